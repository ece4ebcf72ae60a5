"""The attention losses (paper section 5, eqs. 15-21): functions of what one layer attended to in one training step.

A term takes an :class:`Attention` and gives one unweighted value per sample, which is 0 without a gradient where the
mask is empty. ``config.objective.TERMS`` is the table of terms. Their keywords are options with the types and ranges of
the annotations (``objective.terms.cwg.sigma``). Paper and authors' code disagree in almost every constant: each is a
keyword here, and :data:`VARIANTS` names the combinations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from i2am_train.config.options import NotNegative, Positive
from i2am_train.errors import CaptureError, ConfigError
from i2am_train.ops.grids import unflatten
from i2am_train.ops.numerics import at_least_float32
from i2am_train.types import GridSize
from i2am_train.types import LossVariant as V

Norm = Literal["valid", "slots", "sum"]
"""What the sum over pairs, neighbours or patches of a sample is divided by: how many of them lie in the mask (at least
1), the size of the tensor that the authors average over (masked zeros included), or nothing."""

CwgNorm = Literal["valid", "slots", "sum", "batch"]
"""Of :func:`cwg`, which explains ``batch``."""

Force = Literal["reward", "hinge", "margin", "mixed"]

SCORE_FLOOR = 1e-8
"""Scores below count as this in logarithms, so that the gradient 1 / score stays finite in float32."""


class Attention(NamedTuple):
    """What one layer attended to, on its two grids; at least float32. :func:`attention_on_grids` makes it."""

    scores: Float[Tensor, "batch height width rows columns"]
    """For each patch of the generated grid (height x width) a distribution over the reference grid (rows x columns);
    mean over heads."""
    centers: Float[Tensor, "batch height width 2"]
    """Mean position of each distribution, ``yx`` in reference patches, 0 at the centre of the first (eq. 15)."""
    mask: Bool[Tensor, "batch height width"]
    """True where the generated patch shows the garment and the sample has its condition."""
    conditioned: Bool[Tensor, " batch"]
    """False for samples whose condition was dropped: they are not counted."""
    target: Float[Tensor, "batch height width 2"] | None = None
    """True reference position of each generated patch, ``yx`` in reference patches, NaN where there is none.

    Fields from here on are optional: ``types.Need`` names them, and only terms that need one are given it."""


def attention_centers(
    scores: Float[Tensor, "*cells rows columns"], *, origin: int = 0, factor: bool = False
) -> Float[Tensor, "*cells 2"]:
    """Centre of mass of scores, ``yx`` in reference patches (eq. 15); 0 to ``rows - 1`` and ``columns - 1``.

    Args:
        origin: index of the first row and column; the paper counts from 1.
        factor: divide by the number of reference patches, as eq. 15 is printed.

    >>> attention_centers(torch.tensor([[0.0, 0.0], [0.0, 0.5], [0.0, 0.5]]))
    tensor([1.5000, 1.0000])
    """
    scores = at_least_float32(scores)
    y, x = (_first_moment(scores.sum(dim=other), origin) for other in (-1, -2))
    centers = torch.stack((y, x), dim=-1)
    return centers / (scores.shape[-2] * scores.shape[-1]) if factor else centers


def attention_on_grids(
    scores: Float[Tensor, "batch generated reference"],
    mask: Bool[Tensor, "batch generated"],
    generated_grid: GridSize,
    reference_grid: GridSize,
    *,
    target: Float[Tensor, "batch generated 2"] | None = None,
    conditioned: Bool[Tensor, " batch"] | None = None,
    centers: Callable[[Tensor], Tensor] = attention_centers,
) -> Attention:
    """What a layer attended to, with its tokens in rows and columns.

    Args:
        scores: softmax over the reference patches, mean over heads.
        mask: the worn garment on the generated grid.
        conditioned: False where the condition was dropped: such a sample gets no gradient. None: all have one.
        centers: reading of eq. 15.

    Raises:
        CaptureError: a grid does not have as many cells as there are tokens.

    >>> scores, garment = torch.eye(4)[None], torch.tensor([[True, False, True, True]])
    >>> on = attention_on_grids(scores, garment, GridSize(2, 2), GridSize(1, 4))
    >>> on.centers[0, :, :, 1], on.mask[0, 0]  # x: each patch looks at its own column
    (tensor([[0., 1.],
            [2., 3.]]), tensor([ True, False]))
    """
    if scores.shape[-1] != reference_grid.tokens:
        raise CaptureError(
            f"The scores have {scores.shape[-1]} reference tokens, but a reference grid of {reference_grid} has "
            f"{reference_grid.tokens}. Drop special tokens before the softmax and pass the grid of the patches."
        )
    scores = at_least_float32(scores)
    if conditioned is None:
        conditioned = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    # Uniform and not zero: a term may take logarithms.
    scores = torch.where(conditioned[:, None, None], scores, 1 / reference_grid.tokens)
    on_reference = scores.reshape(*scores.shape[:2], *reference_grid)
    return Attention(
        scores=unflatten(on_reference, generated_grid),
        centers=unflatten(centers(on_reference), generated_grid),
        mask=unflatten(mask & conditioned[:, None], generated_grid),
        conditioned=conditioned,
        target=None if target is None else unflatten(target, generated_grid).to(scores),
    )


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
        margin: for the force ``margin`` alone, in reference patches per step between generated patches; None: 1. What
            can be met is the reference grid's size over the generated one's.

    Raises:
        ConfigError: a margin is given and the force does not look at it.

    >>> centers = torch.tensor([[[[0.0, 1.0], [0.0, 0.5]], [[1.0, 0.0], [0.5, 0.5]]]])
    >>> on = Attention(torch.ones(1, 2, 2, 1, 1), centers, torch.ones(1, 2, 2).bool(), torch.ones(1).bool())
    >>> dcml(on, force="hinge"), dcml(on)  # gaps: -.5 and .5 along rows, 1 and .5 along columns
    (tensor([0.1250]), tensor([-0.5000]))
    """
    if margin is not None and force != "margin":
        raise ConfigError(f"dcml has margin={margin}, and force={force} has none. Leave it out, or use force=margin.")
    step = 1.0 if margin is None else margin
    y, x = attention.centers.unbind(dim=-1)
    x_sum, x_pairs = _over_pairs(x, attention.mask, force, step)
    y_sum, y_pairs = _over_pairs(y.mT, attention.mask.mT, force, step)
    return _divided(x_sum + y_sum, norm, x_pairs + y_pairs, attention.mask[0].numel() ** 2)


