"""Stops a training run: when it is told to, after saving its state; after its last step; where it computes no numbers.

Ctrl-C, SIGTERM (schedulers, preemption) and, under SLURM, SIGUSR1 (``#SBATCH --signal=USR1@120``) wait for the end of
the step, so that no accumulated gradient is lost and the same command goes on bit by bit. A second Ctrl-C does not
wait. After SIGUSR1 SLURM is asked to start the job again; after SIGTERM that is its own affair (``--requeue``).

Lightning's handler of SIGUSR1 is replaced: it would save where it is called, within a step, and a second time.
"""

import math
import os
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils import get_total_norm

from i2am_train.callbacks.checkpoints import CHECKPOINTS_FOLDER
from i2am_train.errors import CommandStopped, TrainingError, TrainingInterruptedError
from i2am_train.files import write_json
from i2am_train.tracking.names import GRADIENT_NORM, LOSS
from i2am_train.training.sharding import whole

_WAITED_FOR = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_STEM = "interrupted-step"


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
        for number in _WAITED_FOR:
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
        trainer.save_checkpoint(self.folder / f"{_STEM}-{self._step:06d}.ckpt")
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
            for file in self.folder.glob(f"{_STEM}-*.ckpt"):
                file.unlink()

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        """Before Lightning puts back those that it found, which would be lost otherwise."""
        self.restore()

    def teardown(self, *_: Any, **__: Any) -> None:
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


class FiniteGuard(L.Callback):
    """Looks at every loss before its gradient is computed, and at every gradient before it is applied.

    So the weights that ``checkpoints/not-finite.ckpt`` keeps are those before the fault. Also logs ``grad_norm``, the
    norm of the gradient before clipping. With float16 the loss scale makes gradients overflow now and then, which
    PyTorch's scaler handles: there only losses are looked at.
    """

    def __init__(self, folder: Path, *, gradients: bool) -> None:
        self.folder = folder
        self.gradients = gradients
        self._batch: Any = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if not bool(torch.isfinite(loss)):
            self._stop(trainer, "loss", float(loss.detach()), {})

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self.gradients:
            return
        gradients = {
            name: parameter.grad for name, parameter in pl_module.named_parameters() if parameter.grad is not None
        }
        norm = float(whole(get_total_norm(list(gradients.values()))))
        pl_module.log(GRADIENT_NORM, norm)
        if not math.isfinite(norm):
            at_fault = [name for name, g in gradients.items() if not bool(whole(g).isfinite().all())]
            self._stop(trainer, "gradient", norm, {"parameters": at_fault})

    def _stop(self, trainer: L.Trainer, what: str, value: float, facts: dict[str, Any]) -> None:
        logged = {name: float(v) for name, v in trainer.callback_metrics.items() if v.numel() == 1}
        names = list(self._batch["name"])
        diagnosis = {
            "what": what,
            "value": str(value),
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "samples": names,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "logged": {name: str(number) for name, number in logged.items()},
            **facts,
        }
        if trainer.world_size == 1:  # saving takes all processes, and the others may be well
            trainer.save_checkpoint(self.folder / CHECKPOINTS_FOLDER / "not-finite.ckpt")
        file = self.folder / f"rank{trainer.global_rank}-diagnosis.json"
        write_json(file, diagnosis)
        terms = {n.removeprefix(LOSS): v for n, v in logged.items() if n.startswith(LOSS)}
        said = ", ".join(f"{name} {number:g}" for name, number in terms.items())
        others = " and others" if len(names) > 4 else ""
        raise TrainingError(
            f"The {what} became {value} in step {trainer.global_step + 1}, on samples {', '.join(names[:4])}{others} "
            f"(losses logged last: {said or 'none'}). Stopped before it changed a weight; details: {file}. Look at "
            "these samples, lower optimization.learning_rate or the weights in objective.terms, or use "
            "optimization.precision=32-true."
        )
