"""A training that goes down as a machine does, in the middle of its work."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import pytest

from i2am_train.workflows import train as workflow


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
