"""What is wrong with a layer's attention, told without knowing where it should look; and whether it should be repaired.

Positions are ``yx`` in patches of their grid, 0 at the centre of the first, row-major. What a faithful layer has stands
with each figure. Two of them are from elsewhere: order violations count the pairs that the paper's loss orders (eqs. 16
to 18), and `rank_correlation` and `where_correlation` are those of :mod:`i2am_train.metrics.faithfulness`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from i2am_train.metrics.attention import MINIMUM_SPREAD_RATIO, center_spread
from i2am_train.ops.grids import reference_coordinates, unflatten
from i2am_train.ops.numerics import at_least_float32
from i2am_train.types import GridSize

SINK_SHARE = 0.01
"""Share of the reference tokens that may be sinks (issue 14); at least one token."""


def order_violations(
    centers: Float[Tensor, "batch generated 2"], mask: Bool[Tensor, "batch generated"], grid: GridSize
) -> Float[Tensor, " batch"]:
    """Share of pairs of generated patches whose attention centres are out of order, in [0, 1].

    Pairs are those of the paper's order loss: two masked patches of one row, whose centres should lie in the same order
    from left to right, or of one column, from top to bottom. 0 is faithful (of an upright garment), .5 is chance: equal
    centres count half. NaN without a pair.

    Args:
        grid: of the generated patches.

    >>> centers = torch.tensor([[[0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]])  # a row out of order, one of equals
    >>> order_violations(centers, torch.ones(1, 4, dtype=torch.bool), GridSize(2, 2))  # (1 + .5 + 0 + 0) / 4
    tensor([0.3750])
    """
    y, x = unflatten(at_least_float32(centers), grid).unbind(dim=-1)
    inside = unflatten(mask, grid)
    (along_rows, row_pairs), (along_columns, column_pairs) = _disorder(x, inside), _disorder(y.mT, inside.mT)
    return (along_rows + along_columns) / (row_pairs + column_pairs)


def _disorder(
    positions: Float[Tensor, "batch lines cells"], inside: Bool[Tensor, "batch lines cells"]
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Pairs out of order on all lines, and how many pairs there are."""
    cells = positions.shape[-1]
    later = torch.ones(cells, cells, dtype=torch.bool, device=positions.device).triu(diagonal=1)
    pairs = inside[..., :, None] & inside[..., None, :] & later
    gaps = positions[..., None, :] - positions[..., :, None]
    wrong = (gaps < 0).to(positions) + 0.5 * (gaps == 0).to(positions)
    return torch.where(pairs, wrong, 0.0).sum(dim=(1, 2, 3)), pairs.sum(dim=(1, 2, 3)).to(positions)


def extent_ratio(
    centers: Float[Tensor, "batch generated 2"],
    mask: Bool[Tensor, "batch generated"],
    garment: Bool[Tensor, "batch reference"],
    grid: GridSize,
) -> Float[Tensor, " batch"]:
    """Spread of the attention centres over that of the garment's own patches on the reference.

    Root mean square distances from the mean position. About 1 is faithful where the image shows all of the garment,
    less where it shows a part; 0 is collapsed. NaN for an empty mask or a garment without extent.

    Args:
        garment: the reference patches that lie on it.
        grid: of the reference patches.

    >>> centers, everywhere = torch.tensor([[[0.0, 1.0], [0.0, 2.0]]]), torch.ones(1, 4, dtype=torch.bool)
    >>> extent_ratio(centers, torch.ones(1, 2, dtype=torch.bool), everywhere, GridSize(1, 4))  # .5 / 1.118
    tensor([0.4472])
    """
    places = reference_coordinates(grid, device=centers.device).expand(len(centers), -1, -1)
    extent = center_spread(places, garment)
    return center_spread(centers, mask) / torch.where(extent > 0, extent, torch.nan)


def round_trip(
    over_reference: Float[Tensor, "batch generated reference"],
    over_generated: Float[Tensor, "batch generated reference"],
    mask: Bool[Tensor, "batch generated"],
    grid: GridSize,
) -> Float[Tensor, " batch"]:
    """Agreement of the two directions: how much of a patch's place is left after the way to the reference and back.

    A generated patch goes to the reference as its row of the softmax over the reference says, and back as the columns
    of the softmax over the generated patches say. The slope of where it arrives against where it began, over the masked
    patches: 1 if every patch comes back to its own place, 0 if all arrive at one place, as with uniform or collapsed
    attention. For a single softmax it cannot leave [0, 1] (the way there and back is a reversible Markov chain without
    negative eigenvalues), for means over heads and steps hardly. It knows no truth: patches that look at each other in
    any order agree. NaN without two places.

    Args:
        grid: of the generated patches.

    >>> swapped = torch.eye(4)[[3, 1, 2, 0]][None]
    >>> everywhere = torch.ones(1, 4, dtype=torch.bool)
    >>> round_trip(swapped, swapped, everywhere, GridSize(2, 2))
    tensor([1.])
    >>> round_trip(torch.full((1, 4, 4), 0.25), torch.full((1, 4, 4), 0.25), everywhere, GridSize(2, 2))
    tensor([0.])
    """
    start = reference_coordinates(grid, device=over_reference.device).expand(len(over_reference), -1, -1)
    end = over_reference @ (over_generated.mT @ start)
    began, arrived = _from_mean(start, mask), _from_mean(end, mask)
    return (began * arrived).sum(dim=(1, 2)) / began.square().sum(dim=(1, 2))


def concordance(
    first: Float[Tensor, "batch patch 2"], second: Float[Tensor, "batch patch 2"], mask: Bool[Tensor, "batch patch"]
) -> Float[Tensor, " batch"]:
    """Agreement of two fields of positions over the masked patches, in [-1, 1].

    Lin's concordance correlation coefficient (Biometrics 45, 1989), both coordinates pooled: 1 only if the fields are
    equal, and near 0 if one of them hardly varies, where a plain correlation would be that of rounding. NaN where both
    are a single point.

    >>> field = torch.tensor([[[0.0, 0.0], [1.0, 2.0]]])
    >>> everywhere = torch.ones(1, 2, dtype=torch.bool)
    >>> concordance(field, field, everywhere), concordance(field, field / 2, everywhere)
    (tensor([1.]), tensor([0.6667]))
    """
    x, y = _from_mean(first, mask), _from_mean(second, mask)
    apart = (_mean(first, mask) - _mean(second, mask)).square().sum(dim=(1, 2)) * mask.sum(dim=1)
    return 2 * (x * y).sum(dim=(1, 2)) / (x.square().sum(dim=(1, 2)) + y.square().sum(dim=(1, 2)) + apart)


def _mean(values: Float[Tensor, "batch patch 2"], mask: Bool[Tensor, "batch patch"]) -> Float[Tensor, "batch 1 2"]:
    return torch.where(mask[..., None], values, 0.0).sum(dim=1, keepdim=True) / mask.sum(dim=1)[:, None, None]


def _from_mean(values: Float[Tensor, "batch patch 2"], mask: Bool[Tensor, "batch patch"]) -> Tensor:
    """Distances from the masked patches' mean; 0 outside."""
    return torch.where(mask[..., None], values - _mean(values, mask), 0.0)


def sink_mass(mass: Float[Tensor, "*batch reference"]) -> Float[Tensor, " *batch"]:
    """Share of the attention that the hundredth of the reference tokens gets which get most, in [0, 1].

    At least one token, so that uniform attention has `sink_floor`. A garment's detail draws attention, too: a sink is
    told by a share that is high in all samples and steps.

    Args:
        mass: attention of each token; its sum may be anything but 0.

    >>> sink_mass(torch.tensor([[0.7, 0.1, 0.1, 0.1]]))
    tensor([0.7000])
    """
    most = mass.topk(_sinks(mass.shape[-1]), dim=-1).values
    return most.sum(dim=-1) / mass.sum(dim=-1)


def sink_floor(tokens: int) -> float:
    """`sink_mass` of uniform attention.

    >>> sink_floor(1036), sink_floor(4)
    (0.010617760617760617, 0.25)
    """
    return _sinks(tokens) / tokens


def _sinks(tokens: int) -> int:
    return math.ceil(SINK_SHARE * tokens)


# ---- which layer to repair -------------------------------------------------------------------------------------------

MOST_VIOLATIONS = 0.25
"""Chosen by us: halfway between order (0) and chance (.5)."""


class Finding(NamedTuple):
    """What the rule says of one layer."""

    used: bool
    scattered: bool
    reasons: tuple[str, ...]
    """What is wrong with its attention, a phrase each; of layers that are not used, too."""

    @property
    def proposed(self) -> bool:
        """Whether it should be repaired: used and scattered."""
        return self.used and self.scattered


def finding(use: float | None, violations: float | None, spread: float | None, *, least_use: float) -> Finding:
    """The rule: a layer is repaired if the image depends on its choice and its choice is scattered.

    Scattered is attention whose centres are out of order in more than a quarter of the pairs (`MOST_VIOLATIONS`), or
    collapsed (spread over less than `MINIMUM_SPREAD_RATIO` of the garment's extent, the limit of `collapse_warning`).
    Soft attention in order is not scattered, though its centres are drawn to the middle. A layer whose choice changes
    the image by less than ``least_use`` cannot be repaired to any effect, however its maps look.

    Args:
        use: means over samples of the figures of these names; None: no sample has one.
        least_use: as a share of the image's range.

    >>> finding(0.04, 0.4, 0.2, least_use=0.02)
    Finding(used=True, scattered=True, reasons=('40 % of its pairs are out of order', 'its centres cover 0.20 of ...'))
    >>> finding(0.001, 0.5, 0.2, least_use=0.02).proposed, finding(0.04, 0.1, 0.9, least_use=0.02).proposed
    (False, False)
    """
    reasons = []
    if violations is not None and violations > MOST_VIOLATIONS:
        reasons.append(f"{violations:.0%} of its pairs are out of order".replace("%", " %"))
    if spread is not None and spread < MINIMUM_SPREAD_RATIO:
        reasons.append(f"its centres cover {spread:.2f} of the extent of the garment")
    return Finding(use is not None and use >= least_use, bool(reasons), tuple(reasons))
