"""What all tests share: executed tensor shapes, no network, an end at SIGTERM, a small dataset and a small model."""

import faulthandler
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook

# Before anything is imported: shapes in the signatures of the numeric packages are checked on every call.
install_import_hook(
    [
        "i2am_train.ops",
        "i2am_train.losses",
        "i2am_train.metrics",
        "i2am_train.attention",
        "i2am_train.evaluation.folders",
        "i2am_train.evaluation.scoring",
        "i2am_train.models.diffusion",
        "i2am_train.training.draws",
    ],
    "beartype.beartype",
)

SMALL = (64, 48)

UNTOUCHED = {signal.SIGTERM}
"""Signals for which nobody may set a handler."""
_set_handler = signal.signal


def _set_handler_if_allowed(number: int, handler: Any) -> Any:
    return signal.getsignal(number) if number in UNTOUCHED else _set_handler(number, handler)


def pytest_configure(config: pytest.Config) -> None:
    """SIGTERM ends the tests at once and says where they were.

    A training, in this process as well, would take the signal, and wait for the end of the step before it ends. In a
    test that hangs the step has no end.
    """
    signal.signal = _set_handler_if_allowed
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        errors = os.dup(2)
    faulthandler.register(signal.SIGTERM, file=errors, chain=True)


@pytest.fixture
def own_sigterm() -> Iterator[None]:
    """The handlers of SIGTERM that the product sets, for tests that send it to themselves."""
    UNTOUCHED.remove(signal.SIGTERM)
    yield
    UNTOUCHED.add(signal.SIGTERM)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections to anything but this machine fail."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"the tests have no network, and something tried {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture(autouse=True)
def no_imports_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test's command line names, the next one's files may not import."""
    monkeypatch.setenv("I2AM_ALLOW_IMPORTS", "")


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic dataset of 64x48 images: 20 training and 6 test samples."""
    from i2am_train.data.synthetic.dataset import make_dataset
    from i2am_train.types import GridSize

    root = tmp_path_factory.mktemp("data") / "small"
    make_dataset(root, 20, 6, GridSize(*SMALL), 0, workers=1, progress=False)
    return root


@pytest.fixture(scope="session")
def make_small_model() -> Callable[..., Any]:
    """Builds a try-on model for 64x48 images with random weights, the same at every call."""

    def make(**sizes: Any) -> Any:
        import torch

        from i2am_train.models.architecture import Architecture, build_model
        from i2am_train.types import GridSize

        defaults: dict[str, Any] = {
            "unet_widths": (16, 16, 32, 32),
            "heads": (1, 2, 4, 4),
            "context_width": 32,
            "vae_widths": (8, 8, 16),
            "encoder_width": 32,
            "encoder_layers": 1,
            "encoder_heads": 2,
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build_model(GridSize(*SMALL), Architecture(**(defaults | sizes))).eval()

    return make


@pytest.fixture(scope="session")
def small_checkpoint(
    make_small_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The small model's folder."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    make_small_model().save_pretrained(folder)
    return folder


UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def original_unet_name(name: str) -> str:
    """Stable Diffusion's own name of a U-Net weight of diffusers, written against its code and not diffusers'."""
    for ours, theirs in (
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
    ):
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    half, *words = name.split(".")
    level = 0 if half == "mid_block" else int(words.pop(0))
    kind, number, rest = words[0], int(words[1]), ".".join(words[2:])
    if kind == "resnets":
        layer, _, what = rest.rpartition(".")
        rest = f"0.{UNET_RESNET[layer]}.{what}"
    elif kind == "attentions":
        rest = f"1.{rest}"
    if half == "mid_block":
        return f"middle_block.{rest}" if number == 0 else f"middle_block.2.{rest[2:]}"
    if half == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{3 * level + 3}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{3 * level + number + 1}.{rest}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}.{rest}"
    return f"output_blocks.{3 * level + number}.{rest}"


def original_vae_name(name: str, levels: int) -> str:
    """Stable Diffusion's own name of a VAE weight of diffusers."""
    half, *words = name.split(".")
    if "quant_conv" in half:
        return name
    if words[0] == "conv_norm_out":
        return f"{half}.norm_out.{words[1]}"
    if words[0] == "mid_block":
        kind, number, rest = words[1], int(words[2]), ".".join(words[3:])
        if kind == "attentions":
            layer, _, what = rest.rpartition(".")
            return f"{half}.mid.attn_1.{VAE_ATTENTION[layer]}.{what}"
        return f"{half}.mid.block_{number + 1}.{rest}"
    if words[0] not in ("down_blocks", "up_blocks"):
        return name
    level = int(words[1]) if words[0] == "down_blocks" else levels - 1 - int(words[1])
    start = f"{half}.{words[0].removesuffix('_blocks')}.{level}"
    rest = ".".join(words[3:]).replace("conv_shortcut", "nin_shortcut").removeprefix("0.")
    kind = words[2]
    if kind == "resnets":
        return f"{start}.block.{rest if words[3] != '0' else '0.' + rest}"
    return f"{start}.{kind.removesuffix('rs')}.{rest}"


@pytest.fixture(scope="session")
def original_layout() -> Callable[..., dict[str, Any]]:
    """The weights of a U-Net and a VAE of diffusers as those of one file in Stable Diffusion's own layout."""

    def rename(
        unet: Any = None, vae: Any = None, *, vae_prefix: str = "first_stage_model."
    ) -> dict[str, Any]:
        weights = {}
        if unet is not None:
            for name, value in unet.state_dict().items():
                weights[f"model.diffusion_model.{original_unet_name(name)}"] = value
        if vae is not None:
            levels = len(vae.config["block_out_channels"])
            for name, value in vae.state_dict().items():
                squared = ".attentions." in name and name.endswith("weight") and value.ndim == 2
                key = vae_prefix + original_vae_name(name, levels)
                weights[key] = value[:, :, None, None] if squared else value
        return weights

    return rename


@pytest.fixture(scope="session")
def make_parts() -> Callable[..., Any]:
    """Builds small parts of Stable Diffusion 1.5's topology: unet, vae, dinov2, clip; keywords replace sizes."""

    def make(kind: str, **changes: Any) -> Any:
        import torch
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

        widths = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        torch.manual_seed(1)
        if kind == "unet":
            sizes: dict[str, Any] = {
                "block_out_channels": (32, 32, 64, 64),
                "attention_head_dim": 8,
            }
            return UNet2DConditionModel(**sizes | {"cross_attention_dim": 24} | changes).eval()
        if kind == "vae":
            sizes = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 2}
            count = len((sizes | changes)["block_out_channels"])
            sizes["down_block_types"] = ("DownEncoderBlock2D",) * count
            sizes["up_block_types"] = ("UpDecoderBlock2D",) * count
            return AutoencoderKL(**sizes | {"latent_channels": 4} | changes).eval()
        if kind == "dinov2":
            sizes = widths | {"image_size": 56, "patch_size": 14, "mlp_ratio": 1}
            return Dinov2Model(Dinov2Config(**sizes | changes)).eval()
        vision = widths | {"intermediate_size": 32, "image_size": 56, "patch_size": 14}
        words = {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        text = widths | {"intermediate_size": 32} | words
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision | changes)).eval()

    return make


@pytest.fixture(scope="session")
def paint_by_example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Paint-by-Example pipeline with random weights."""
    from tests.support.pipelines import tiny_paint_by_example

    return tiny_paint_by_example(tmp_path_factory.mktemp("pipelines") / "paint_by_example")
