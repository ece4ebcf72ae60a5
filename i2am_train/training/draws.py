"""The random numbers of training: one stream for each sample and epoch.

A sample's noise depends on the run's seed, the epoch and the sample's index and on nothing else, so the numbers are the
same on one process or several, in any batch, and after a restart.

Where gradients are accumulated, attention terms are means over the samples of the whole optimizer step whose condition
was not dropped: for several batches to be one large batch, all of them must divide by the same number. Order and
dropped conditions are functions of (seed, epoch, sample), so it is known before the first of them is computed.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from i2am_train.seeds import seed_for
from i2am_train.types import GridSize


class Draws(NamedTuple):
    """Random numbers of one training step."""

    timesteps: Int[Tensor, " batch"]
    """Uniform over the scheduler's timesteps."""
    noise: Float[Tensor, "batch 4 latent_height latent_width"]
    """The noise that the denoiser is asked for."""
    posterior: Float[Tensor, "batch 3 4 latent_height latent_width"]
    """Noise of the VAE's posteriors of person, agnostic and pose (the authors sample all three)."""
    dropped: Bool[Tensor, " batch"]
    """Samples whose reference is replaced by the null tokens."""


def draw(
    seed: int, epoch: int, indices: list[int], *, latent: GridSize, timesteps: int, condition_dropout: float
) -> Draws:
    """Random numbers for the samples with the given dataset indices.

    >>> one = draw(0, 3, [7, 9], latent=GridSize(4, 2), timesteps=1000, condition_dropout=0.2)
    >>> other = draw(0, 3, [9], latent=GridSize(4, 2), timesteps=1000, condition_dropout=0.2)
    >>> bool((one.noise[1] == other.noise[0]).all())
    True
    """
    rows = [
        _draw_one(seed_for(seed, "training", epoch, index), latent, timesteps, condition_dropout) for index in indices
    ]
    return Draws(*(torch.stack(column) for column in zip(*rows, strict=True)))


def _draw_one(
    seed: int, latent: GridSize, timesteps: int, condition_dropout: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(timesteps, (), generator=generator),
        torch.randn(4, *latent, generator=generator),
        torch.randn(3, 4, *latent, generator=generator),
        torch.rand((), generator=generator) < condition_dropout,
    )


def batches_of_step(
    order: list[int], batch_size: int, batch_index: int, accumulate: int, batches: int
) -> list[list[int]]:
    """The samples of each batch that goes into the same optimizer step as batch ``batch_index`` of the epoch.

    ``order`` is the epoch's, on this process; the epoch has ``batches``, and its last step may have fewer than others.

    >>> batches_of_step([5, 3, 0, 1, 4, 2], batch_size=2, batch_index=1, accumulate=2, batches=3)
    [[5, 3], [0, 1]]
    >>> batches_of_step([5, 3, 0, 1, 4, 2], batch_size=2, batch_index=2, accumulate=2, batches=3)
    [[4, 2]]
    """
    first = batch_index - batch_index % accumulate
    starts = [number * batch_size for number in range(first, min(first + accumulate, batches))]
    return [order[start : start + batch_size] for start in starts]


class ConditionedCount:
    """Mean number of samples per batch of an optimizer step whose condition is not dropped, worked out once a step."""

    def __init__(self) -> None:
        self._batches: list[list[int]] = []
        self._epoch = -1
        self._count = torch.zeros(())

    def __call__(self, batches: list[list[int]], epoch: int, draws: Callable[[list[int]], Draws]) -> Float[Tensor, ""]:
        """``batches`` are the step's (:func:`batches_of_step`), ``draws`` gives the random numbers of samples."""
        if (batches, epoch) != (self._batches, self._epoch):
            dropped = [draws(batch).dropped for batch in batches]
            self._count = (~torch.cat(dropped)).sum() / len(batches)
            self._batches, self._epoch = batches, epoch
        return self._count
