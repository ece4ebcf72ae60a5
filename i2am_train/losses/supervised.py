"""Attention supervised by the true correspondence, for comparison: no bound on what other terms reach.

Not in the paper. It needs the exact position of each garment patch, which the embedded data has.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from i2am_train.ops.grids import reference_coordinates
from i2am_train.ops.precision import at_least_float32
from i2am_train.types import GridSize

SCORE_FLOOR = 1e-8
"""Scores below this count as this, so that the gradient 1 / score stays finite in float32."""


def correspondence_cross_entropy(
    scores: Float[Tensor, "batch generated reference"],
    target_yx: Float[Tensor, "batch generated 2"],
    reference_grid: GridSize,
    sigma: float = 1.0,
) -> Float[Tensor, " batch"]:
    """Cross-entropy (nats) from a Gaussian at the true reference position to the scores.

    Mean over the generated patches that have a target; 0 without a gradient where none has. The
    minimum is the entropy of the discrete Gaussian (2.84 nats for sigma 1 away from the border).

    Args:
        target_yx: in reference patches, NaN where a generated patch has no true position
            (:func:`~i2am_train.metrics.correspondence.target_on_grid`).
        sigma: of the Gaussian, in reference patches; 1 was chosen by us, as in CWG.

    >>> scores = torch.tensor([[[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]])
    >>> target = torch.tensor([[[0.0, 1.0], [float("nan"), float("nan")]]])
    >>> correspondence_cross_entropy(scores, target, GridSize(1, 3), sigma=0.1)  # log 2
    tensor([0.6931])
    """
    scores = at_least_float32(scores)
    valid = target_yx.isfinite().all(dim=-1)
    goal = _gaussian(
        torch.where(valid[..., None], target_yx, 0.0).to(scores), reference_grid, sigma
    )
    surprise = -(goal * scores.clamp(min=SCORE_FLOOR).log()).sum(dim=-1)
    return torch.where(valid, surprise, 0.0).sum(dim=-1) / valid.sum(dim=-1).clamp(min=1)


def _gaussian(
    target_yx: Float[Tensor, "batch generated 2"], grid: GridSize, sigma: float
) -> Float[Tensor, "batch generated reference"]:
    places = reference_coordinates(grid, dtype=target_yx.dtype, device=target_yx.device)
    squared = (target_yx[..., None, :] - places).square().sum(dim=-1)
    return torch.softmax(-squared / (2 * sigma**2), dim=-1)
