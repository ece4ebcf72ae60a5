"""A test that hangs in a training can be ended: `timeout 600 make test` does what it says."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HANGING = """
import time
from pathlib import Path

import lightning as L
import pytest
import torch

from i2am_train.callbacks.interruption import InterruptionCallback
from i2am_train.entry import stopped_by_signals


class Model(L.LightningModule):
    def configure_optimizers(self):
        return None

    def training_step(self, batch):
        Path("hangs").touch()
        time.sleep(600)


@pytest.mark.filterwarnings("ignore")
def test_it(tmp_path):
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, callbacks=[InterruptionCallback(tmp_path)],
    )
    with stopped_by_signals():
        trainer.fit(Model(), torch.utils.data.DataLoader([0]))
"""


@pytest.mark.long
def test_a_training_that_hangs_in_a_test_ends_at_sigterm(tmp_path: Path) -> None:
    """At the first one, although the step never ends; the line where it hung is on standard error."""
    (tmp_path / "test_hanging.py").write_text(HANGING)
    tests = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "--rootdir", ".", "test_hanging.py"],
        cwd=tmp_path, env={"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "hangs").exists() and tests.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        tests.send_signal(signal.SIGTERM)
        output, errors = tests.communicate(timeout=20)
    finally:
        tests.kill()
    assert tests.returncode == -signal.SIGTERM, output
    assert "in training_step" in errors
