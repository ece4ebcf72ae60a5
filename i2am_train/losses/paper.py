"""The attention losses of the I2AM paper (section 5, eqs. 15-21) in all their readings.

Paper and authors' code disagree in almost every constant: each is a keyword here, and :data:`VARIANTS` names the
combinations. Forms of ours that end where the garment does are keywords, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from i2am_train.config.options import NotNegative, Positive, Share
from i2am_train.errors import ConfigError
from i2am_train.losses.attention import Attention, attention_centers, needed, score_entropy, squared_distances
from i2am_train.types import LossVariant as V

Norm = Literal["valid", "slots", "sum"]
"""What the sum over pairs, neighbours or patches of a sample is divided by: how many of them lie in the mask (at least
1), the size of the tensor that the authors average over (masked zeros included), or nothing."""

CwgNorm = Literal["valid", "slots", "sum", "batch"]
"""Of :func:`cwg`, which explains ``batch``."""

Force = Literal["reward", "hinge", "margin", "mixed", "capped", "extent"]


def dcml(
    attention: Attention, *, force: Force = "reward", norm: Norm = "valid", margin: NotNegative | None = None
) -> Float[Tensor, " batch"]:
    """Distance-centering maximisation: centres keep the order of their patches (eqs. 16-18).

    Along each row of generated patches x should grow to the right, along each column y downwards, over all pairs that
    lie in the mask. In reference patches. Equations 16 and 17 number the axes the other way round than equation 20; as
    in the authors' code, component 0 is y and component 1 is x.

    Args:
        force: what a pair adds, by its gap (later centre minus earlier one). ``hinge``: ``max(0, -gap)``, misordered
            pairs only, content with a single centre for all. ``reward``: ``-max(0, gap)``, ordered pairs only, never
            content. ``margin``: ``max(0, margin * steps - gap)``. ``mixed``: ``-gap``, the sum of the first two.
            ``capped`` is ``reward`` whose pull ends at ``enough``, ``-min(max(0, gap), enough)``, and ``extent`` is the
            distance from there, ``abs(enough - gap)``, which also pulls together what lies too far apart. ``enough`` is
            the gap of the garment itself, ``margin * slope * steps``; ``slope`` is by axis its extent in reference
            patches over that in generated patches, which the two masks tell without the truth
            (:func:`~i2am_train.ops.grids.garment_slope`). These two forms are ours.
        margin: for the force ``margin`` in reference patches per step between generated patches; what can be met is
            the reference grid's size over the generated one's. For ``capped`` and ``extent`` a share of the garment's
            own extent. None: 1. Other forces have none.

    Raises:
        ConfigError: a margin is given and the force does not look at it.

    >>> centers = torch.tensor([[[[0.0, 1.0], [0.0, 0.5]], [[1.0, 0.0], [0.5, 0.5]]]])
    >>> on = Attention(torch.ones(1, 2, 2, 1, 1), centers, torch.ones(1, 2, 2).bool(), torch.ones(1).bool())
    >>> dcml(on, force="hinge"), dcml(on)  # gaps: -.5 and .5 along rows, 1 and .5 along columns
    (tensor([0.1250]), tensor([-0.5000]))
    """
    if margin is not None and force not in ("margin", "capped", "extent"):
        raise ConfigError(f"dcml has margin={margin}, and force={force} has none. Leave it out, or use force=margin.")
    step = 1.0 if margin is None else margin
    y_stride: float | Tensor = step
    x_stride: float | Tensor = step
    if force in ("capped", "extent"):
        y_stride, x_stride = (step * needed(attention, "slope", "dcml")[:, :, None, None, None]).unbind(dim=1)
    y, x = attention.centers.unbind(dim=-1)
    x_sum, x_pairs = _over_pairs(x, attention.mask, force, x_stride)
    y_sum, y_pairs = _over_pairs(y.mT, attention.mask.mT, force, y_stride)
    return _divided(x_sum + y_sum, norm, x_pairs + y_pairs, attention.mask[0].numel() ** 2)


def tv(attention: Attention, *, power: Literal[1, 2] = 2, norm: Norm = "valid") -> Float[Tensor, " batch"]:
    """Total variation: neighbours look at neighbouring places (eq. 19); at least 0, and 0 for a constant centre.

    Sum over neighbours (right, below) in the mask of ``|difference of centres| ** power``, in reference patches.

    >>> centers = torch.tensor([[[[0.0, 1.0], [0.0, 0.5]], [[1.0, 0.0], [0.5, 0.5]]]])
    >>> tv(Attention(torch.ones(1, 2, 2, 1, 1), centers, torch.ones(1, 2, 2).bool(), torch.ones(1).bool()))  # 3 / 4
    tensor([0.7500])
    """
    return variation(attention.centers, attention.mask, power, norm)


def variation(
    centers: Float[Tensor, "batch height width 2"],
    mask: Bool[Tensor, "batch height width"],
    power: Literal[1, 2],
    norm: Norm,
) -> Float[Tensor, " batch"]:
    """Total variation of a field of centres inside a mask, as :func:`tv` has it.

    >>> variation(torch.tensor([[[[0.0, 0.0], [3.0, 1.0]]]]), torch.ones(1, 1, 2).bool(), 1, "valid")
    tensor([4.])
    """
    # A view of its own: gradients are then added term by term, in an order that does not depend on this function.
    centers = centers.view_as(centers)
    (down, down_pairs), (right, right_pairs) = (_over_neighbours(centers, mask, axis, power) for axis in (1, 2))
    if norm == "slots":  # the authors average each direction, and both coordinates, on its own
        height, width = mask.shape[1:]
        return down / max(1, 2 * (height - 1) * width) + right / max(1, 2 * height * (width - 1))
    return _divided(down + right, norm, down_pairs + right_pairs)


def cwg(
    attention: Attention,
    *,
    sigma: Positive = 1.0,
    power: Literal[1, 2] = 2,
    norm: CwgNorm = "valid",
    origin: int = 0,
    detach_centers: bool = False,
    entropy_floor: Share = 0.0,
) -> Float[Tensor, " batch"]:
    """Center-weighted Gaussian: attention gathers around its own centre (eqs. 20-21).

    Minus the score mass near the centre, weighted with ``exp(-distance ** power / (2 sigma ** 2))``: in [-1, 0] for
    ``valid``, -1 where each patch attends to a single place.

    Args:
        sigma: in reference patches.
        norm: ``batch`` divides by the masks' patches of the whole batch, as the authors' first code does: the mean of
            the values over the samples that count is that quotient, single values may lie below -1. It is the only rule
            that looks at other samples; with several processes, or gradients accumulated over batches, a batch is what
            the call sees.
        origin: that of the centres.
        detach_centers: let the gradient flow through the scores only. The default also drags the centre towards mass
            that exists, as the authors' code does.
        entropy_floor: in [0, 1], as a share of the entropy of uniform attention. A patch whose attention has less
            counts as before and feels nothing, so that attention does not end in a single patch. 0: no floor.

    >>> scores = torch.tensor([[[[[0.0, 1.0, 0.0]], [[0.0, 0.5, 0.5]]]]])
    >>> on = Attention(scores, attention_centers(scores), torch.ones(1, 1, 2).bool(), torch.ones(1).bool())
    >>> cwg(on)  # (1 + exp(-1/8)) / 2
    tensor([-0.9412])
    """
    centers = attention.centers.detach() if detach_centers else attention.centers

    def near_centers(scores: Tensor, centers: Tensor) -> Tensor:
        distance = squared_distances(centers, scores, origin)
        if power == 1:
            distance = _safe_sqrt(distance)
        near = (torch.exp(-distance / (2 * sigma**2)) * scores).sum(dim=(-2, -1))
        if entropy_floor:
            near = torch.where(score_entropy(scores.detach()) < entropy_floor, near.detach(), near)
        return near

    near = attention.by_patch(near_centers, centers)
    total = -torch.where(attention.mask, near, 0.0).flatten(1).sum(dim=1)
    if norm == "batch":
        return total * attention.conditioned.sum() / attention.mask.sum().clamp(min=1)
    patches = attention.mask.flatten(1).sum(dim=1)
    return _divided(total, norm, patches, attention.mask[0].numel() * attention.reference_grid.tokens)


class Variant(NamedTuple):
    """How one reading computes centres (eq. 15) and the paper's three terms."""

    dcml: Callable[..., Tensor]
    """Eqs. 16-18."""
    tv: Callable[..., Tensor] = tv
    """Eq. 19."""
    cwg: Callable[..., Tensor] = cwg
    """Eqs. 20-21."""
    centers: Callable[[Tensor], Tensor] = attention_centers


