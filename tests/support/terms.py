"""Attention terms of a user, good ones and bad ones; and entries of ``objective.terms`` with a weight and no more."""

from typing import Any

from torch import Tensor

from i2am_train.losses.attention import Attention


def weights(**terms: float) -> dict[str, dict[str, Any]]:
    """``objective.terms`` of terms with these weights."""
    return {name: {"weight": weight} for name, weight in terms.items()}


def mass(attention: Attention, *, scale: float = 1.0) -> Tensor:
    """Mean largest score of the patches in the mask."""
    inside = attention.mask
    largest = attention.scores.flatten(3).amax(dim=-1).where(inside, 0.0)
    return scale * largest.flatten(1).sum(dim=1) / inside.flatten(1).sum(dim=1).clamp(min=1)


def product(attention: Attention) -> Tensor:
    """A matrix product, which autocast would compute in half precision."""
    rows = attention.scores.flatten(3).flatten(1, 2)
    return (rows @ rows.mT).flatten(1).sum(dim=1)


def offset(attention: Attention) -> Tensor:
    """Mean distance to the truth along y, for the patches that have one."""
    assert attention.target is not None
    known = attention.mask & attention.target.isfinite().all(dim=-1)
    true = attention.target[..., 0].where(known, 0.0)
    return (attention.centers[..., 0] - true).abs().where(known, 0.0).flatten(1).sum(dim=1)


def batch_mean(attention: Attention) -> Tensor:
    return attention.centers.mean()


def constant(attention: Attention) -> Tensor:
    return attention.mask.flatten(1).sum(dim=1).float()


def empty_mean(attention: Attention) -> Tensor:
    return mass(attention) / attention.mask.flatten(1).sum(dim=1)


def compared(attention: Attention) -> Tensor:
    """Hands a function to `by_patch` that looks at several patches."""
    peaks = attention.by_patch(lambda scores: scores.amax(dim=(-2, -1)) / scores.amax())
    return peaks.where(attention.mask, 0.0).flatten(1).sum(dim=1)


def four_axes(attention: Attention) -> Tensor:
    """Hands a function to `by_patch` that takes patches to have two axes."""
    peaks = attention.by_patch(lambda scores: scores.amax(dim=(3, 4)))
    return peaks.where(attention.mask, 0.0).flatten(1).sum(dim=1)


def two_of_them(attention: Attention, other: Attention) -> Tensor:
    return mass(attention) + mass(other)
