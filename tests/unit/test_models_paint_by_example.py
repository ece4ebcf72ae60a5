"""Paint-by-Example: painting while attention is captured; the pipeline computes what the authors' files compute."""

import argparse
import json
import shutil
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
from i2am_train.errors import CheckpointError, ConfigError, NotFiniteError, RunFolderError
from i2am_train.models.paint_by_example import (
    ENCODER_PARTS,
    PaintByExample,
    Painting,
    encoder_part,
    pipeline_from_weights,
)
from i2am_train.models.single_file import KeyMismatchError, key_report, unet_part
from i2am_train.types import Direction, GridSize
from i2am_train.workflows.models import init as run
from tests.support.ldm_models import LatentDiffusion

SIZE = GridSize(32, 48)


@pytest.fixture(scope="module")
def model(paint_by_example: Path) -> PaintByExample:
    return PaintByExample.from_pretrained(str(paint_by_example))


def painting(seed: int) -> Painting:
    generator = np.random.default_rng(seed)
    mask = np.zeros((50, 40), np.bool_)
    mask[10:30, 5 : 20 + seed] = True
    image = generator.integers(0, 256, (50, 40, 3), np.uint8)
    reference = generator.integers(0, 256, (20, 15, 3), np.uint8)
    return Painting(image=image, mask=mask, reference=reference, seed=seed)


def test_a_batch_is_painted_and_its_attention_captured(model: PaintByExample) -> None:
    """15 layers and the decoder's nine, finest grid first of all; one reference token, hence not functional."""
    painted = model.paint([painting(0), painting(1), painting(2)], SIZE, steps=2, guidance=5.0)
    assert painted.images.shape == (3, 32, 48, 3)
    assert len(painted.maps.layers) == 15
    assert len(painted.decoder_maps.layers) == 9
    assert not painted.functional
    assert len(painted.maps.store.timesteps) == 2
    assert painted.maps.store.timesteps == (501.0, 1.0)
    unified = painted.decoder_maps.unified(Direction.REFERENCE_TO_GENERATED)
    assert unified.values.shape == (3, 16, 24)
    assert (unified.values.std(dim=(1, 2)) > 0).all()
    daam = painted.decoder_maps.unified(Direction.REFERENCE_TO_GENERATED, softmax_over="reference")
    assert (daam.values == 1).all()


def test_noise_belongs_to_a_picture(model: PaintByExample) -> None:
    """A picture is the same alone and in a batch, with and without guidance; another reference changes it."""
    for guidance in (1.0, 3.0):
        two = model.paint([painting(0), painting(1)], SIZE, steps=2, guidance=guidance)
        one = model.paint([painting(1)], SIZE, steps=2, guidance=guidance)
        assert np.abs(two.images[1].astype(int) - one.images[0]).max() <= 1
        torch.testing.assert_close(two.maps.store.layers[0].to_generated[1], one.maps.store.layers[0].to_generated[0])


def test_the_layers_and_sizes_that_fit(model: PaintByExample) -> None:
    """Latents are halved three times, and the VAE halves once."""
    assert model.size_step == 16
    model.check_size(SIZE)
    with pytest.raises(ConfigError, match=r"40x48 .* multiples of 16"):
        model.check_size(GridSize(40, 48))


def test_another_pipeline_is_refused(paint_by_example: Path, small_checkpoint: Path, tmp_path: Path) -> None:
    """A try-on model, a folder of nothing, and a name that is neither."""
    with pytest.raises(CheckpointError, match=r"takes 12 channels; Paint-by-Example's takes 9"):
        PaintByExample.from_pretrained(str(small_checkpoint))
    with pytest.raises(CheckpointError, match=r"is no folder of diffusers"):
        PaintByExample.from_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"no file or folder 'a/b/c'"):
        PaintByExample.from_pretrained("a/b/c")


def test_without_network_the_hub_s_name_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default pipeline where nothing can be fetched."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"Fantasy-Studio/Paint-by-Example; .*hf download"):
        PaintByExample.from_pretrained("Fantasy-Studio/Paint-by-Example")


def test_half_precision_paints_or_says_that_it_cannot(paint_by_example: Path) -> None:
    """bfloat16 gives images and float32 maps; a U-Net that gives no numbers is told."""
    half = PaintByExample.from_pretrained(str(paint_by_example), dtype="bfloat16")
    painted = half.paint([painting(0), painting(1)], SIZE, steps=1, guidance=2.0)
    assert painted.images.dtype == np.uint8
    assert painted.maps.store.layers[0].to_generated.dtype == torch.float32
    torch.nn.init.constant_(half.pipeline.unet.conv_out.bias, torch.inf)
    with pytest.raises(
        NotFiniteError, match=r"Step 1 of 1 of sampling .timestep \d+.: the latents became .* in bfloat16"
    ):
        half.paint([painting(0)], SIZE, steps=1, guidance=2.0)


def test_the_hub_s_old_files_are_read(model: PaintByExample, paint_by_example: Path, tmp_path: Path) -> None:
    """Its repository holds pickled tensors, the encoder's under names of older versions of transformers."""
    folder = tmp_path / "hub"
    shutil.copytree(paint_by_example, folder)
    for file in folder.rglob("*.safetensors"):
        weights = load_file(file)
        if file.parent.name == "image_encoder":
            weights = {name.replace("model.", "model.vision_model.", 1): w for name, w in weights.items()}
            assert "model.vision_model.post_layernorm.weight" in weights
            name = "pytorch_model.bin"
        else:
            name = "diffusion_pytorch_model.bin"
        torch.save(weights, file.with_name(name))
        file.unlink()
    old = PaintByExample.from_pretrained(str(folder))
    for part in ("unet", "vae", "image_encoder"):
        ours, theirs = (getattr(m.pipeline, part).state_dict() for m in (model, old))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


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
    unet, unet_weights = unet_part(weights, "x")
    encoder, encoder_weights = encoder_part(weights, "x")
    parts = {"unet": (unet, unet_weights), "encoder": (encoder, encoder_weights)}
    report = key_report("x", weights, parts, ours=("",))
    assert report.complete
    assert report.unexpected == report.left_out == []
    assert sum(key.startswith("model.diffusion_model.") for key in report.mapped) == 686
    assert len(unet.state_dict()) == 686
    assert encoder.config.num_attention_heads == 16
    assert encoder.config.image_size == 224
    assert len(encoder.mapper.blocks) == 5
