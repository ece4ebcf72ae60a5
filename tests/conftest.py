"""What all tests share: executed tensor shapes, no network, a small dataset and a small model."""

import socket
from collections.abc import Callable
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
        "i2am_train.attribution",
        "i2am_train.evaluation.folders",
        "i2am_train.evaluation.scoring",
        "i2am_train.models.diffusion",
        "i2am_train.training.draws",
    ],
    "beartype.beartype",
)

SMALL = (64, 48)


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


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic dataset of 64x48 images: 20 training and 6 test samples."""
    from i2am_train.datasets.synthetic import make_dataset
    from i2am_train.types import GridSize

    root = tmp_path_factory.mktemp("data") / "small"
    make_dataset(root, 20, 6, GridSize(*SMALL), 0, workers=1, progress=False)
    return root


@pytest.fixture(scope="session")
def make_small_model() -> Callable[..., Any]:
    """Builds a try-on model for 64x48 images with random weights, the same at every call."""

    def make(**sizes: Any) -> Any:
        import torch

        from i2am_train.models.build import Architecture, build_model
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
