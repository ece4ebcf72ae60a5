"""Attention centres: the mean reference position that each generated patch attends to (eq. 15)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from i2am_train.errors import CaptureError
from i2am_train.losses.base import RULES
from i2am_train.ops.precision import at_least_float32
from i2am_train.types import GridSize, LossVariant


def attention_centers(
    scores: Float[Tensor, "batch generated reference"],
    reference_grid: GridSize,
    variant: LossVariant = LossVariant.HINGE,
) -> Float[Tensor, "batch generated 2"]:
    """Centre of mass of each generated patch's attention, ``yx`` in reference patches (eq. 15).

    The range is [0, height - 1] x [0, width - 1]; the readings of the paper count from 1, and the
    literal one divides by the number of patches. Scores are a softmax over the reference patches,
    averaged over heads.

    Raises:
        CaptureError: if the reference grid does not have as many cells as the scores.

    >>> scores = torch.tensor([[[0.0, 0.0, 0.0, 0.5, 0.0, 0.5], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]])
    >>> attention_centers(scores, GridSize(3, 2))[0]
    tensor([[1.5000, 1.0000],
            [0.0000, 0.0000]])
    """
    rules = RULES[variant]
    on_grid = unflatten_reference(at_least_float32(scores), reference_grid)
    y = _first_moment(on_grid.sum(dim=-1), rules.coordinate_origin)
    x = _first_moment(on_grid.sum(dim=-2), rules.coordinate_origin)
    centers = torch.stack((y, x), dim=-1)
    return centers / reference_grid.tokens if rules.centre_factor else centers


def unflatten_reference(
    scores: Float[Tensor, "batch generated reference"], reference_grid: GridSize
) -> Float[Tensor, "batch generated height width"]:
    """Split the reference axis into rows and columns; CaptureError if the grid does not fit."""
    if scores.shape[-1] != reference_grid.tokens:
        raise CaptureError(
            f"The scores have {scores.shape[-1]} reference tokens, but a reference grid of "
            f"{reference_grid} has {reference_grid.tokens}. Drop special tokens before the "
            "softmax and pass the grid of the patches."
        )
    return scores.reshape(*scores.shape[:2], reference_grid.height, reference_grid.width)


def _first_moment(
    mass: Float[Tensor, "batch generated cells"], origin: int
) -> Float[Tensor, "batch generated"]:
    positions = torch.arange(origin, origin + mass.shape[-1], dtype=mass.dtype, device=mass.device)
    return (mass * positions).sum(dim=-1)
