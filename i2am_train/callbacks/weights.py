"""Weights that a run keeps besides those in training: their moving average, snapshots on the way, and the best model.

Each model that is kept is a folder that every command reads; it appears complete or not at all.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from i2am_train.files import write_json
from i2am_train.runs import BEST_RECORD, SNAPSHOTS_FOLDER
from i2am_train.tracking.names import VALIDATION
from i2am_train.training.module import TryOnModule
from i2am_train.training.sharding import sharded_like, whole_state

_STATE = "averaged_weights"
"""Key of the average in a checkpoint: whole tensors by the weights' names."""


class AveragedWeights(L.Callback):
    """A moving average of the trained weights, which is validated, kept and finished in their place.

    After every optimizer step: average <- decay * average + (1 - decay) * weights, from the first step's.

    Not Lightning's WeightAveraging, which copies the whole module: the frozen encoders, too, into memory and into
    every checkpoint, and not at all where weights are sharded. Here a process averages its part of what is trained.
    """

    def __init__(self, decay: float) -> None:
        self._mix = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._averages: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] = {}
        self._step = 0

    def swap(self, module: L.LightningModule) -> None:
        """Exchanges the weights in training and their average; a second call puts them back."""
        for average, weight in self._pairs(module):
            kept = average.clone()
            average.copy_(weight)
            weight.copy_(kept)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self._averages = {
            name: sharded_like(self._loaded[name].to(weight.device), weight)
            for name, weight in _trained(pl_module)
            if self._loaded
        }
        self._loaded = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step:  # between two steps gradients are accumulated
            return
        self._step = trainer.global_step
        if self._averages:
            averages, weights = zip(*self._pairs(pl_module), strict=True)
            self._mix(list(averages), list(weights), None)
        else:
            self._averages = {name: weight.clone() for name, weight in _trained(pl_module)}

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the module gathers sharded weights."""
        self.swap(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After it has released them."""
        self.swap(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The finished model is the average."""
        self.swap(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[_STATE] = whole_state(self._averages, first=trainer.is_global_zero)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint[_STATE]

    def _pairs(self, module: L.LightningModule) -> Iterator[tuple[Tensor, Tensor]]:
        """Averages and weights, this process's parts of both."""
        if self._averages:
            for name, weight in _trained(module):
                yield _own(self._averages[name]), _own(weight)


def _trained(module: L.LightningModule) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.detach()


def _own(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


class SnapshotCallback(L.Callback):
    """Keeps ``snapshots/step-000100``, ... every ``every`` optimizer steps before the last of ``steps``.

    The last is the finished model itself. Where weights are averaged, the average is kept. A run that is continued
    writes the same folders again.
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
        if self.averaging is not None:
            self.averaging.swap(pl_module)
        _save(pl_module, self.folder / f"step-{step:06d}")
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
        if _save(pl_module, self.folder):
            record = {"score": self.score, "value": value, "step": trainer.global_step}
            write_json(self.folder.with_name(BEST_RECORD), record)

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, for a run that is continued."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


def _save(module: L.LightningModule, folder: Path) -> bool:
    """Writes the whole model, in the first process, which alone has it; collective."""
    assert isinstance(module, TryOnModule)
    model = module.whole_model()
    if model is not None:
        model.save_pretrained(folder)
    return model is not None


def snapshot_folders(run: Path) -> list[Path]:
    """The snapshots of a run folder, earliest first.

    >>> snapshot_folders(Path("no_such_run"))
    []
    """
    return sorted((run / SNAPSHOTS_FOLDER).glob("step-*"))
