"""Checkpoints of Paint-by-Example and DCI-VTON: what their networks compute, the pipeline of diffusers computes."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, PaintByExamplePipeline, PNDMScheduler, UNet2DConditionModel
from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from i2am_train import trace
from i2am_train.config.models import InitConfig
from i2am_train.errors import CheckpointError, ConfigError, RunFolderError
from i2am_train.models.convert.key_report import KeyMismatchError, key_report
from i2am_train.models.convert.paint_by_example_file import (
    ENCODER_PARTS,
    empty_encoder,
    pipeline_from_weights,
    renamed_encoder,
)
from i2am_train.models.convert.single_file import empty_unet_part
from i2am_train.workflows.models import init as run
from tests.support.ldm_models import LatentDiffusion

WIDTHS, CONTEXT = (32, 32, 64, 64), 24
POSITIONS = "cond_stage_model.transformer.vision_model.embeddings.position_ids"


class MapperAttention(nn.Module):
    """One head; query, key and value in one matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_qkv = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_qkv(x).split(x.shape[-1], dim=-1)
        return self.c_proj((q @ k.mT / x.shape[-1] ** 0.5).softmax(dim=-1) @ v)


class MapperMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class MapperBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.mlp = MapperAttention(width), MapperMLP(width)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ImageEmbedder(nn.Module):
    """``cond_stage_model``: CLIP with the names of transformers 4, blocks, a norm."""

    def __init__(self, config: CLIPVisionConfig, blocks: int) -> None:
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.vision_model = CLIPVisionModel(config)
        self.mapper = nn.Module()
        self.mapper.resblocks = nn.ModuleList(MapperBlock(config.hidden_size) for _ in range(blocks))
        self.final_ln = nn.LayerNorm(config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.transformer.vision_model(pixel_values=pixels).pooler_output[:, None]
        for block in self.mapper.resblocks:
            x = block(x)
        return self.final_ln(x)


class TheirModel(LatentDiffusion):
    """All networks but the VAE, which comes from diffusers."""

    def __init__(self, widths: tuple[int, ...], context: int, clip: CLIPVisionConfig, blocks: int) -> None:
        super().__init__(widths, context)
        self.cond_stage_model = ImageEmbedder(clip, blocks)
        self.proj_out = nn.Linear(clip.hidden_size, context)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.proj_out(self.cond_stage_model(pixels))


def small_clip() -> CLIPVisionConfig:
    """Nine layers, so that the mapper has two (diffusers: a fifth of one more)."""
    return CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=9, num_attention_heads=1, image_size=56, patch_size=14
    )


