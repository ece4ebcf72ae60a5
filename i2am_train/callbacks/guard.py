"""Stops a training run whose loss or gradient is no longer a number, and says where it happened."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from i2am_train.callbacks.checkpoints import FOLDER as CHECKPOINTS
from i2am_train.errors import TrainingError
from i2am_train.files import write_json
from i2am_train.tracking.names import GRADIENT_NORM, LOSS
from i2am_train.training.sharding import whole

CHECKPOINT, DIAGNOSIS = "not-finite.ckpt", "diagnosis.json"


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
        path = self.folder / CHECKPOINTS / CHECKPOINT
        if trainer.world_size == 1:  # saving takes all processes, and the others may be well
            trainer.save_checkpoint(path)
        write_json(self.folder / f"rank{trainer.global_rank}-{DIAGNOSIS}", diagnosis)
        terms = {n.removeprefix(LOSS): v for n, v in logged.items() if n.startswith(LOSS)}
        said = ", ".join(f"{name} {number:g}" for name, number in terms.items())
        others = " and others" if len(names) > 4 else ""
        raise TrainingError(
            f"The {what} became {value} in step {trainer.global_step + 1}, on samples {', '.join(names[:4])}{others} "
            f"(losses logged last: {said or 'none'}). Stopped before it changed a weight; details: "
            f"{self.folder}/rank{trainer.global_rank}-{DIAGNOSIS}. Look at these samples, lower "
            "optimization.learning_rate or the weights in objective, or use optimization.precision=32-true."
        )
