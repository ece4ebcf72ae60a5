"""A moving average of the trained weights, which is validated, kept and finished in their place."""

from collections.abc import Iterator
from typing import Any

import lightning as L
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from i2am_train.training.sharding import sharded_like, whole_state

STATE = "averaged_weights"
"""Its key in a checkpoint: whole tensors by the weights' names."""


class AveragedWeights(L.Callback):
    """Averages after every optimizer step: average <- decay * average + (1 - decay) * weights, from the first step's.

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

    # -- Lightning's hooks -----------------------------------------------------------------------------------------

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
        checkpoint[STATE] = whole_state(self._averages, first=trainer.is_global_zero)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint[STATE]

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
