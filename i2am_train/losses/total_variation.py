"""Total variation of attention centres: neighbours look at neighbouring places (eq. 19)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from i2am_train.losses.base import RULES, Normaliser, VariantRules
from i2am_train.ops.grids import unflatten
from i2am_train.ops.precision import at_least_float32
from i2am_train.types import GridSize, LossVariant


def total_variation(
    centers: Float[Tensor, "batch generated 2"],
    mask: Bool[Tensor, "batch generated"],
    generated_grid: GridSize,
    variant: LossVariant = LossVariant.HINGE,
) -> Float[Tensor, " batch"]:
    """TV of each sample, unweighted, over neighbours (right, below) that both lie in the mask.

    In squared reference patches (patches for ``authors_v1``), at least 0; 0 without a gradient
    where no two neighbours are in the mask. The minimum is a constant centre: this term needs DCML
    beside it.

    >>> centers = torch.tensor([[[0.0, 1.0], [0.0, 0.5], [1.0, 0.0], [0.5, 0.5]]])
    >>> total_variation(centers, torch.ones(1, 4, dtype=torch.bool), GridSize(2, 2))  # 3 / 4 pairs
    tensor([0.7500])
    """
    rules = RULES[variant]
    inside = unflatten(mask, generated_grid)
    on_grid = unflatten(at_least_float32(centers), generated_grid)
    down, down_pairs = _along_axis(on_grid, inside, 1, rules)
    right, right_pairs = _along_axis(on_grid, inside, 2, rules)
    if rules.tv_norm is Normaliser.VALID:
        return (down + right) / (down_pairs + right_pairs).clamp(min=1)
    return down + right


def _along_axis(
    on_grid: Float[Tensor, "batch height width 2"],
    inside: Bool[Tensor, "batch height width"],
    axis: int,
    rules: VariantRules,
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Sum over valid neighbours along one axis, and their number."""
    differences = on_grid.diff(dim=axis)
    valid = _both_inside(inside, axis)
    terms = torch.where(valid[..., None], differences.abs() ** rules.tv_power, 0.0)
    total = terms.sum(dim=(1, 2, 3))
    if rules.tv_norm is Normaliser.ALL_SLOTS:  # the authors average each direction on its own
        total = total / max(1, differences[0].numel())
    return total, valid.sum(dim=(1, 2))


def _both_inside(
    inside: Bool[Tensor, "batch height width"], axis: int
) -> Bool[Tensor, "batch rows columns"]:
    length = inside.shape[axis]
    return inside.narrow(axis, 0, length - 1) & inside.narrow(axis, 1, length - 1)