_AS_PRINTED = Variant(
    dcml=partial(dcml, force="hinge", norm="sum"),
    tv=partial(tv, norm="sum"),
    cwg=partial(cwg, norm="slots", origin=1),
    centers=partial(attention_centers, origin=1, factor=True),
)

VARIANTS: dict[V, Variant] = {
    V.PAPER: _AS_PRINTED,
    V.PAPER_WITHOUT_FACTOR: _AS_PRINTED._replace(centers=partial(attention_centers, origin=1)),
    V.AUTHORS_V1: Variant(
        dcml=partial(dcml, force="reward", norm="slots"),
        tv=partial(tv, power=1, norm="slots"),
        cwg=partial(cwg, power=1, norm="batch", sigma=0.5),
    ),
    V.AUTHORS_V2: Variant(
        dcml=partial(dcml, force="reward", norm="slots"),
        tv=partial(tv, norm="slots"),
        cwg=partial(cwg, power=1, norm="slots"),
    ),
    V.HINGE: Variant(dcml=partial(dcml, force="hinge")),
    V.REWARD: Variant(dcml=partial(dcml, force="reward")),
    V.MARGIN: Variant(dcml=partial(dcml, force="margin")),
    V.MIXED: Variant(dcml=partial(dcml, force="mixed")),
}
"""Readings of equations 15-21 as presets of the terms' keywords; `LossVariant` says what each is.

What they do to the attention: the paper's hinge acts on misordered pairs only and is 0 for a constant centre, so that
attention may collapse to one point, which also minimises the other two terms. The authors' code rewards the gaps of
pairs that are in order already: the reward never vanishes, which is the force that keeps attention spread, and
misordered pairs feel nothing. ``mixed`` is both: a constant force on every pair.

The first five are pinned by golden vectors (``tests/golden``)."""


