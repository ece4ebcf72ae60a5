"""Copies of the model that a training run keeps on its way, each a folder that every command reads."""

from pathlib import Path
from typing import Any

import lightning as L

from i2am_train.callbacks.averaging import AveragedWeights
from i2am_train.files import write_json
from i2am_train.runs import BEST_RECORD, SNAPSHOTS_FOLDER
from i2am_train.tracking.names import VALIDATION
from i2am_train.training.module import TryOnModule


class SnapshotCallback(L.Callback):
    """Keeps ``snapshots/step-000100``, ... every ``every`` optimizer steps before the last of ``steps``.

    The last is the finished model itself. Where weights are averaged, the average is kept. A folder appears complete
    or not at all; a run that is continued writes the same folders again.
    """

    def __init__(self, folder: Path, every: int, steps: int, averaging: AveragedWeights | None = None) -> None:
        self.folder = folder
        self.every = every
        self.steps = steps
        self.averaging = averaging
        self._last = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._last:  # between two steps gradients are accumulated
            return
        self._last = step
        if step % self.every or step >= self.steps:
            return
        assert isinstance(pl_module, TryOnModule)
        if self.averaging is not None:
            self.averaging.swap(pl_module)
        if (model := pl_module.whole_model()) is not None:
            model.save_pretrained(self.folder / f"step-{step:06d}")
        if self.averaging is not None:
            self.averaging.swap(pl_module)


class BestModelCallback(L.Callback):
    """Keeps the model with the best value of one validation score in ``folder``, and beside it which that is."""

    def __init__(self, folder: Path, score: str, *, higher_is_better: bool) -> None:
        self.folder = folder
        self.score = score
        self.higher_is_better = higher_is_better
        self.best: float | None = None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        value = float(trainer.callback_metrics[VALIDATION + self.score])
        if self.best is not None and (value <= self.best) == self.higher_is_better:
            return
        self.best = value
        assert isinstance(pl_module, TryOnModule)
        if (model := pl_module.whole_model()) is not None:
            model.save_pretrained(self.folder)
            record = {"score": self.score, "value": value, "step": trainer.global_step}
            write_json(self.folder.with_name(BEST_RECORD), record)

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, for a run that is continued."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


def snapshot_folders(run: Path) -> list[Path]:
    """The snapshots of a run folder, earliest first.

    >>> snapshot_folders(Path("no_such_run"))
    []
    """
    return sorted((run / SNAPSHOTS_FOLDER).glob("step-*"))
