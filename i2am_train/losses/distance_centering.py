"""Distance-centering maximisation loss: keeps attention centres in the order of their patches.

Along each row of generated patches the x of the centres should grow to the right, along each column
the y downwards (eqs. 16-18). Equations 16 and 17 number the axes the other way round than equation
20; as in the authors' code, component 0 is y and component 1 is x.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from i2am_train.losses.base import RULES, Normaliser, PairForce
from i2am_train.ops.grids import unflatten
from i2am_train.ops.precision import at_least_float32
from i2am_train.types import GridSize, LossVariant


def dcml(
    centers: Float[Tensor, "batch generated 2"],
    mask: Bool[Tensor, "batch generated"],
    generated_grid: GridSize,
    variant: LossVariant = LossVariant.HINGE,
    margin: float = 1.0,
) -> Float[Tensor, " batch"]:
    """DCML of each sample, unweighted, over pairs of cells that both lie in the mask.

    In reference patches (mean or sum over pairs, by variant). 0 without a gradient where the mask
    holds no pair. ``hinge``, ``margin`` and the paper's are at least 0; ``reward`` and the authors'
    at most 0 and bounded by the size of the reference grid.

    Args:
        centers: ``yx`` from :func:`~i2am_train.losses.centers.attention_centers`.
        mask: warped garment on the generated grid.
        margin: for ``margin`` only, in reference patches per step between generated cells. The
            length is one of the reference, so that the value means the same for every layer. What
            can be met depends on the layer: see :func:`identity_stride`.

    >>> centers = torch.tensor([[[0.0, 1.0], [0.0, 0.5], [1.0, 0.0], [0.5, 0.5]]])
    >>> dcml(centers, torch.ones(1, 4, dtype=torch.bool), GridSize(2, 2))  # .5 over 4 pairs
    tensor([0.1250])
    """
    inside = unflatten(mask, generated_grid)
    y, x = unflatten(at_least_float32(centers), generated_grid).unbind(dim=-1)
    rules = RULES[variant]
    x_sum, x_pairs = _sum_over_pairs(x, inside, rules.dcml_force, margin)
    y_sum, y_pairs = _sum_over_pairs(y.mT, inside.mT, rules.dcml_force, margin)
    total = x_sum + y_sum
    match rules.dcml_norm:
        case Normaliser.ONE:
            return total
        case Normaliser.ALL_SLOTS:
            return total / generated_grid.tokens**2
        case Normaliser.VALID:
            return total / (x_pairs + y_pairs).clamp(min=1)


def identity_stride(generated_grid: GridSize, reference_grid: GridSize) -> tuple[float, float]:
    """Reference patches per generated step, ``(y, x)``, if both pictures were overlaid.

    A margin near it asks for the whole reference to be spread over the whole picture, above it for
    the impossible. The default margin of 1 patch is half of it for an 8x6 layer with a 16x12
    reference (measured in trial trainings), and twice the possible for a 32x24 layer.

    >>> identity_stride(GridSize(8, 6), GridSize(16, 12))
    (2.0, 2.0)
    """
    return (
        reference_grid.height / generated_grid.height,
        reference_grid.width / generated_grid.width,
    )


def _sum_over_pairs(
    positions: Float[Tensor, "batch lines cells"],
    inside: Bool[Tensor, "batch lines cells"],
    force: PairForce,
    margin: float,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Sum of the pair term over every first < later on each line, and the number of valid pairs."""
    cells = torch.arange(positions.shape[-1], device=positions.device)
    steps = cells - cells[:, None]  # [first, later]
    valid = inside[..., :, None] & inside[..., None, :] & (steps > 0)
    gaps = positions[..., None, :] - positions[..., :, None]  # later minus first
    terms = torch.where(valid, _pair_term(gaps, steps, force, margin), 0.0)
    return terms.sum(dim=(1, 2, 3)), valid.sum(dim=(1, 2, 3)).to(positions.dtype)


def _pair_term(gaps: Tensor, steps: Tensor, force: PairForce, margin: float) -> Tensor:
    match force:
        case PairForce.REPAIR:
            return torch.relu(-gaps)
        case PairForce.REWARD:
            return -torch.relu(gaps)
        case PairForce.REPAIR_TO_MARGIN:
            return torch.relu(margin * steps - gaps)
        case PairForce.REPAIR_AND_REWARD:
            return -gaps
