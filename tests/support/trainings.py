"""Trainings of the tests: weights and curves, and one that goes down as a machine does, in the middle of its work."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from i2am_train.tracking.names import STEP_SECONDS
from i2am_train.workflows import train as workflow


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Those of a finished run's U-Net."""
    return load_file(run / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs ended at the same U-Net, bit by bit."""
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def curves(run: Path, *, timed: bool = False) -> list[dict[str, float]]:
    """What a run logged, moment by moment: the lines of ``metrics.csv``, numbers alone; none before the first.

    The time that a step took is another in every run, and left out unless ``timed``.
    """
    file = run / "metrics.csv"
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]
    return [{name: value for name, value in row.items() if timed or name != STEP_SECONDS} for row in rows]


class Stop(L.Callback):
    """Ends the process's work as a crash would, at the beginning of the second epoch."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise RuntimeError("the machine went down")


@contextmanager
def going_down(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trainings inside end with `Stop`, and must."""
    with monkeypatch.context() as patch:
        make = workflow.make_trainer

        def make_stopping(*arguments: Any) -> L.Trainer:
            trainer = make(*arguments)
            trainer.callbacks.append(Stop())
            return trainer

        patch.setattr(workflow, "make_trainer", make_stopping)
        with pytest.raises(RuntimeError, match="went down"):
            yield


SCHEDULED = [
    "objective.layers={2: 1.0, 5: 0.5}",
    "objective.terms.dcml.schedule=early", "objective.terms.dcml.share=0.5",
    "objective.terms.tv.schedule=ramp", "objective.terms.tv.share=0.75",
    "objective.terms.cwg.timesteps=[0,500]",
]  # fmt: skip
"""For ``experiment=refined``: two layers, terms whose weight changes, and one that counts some samples only."""