@pytest.fixture(scope="module")
def theirs() -> TheirModel:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = TheirModel(WIDTHS, CONTEXT, small_clip(), 2)
        for name, parameter in model.named_parameters():
            if "norm" in name or ".ln_" in name or "final_ln" in name:
                nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def weights(
    theirs: TheirModel, make_parts: Callable[..., Any], original_layout: Callable[..., dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Their checkpoint's state dict, with the buffers and averages that such files have beside the weights."""
    others = {"betas": torch.ones(5), "model_ema.decay": torch.ones(()), POSITIONS: torch.arange(17)}
    return dict(theirs.state_dict()) | original_layout(vae=make_parts("vae")) | others


@pytest.fixture(scope="module")
def pipeline(weights: dict[str, Tensor]) -> PaintByExamplePipeline:
    return pipeline_from_weights(weights, "model.ckpt")[0]


def seeded(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_the_unet_computes_the_same(theirs: TheirModel, pipeline: PaintByExamplePipeline) -> None:
    """On a latent that is not square, for two samples at different times."""
    latent, times, context = seeded(2, 9, 24, 16), torch.tensor([801, 41]), seeded(2, 1, CONTEXT)
    expected = theirs.model(latent, times, context)
    found = pipeline.unet(latent, times, encoder_hidden_states=context).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_encoder_computes_the_same(theirs: TheirModel, pipeline: PaintByExamplePipeline) -> None:
    """CLIP, mapper, norm and projection to one token, and the vector for no reference."""
    pixels = seeded(3, 3, 56, 56)
    found, nothing = pipeline.image_encoder(pixels, return_uncond_vector=True)
    assert found.shape == (3, 1, CONTEXT)
    torch.testing.assert_close(found, theirs.encode(pixels), atol=1e-5, rtol=1e-4)
    assert torch.equal(nothing, theirs.learnable_vector)


def test_the_vae_is_taken_over(pipeline: PaintByExamplePipeline, make_parts: Callable[..., Any]) -> None:
    """Weight by weight, with Stable Diffusion's scaling factor."""
    expected = make_parts("vae").state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in pipeline.vae.state_dict().items())
    assert pipeline.vae.config.scaling_factor == 0.18215


def test_every_key_is_in_the_report(weights: dict[str, Tensor]) -> None:
    """Exactly once; only a list of positions has no place."""
    _, report = pipeline_from_weights(weights, "model.ckpt")
    assert sorted([*report.mapped, *report.unexpected, *report.left_out]) == sorted(weights)
    assert report.unexpected == [POSITIONS]
    assert sorted(report.left_out) == ["betas", "model_ema.decay"]
    fused = "cond_stage_model.mapper.resblocks.1.attn.c_qkv.bias"
    start = "image_encoder.mapper.blocks.1.attn1"
    assert report.mapped[fused] == [f"{start}.to_{letter}.bias" for letter in "qkv"]


@pytest.mark.parametrize("option", ["paint_by_example", "dci_vton"])
def test_on_the_command_line(
    option: str, weights: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Lightning checkpoint becomes a folder that diffusers opens, samples with and that can be traced."""
    torch.save({"state_dict": weights, "global_step": 3}, tmp_path / "a.ckpt")
    half = option == "dci_vton"
    run(InitConfig(output=tmp_path / "out", half=half, **{option: tmp_path / "a.ckpt"}))
    said = capsys.readouterr().out
    assert "0 missing, 0 wrong shape, 1 unexpected, 2 left out" in said
    assert "'dci_vton_diffusers'" in said if half else "'paint_by_example'" in said
    (report,) = json.loads((tmp_path / "out.keys.json").read_text())
    assert report["unexpected"] == [POSITIONS]
    stored = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert stored["conv_in.weight"].dtype == (torch.float16 if half else torch.float32)
    reread = reopened(tmp_path / "out")
    recipe = "dci_vton_diffusers" if half else None
    with trace(reread, recipe) as attention:
        image = sampled(reread, guidance=1.0 if half else 5.0)
    assert image.shape == (1, 64, 128, 3)
    store = attention.maps().store
    assert len(store.layers) == 9
    assert store.steps == 2
    assert [mark.split(":")[0] for mark in store.marks] == ["not functional", "partial"][: 1 + half]


def reopened(folder: Path) -> PaintByExamplePipeline:
    """Part by part, in float32: diffusers 0.42 does not find the encoder's class by the pipeline's index."""
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "PaintByExamplePipeline"
    assert index["image_encoder"] == ["paint_by_example", "PaintByExampleImageEncoder"]
    encoder = folder / "image_encoder"
    config = CLIPVisionConfig.from_pretrained(encoder)
    pipeline = PaintByExamplePipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        image_encoder=PaintByExampleImageEncoder.from_pretrained(encoder, config=config, dtype=torch.float32),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32),
        scheduler=PNDMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor.from_pretrained(folder / "feature_extractor"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampled(pipeline: PaintByExamplePipeline, guidance: float) -> np.ndarray:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 128, 3), np.uint8))
    mask = Image.fromarray(np.tile(np.uint8([0, 255]), (64, 64)))
    return pipeline(
        picture,
        picture,
        mask,
        num_inference_steps=2,
        guidance_scale=guidance,
        output_type="np",
        generator=torch.Generator().manual_seed(1),
    ).images


def test_what_does_not_fit_is_listed(weights: dict[str, Tensor], tmp_path: Path) -> None:
    """Missing, misshapen and unexpected keys by name, in the error and in the file; no folder."""
    damaged = dict(weights)
    del damaged["proj_out.bias"]
    damaged["model.diffusion_model.out.2.weight"] = torch.zeros(4, 8, 3, 3)
    damaged["cond_stage_model.mapper.resblocks.0.attn.extra.weight"] = torch.zeros(2)
    save_file({n: v.clone() for n, v in damaged.items()}, tmp_path / "b.safetensors")
    with pytest.raises(KeyMismatchError, match=r"1 missing, 1 wrong shape, 2 unexpected.*proj_out"):
        run(InitConfig(output=tmp_path / "out", paint_by_example=tmp_path / "b.safetensors"))
    (report,) = json.loads((tmp_path / "out.keys.json").read_text())
    assert report["missing"] == ["image_encoder.proj_out.bias"]
    assert list(report["wrong_shape"]) == ["model.diffusion_model.out.2.weight"]
    assert report["unexpected"] == ["cond_stage_model.mapper.resblocks.0.attn.extra.weight", POSITIONS]
    assert not (tmp_path / "out").exists()


def test_other_models_are_refused(weights: dict[str, Tensor]) -> None:
    """StableVITON's channels, Stable Diffusion itself, an encoder without CLIP's embeddings."""
    first = "model.diffusion_model.input_blocks.0.0.weight"
    for channels in (4, 13):
        other = weights | {first: torch.zeros(WIDTHS[0], channels, 3, 3)}
        with pytest.raises(CheckpointError, match=rf"has {channels} input channels.*StableVITON"):
            pipeline_from_weights(other, "other.ckpt")
    text = {n: v for n, v in weights.items() if not n.startswith(ENCODER_PARTS)}
    with pytest.raises(CheckpointError, match=r"no checkpoint of Paint-by-Example.*unet=FILE"):
        pipeline_from_weights(text, "sd.ckpt")
    blind = {n: v for n, v in weights.items() if "patch_embedding" not in n}
    with pytest.raises(CheckpointError, match=r"no .model\.embeddings\.patch_embedding"):
        pipeline_from_weights(blind, "blind.ckpt")


def test_a_pickle_with_objects_is_refused(weights: dict[str, Tensor], tmp_path: Path) -> None:
    """A training run's remains in model.ckpt: not opened, and the conversion is spelled out."""
    remains = {"state_dict": weights, "callbacks": {"best": argparse.Namespace(path="x")}}
    torch.save(remains, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"argparse.Namespace.*docker run --rm --network none"):
        run(InitConfig(output=tmp_path / "out", paint_by_example=tmp_path / "model.ckpt"))
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]


def test_options_that_change_nothing_are_refused(tmp_path: Path) -> None:
    """Two sources, options of a try-on model, and an existing folder."""
    file = tmp_path / "model.ckpt"
    with pytest.raises(ConfigError, match="found unet and dci_vton"):
        InitConfig(output=tmp_path / "out", unet="x", dci_vton=file)
    with pytest.raises(ConfigError, match="ema, height has no meaning with dci_vton"):
        InitConfig(output=tmp_path / "out", dci_vton=file, height=1024, ema=True)
    with pytest.raises(RunFolderError, match="exists"):
        run(InitConfig(output=tmp_path, dci_vton=file))


def test_true_shapes() -> None:
    """At the true widths all 686 keys of the U-Net and all of the encoder find their places (CLIP ViT-L/14)."""
    clip = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )
    with torch.device("meta"):
        weights = TheirModel((320, 640, 1280, 1280), 768, clip, 5).state_dict()
    unet, unet_weights = empty_unet_part(weights, "x")
    encoder_weights = renamed_encoder(weights)
    encoder = empty_encoder(encoder_weights.tensors, "x")
    parts = {"unet": (unet, unet_weights), "encoder": (encoder, encoder_weights)}
    report = key_report("x", weights, parts, ours=("",))
    assert report.complete
    assert report.unexpected == report.left_out == []
    assert sum(key.startswith("model.diffusion_model.") for key in report.mapped) == 686
    assert len(unet.state_dict()) == 686
    assert encoder.config.num_attention_heads == 16
    assert encoder.config.image_size == 224
    assert len(encoder.mapper.blocks) == 5
