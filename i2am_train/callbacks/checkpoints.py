"""The checkpoints that a stopped run goes on from.

Not Lightning's ModelCheckpoint: a checkpoint that it writes in the last step of an epoch is continued by Lightning 2.6
with an empty epoch, after which noise and order are those of another epoch than in an uninterrupted run. Here such a
checkpoint waits for the end of the epoch.
"""

import re
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

FOLDER = "checkpoints"
"""Where a run keeps them, inside the run folder."""


class CheckpointCallback(Checkpoint):
    """Saves ``step-000100.ckpt``, ... every ``every`` optimizer steps, or after each epoch where that is None.

    The latest ``keep`` stay.
    """

    def __init__(self, folder: Path, every: int | None, keep: int) -> None:
        self.folder = folder
        self.every = every
        self.keep = keep
        self._saved = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.every is not None and not trainer.is_last_batch:
            self._save_if_due(trainer, self.every)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save_if_due(trainer, self.every or 1)

    def _save_if_due(self, trainer: L.Trainer, every: int) -> None:
        step = trainer.global_step
        if step // every == self._saved // every:
            return
        self._saved = step
        trainer.save_checkpoint(self.folder / f"step-{step:06d}.ckpt")
        if trainer.is_global_zero:
            for file in sorted(self.folder.glob("step-*.ckpt"))[: -self.keep]:
                file.unlink()


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint of the last step in a run folder, whoever wrote it; None if there is none."""
    steps = _checkpoints(run)
    return steps[max(steps)] if steps else None


def steps_done(run: Path) -> int:
    """The optimizer steps of that checkpoint; 0 if there is none."""
    return max(_checkpoints(run), default=0)


def _checkpoints(run: Path) -> dict[int, Path]:
    return {
        int(match[1]): file
        for file in (run / FOLDER).glob("*.ckpt")
        if (match := re.search(r"step-(\d+)\.ckpt$", file.name))
    }
