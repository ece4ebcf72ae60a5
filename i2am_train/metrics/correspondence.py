"""Whether attention looks at the right place of the reference, and whether it has collapsed.

Positions are ``yx`` in reference patches, 0 at the centre of the first patch. The truth comes from
the dataset's exact correspondence. Where there is none, the spread of the centres and the entropy
of the attention still tell a collapse, which IMACS does not see.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from i2am_train.ops.grids import mask_on_grid
from i2am_train.ops.precision import at_least_float32
from i2am_train.types import GridSize

MINIMUM_SPREAD_RATIO = 0.3
"""Chosen by us: in trial trainings healthy arms kept .55 or more, the collapsed one (``paper``'s losses) had 0."""
MAXIMUM_ENTROPY = 0.95
"""Chosen by us: at least three quarters of the patches share the attention (192 ** .95 = 148)."""
SHARP_ENTROPY = 0.2
"""Chosen by us, to word the warning: about three patches share the attention (192 ** .2 = 2.9)."""


def target_on_grid(
    correspondence: Float[Tensor, "batch height width 2"],
    warped_mask: Bool[Tensor, "batch height width"],
    generated_grid: GridSize,
    reference_grid: GridSize,
) -> Float[Tensor, "batch generated 2"]:
    """True reference position of each generated cell, ``yx`` in reference patches.

    The mean over the cell's garment pixels, for cells that lie at least half on the garment; NaN
    for the others, and where the cell has no pixel with a known position.

    Args:
        correspondence: of each pixel, ``yx`` in units of the flat garment's height and width, so
            that row ``r`` of ``H`` is ``(r + .5) / H``; NaN where there is none. A value ``v`` is
            the position ``v * patches - .5``.
        warped_mask: garment on the person.

    >>> known = torch.tensor([[[[0.5, 0.25], [0.5, 0.75]]]])  # one row, two pixels
    >>> on_garment = torch.ones(1, 1, 2, dtype=torch.bool)
    >>> target_on_grid(known, on_garment, GridSize(1, 2), GridSize(1, 4))[0].tolist()
    [[0.0, 0.5], [0.0, 2.5]]
    """
    positions = at_least_float32(correspondence)
    known = (warped_mask & positions.isfinite().all(dim=-1))[:, None].to(positions)
    size = (generated_grid.height, generated_grid.width)
    pixels = torch.where(known.bool(), positions.movedim(-1, 1), 0.0)
    mean = F.adaptive_avg_pool2d(pixels, size) / F.adaptive_avg_pool2d(known, size)
    patches = mean.new_tensor(reference_grid)
    target = mean.flatten(2).mT * patches - 0.5
    return torch.where(mask_on_grid(warped_mask, generated_grid)[..., None], target, torch.nan)


def correspondence_error(
    centers: Float[Tensor, "batch generated 2"], target: Float[Tensor, "batch generated 2"]
) -> Float[Tensor, " batch"]:
    """Mean distance in reference patches between attention centres and the truth.

    Over the patches that have a target; NaN for a sample without any.

    >>> nan = float("nan")
    >>> centers = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]]])
    >>> target = torch.tensor([[[3.0, 4.0], [1.0, 1.0], [nan, nan]]])
    >>> correspondence_error(centers, target)  # (5 + 0) / 2
    tensor([2.5000])
    """
    distance, valid = _distances(centers, target)
    return _mean_where(distance, valid)


def pck(
    centers: Float[Tensor, "batch generated 2"], target: Float[Tensor, "batch generated 2"], radius: float = 1.0
) -> Float[Tensor, " batch"]:
    """Share of attention centres within ``radius`` reference patches of the truth, in [0, 1].

    Percentage of correct keypoints. Over the patches that have a target; NaN without any.

    >>> centers = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    >>> pck(centers, torch.tensor([[[3.0, 4.0], [1.0, 2.0]]]), radius=1.0)
    tensor([0.5000])
    """
    distance, valid = _distances(centers, target)
    return _mean_where((distance <= radius).to(distance), valid)


def center_spread(
    centers: Float[Tensor, "batch generated 2"], mask: Bool[Tensor, "batch generated"]
) -> Float[Tensor, " batch"]:
    """Standard deviation of the attention centres in reference patches, over the masked patches.

    The root mean square distance from their mean position. 0 where all centres coincide; NaN for an
    empty mask.

    >>> centers = torch.tensor([[[0.0, 0.0], [6.0, 8.0], [9.0, 9.0]]])
    >>> center_spread(centers, torch.tensor([[True, True, False]]))
    tensor([5.])
    """
    inside = torch.where(mask[..., None], at_least_float32(centers), 0.0)
    count = mask.sum(dim=-1)
    middle = inside.sum(dim=1) / count[:, None]
    squared = (inside - middle[:, None]).square().sum(dim=-1)
    return _mean_where(squared, mask).sqrt()


def spread_ratio(
    centers: Float[Tensor, "batch generated 2"], target: Float[Tensor, "batch generated 2"]
) -> Float[Tensor, " batch"]:
    """Spread of the attention centres over that of the truth; about 1 is right, 0 is collapsed.

    Over the patches that have a target; NaN where the targets have no spread (one patch or none).
    Where the truth is unknown, :func:`~i2am_train.ops.grids.aligned_coordinates`, NaN outside the
    garment, is a yardstick.

    >>> target = torch.tensor([[[0.0, 0.0], [0.0, 4.0]]])
    >>> spread_ratio(torch.tensor([[[2.0, 2.0], [2.0, 3.0]]]), target)
    tensor([0.2500])
    """
    valid = target.isfinite().all(dim=-1)
    truth = center_spread(target, valid)
    return center_spread(centers, valid) / torch.where(truth > 0, truth, torch.nan)


def attention_entropy(
    scores: Float[Tensor, "batch generated reference"], mask: Bool[Tensor, "batch generated"], normalised: bool = True
) -> Float[Tensor, " batch"]:
    """Mean entropy of the attention rows over the masked patches; NaN for an empty mask.

    In [0, 1] as a share of the entropy of uniform attention: 0 looks at one patch, 1 at all alike.
    In nats if not ``normalised``. A single reference patch has entropy 0.

    >>> scores = torch.tensor([[[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]])
    >>> attention_entropy(scores, torch.tensor([[True, True]]))
    tensor([0.5000])
    """
    entropy = torch.special.entr(at_least_float32(scores)).sum(dim=-1)
    reference = scores.shape[-1]
    unit = math.log(reference) if normalised and reference > 1 else 1.0
    return _mean_where(entropy / unit, mask)


def collapse_warning(ratio: float | None, entropy: float) -> str | None:
    """One sentence if the attention has collapsed, else None.

    Warns if the centres' spread falls below 0.3 of the truth's, or if the attention is almost
    uniform (normalised entropy above 0.95), so that its centres mean nothing. Sharp attention alone
    is no collapse: a perfect correspondence is sharp.

    Args:
        ratio: dataset mean of :func:`spread_ratio`; None or NaN where it is unknown.
        entropy: dataset mean of :func:`attention_entropy`, normalised.

    >>> collapse_warning(0.9, 0.3) is None
    True
    >>> print(collapse_warning(0.02, 0.1)[:36])
    Attention has collapsed to one place
    """
    if entropy > MAXIMUM_ENTROPY:
        return (
            f"Attention is almost uniform: its entropy is {entropy:.2f} of the largest possible "
            f"(limit {MAXIMUM_ENTROPY}), so that its centres say nothing. Raise the weight of cwg."
        )
    if ratio is None or not ratio < MINIMUM_SPREAD_RATIO:
        return None
    where = "to one place" if entropy < SHARP_ENTROPY else "towards the middle"
    return (
        f"Attention has collapsed {where}: the spread of its centres is {ratio:.2f} of the truth's "
        f"(limit {MINIMUM_SPREAD_RATIO}), its entropy {entropy:.2f} of the largest possible. IMACS "
        "does not see this. Training with attention losses: lower the weights of tv and cwg, or use "
        "a variant that keeps centres apart (reward, mixed)."
    )


def _distances(
    centers: Float[Tensor, "batch generated 2"], target: Float[Tensor, "batch generated 2"]
) -> tuple[Float[Tensor, "batch generated"], Bool[Tensor, "batch generated"]]:
    valid = target.isfinite().all(dim=-1)
    distance = torch.linalg.vector_norm(at_least_float32(centers) - target, dim=-1)
    return distance, valid


def _mean_where(
    values: Float[Tensor, "batch generated"], valid: Bool[Tensor, "batch generated"]
) -> Float[Tensor, " batch"]:
    """Mean over the valid patches; NaN (0 / 0) where there are none."""
    return torch.where(valid, values, 0.0).sum(dim=-1) / valid.sum(dim=-1)
