"""Commands on a small dataset and a card that is not there."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def options(small_dataset: Path) -> list[str]:
    """Small data and few steps."""
    return [
        f"data.root={small_dataset}",
        "data.height=64",
        "data.width=48",
        "data.workers=0",
        "sampling.steps=2",
        "attribution.time_groups=2",
    ]


@pytest.fixture(scope="session")
def training(options: list[str], small_checkpoint: Path) -> list[str]:
    """One step, an epoch, and validation."""
    return [
        *options,
        f"init={small_checkpoint}",
        "data.batch_size=12",
        "optimization.steps=1",
        "validation.samples=2",
        "validation.panel_samples=1",
        "evaluation.metrics=[ssim,kd_efficientnet_lite0]",
        "evaluation.batch_size=2",
        "trainer.progress_bar=false",
        "trainer.log_every_n_steps=1",
        "trainer.accelerator=gpu",
        "tracking.wandb=disabled",
    ]
