"""Options of commands on the small dataset."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def overrides(small_dataset: Path, small_checkpoint: Path) -> list[str]:
    """Options of every command: small data, few steps, few samples."""
    return [
        f"data.root={small_dataset}",
        "data.height=64",
        "data.width=48",
        "data.workers=0",
        "sampling.steps=2",
        "attribution.time_groups=2",
    ]


@pytest.fixture(scope="session")
def training(overrides: list[str], small_checkpoint: Path) -> list[str]:
    """Options of a training run: two epochs of two steps, four validation samples."""
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
