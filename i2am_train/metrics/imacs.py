"""IMACS: how much of an attribution map lies inside a mask, and how little outside (paper eq. 8).

``imacs_g`` is the score of a reference-to-generated map against the inpainting mask, ``imacs_r``
that of a generated-to-reference map against the garment mask. IMACS does not see a collapse of the
attention to one point: read it beside :mod:`i2am_train.metrics.correspondence`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from i2am_train.errors import ConfigError, DataError

DEFAULT_PENALTY = 3.0
"""Lambda of the paper's main results (section 5.4)."""

RANGE_TOLERANCE = 1e-6
"""Rounding of a map that was normalised in float32."""


def imacs(
    heat_map: Float[Tensor, "batch height width"],
    mask: Bool[Tensor, "batch height width"],
    penalty: float | Sequence[float] = DEFAULT_PENALTY,
) -> Float[Tensor, " batch"] | Float[Tensor, "penalties batch"]:
    """Mean of the map inside the mask minus ``penalty`` times its mean outside (eq. 8).

    In [-penalty, 1]; 1 for a map that is 1 inside and 0 outside. NaN for a sample whose mask is
    empty: it has no score. If the mask covers everything, the outside counts as 0.

    Args:
        heat_map: min-max normalised to [0, 1], thresholded at delta (the paper's is 0.4) and at
            image size; this function does not threshold. A constant map is all 0.
        mask: of the same size.
        penalty: lambda. A sequence gives one row per value, from the same two means.

    Raises:
        ConfigError: for a negative penalty.
        DataError: for map values outside [0, 1], NaN included.

    >>> heat_map = torch.tensor([[[0.0, 0.0, 0.45], [0.0, 0.9, 0.0], [0.41, 1.0, 0.62],
    ...                           [0.0, 0.55, 0.0]]])
    >>> mask = torch.tensor([[[0, 0, 0], [0, 1, 1], [0, 1, 1], [0, 1, 0]]], dtype=torch.bool)
    >>> imacs(heat_map, mask, penalty=3.0)  # 3.07 / 5 - 3 * 0.86 / 7
    tensor([0.2454])
    >>> imacs(heat_map, mask, penalty=(1.0, 3.0))[:, 0]
    tensor([0.4911, 0.2454])
    """
    penalties = _checked_penalties(penalty)
    values = _checked_map(heat_map)
    inside = _mean_inside(values, mask)
    outside = _mean_inside(values, ~mask).nan_to_num(nan=0.0)
    rows = torch.stack([inside - weight * outside for weight in penalties])
    return rows if isinstance(penalty, Sequence) else rows[0]


def imacs_column(name: str, delta: float, penalty: float) -> str:
    """Name of a score at one threshold and one penalty, in rows, results and logs.

    ``imacs_g`` and ``imacs_r`` without a suffix are those of the configuration's own delta and
    lambda; they stand there under both names.

    >>> imacs_column("imacs_g", delta=0.4, penalty=3.0)
    'imacs_g@d0.4_l3'
    """
    return f"{name}@d{delta:g}_l{penalty:g}"


def _mean_inside(
    values: Float[Tensor, "batch height width"], mask: Bool[Tensor, "batch height width"]
) -> Float[Tensor, " batch"]:
    """Mean over the mask; NaN (0 / 0) where it is empty.

    The authors add 1e-8 to the number of pixels. Counts are whole numbers, so that it only matters
    where the mask is empty, which has an answer of its own here.
    """
    return torch.where(mask, values, 0.0).sum(dim=(1, 2)) / mask.sum(dim=(1, 2))


def _checked_penalties(penalty: float | Sequence[float]) -> tuple[float, ...]:
    penalties = tuple(penalty) if isinstance(penalty, Sequence) else (penalty,)
    if not penalties or not all(value >= 0 for value in penalties):
        raise ConfigError(
            f"The IMACS penalty (lambda) is {penalty}. Give one number, or several, that are at "
            "least 0; the paper uses 3."
        )
    return penalties


def _checked_map(heat_map: Float[Tensor, "batch height width"]) -> Tensor:
    values = heat_map if heat_map.dtype is torch.float64 else heat_map.float()
    if values.numel() and not (values.min() >= -RANGE_TOLERANCE and values.max() <= 1 + RANGE_TOLERANCE):
        raise DataError(
            f"IMACS needs maps in [0, 1], found values from {values.min():.4g} to "
            f"{values.max():.4g}. Normalise the map (HeatMap.normalised) before scoring it."
        )
    return values
