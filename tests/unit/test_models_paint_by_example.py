"""Paint-by-Example: loaded from a folder, painting batches whose attention is captured."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from i2am_train.errors import CheckpointError, ConfigError, NotFiniteError
from i2am_train.models.others.paint_by_example import PaintByExample, Painting
from i2am_train.types import Direction, GridSize

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