def _over_pairs(
    positions: Float[Tensor, "batch lines cells"],
    inside: Bool[Tensor, "batch lines cells"],
    force: Force,
    stride: float | Float[Tensor, "batch 1 1 1"],
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Sum of the force over every first < later on each line, and the number of valid pairs; ``stride`` is the gap per
    step that some forces ask for."""
    cells = torch.arange(positions.shape[-1], device=positions.device)
    steps = cells - cells[:, None]  # [first, later]
    valid = inside[..., :, None] & inside[..., None, :] & (steps > 0)
    gaps = positions[..., None, :] - positions[..., :, None]  # later minus first
    match force:
        case "reward":
            terms = -torch.relu(gaps)
        case "hinge":
            terms = torch.relu(-gaps)
        case "margin":
            terms = torch.relu(stride * steps - gaps)
        case "extent":
            terms = (stride * steps - gaps).abs()
        case "mixed":
            terms = -gaps
        case "capped":
            terms = -torch.minimum(torch.relu(gaps), stride * steps)
    return torch.where(valid, terms, 0.0).sum(dim=(1, 2, 3)), valid.sum(dim=(1, 2, 3))


def _over_neighbours(
    centers: Float[Tensor, "batch height width 2"], inside: Bool[Tensor, "batch height width"], axis: int, power: int
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Sum over valid neighbours along one axis, and their number."""
    length = inside.shape[axis] - 1
    valid = inside.narrow(axis, 0, length) & inside.narrow(axis, 1, length)
    changes = torch.where(valid[..., None], centers.diff(dim=axis).abs() ** power, 0.0)
    return changes.sum(dim=(1, 2, 3)), valid.sum(dim=(1, 2))


def _safe_sqrt(squared: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 and not infinite, as that of torch's norm."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def _divided(
    total: Float[Tensor, " batch"], norm: str, valid: Int[Tensor, " batch"], slots: int = 1
) -> Float[Tensor, " batch"]:
    match norm:
        case "valid":
            return total / valid.clamp(min=1)
        case "slots":
            return total / slots
    return total
