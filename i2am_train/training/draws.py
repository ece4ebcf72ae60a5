"""The random numbers of training: one stream for each sample and epoch.

A sample's noise depends on the run's seed, the epoch and the sample's index and on nothing else, so the numbers are the
same on one process or several, in any batch, and after a restart.
"""

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
    seed: int,
    epoch: int,
    indices: list[int],
    *,
    latent: GridSize,
    timesteps: int,
    condition_dropout: float,
) -> Draws:
    """Random numbers for the samples with the given dataset indices.

    >>> one = draw(0, 3, [7, 9], latent=GridSize(4, 2), timesteps=1000, condition_dropout=0.2)
    >>> other = draw(0, 3, [9], latent=GridSize(4, 2), timesteps=1000, condition_dropout=0.2)
    >>> bool((one.noise[1] == other.noise[0]).all())
    True
    """
    rows = [
        _draw_one(seed_for(seed, "training", epoch, index), latent, timesteps, condition_dropout)
        for index in indices
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
