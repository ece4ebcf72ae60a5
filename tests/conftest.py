"""What all tests share: executed tensor shapes, no network, an end at SIGTERM, a small dataset and a small model."""

import faulthandler
import os
import signal
import socket
import sys
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
        "i2am_train.evaluation.scoring",
        "i2am_train.models.diffusion",
        "i2am_train.training.step",
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
def own_signals() -> Iterator[None]:
    """The handlers that the product sets, for tests that send signals to themselves.

    SIGINT is ignored where the tests were started in the background, which the product would respect.
    """
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    UNTOUCHED.remove(signal.SIGTERM)
    yield
    UNTOUCHED.add(signal.SIGTERM)
    signal.signal(signal.SIGINT, interrupt)


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
def no_own_metrics() -> Iterator[None]:
    """Metrics that one test makes known, the next does not know."""
    yield
    if "i2am_train.metrics.registry" in sys.modules:
        from tests.support.own_metrics import forget_own_metrics

        forget_own_metrics()


@pytest.fixture(autouse=True)
def no_imports_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test's command line names, the next one's files may not import."""
    monkeypatch.setenv("I2AM_ALLOW_IMPORTS", "")


@pytest.fixture
def fresh_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Each command starts in an empty folder, without what the last one left in the process."""
    from hydra.core.global_hydra import GlobalHydra

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["i2am"])
    for name in ("I2AM_DEBUG", "HYDRA_FULL_ERROR", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # registers the old value, to be put back
        monkeypatch.delenv(name)
    yield
    GlobalHydra.instance().clear()


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic dataset of 64x48 images: 20 training and 6 test samples."""
    from i2am_train.data.synthetic import make_dataset
    from i2am_train.types import GridSize

    root = tmp_path_factory.mktemp("data") / "small"
    make_dataset(root, 20, 6, GridSize(*SMALL), 0, workers=1, progress=False)
    return root


@pytest.fixture(scope="session")
def read_batch(small_dataset: Path) -> Callable[..., Any]:
    """Reads samples of the small dataset as one batch."""
    from torch.utils.data import default_collate

    from i2am_train.data.dataset import TryOnDataset
    from i2am_train.types import GridSize, Pairing, Split

    def read(indices: list[int], pairing: str = "paired", split: str = "test") -> Any:
        dataset = TryOnDataset(small_dataset, Split(split), Pairing(pairing), GridSize(*SMALL))
        return default_collate([dataset[index] for index in indices])

    return read


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


@pytest.fixture(scope="module")
def model(make_small_model: Callable[..., Any]) -> Any:
    """The small model, for the tests of one file."""
    return make_small_model()


@pytest.fixture(scope="session")
def small_checkpoint(make_small_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's folder."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    make_small_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def overrides(small_dataset: Path) -> list[str]:
    """Options of every command: small data, few steps."""
    return [
        f"data.root={small_dataset}",
        f"data.height={SMALL[0]}",
        f"data.width={SMALL[1]}",
        "data.workers=0",
        "sampling.steps=2",
        "attribution.time_groups=2",
    ]


@pytest.fixture(scope="session")
def training(overrides: list[str], small_checkpoint: Path) -> list[str]:
    """Options of a training run: two epochs of two steps, four validation samples. What follows them replaces them."""
    return [
        *overrides,
        f"init={small_checkpoint}",
        "data.batch_size=8",
        "optimization.steps=4",
        "validation.samples=4",
        "validation.panel_samples=2",
        "evaluation.metrics=[ssim]",
        "evaluation.batch_size=3",
        "trainer.progress_bar=false",
        "trainer.log_every_n_steps=1",
        "trainer.accelerator=cpu",
        "tracking.wandb=disabled",
    ]


@pytest.fixture(scope="session")
def original_layout() -> Callable[..., dict[str, Any]]:
    """The weights of a U-Net and a VAE of diffusers as those of one file in Stable Diffusion's own layout."""
    from tests.support.stable_diffusion_file import in_original_layout

    return in_original_layout


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
            sizes: dict[str, Any] = {"block_out_channels": (32, 32, 64, 64), "attention_head_dim": 8}
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
