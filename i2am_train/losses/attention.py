"""What the attention losses are functions of: what one layer attended to in one training step, on its two grids.

A term takes an :class:`Attention` and gives one unweighted value per sample, which is 0 without a gradient where the
mask is empty. :mod:`~i2am_train.losses.paper` has the terms of the I2AM paper, :mod:`~i2am_train.losses.literature`
those of others, and ``config.objective.TERMS`` the table of all. Their keywords are options with the types and ranges
of the annotations (``objective.terms.cwg.sigma``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from i2am_train.errors import CaptureError
from i2am_train.ops.grids import unflatten
from i2am_train.ops.numerics import at_least_float32
from i2am_train.types import GridSize

SCORE_FLOOR = 1e-8
"""Scores below count as this in logarithms, so that the gradient 1 / score stays finite in float32."""


class Pictures(NamedTuple):
    """What a photometric term compares, in [-1, 1] and at any sizes."""

    person: Float[Tensor, "batch 3 picture_height picture_width"]
    worn: Bool[Tensor, "batch picture_height picture_width"]
    """True where the person's picture shows the garment."""
    garment: Float[Tensor, "batch 3 garment_height garment_width"]
    """The flat garment, which the reference grid covers."""


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
    matches: Float[Tensor, "batch height width rows columns"] | None = None
    """Share of each generated patch's matches that lie in each reference patch; zeros for a patch without any."""
    log_heads: Float[Tensor, "batch head height width rows columns"] | None = None
    """Logarithm of each head's scores: finite where the scores themselves are too small for float32."""
    log_mass: Float[Tensor, "batch height width"] | None = None
    """Logarithm of the share of each generated patch's attention that goes to the reference grid, at most 0; the rest
    goes to other tokens of the same softmax. Mean over heads."""
    slope: Float[Tensor, "batch 2"] | None = None
    """Reference patches per generated patch, ``yx``, over which the garment extends on the two grids
    (:func:`~i2am_train.ops.grids.garment_slope`)."""
    pictures: Pictures | None = None


def needed(attention: Attention, name: str, term: str) -> Tensor:
    """An optional tensor of an attention, for a term that cannot do without.

    Raises:
        CaptureError: it is not there.

    >>> on = Attention(torch.ones(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 2), *[torch.ones(1, 1, 1).bool()] * 2)
    >>> needed(on, "log_heads", "atv")
    Traceback (most recent call last):
        ...
    i2am_train.errors.CaptureError: The attention term 'atv' needs log_heads, which this Attention does not have. ...
    """
    found: Tensor | None = getattr(attention, name)
    if found is None:
        raise CaptureError(
            f"The attention term '{term}' needs {name}, which this Attention does not have. Hand it to "
            "attention_on_grids; in training, a term gets what it says that it needs."
        )
    return found


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
    matches: Float[Tensor, "batch generated reference"] | None = None,
    log_heads: Float[Tensor, "batch head generated reference"] | None = None,
    log_mass: Float[Tensor, "batch generated"] | None = None,
    slope: Float[Tensor, "batch 2"] | None = None,
    pictures: Pictures | None = None,
) -> Attention:
    """What a layer attended to, with its tokens in rows and columns.

    Args:
        scores: softmax over the reference patches, mean over heads.
        mask: the worn garment on the generated grid.
        conditioned: False where the condition was dropped: such a sample gets no gradient. None: all have one.
        centers: reading of eq. 15.

    The other arguments are the optional parts of an :class:`Attention`, tokens in one axis.

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
    if matches is not None:
        matches = matches.reshape(len(matches), *generated_grid, *reference_grid).to(scores)
    if log_heads is not None:
        even = -math.log(reference_grid.tokens)
        log_heads = torch.where(conditioned[:, None, None, None], at_least_float32(log_heads), even)
        log_heads = log_heads.reshape(*log_heads.shape[:2], *generated_grid, *reference_grid)
    if log_mass is not None:
        log_mass = unflatten(torch.where(conditioned[:, None], at_least_float32(log_mass), 0.0), generated_grid)
    if pictures is not None:
        pictures = pictures._replace(worn=pictures.worn & conditioned[:, None, None])
    return Attention(
        scores=unflatten(on_reference, generated_grid),
        centers=unflatten(centers(on_reference), generated_grid),
        mask=unflatten(mask & conditioned[:, None], generated_grid),
        conditioned=conditioned,
        target=None if target is None else unflatten(target, generated_grid).to(scores),
        matches=matches,
        log_heads=log_heads,
        log_mass=log_mass,
        slope=slope,
        pictures=pictures,
    )


def mean_inside(
    values: Float[Tensor, "batch height width"], inside: Bool[Tensor, "batch height width"]
) -> Float[Tensor, " batch"]:
    """Mean over the patches (or pixels) inside a mask; 0 without a gradient where it is empty.

    >>> mean_inside(torch.tensor([[[1.0, 3.0]], [[5.0, torch.nan]]]), torch.tensor([[[True, True]], [[True, False]]]))
    tensor([2., 5.])
    """
    return torch.where(inside, values, 0.0).flatten(1).sum(dim=1) / inside.flatten(1).sum(dim=1).clamp(min=1)


def score_entropy(scores: Float[Tensor, "*cells rows columns"]) -> Float[Tensor, " *cells"]:
    """Entropy of distributions over the reference as a share of the largest possible one: 0 looks at a single patch, 1
    at all alike. One patch has entropy 0.

    Scores below ``SCORE_FLOOR`` have no gradient of infinity.

    >>> score_entropy(torch.tensor([[[0.25, 0.25], [0.25, 0.25]], [[0.5, 0.5], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]]))
    tensor([1.0000, 0.5000, -0.0000])
    """
    patches = scores.shape[-2] * scores.shape[-1]
    entropy = -(scores * scores.clamp(min=SCORE_FLOOR).log()).sum(dim=(-2, -1))
    return entropy / (math.log(patches) if patches > 1 else 1.0)


def squared_distances(
    points: Float[Tensor, "batch height width 2"], scores: Float[Tensor, "batch height width rows columns"], origin: int
) -> Float[Tensor, "batch height width rows columns"]:
    """From each point to each reference patch; ``origin`` is the index of the first row and column.

    >>> squared_distances(torch.tensor([[[[0.0, 1.5]]]]), torch.ones(1, 1, 1, 1, 3), origin=0)[0, 0, 0]
    tensor([[2.2500, 0.2500, 0.2500]])
    """
    rows, columns = (
        torch.arange(length, dtype=points.dtype, device=points.device) + origin for length in scores.shape[-2:]
    )
    y, x = points.unbind(dim=-1)
    vertical, horizontal = (y[..., None] - rows).square(), (x[..., None] - columns).square()
    return vertical[..., :, None] + horizontal[..., None, :]


def _first_moment(mass: Float[Tensor, "*cells positions"], origin: int) -> Float[Tensor, " *cells"]:
    positions = torch.arange(origin, origin + mass.shape[-1], dtype=mass.dtype, device=mass.device)
    return (mass * positions).sum(dim=-1)  # no matrix product: autocast would compute it in bfloat16
