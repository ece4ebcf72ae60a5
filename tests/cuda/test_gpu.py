"""What only a real card can show: equal weights after a stop, compiled networks, optimizers with own kernels.

All other tests of this folder run on it, too: ``make test-gpu``.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from i2am_train.config.store import compose
from i2am_train.workflows.train import train
from tests.support.trainings import going_down, same_weights, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # Lightning's and torch's own deprecations
]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_resumed_equals_uninterrupted(
    training: list[str], precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [
        *training, "experiment=refined", "optimization.steps=2", f"optimization.precision={precision}",
        "trainer.deterministic=true", "trainer.checkpoint_every_n_steps=1",
    ]  # fmt: skip
    whole = train(compose("train", [*options, f"output={tmp_path / 'whole'}"]))
    again = [*options, f"output={tmp_path / 'stopped'}"]
    with going_down(monkeypatch):
        train(compose("train", again))
    resumed = train(compose("train", again))
    assert same_weights(resumed, whole)


def test_eight_bit_adamw(training: list[str], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install bitsandbytes)")
    options = [*training, "experiment=refined", "optimization.optimizer=adamw8bit"]
    folder = train(compose("train", [*options, f"output={tmp_path / 'run'}"]))
    assert json.loads((folder / "manifest.json").read_text())["finished"]
    assert all(np.isfinite(value.numpy()).all() for value in weights(folder).values())


def test_compiled_training(training: list[str], tmp_path: Path) -> None:
    """In a process of its own, without the tests' executed tensor shapes, which would be compiled, too."""
    words = [
        *training, "experiment=refined", "optimization.compile=true", "optimization.precision=bf16-mixed",
        f"output={tmp_path / 'run'}",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "i2am_train", "train", *words],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["finished"]
