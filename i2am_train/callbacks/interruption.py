"""Stops a training run between two optimizer steps: when it is told to, after saving its state, and after its last.

Ctrl-C, SIGTERM (schedulers, preemption) and, under SLURM, SIGUSR1 (``#SBATCH --signal=USR1@120``) wait for the end of
the step, so that no accumulated gradient is lost and the same command goes on bit by bit. A second Ctrl-C does not
wait. After SIGUSR1 SLURM is asked to start the job again; after SIGTERM that is its own affair (``--requeue``).

Lightning's handler of SIGUSR1 is replaced: it would save where it is called, within a step, and a second time.
"""

import os
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from i2am_train.errors import CommandStopped, TrainingInterruptedError

WAITED_FOR = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STEM = "interrupted-step"


class InterruptionCallback(L.Callback):
    """Saves ``interrupted-step-000123.ckpt`` into ``folder`` and raises ``TrainingInterruptedError``.

    It is raised before the next step only: Lightning writes a step's row of the curves after ``on_train_batch_end``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._originals: dict[int, Any] = {}
        self._process = os.getpid()
        self._received: int | None = None
        self._step = 0
        self._saved = False
        self._requeue = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._process = os.getpid()
        self._received = None
        self._saved = False
        self._step = trainer.global_step
        if threading.current_thread() is not threading.main_thread():  # the others cannot
            return
        for number in WAITED_FOR:
            original = signal.getsignal(number)
            if number != signal.SIGUSR1 or "SLURM_JOB_ID" in os.environ:
                self._originals[number] = original
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a copy that reads samples; it is needed until the step's end
            return
        if self._received == signal.SIGINT == number:
            # Not KeyboardInterrupt, at which Lightning ends the process with status 1.
            raise CommandStopped(number, "training was stopped at once, without saving.")
        self._received = number

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        # Not while gradients are accumulated; after an epoch's last step the epoch ends first (callbacks.checkpoints).
        if trainer.global_step > self._step and not trainer.is_last_batch:
            self._save_if_told(trainer)

    def on_train_batch_start(self, *_: Any) -> None:
        if self._saved:
            self._stop()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save_if_told(trainer)
        if self._saved:
            self._stop()

    def _save_if_told(self, trainer: L.Trainer) -> None:
        self._step = trainer.global_step
        # One process may have been told earlier than another; all save and stop at the same step.
        if not _any(trainer, self._received is not None):
            return
        trainer.save_checkpoint(self.folder / f"{STEM}-{self._step:06d}.ckpt")
        self._saved = True
        asked = _any(trainer, self._received == signal.SIGUSR1)
        self._requeue = asked and trainer.is_global_zero

    def _stop(self) -> None:
        if self._requeue:
            requeue()
        raise TrainingInterruptedError(self._received or signal.SIGTERM, self._step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The finished run needs none of these checkpoints."""
        if trainer.is_global_zero:
            for file in self.folder.glob(f"{STEM}-*.ckpt"):
                file.unlink()

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        """Before Lightning puts back those that it found, which would be lost otherwise."""
        self.restore()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.restore()

    def restore(self) -> None:
        """Puts the signals' handlers back; Lightning leaves ``teardown`` out after an error."""
        for number, original in self._originals.items():
            signal.signal(number, original)
        self._originals.clear()


def _any(trainer: L.Trainer, value: bool) -> bool:
    """Whether it is so in any of the processes."""
    return trainer.strategy.reduce_boolean_decision(value, all=False)


def requeue() -> None:
    """Asks SLURM to start this job, or this task of an array of jobs, again."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"SLURM did not take job {job} back ({error}). Submit it again, and it goes on.")


class StopAfterSteps(L.Callback):
    """Stops at ``steps``, counted over all attempts of a run.

    Not Lightning's ``max_steps``: with it, a run that is continued at an epoch's border first goes through an empty
    epoch, after which sampler and module disagree about the epoch (Lightning 2.6), and the continued run differs from
    an uninterrupted one.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check(trainer)  # a continued run may be there already

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._check(trainer)

    def _check(self, trainer: L.Trainer) -> None:
        if trainer.global_step >= self.steps:
            trainer.should_stop = True
