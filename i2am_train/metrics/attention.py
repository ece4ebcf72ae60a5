"""Scores of attention: does it lie inside the masks (IMACS), look at the right place, and has it collapsed?

Of masks: ``imacs_g`` is the score of a reference-to-generated map against the inpainting mask, ``imacs_r`` that of a
generated-to-reference map against the garment mask. IMACS does not see a collapse of the attention to one point: read
it beside the others.

Of places: positions are ``yx`` in reference patches, 0 at the centre of the first patch. The truth comes from the
dataset's exact correspondence. Where there is none, the spread of the centres and the entropy of the attention still
tell a collapse. In super-resolution the reference is the same picture, so that a patch should look at its own place
(`alignment`). The paper shows by eye that it does in PASD's middle layers and less so in the last ones (section 5.3,
Figs. 9 and 18); these are the numbers for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from i2am_train.attention.maps import AttributionMaps
from i2am_train.errors import ConfigError, DataError
from i2am_train.ops.grids import aligned_coordinates, mask_on_grid, reference_coordinates, scaled
from i2am_train.ops.numerics import at_least_float32
from i2am_train.types import Direction, GridSize

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

    In [-penalty, 1]; 1 for a map that is 1 inside and 0 outside. NaN for a sample whose mask is empty: it has no score.
    If the mask covers everything, the outside counts as 0.

    Args:
        heat_map: min-max normalised to [0, 1], thresholded at delta (the paper's is 0.4) and at image size; this
            function does not threshold. A constant map is all 0.
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

    ``imacs_g`` and ``imacs_r`` without a suffix are those of the configuration's own delta and lambda; they stand there
    under both names.

    >>> imacs_column("imacs_g", delta=0.4, penalty=3.0)
    'imacs_g@d0.4_l3'
    """
    return f"{name}@d{delta:g}_l{penalty:g}"


def _mean_inside(
    values: Float[Tensor, "batch height width"], mask: Bool[Tensor, "batch height width"]
) -> Float[Tensor, " batch"]:
    """Mean over the mask; NaN (0 / 0) where it is empty.

    The authors add 1e-8 to the number of pixels. Counts are whole numbers, so that it only matters where the mask is
    empty, which has an answer of its own here.
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

    The mean over the cell's garment pixels, for cells that lie at least half on the garment; NaN for the others, and
    where the cell has no pixel with a known position.

    Args:
        correspondence: of each pixel, ``yx`` in units of the flat garment's height and width, so that row ``r`` of
            ``H`` is ``(r + .5) / H``; NaN where there is none. A value ``v`` is the position ``v * patches - .5``.
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
    target = scaled(mean.flatten(2).mT, *map(float, reference_grid)) - 0.5
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

    The root mean square distance from their mean position. 0 where all centres coincide; NaN for an empty mask.

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

    Over the patches that have a target; NaN where the targets have no spread (one patch or none). Where the truth is
    unknown, :func:`~i2am_train.ops.grids.aligned_coordinates`, NaN outside the garment, is a yardstick.

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

    In [0, 1] as a share of the entropy of uniform attention: 0 looks at one patch, 1 at all alike. In nats if not
    ``normalised``. A single reference patch has entropy 0.

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

    Warns if the centres' spread falls below 0.3 of the truth's, or if the attention is almost uniform (normalised
    entropy above 0.95), so that its centres mean nothing. Sharp attention alone is no collapse: a perfect
    correspondence is sharp.

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


class Alignment(NamedTuple):
    """Of one layer, a value per sample; 0, 0 and 1 where every patch looks at its own place."""

    distance: Float[Tensor, " batch"]
    """Mean distance of the attention from the patch's own position, in reference patches."""
    relative: Float[Tensor, " batch"]
    """The same as a share of the reference's diagonal, in [0, 1]: comparable between grids."""
    within: Float[Tensor, " batch"]
    """Share of the attention within ``radius`` patches of the own position, in [0, 1]."""


def alignment(
    scores: Float[Tensor, "batch generated reference"],
    generated_grid: GridSize,
    reference_grid: GridSize,
    radius: float = 1.0,
) -> Alignment:
    """Alignment of attention between two pictures that show the same.

    Distances are expectations under the attention, not distances of its centre: attention that is spread evenly has its
    centre on every middle patch, and is not aligned with any.

    >>> one_to_the_right = torch.eye(3)[[1, 2, 2]].expand(2, 3, 3)  # the last one looks at itself
    >>> [round(float(value[0]), 3) for value in alignment(one_to_the_right, GridSize(1, 3), GridSize(1, 3))]
    [0.667, 0.211, 1.0]
    """
    values = at_least_float32(scores)
    away = _away(values, generated_grid, reference_grid)
    distance = (values * away).sum(dim=-1).mean(dim=-1)
    near = (away <= radius + 1e-6).to(values)
    return Alignment(distance, distance / _diagonal(reference_grid), (values * near).sum(dim=-1).mean(dim=-1))


