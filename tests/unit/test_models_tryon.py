"""The try-on model: topology, widening, files and their errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from i2am_train.attention.recipe import PAPER_LAYERS, paper_number
from i2am_train.attention.trace import ScoreTap, trace
from i2am_train.errors import CheckpointError
from i2am_train.models.architecture import widen_input
from i2am_train.models.sampling import sample
from i2am_train.models.tryon import Conditions, TryOnModel
from i2am_train.types import GridSize


def inputs(batch: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, 3, 64, 48)
    return {name: torch.rand(shape, generator=generator) * 2 - 1 for name in ("garment", "agnostic", "densepose")}


def test_topology(make_small_model: Callable[..., Any]) -> None:
    """Twelve input channels, nine decoder layers at three resolutions, and the paper's numbers for them."""
    model = make_small_model()
    with trace(model) as attention:
        sample(model, **inputs(2), seeds=[0, 1], steps=2, guidance=2.0)
    sites = attention.sites
    assert model.unet.config["in_channels"] == 12
    assert tuple(site.layer for site in sites) == PAPER_LAYERS
    assert [paper_number(site.layer) for site in sites] == list(range(1, 10))
    assert len({site.generated_grid for site in sites}) == 3


@pytest.mark.parametrize("class_token", [False, True])
def test_reference_tokens(make_small_model: Callable[..., Any], class_token: bool) -> None:
    """All patch tokens in row-major order, after the class token if it is kept."""
    model = make_small_model(class_token=class_token)
    tokens = model.encode_reference(inputs()["garment"])
    assert model.reference_grid == GridSize(8, 6)
    assert tokens.shape == (3, 48 + class_token, 32)
    assert model.projector.null_tokens.shape == (1, 48 + class_token, 32)


def siglip() -> PreTrainedModel:
    """No special tokens. Its positions are those of a square picture."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    return SiglipVisionModel(SiglipVisionConfig(**sizes, num_attention_heads=2, image_size=48, patch_size=8)).eval()


def dinov2_with_registers() -> PreTrainedModel:
    """A class token and three registers."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 1}
    return Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**sizes, image_size=48, patch_size=8, num_register_tokens=3)
    ).eval()


class Unprojected(torch.nn.Module):
    """Stands for the projector and gives the encoder's tokens as they are."""

    def forward(self, tokens: torch.Tensor, dropped: None) -> torch.Tensor:
        return tokens


@pytest.mark.parametrize(
    ("make", "class_token", "special"),
    [(siglip, False, 0), (dinov2_with_registers, False, 4), (dinov2_with_registers, True, 4)],
)
def test_other_encoders(
    make_small_model: Callable[..., Any], make: Callable[[], PreTrainedModel], class_token: bool, special: int
) -> None:
    """Whatever an encoder puts in front, the patches stay whole and in order, and registers are dropped."""
    model = make_small_model(class_token=class_token)
    model.config.reference_height = model.config.reference_width = 48
    model.reference_encoder, model.projector = make(), Unprojected()
    garment = inputs()["garment"][..., :48, :]
    model.reference_mean.fill_(0.5)
    model.reference_std.fill_(0.5)  # the encoder then sees the garment as it is
    encoded = model.reference_encoder(pixel_values=garment).last_hidden_state
    assert encoded.shape[1] == special + 36
    kept = encoded[:, [*range(class_token), *range(special, special + 36)]]
    torch.testing.assert_close(model.encode_reference(garment), kept)


@pytest.mark.parametrize(("class_token", "patch"), [(True, 8), (False, 16)])
def test_an_encoder_that_does_not_fit_the_grid(
    make_small_model: Callable[..., Any], class_token: bool, patch: int
) -> None:
    """A class token that the encoder lacks, or a grid of another size, is an error and not a shifted map."""
    model = make_small_model(class_token=class_token)
    model.config.reference_height = model.config.reference_width = 48
    model.reference_encoder = siglip()
    model.reference_encoder.config.patch_size = patch
    with pytest.raises(CheckpointError, match="SiglipVisionModel gives 36 tokens"):
        model.encode_reference(inputs()["garment"])


def test_widened_input_changes_nothing_at_the_start() -> None:
    """With zero-initialised channels the network equals the one on the noisy latent alone (paper A.5)."""
    kind = {"block_out_channels": (8, 8), "norm_num_groups": 4, "cross_attention_dim": 8}
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    unet = UNet2DConditionModel(in_channels=4, attention_head_dim=2, **kind, **blocks).eval()
    noisy, tokens = torch.randn(2, 4, 8, 4), torch.randn(2, 5, 8)
    before = unet(noisy, 7, tokens).sample
    widened = widen_input(unet)
    after = widened(torch.cat([noisy, torch.randn(2, 8, 8, 4)], dim=1), 7, tokens).sample
    torch.testing.assert_close(after, before)
    assert widened.config["in_channels"] == 12


