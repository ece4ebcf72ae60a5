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
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from i2am_train.callbacks.checkpoints import CHECKPOINTS_FOLDER
from i2am_train.errors import CommandStopped, TrainingError, TrainingInterruptedError
from i2am_train.files import write_json
from i2am_train.tracking.names import GRADIENT_NORM, LOSS
from i2am_train.training.module import TryOnModule
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
        self._group: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._process = os.getpid()
        self._received = None
        self._saved = False
        self._step = trainer.global_step
        if trainer.world_size > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")  # asked in every step: not over the GPUs, which would wait
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
        if not self._any(trainer, self._received is not None):
            return
        trainer.save_checkpoint(self.folder / f"{_STEM}-{self._step:06d}.ckpt")
        self._saved = True
        asked = self._any(trainer, self._received == signal.SIGUSR1)
        self._requeue = asked and trainer.is_global_zero

    def _any(self, trainer: L.Trainer, value: bool) -> bool:
        """Whether it is so in any of the processes."""
        if trainer.world_size == 1:
            return value
        told = torch.tensor(int(value))
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group)
        return bool(told)

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
    """Looks at every loss and every gradient before it is applied, and stops the training at the first that is not
    finite; ``checkpoints/not-finite.ckpt`` keeps the weights from before the fault. Also logs ``grad_norm``, the norm
    of the gradient before clipping.

    A CPU looks at once. On a GPU that would be a wait in every step: there the verdict stays on the device, where the
    fused optimizer obeys it (``found_inf``), so that from the fault on no step changes a weight; the host looks every
    ``every`` steps, before a validation, before anything is saved and at the end. Where weights are sharded or the
    optimizer is not fused, it looks at once.

    With float16 the loss scale makes gradients overflow now and then, which PyTorch's scaler handles: there only losses
    are looked at.
    """

    def __init__(self, folder: Path, *, gradients: bool, every: int = 1) -> None:
        self.folder = folder
        self.gradients = gradients
        self.every = every
        self._loss: Tensor | None = None
        """Of this step: the sum of its batches' losses, which is finite where all of them are."""
        self._fault: Tensor | None = None
        """Of the first step at fault: its number, loss and gradient norm, on the device; its number is -1 without."""
        self._steps: deque[tuple[int, list[str], float]] = deque(maxlen=every)
        """Number, samples and learning rate of the steps that the host has not looked at."""
        self._names: list[str] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._loss is None:
            self._names = []
        self._names += batch["name"]

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        if not self._waits_later(trainer) and not bool(torch.isfinite(loss)):
            self._stop(trainer, "loss", float(loss.detach()), self._step(trainer))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, TryOnModule)
        assert self._loss is not None, "a step has a loss"
        loss, self._loss = self._loss, None
        norm = torch.zeros_like(loss)
        if self.gradients:
            norm = whole(pl_module.gradient_norm())
            pl_module.log(GRADIENT_NORM, norm)
        if self._waits_later(trainer):
            self._note(trainer, optimizer, loss, norm)
        elif not bool(norm.isfinite()):
            at_fault = [
                name for name, p in pl_module.named_parameters() if p.grad is not None and not _all_finite(p.grad)
            ]
            self._stop(trainer, "gradient", float(norm), self._step(trainer), parameters=at_fault)

    def _waits_later(self, trainer: L.Trainer) -> bool:
        optimizer = trainer.optimizers[0]
        weights = optimizer.param_groups[0]["params"]
        fused = bool(optimizer.defaults.get("fused"))
        # Without a scaler's own verdict: float16's optimizers are not fused, and its scaler leaves such steps out.
        protected = fused or not self.gradients
        return self.every > 1 and protected and weights[0].is_cuda and not isinstance(weights[0], DTensor)

    def _step(self, trainer: L.Trainer) -> tuple[int, list[str], float]:
        return trainer.global_step, list(self._names), trainer.optimizers[0].param_groups[0]["lr"]

    def _note(self, trainer: L.Trainer, optimizer: torch.optim.Optimizer, loss: Tensor, norm: Tensor) -> None:
        """Keeps the first fault on the device, and any later step from changing weights."""
        step = torch.full_like(loss, trainer.global_step)
        nothing = torch.full_like(loss, -1.0)
        at_fault = ~(loss.isfinite() & norm.isfinite())
        now = torch.stack([torch.where(at_fault, step, nothing), loss, norm])
        self._fault = now if self._fault is None else torch.where(self._fault[0] >= 0, self._fault, now)
        if self.gradients:
            optimizer.found_inf = (self._fault[0] >= 0).float()  # type: ignore[attr-defined]
        self._steps.append(self._step(trainer))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if len(self._steps) == self.every:
            self._look(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._look(trainer)

    def _look(self, trainer: L.Trainer) -> None:
        """Waits for the device."""
        if self._fault is None:
            return
        (number, loss, norm), steps = self._fault.tolist(), {step[0]: step for step in self._steps}
        self._fault = None
        self._steps.clear()
        if number >= 0:
            what, value = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
            self._stop(trainer, what, value, steps[int(number)])

    def _stop(
        self, trainer: L.Trainer, what: str, value: float, step: tuple[int, list[str], float], **facts: Any
    ) -> None:
        number, names, rate = step
        logged = {name: float(v) for name, v in trainer.callback_metrics.items() if v.numel() == 1}
        diagnosis = {
            "what": what,
            "value": str(value),
            "step": number,
            "epoch": trainer.current_epoch,
            "samples": names,
            "learning_rate": rate,
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
            f"The {what} became {value} in step {number + 1}, on samples {', '.join(names[:4])}{others} "
            f"(losses logged last: {said or 'none'}). Stopped before it changed a weight; details: {file}. Look at "
            "these samples, lower optimization.learning_rate or the weights in objective.terms, or use "
            "optimization.precision=32-true."
        )


def _all_finite(gradient: Tensor) -> bool:
    return bool(whole(gradient).isfinite().all())
