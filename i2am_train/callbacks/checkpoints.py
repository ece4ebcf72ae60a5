"""The checkpoints that a stopped run goes on from: written whole or not at all, kept, found again, and read.

Not Lightning's ModelCheckpoint: a checkpoint that it writes in the last step of an epoch is continued by Lightning 2.6
with an empty epoch, after which noise and order are those of another epoch than in an uninterrupted run. Here such a
checkpoint waits for the end of the epoch.
"""

import itertools
import os
import pickle
import re
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from i2am_train.environment import first_process
from i2am_train.errors import CheckpointError
from i2am_train.files import written

CHECKPOINTS_FOLDER = "checkpoints"
"""Where a run keeps them, inside the run folder."""
PARTS = {"state_dict", "optimizer_states", "loops", "global_step"}
"""What a checkpoint of a training holds, among others."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name first, so that a killed process leaves the last good checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Saves, flushes and renames."""
        with written(Path(path)) as unfinished:
            super().save_checkpoint(checkpoint, unfinished, storage_options)

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Loads a checkpoint of a training, as tensors and plain values: a pickle could run any program.

        Raises:
            CheckpointError: it is something else that torch wrote.
        """
        options["weights_only"] = True
        try:
            checkpoint = super().load_checkpoint(path, *arguments, **options)
        except (RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({str(error).splitlines()[0]}). Move it away, and the run goes on from the "
                "one before."
            ) from error
        if not set(checkpoint) >= PARTS:
            raise CheckpointError(
                f"{path} is no checkpoint of a training: expected {', '.join(sorted(PARTS))} in it. Move it "
                "away, and the run goes on from the one before."
            )
        return checkpoint


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
        trainer.save_checkpoint(self.folder / f"{_stem(step)}.ckpt")
        if trainer.is_global_zero:
            ours = [(n, file) for n, file in _checkpoints(self.folder) if file.stem == _stem(n)]
            for _, file in ours[self.keep :]:
                file.unlink()


def resume_point(run: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint of the last step that is whole, None if there is none at all, and what is to be said of others.

    Damaged ones that are newer get another name, under which they stay. Every byte is read: the time is that of
    loading it, which follows from memory.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.

    >>> resume_point(Path("no_such_run"))
    (None, [])
    """
    damaged: list[tuple[Path, str]] = []
    for _, file in _checkpoints(run / CHECKPOINTS_FOLDER):
        fault = _damage_of(file)
        if fault is None:
            return file, [_set_aside(one, why, file) for one, why in damaged]
        damaged.append((file, fault))
    if damaged:
        faults = ", ".join(f"{file.name} {fault}" for file, fault in damaged)
        raise CheckpointError(
            f"No checkpoint in {run / CHECKPOINTS_FOLDER} can be read: {faults}. Nothing was changed. Put a whole one "
            "back, or delete them to train this run anew from its first step."
        )
    return None, []


def _damage_of(file: Path) -> str | None:
    """Why a file cannot be a whole checkpoint, or None; torch writes a ZIP archive with a checksum of every part."""
    if file.is_dir():
        return "is a folder"
    try:
        if file.stat().st_size == 0:
            return "is empty"
        with zipfile.ZipFile(file) as archive:
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                return "is no checkpoint"
            part = archive.testzip()
    except zipfile.BadZipFile:
        return "is cut off, or no checkpoint"
    except (OSError, EOFError, NotImplementedError) as error:
        return f"cannot be read ({error})"
    return None if part is None else f"is damaged (in {part})"


def _set_aside(file: Path, fault: str, instead: Path) -> str:
    kept = file.with_name(f"{file.name}.damaged")
    for number in itertools.count(2):
        if not os.path.lexists(kept):
            break
        kept = file.with_name(f"{file.name}.damaged{number}")
    if first_process():
        with suppress(FileNotFoundError):
            file.rename(kept)
    return f"{file} {fault}; it is kept as {kept.name}. The run goes on from {instead.name}."


def steps_done(run: Path) -> int:
    """The optimizer steps of the newest checkpoint, whoever wrote it; 0 if there is none.

    >>> steps_done(Path("no_such_run"))
    0
    """
    return max((step for step, _ in _checkpoints(run / CHECKPOINTS_FOLDER)), default=0)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints with their steps, the latest first."""
    found = [
        (int(match[1]), file) for file in folder.glob("*.ckpt") if (match := re.search(r"step-(\d+)\.ckpt$", file.name))
    ]
    return sorted(found, reverse=True)


def _stem(step: int) -> str:
    return f"step-{step:06d}"
