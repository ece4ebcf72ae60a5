"""Folders of models with something wrong in them: one error that names what, before anything is made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from i2am_train.config.locations import checkpoint_folder
from i2am_train.errors import CheckpointError
from i2am_train.models.single_file import unet_from_weights, vae_from_weights
from i2am_train.models.tryon import TryOnModel

UNET = "unet/diffusion_pytorch_model.safetensors"
ENCODER = "reference_encoder/model.safetensors"
HTML = b"<!DOCTYPE html>\n<html><body>Access denied</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n"

Change = Callable[[Path], Any]


def weights(file: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Change:
    """Replaces the tensors of a file."""

    def apply(folder: Path) -> None:
        save_file(change(load_file(folder / file)), folder / file, {"format": "pt"})

    return apply


def text(file: str, content: str | bytes) -> Change:
    """Replaces a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / file).write_bytes(data)


def values(file: str, **changes: Any) -> Change:
    """Replaces some values of a JSON object."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(content))

    return apply


def half(file: str) -> Change:
    """The first half of a file."""

    def apply(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) // 2])

    return apply


def one(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., dict[str, Tensor]]:
    return lambda tensors: {**tensors, name: change(tensors[name])}


def without(name: str) -> Callable[..., dict[str, Tensor]]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def spoiled(value: float) -> Callable[[Tensor], Tensor]:
    """One number of the tensor is another."""

    def apply(tensor: Tensor) -> Tensor:
        tensor.view(-1)[1] = value
        return tensor

    return apply


def sharded(files: dict[str, str] | Any) -> Change:
    """An index in place of the file that it names, or names wrongly."""

    def apply(folder: Path) -> None:
        (folder / UNET).unlink()
        (folder / f"{UNET}.index.json").write_text(json.dumps(files))

    return apply


BIAS, QUERY, TOKEN = "conv_out.bias", "conv_in.weight", "embeddings.cls_token"
FAULTS: dict[str, tuple[Change, str]] = {
    # values
    "nan in the U-Net": (
        weights(UNET, one(BIAS, spoiled(float("nan")))),
        r"1 tensors of '.*/unet' hold values that are not finite numbers .conv_out.bias.: conv_out.bias has 1 of 4",
    ),
    "infinity in the VAE": (
        weights("vae/diffusion_pytorch_model.safetensors", one("decoder.conv_out.bias", spoiled(float("inf")))),
        r"/vae' hold values that are not finite .*decoder.conv_out.bias",
    ),
    "nan in the encoder": (weights(ENCODER, one(TOKEN, spoiled(float("nan")))), r"not finite .*cls_token"),
    "nan in the projector": (
        weights("projector/diffusion_pytorch_model.safetensors", one("null_tokens", spoiled(float("nan")))),
        "not finite .*null_tokens",
    ),
    "too large for float32": (
        weights(UNET, one(BIAS, lambda value: value.double() * 0 + 1e300)),
        "not finite .*conv_out.bias",
    ),
    "whole numbers": (
        weights(UNET, one(QUERY, lambda value: (value * 100).to(torch.int8))),
        r"1 tensors of '.*/unet' hold whole numbers .* .conv_in.weight; conv_in.weight is I8",
    ),
    "whole numbers in the encoder": (
        weights(ENCODER, lambda tensors: {n: v.to(torch.int32) for n, v in tensors.items()}),
        "hold whole numbers",
    ),
    # tensors
    "a missing tensor": (weights(UNET, without(BIAS)), r"'.*/unet' lack 1 tensors .conv_out.bias"),
    "a missing tensor of the encoder": (weights(ENCODER, without(TOKEN)), r"lack 1 tensors .*cls_token"),
    "another network's tensors": (
        lambda folder: shutil.copy(folder / "vae/diffusion_pytorch_model.safetensors", folder / UNET),
        r"lack \d+ tensors .* and has \d+ others .decoder",
    ),
    "another network's tensors in the encoder": (
        lambda folder: shutil.copy(folder / UNET, folder / ENCODER),
        r"lack \d+ tensors .* and has \d+ others",
    ),
    "another network's folder": (
        lambda folder: shutil.copytree(folder / "vae", folder / "unet", dirs_exist_ok=True),
        "holds a AutoencoderKL where unet= needs a UNet2DConditionModel",
    ),
    "another shape": (
        weights(UNET, one(QUERY, lambda value: torch.cat([value, value]))),
        r"cannot be read: .*conv_in.weight expected shape",
    ),
    "another shape in the encoder": (
        weights(ENCODER, one(TOKEN, lambda value: torch.cat([value, value]))),
        r"1 tensors of '.*/reference_encoder' have other shapes .* embeddings.cls_token is \[2, 1, 32\]",
    ),
    # files of weights
    "an empty file": (text(UNET, b""), r"\(0 bytes\) cannot be read: it is empty"),
    "half a file": (half(UNET), "cannot be read: .* half downloaded"),
    "half a file of the encoder": (half(ENCODER), "cannot be read: .* half downloaded"),
    "a web page": (text(UNET, HTML), "it is a web page"),
    "a pointer of git-lfs": (text(ENCODER, POINTER), "git lfs pull"),
    "noise": (text(ENCODER, bytes(range(256)) * 4), "cannot be read"),
    "no weights": (lambda folder: (folder / UNET).unlink(), r"unet' holds no weights: .*found: config.json"),
    # indices
    "an index that is a list": (sharded([1]), "holds a list where an object"),
    "an index without its map": (sharded({"metadata": {}}), "is no index of weights"),
    "an index of numbers": (sharded({"weight_map": {"a": 1}}), "is no index of weights"),
    "an index of files that are missing": (
        sharded({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}),
        r"2 of the 2 files of weights .* are missing .1.safetensors, 2",
    ),
    # descriptions
    "model_index.json is a list": (text("model_index.json", "[1, 2]"), "holds a list where an object"),
    "model_index.json is text": (text("model_index.json", "hello"), "cannot be read as JSON"),
    "model_index.json is cut": (half("model_index.json"), "cannot be read as JSON"),
    "model_index.json is of bytes": (text("model_index.json", b"\xff\xfe\x00"), "cannot be read as JSON"),
    "model_index.json of a text": (values("model_index.json", height="tall"), r"height=tall is not possible"),
    "model_index.json of nothing": (values("model_index.json", height=0), "height=0 .*: expected at least 1"),
    "model_index.json of null": (values("model_index.json", width=None), "width=null is not possible"),
    "model_index.json of two means": (
        values("model_index.json", reference_mean=[0.5, 0.5]), r"reference_mean=\[0.5, 0.5\] .*: expected three values",
    ),
    "model_index.json of no deviation": (
        values("model_index.json", reference_std=[0.0, 1.0, 1.0]), r"reference_std\[0\]=0.0 .*: expected more than 0",
    ),
    "model_index.json of another pipeline": (
        text("model_index.json", json.dumps({"_class_name": "X", "text_encoder": ["a", "B"]})),
        "no option 'text_encoder'",
    ),
    "config.json is a list": (text("unet/config.json", "[1]"), "holds a list where an object"),
    "config.json is a number": (text("vae/config.json", "3"), "holds a int where an object"),
    "config.json is a name": (text("projector/config.json", '"a"'), "holds a str where an object"),
    "config.json is cut": (half("reference_encoder/config.json"), "cannot be read as JSON"),
    "config.json of texts": (values("unet/config.json", block_out_channels="abc"), "cannot be read"),
    "config.json of the encoder of texts": (
        values("reference_encoder/config.json", hidden_size="abc"), "cannot be read",
    ),
    "config.json of no size": (values("projector/config.json", encoder_width=None), "cannot be read"),
    "config.json without patches": (values("reference_encoder/config.json", patch_size=None), "reference_encoder"),
    "config.json of an unknown model": (
        values("reference_encoder/config.json", model_type="nothing"), "cannot be read",
    ),
    "scheduler_config.json is a list": (
        text("scheduler/scheduler_config.json", "[]"), "holds a list where an object",
    ),
    "scheduler_config.json of another prediction": (
        values("scheduler/scheduler_config.json", prediction_type="sample"), "cannot be read",
    ),
    "scheduler_config.json of texts": (
        values("scheduler/scheduler_config.json", num_train_timesteps="many"), "cannot be read",
    ),
    "a part that is a file": (
        lambda folder: (shutil.rmtree(folder / "vae"), (folder / "vae").write_text("x")), "lacks vae",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_folder(fault: str, small_checkpoint: Path, tmp_path: Path) -> None:
    """One paragraph that names the file, the tensor or the option."""
    folder = tmp_path / "model"
    shutil.copytree(small_checkpoint, folder)
    change, message = FAULTS[fault]
    change(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        TryOnModel.from_pretrained(folder)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_is_a_file(tmp_path: Path) -> None:
    """What is a file is not called missing."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"model.safetensors is a file, and a checkpoint is a folder"):
        checkpoint_folder(str(file))


PREFIX = "model.diffusion_model."


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (f"{PREFIX}input_blocks.0.0.weight", torch.ones(3)),
        (f"{PREFIX}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", torch.tensor(1.0)),
        (f"{PREFIX}out.2.weight", torch.tensor(1.0)),
        (f"{PREFIX}middle_block.1.proj_in.weight", torch.ones(7, 5, 3, 3)),
        ("first_stage_model.decoder.conv_in.weight", torch.ones(2)),
    ],
)
def test_a_single_file_of_other_shapes(make_parts: Any, original_layout: Any, key: str, value: Tensor) -> None:
    """Tensors that lack dimensions, too."""
    network = "unet" if key.startswith(PREFIX) else "vae"
    tensors = original_layout(**{network: make_parts(network)})
    assert key in tensors
    read: Any = unet_from_weights if network == "unet" else vae_from_weights
    with pytest.raises(CheckpointError, match=r"'a\.ckpt'|a\.ckpt: "):
        read({**tensors, key: value}, "a.ckpt")