def test_round_trip(make_small_model: Callable[..., Any], tmp_path: Path) -> None:
    """A saved and loaded model gives bit-identical predictions, and its copy does not tell where it came from."""
    model = make_small_model()
    model.save_pretrained(tmp_path / "model")
    again = TryOnModel.from_pretrained(tmp_path / "model").eval()
    latents, given = torch.randn(2, 4, 16, 12), inputs(2)
    conditions = Conditions(latents, latents, model.encode_reference(given["garment"]))
    at = torch.tensor([5, 900])
    assert torch.equal(again.denoise(latents, at, conditions), model.denoise(latents, at, conditions))
    assert torch.equal(again.encode_reference(given["garment"]), model.encode_reference(given["garment"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    again.save_pretrained(tmp_path / "copy")
    assert not [file for file in (tmp_path / "copy").rglob("*.json") if str(tmp_path) in file.read_text()]


def test_saving_while_a_tap_listens(make_small_model: Callable[..., Any], tmp_path: Path) -> None:
    """A model is saved in the middle of training, when a score tap holds a graph (deepcopy would fail on it)."""
    model = make_small_model()
    latents = torch.zeros(2, 4, *model.latent_size)
    with ScoreTap(model, layers=[2]) as tap:
        tokens = model.encode_reference(inputs(2)["garment"])
        model.denoise(latents, torch.tensor([3, 4]), Conditions(latents, latents, tokens))
        assert tap.scores(2).requires_grad
        model.save_pretrained(tmp_path / "model", half=True)
    loaded = TryOnModel.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(loaded.unet.conv_in.weight, model.unet.conv_in.weight.half().float())


def test_half_precision_files(make_small_model: Callable[..., Any], tmp_path: Path) -> None:
    """Stored as float16, loaded as float32, and the model in memory is untouched."""
    model = make_small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "model", half=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    again = TryOnModel.from_pretrained(tmp_path / "model")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}


def test_saving_over_another_folder_is_refused(make_small_model: Callable[..., Any], tmp_path: Path) -> None:
    """Files that are not a model's are never replaced."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not a try-on model"):
        make_small_model().save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_missing_and_incomplete_folders(make_small_model: Callable[..., Any], tmp_path: Path) -> None:
    """The error names the folder, what is missing and what to do."""
    with pytest.raises(CheckpointError, match="no such folder"):
        TryOnModel.from_pretrained(tmp_path / "nowhere")
    folder = tmp_path / "model"
    make_small_model().save_pretrained(folder)
    for file in ("projector/diffusion_pytorch_model", "reference_encoder/model"):
        weights = folder / f"{file}.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:100])
        with pytest.raises(CheckpointError, match="cannot be read"):
            TryOnModel.from_pretrained(folder)
        weights.write_bytes(whole)
    weights = folder / "projector" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    (folder / "projector" / "config.json").unlink()
    (folder / "projector").rmdir()
    with pytest.raises(CheckpointError, match="lacks projector"):
        TryOnModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 9}, r"U-Net's input channels 9, expected 12"),
        ({"cross_attention_dim": 24}, r"U-Net's context width 24, expected 32"),
    ],
)
def test_networks_of_different_models_are_refused(
    make_small_model: Callable[..., Any], tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    """A U-Net put into another model's folder is found when it is read, not in a training's first step."""
    model = make_small_model()
    model.save_pretrained(tmp_path / "model")
    other = UNet2DConditionModel.from_config(dict(model.unet.config) | changes)
    other.save_pretrained(tmp_path / "model" / "unet")
    with pytest.raises(CheckpointError, match=rf"do not fit each other: {message}\. .* 'i2am init'"):
        TryOnModel.from_pretrained(tmp_path / "model")


def test_a_sample_does_not_depend_on_its_batch(make_small_model: Callable[..., Any]) -> None:
    """Sample 1 is the same alone and in a batch of three."""
    model, given = make_small_model(), inputs()
    together = sample(model, **given, seeds=[4, 5, 6], steps=2, guidance=2.0)
    alone = sample(model, **{name: images[1:2] for name, images in given.items()}, seeds=[5], steps=2, guidance=2.0)
    torch.testing.assert_close(alone[0], together[1], atol=1e-5, rtol=0)


def test_capture_does_not_change_the_image(make_small_model: Callable[..., Any]) -> None:
    """Bit-identical with and without, with and without guidance."""
    model, given = make_small_model(), inputs(2)
    for guidance in (1.0, 3.0):
        plain = sample(model, **given, seeds=[1, 2], steps=2, guidance=guidance)
        with trace(model, matrix_layers=[2]):
            captured = sample(model, **given, seeds=[1, 2], steps=2, guidance=guidance)
        assert torch.equal(plain, captured)


def test_guidance_one_is_the_conditional_model(make_small_model: Callable[..., Any]) -> None:
    """Maps with guidance come from the conditional half: at guidance 1 and 1.0001 they agree."""
    model, given = make_small_model(), inputs(2)
    maps = []
    for guidance in (1.0, 1.0001):
        with trace(model) as attention:
            sample(model, **given, seeds=[1, 2], steps=1, guidance=guidance)
        maps.append(attention.maps().store.layers[1].to_generated)
    torch.testing.assert_close(maps[0], maps[1], atol=1e-5, rtol=1e-3)
