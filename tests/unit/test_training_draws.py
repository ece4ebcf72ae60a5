"""training/draws.py: the random numbers of a sample depend on seed, epoch and index alone."""

from typing import Any

import pytest
import torch

from i2am_train.training.draws import Draws, draw
from i2am_train.types import GridSize

LATENT = GridSize(4, 3)


def draws(indices: list[int], **changes: Any) -> Draws:
    options = {"seed": 0, "epoch": 3, "timesteps": 1000, "condition_dropout": 0.2} | changes
    return draw(options.pop("seed"), options.pop("epoch"), indices, latent=LATENT, **options)


def test_shapes() -> None:
    """One timestep, noise, posterior noise of three images and a decision for each sample."""
    drawn = draws([5, 8])
    assert drawn.timesteps.shape == drawn.dropped.shape == (2,)
    assert drawn.noise.shape == (2, 4, 4, 3)
    assert drawn.posterior.shape == (2, 3, 4, 4, 3)
    assert drawn.timesteps.dtype == torch.int64


def test_a_sample_does_not_depend_on_its_batch() -> None:
    """Order and company in the batch, and so the number of processes, change nothing."""
    together, turned = draws([2, 7, 11, 4]), draws([4, 11, 2])
    for name in Draws._fields:
        first, second = getattr(together, name), getattr(turned, name)
        assert torch.equal(first[[3, 2, 0]], second), name


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 4}])
def test_other_seed_or_epoch_draws_other_numbers(change: dict[str, int]) -> None:
    """An epoch does not repeat the noise of the last, nor a run that of another seed."""
    indices = list(range(20))
    one, other = draws(indices), draws(indices, **change)
    assert not torch.isclose(one.noise, other.noise).any()
    assert not torch.equal(one.timesteps, other.timesteps)
    assert not torch.equal(one.dropped, other.dropped)


def test_samples_differ_and_so_do_the_parts_of_one() -> None:
    """No noise is used twice: not by neighbours, not for denoising and for a posterior."""
    drawn = draws([0, 1])
    assert not torch.isclose(drawn.noise[0], drawn.noise[1]).any()
    parts = torch.cat([drawn.noise[:1], drawn.posterior[0]])
    assert len(parts.flatten(1).unique(dim=0)) == 4


def test_distributions() -> None:
    """Standard normal noise, timesteps over the whole range and not beyond, the asked share dropped."""
    drawn = draws(list(range(2000)))
    assert drawn.noise.mean().abs() < 0.02
    assert drawn.posterior.std().sub(1).abs() < 0.02
    assert drawn.dropped.float().mean().sub(0.2).abs() < 0.03
    counts = torch.bincount(draws(list(range(2000)), timesteps=5).timesteps, minlength=5)
    assert len(counts) == 5
    assert counts.sub(400).abs().max() < 80


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 50)])
def test_nobody_or_everybody_is_dropped(share: float, expected: int) -> None:
    """The ends of the range are exact, and the share does not move the other numbers."""
    drawn, usual = draws(list(range(50)), condition_dropout=share), draws(list(range(50)))
    assert int(drawn.dropped.sum()) == expected
    assert torch.equal(drawn.noise, usual.noise)
    assert torch.equal(drawn.timesteps, usual.timesteps)


def test_the_global_stream_is_not_touched() -> None:
    """Drawing neither reads nor moves torch's global generator."""
    before = torch.get_rng_state()
    draws([0, 1, 2])
    assert torch.equal(torch.get_rng_state(), before)