def tv(attention: Attention, *, power: Literal[1, 2] = 2, norm: Norm = "valid") -> Float[Tensor, " batch"]:
    """Total variation: neighbours look at neighbouring places (eq. 19); at least 0, and 0 for a constant centre.

    Sum over neighbours (right, below) in the mask of ``|difference of centres| ** power``, in reference patches.

    >>> centers = torch.tensor([[[[0.0, 1.0], [0.0, 0.5]], [[1.0, 0.0], [0.5, 0.5]]]])
    >>> tv(Attention(torch.ones(1, 2, 2, 1, 1), centers, torch.ones(1, 2, 2).bool(), torch.ones(1).bool()))  # 3 / 4
    tensor([0.7500])
    """
    # A view of its own: gradients are then added term by term, in an order that does not depend on this function.
    centers = attention.centers.view_as(attention.centers)
    (down, down_pairs), (right, right_pairs) = (
        _over_neighbours(centers, attention.mask, axis, power) for axis in (1, 2)
    )
    if norm == "slots":  # the authors average each direction, and both coordinates, on its own
        height, width = attention.mask.shape[1:]
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

    >>> scores = torch.tensor([[[[[0.0, 1.0, 0.0]], [[0.0, 0.5, 0.5]]]]])
    >>> on = Attention(scores, attention_centers(scores), torch.ones(1, 1, 2).bool(), torch.ones(1).bool())
    >>> cwg(on)  # (1 + exp(-1/8)) / 2
    tensor([-0.9412])
    """
    centers = attention.centers.detach() if detach_centers else attention.centers
    distance = _squared_distances(centers, attention.scores, origin)
    if power == 1:
        distance = _safe_sqrt(distance)
    near = (torch.exp(-distance / (2 * sigma**2)) * attention.scores).sum(dim=(-2, -1))
    total = -torch.where(attention.mask, near, 0.0).flatten(1).sum(dim=1)
    if norm == "batch":
        return total * attention.conditioned.sum() / attention.mask.sum().clamp(min=1)
    patches = attention.mask.flatten(1).sum(dim=1)
    return _divided(total, norm, patches, attention.scores[0].numel())


def supervised(attention: Attention, *, sigma: Positive = 1.0) -> Float[Tensor, " batch"]:
    """Cross-entropy (nats) from a Gaussian at the true reference position to the scores. Not in the paper.

    Mean over the patches in the mask that have a target. For comparison: no bound on what other terms reach. The
    minimum is the entropy of the discrete Gaussian (2.84 nats for sigma 1 away from the border).

    Args:
        sigma: of the Gaussian, in reference patches; 1 was chosen by us.

    Raises:
        ConfigError: the data has no targets.

    >>> scores = torch.tensor([[[[[0.25, 0.5, 0.25]], [[0.2, 0.2, 0.6]]]]])
    >>> target = torch.tensor([[[[0.0, 1.0], [float("nan"), float("nan")]]]])
    >>> inside, counted = torch.ones(1, 1, 2).bool(), torch.ones(1).bool()
    >>> supervised(Attention(scores, attention_centers(scores), inside, counted, target), sigma=0.1)  # log 2
    tensor([0.6931])
    """
    if attention.target is None:
        raise ConfigError(
            "The attention term 'supervised' got no correspondence. Use data with a 'correspondence' folder, or set "
            "its weight to 0."
        )
    valid = attention.mask & attention.target.isfinite().all(dim=-1)
    target = torch.where(valid[..., None], attention.target, 0.0)
    squared = _squared_distances(target, attention.scores, origin=0)
    goal = torch.softmax(-squared.flatten(3) / (2 * sigma**2), dim=-1)
    logarithms = attention.scores.flatten(3).clamp(min=SCORE_FLOOR).log()
    surprise = torch.where(valid, -(goal * logarithms).sum(dim=-1), 0.0)
    return surprise.flatten(1).sum(dim=1) / valid.flatten(1).sum(dim=1).clamp(min=1)


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


def _first_moment(mass: Float[Tensor, "*cells positions"], origin: int) -> Float[Tensor, " *cells"]:
    positions = torch.arange(origin, origin + mass.shape[-1], dtype=mass.dtype, device=mass.device)
    return (mass * positions).sum(dim=-1)  # no matrix product: autocast would compute it in bfloat16


def _over_pairs(
    positions: Float[Tensor, "batch lines cells"],
    inside: Bool[Tensor, "batch lines cells"],
    force: Force,
    margin: float,
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Sum of the force over every first < later on each line, and the number of valid pairs."""
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
            terms = torch.relu(margin * steps - gaps)
        case "mixed":
            terms = -gaps
    return torch.where(valid, terms, 0.0).sum(dim=(1, 2, 3)), valid.sum(dim=(1, 2, 3))


def _over_neighbours(
    centers: Float[Tensor, "batch height width 2"], inside: Bool[Tensor, "batch height width"], axis: int, power: int
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Sum over valid neighbours along one axis, and their number."""
    length = inside.shape[axis] - 1
    valid = inside.narrow(axis, 0, length) & inside.narrow(axis, 1, length)
    changes = torch.where(valid[..., None], centers.diff(dim=axis).abs() ** power, 0.0)
    return changes.sum(dim=(1, 2, 3)), valid.sum(dim=(1, 2))


def _squared_distances(
    points: Float[Tensor, "batch height width 2"], scores: Float[Tensor, "batch height width rows columns"], origin: int
) -> Float[Tensor, "batch height width rows columns"]:
    """From each point to each reference patch."""
    rows, columns = (
        torch.arange(length, dtype=points.dtype, device=points.device) + origin for length in scores.shape[-2:]
    )
    y, x = points.unbind(dim=-1)
    vertical, horizontal = (y[..., None] - rows).square(), (x[..., None] - columns).square()
    return vertical[..., :, None] + horizontal[..., None, :]


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
