"""Centre-weighted Gaussian loss: attention gathers around its own centre (eqs. 20-21)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from i2am_train.losses.base import RULES, Normaliser
from i2am_train.losses.centers import unflatten_reference
from i2am_train.ops.precision import at_least_float32
from i2am_train.types import GridSize, LossVariant


def center_weighted(
    scores: Float[Tensor, "batch generated reference"],
    centers: Float[Tensor, "batch generated 2"],
    mask: Bool[Tensor, "batch generated"],
    reference_grid: GridSize,
    variant: LossVariant = LossVariant.HINGE,
    sigma: float | None = None,
    detach_centers: bool = False,
    counted: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """CWG of each sample, unweighted: minus the score mass near the centre, over masked patches.

    In [-1, 0] for the mean-normalised variants, -1 where every patch attends to a single place;
    exactly 0 without a gradient for an empty mask.

    ``authors_v1`` divides by the masks' cells of the whole batch. Its values are such that their mean
    over the samples that count is that quotient; the mean is in [-1, 0], single values may be below.
    A batch is what the call sees: with several processes, or gradients accumulated over batches, the
    mean over all samples is that of the batches' quotients, weighted by their numbers of samples, which
    are equal in the authors' code.

    Args:
        centers: of the same scores and the same variant.
        sigma: in reference patches; None takes the variant's own (1, or 0.5 for ``authors_v1``).
        detach_centers: whether the gradient flows through the scores only. The default also drags
            the centre towards mass that exists, as the authors' code does.
        counted: the samples that the caller averages over, None for all; the others' masks are empty.

    >>> scores = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.5, 0.5]]])
    >>> centers = torch.tensor([[[0.0, 1.0], [0.0, 1.5]]])
    >>> mask = torch.ones(1, 2, dtype=torch.bool)
    >>> center_weighted(scores, centers, mask, GridSize(1, 3))  # (1 + exp(-1/8)) / 2
    tensor([-0.9412])
    """
    rules = RULES[variant]
    scores, centers = at_least_float32(scores), at_least_float32(centers)
    if detach_centers:
        centers = centers.detach()
    on_grid = unflatten_reference(scores, reference_grid)
    squared = _squared_distances(centers, reference_grid, rules.coordinate_origin)
    distance = squared if rules.cwg_squared_distance else _safe_sqrt(squared)
    width = variant.sigma if sigma is None else sigma
    near = (torch.exp(-distance / (2 * width**2)) * on_grid).sum(dim=(-2, -1))
    total = -torch.where(mask, near, 0.0).sum(dim=-1)
    match rules.cwg_norm:
        case Normaliser.ONE:
            return total
        case Normaliser.ALL_SLOTS:
            return total / (scores.shape[1] * scores.shape[2])
        case Normaliser.VALID:
            if not rules.cwg_of_batch:
                return total / mask.sum(dim=-1).clamp(min=1)
            samples = len(mask) if counted is None else counted.sum()
            return total * samples / mask.sum().clamp(min=1)


def _squared_distances(
    centers: Float[Tensor, "batch generated 2"], grid: GridSize, origin: int
) -> Float[Tensor, "batch generated height width"]:
    rows = torch.arange(grid.height, dtype=centers.dtype, device=centers.device) + origin
    columns = torch.arange(grid.width, dtype=centers.dtype, device=centers.device) + origin
    y, x = centers.unbind(dim=-1)
    vertical = (y[..., None] - rows).square()
    horizontal = (x[..., None] - columns).square()
    return vertical[..., :, None] + horizontal[..., None, :]


def _safe_sqrt(squared: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 and not infinite, as that of torch's norm."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)