def patch_distance(
    scores: Float[Tensor, "batch generated reference"], generated_grid: GridSize, reference_grid: GridSize
) -> Float[Tensor, "batch generated"]:
    """Mean distance of each generated patch's attention from its own position, as a share of the reference's diagonal,
    in [0, 1]; the mean over patches is `Alignment.relative`.

    >>> swapped = torch.eye(4)[[3, 1, 2, 0]].expand(2, 4, 4)  # two corners of a square look across
    >>> [round(value, 3) for value in patch_distance(swapped, GridSize(2, 2), GridSize(2, 2))[0].tolist()]
    [0.5, 0.0, 0.0, 0.5]
    """
    values = at_least_float32(scores)
    away = _away(values, generated_grid, reference_grid)
    return (values * away).sum(dim=-1) / _diagonal(reference_grid)


def _even_alignment(generated_grid: GridSize, reference_grid: GridSize) -> Alignment:
    """What attention that is spread evenly would have: the value of no alignment at all.

    >>> round(float(_even_alignment(GridSize(1, 2), GridSize(1, 2)).distance), 3)
    0.5
    """
    shape = (1, generated_grid.tokens, reference_grid.tokens)
    even = torch.full(shape, 1 / reference_grid.tokens)
    return alignment(even, generated_grid, reference_grid)


def _away(values: Tensor, generated_grid: GridSize, reference_grid: GridSize) -> Float[Tensor, "generated reference"]:
    """Distance of each reference cell from each generated patch's own place, in reference cells."""
    dtype, device = values.dtype, values.device
    own = aligned_coordinates(generated_grid, reference_grid, dtype=dtype, device=device)
    cells = reference_coordinates(reference_grid, dtype=dtype, device=device)
    away: Tensor = torch.linalg.vector_norm(own[:, None] - cells[None], dim=-1)
    return away


def _diagonal(grid: GridSize) -> float:
    return math.hypot(grid.height, grid.width)


def layer_alignment(maps: AttributionMaps) -> dict[str, Alignment]:
    """Alignment of every layer that was traced with its matrix (``matrix_layers``), in the order in which the model
    runs them.

    The matrices are means over heads and steps. A layer with N generated and M reference tokens costs ``8 N M`` bytes
    per sample: 134 MB for 64x64 tokens on both sides.

    >>> from i2am_train.attention import AttributionStore, LayerRecord
    >>> even, own = torch.full((1, 1, 1, 2), 0.5), torch.eye(2)[None]  # each patch looks at its own place
    >>> record = LayerRecord("a", GridSize(1, 2), GridSize(1, 2), even, even, scores_over_reference=own)
    >>> layer_alignment(AttributionMaps(AttributionStore((record,), (None,))))["a"].distance
    tensor([0.])
    """
    found = {}
    for record in maps.store.layers:
        if record.scores_over_reference is not None:
            grid = record.grid(Direction.GENERATED_TO_REFERENCE)
            scores = record.scores_over_reference
            found[record.layer] = alignment(scores, record.generated_grid, grid)
    return found


def alignment_table(maps: AttributionMaps) -> list[dict[str, Any]]:
    """The mean over samples of each layer's alignment, ready for JSON, in the order of the layers.

    ``distance`` counts reference patches, ``relative`` is a share of the diagonal, ``within_one`` the share of the
    attention at most one patch away; ``even`` is the ``relative`` of attention that is spread evenly. Layers without a
    score matrix are left out.

    >>> from i2am_train.attention import AttributionStore, LayerRecord
    >>> even, own = torch.full((1, 1, 1, 2), 0.5), torch.eye(2)[None]
    >>> record = LayerRecord("a", GridSize(1, 2), GridSize(1, 2), even, even, scores_over_reference=own)
    >>> (row,) = alignment_table(AttributionMaps(AttributionStore((record,), (None,))))
    >>> row["relative"], round(row["even"], 3)
    (0.0, 0.224)
    """
    rows = []
    for layer, found in layer_alignment(maps).items():
        record = maps.store.layer(layer)
        grids = record.generated_grid, record.grid(Direction.GENERATED_TO_REFERENCE)
        rows.append(
            {
                "layer": layer,
                "generated_grid": grids[0],
                "reference_grid": grids[1],
                "distance": float(found.distance.mean()),
                "relative": float(found.relative.mean()),
                "within_one": float(found.within.mean()),
                "even": float(_even_alignment(*grids).relative),
            }
        )
    return rows
