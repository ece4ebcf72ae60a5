"""Commands on a small dataset, on a card that is not there, and on one that is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.card import card, real_card


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a real card say why they do not run."""
    if not torch.cuda.is_available():
        reason = "needs a CUDA device, and torch finds none on this machine"
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Any:
    """A context in which there is a card: every test runs on the one that is not there, with -m gpu on the real one."""
    return card if request.param == "fake" else real_card


@pytest.fixture
def there(machine: Any, small_checkpoint: Path) -> Iterator[None]:
    """The machine has a card, and the command computes on it."""
    with machine() as seen:
        yield
    assert seen.operations > 100


@pytest.fixture(scope="session")
def training(training: list[str]) -> list[str]:
    """One step, an epoch, and validation."""
    return [
        *training,
        "data.batch_size=12",
        "optimization.steps=1",
        "validation.samples=2",
        "validation.panel_samples=1",
        "evaluation.metrics=[ssim,kd_efficientnet_lite0]",
        "evaluation.batch_size=2",
        "trainer.accelerator=gpu",
    ]
