"""What a training logs to: files in its run folder, and a run in Weights & Biases."""

import csv
import io
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from i2am_train.callbacks.checkpoints import steps_done
from i2am_train.callbacks.evaluation import EvaluationCallback
from i2am_train.config.options import plain
from i2am_train.config.training import TrainConfig
from i2am_train.data.dataset import prepare_data
from i2am_train.environment import first_process
from i2am_train.files import write_text
from i2am_train.runs import MODEL_FOLDER, RunFolder
from i2am_train.tracking.names import STEP_SECONDS, TRAIN_JOB
from i2am_train.tracking.session import finish_run, log_model, open_run, use_dataset


class ContinuedCSVLogger(CSVLogger):
    """Goes on with the ``metrics.csv`` of a run folder; Lightning's own would delete the rows of earlier attempts.

    ``done`` is the number of optimizer steps of the checkpoint that the run goes on from. Rows of later steps, which a
    killed attempt had come to and which are trained again, are dropped, so that every step stands there once.
    """

    def __init__(self, folder: Path, done: int) -> None:
        super().__init__(folder.parent, name=folder.name, version="")
        if not first_process():  # the others do not write, and must not touch the first one's file
            return
        file = folder / "metrics.csv"
        kept = file.with_suffix(".csv.previous")
        if file.is_file():
            file.replace(kept)  # not deleted if the process dies before the file is written again
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*exists and is not empty.*")
            writer = self.experiment
        if kept.is_file():
            with kept.open(newline="") as lines:
                table = csv.DictReader(lines)
                writer.metrics_keys = list(table.fieldnames or [])
                rows = [row for row in table if _whole(row) and int(row["step"]) < done]
            text = io.StringIO()
            again = csv.DictWriter(text, writer.metrics_keys)
            again.writeheader()
            again.writerows(rows)
            write_text(file, text.getvalue())
            kept.unlink()


class StepSeconds(L.Callback):
    """Logs the seconds from the end of one optimizer step to that of the next, loading of its batches included.

    The first step and one behind a validation have nothing to be measured from. On a GPU, which runs behind, a single
    value says when the step was handed over; the median of many is the time of a step.
    """

    def __init__(self) -> None:
        self._step = 0
        self._ended: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step:  # gradients are still being added up
            return
        now = time.perf_counter()
        if self._ended is not None:
            # A plain number would be copied to the GPU, and waited for.
            pl_module.log(STEP_SECONDS, torch.tensor(now - self._ended))
        self._step, self._ended = trainer.global_step, now

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = None


def _whole(row: dict[str, str | None]) -> bool:
    """False for a line that a killed process wrote half of."""
    return None not in row.values() and (row["step"] or "").isdigit()


class _TrackedLogger(WandbLogger):
    """Opens the run when it is first used, in the first process only."""

    def __init__(self, folder: Path, project: str, start: Callable[[], Any]) -> None:
        super().__init__(project=project, save_dir=folder)
        self._start = start

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The ``wandb.Run``."""
        if self._experiment is None and not hasattr(self, "_attach_id"):
            self._experiment = self._start()
        return super().experiment

    @rank_zero_only
    def end(self, *, failed: bool) -> None:
        """Ends the run, if one was opened."""
        if self._experiment is not None:
            finish_run(self._experiment, failed=failed)
            self._experiment = None


def make_loggers(config: TrainConfig, folder: Path) -> list[Logger]:
    """CSV, TensorBoard and W&B; files lie in the run folder.

    What a killed attempt logged after its last checkpoint is dropped; W&B keeps it, and shows those steps twice.
    """
    tracking = config.tracking
    done = steps_done(folder)
    loggers: list[Logger] = []
    if tracking.csv:
        loggers.append(ContinuedCSVLogger(folder, done))
    if tracking.tensorboard:
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version="", purge_step=done))
    if tracking.wandb != "disabled":
        loggers.append(_TrackedLogger(folder, tracking.project, partial(_start_run, config, folder)))
    return loggers


def _start_run(config: TrainConfig, folder: Path) -> Any:
    """The W&B run of a training, with configuration, provenance and dataset."""
    manifest = RunFolder(folder, resumed=False).manifest
    manifest.pop("settings", None)
    run = open_run(
        config.tracking,
        folder,
        name=folder.name,
        job_type=TRAIN_JOB,
        arm=config.name,
        config={**plain(config), "provenance": manifest},
        tags=[config.name, f"seed{config.seed}"],
    )
    use_dataset(run, prepare_data(config.data), manifest["data"])
    return run


def record_model(trainer: L.Trainer, config: TrainConfig, folder: Path) -> None:
    """Logs the finished model as an artifact of the W&B run."""
    manifest = RunFolder(folder, resumed=False).manifest
    results = [c.result for c in trainer.callbacks if isinstance(c, EvaluationCallback)]  # type: ignore[attr-defined]
    metadata = {
        "metrics": results[0].metrics if results and results[0] else {},
        "step": trainer.global_step,
        "data": manifest["data"],
        "git": manifest["git"],
    }
    for logger in trainer.loggers:
        if isinstance(logger, _TrackedLogger):
            log_model(logger.experiment, folder, folder / MODEL_FOLDER, metadata, upload=config.tracking.upload_model)


def finish_tracking(trainer: L.Trainer, *, failed: bool = False) -> None:
    """Ends the W&B run; the next training in this process would otherwise be written into it."""
    for logger in trainer.loggers:
        if isinstance(logger, _TrackedLogger):
            logger.end(failed=failed)
