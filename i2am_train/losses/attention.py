"""What the attention losses are functions of: what one layer attended to in one training step, on its two grids.

A term takes an :class:`Attention` and gives one unweighted value per sample, which is 0 without a gradient where the
mask is empty. The matrices of a large layer are not kept: a term that looks at each patch alone says so
(:meth:`Attention.by_patch`), and is called with blocks of patches. :mod:`~i2am_train.losses.paper` has the terms of the
I2AM paper, :mod:`~i2am_train.losses.literature` those of others, and ``config.objective.TERMS`` the table of all. Their
keywords are options with the types and ranges of the annotations (``objective.terms.cwg.sigma``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from i2am_train.attention.hooks import AttentionInputs
from i2am_train.errors import CaptureError
from i2am_train.ops.grids import unflatten
from i2am_train.ops.numerics import at_least_float32
from i2am_train.ops.rows import head_mean_scores, keeps_matrix, log_head_scores, map_rows, mean_over_heads
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


PatchMatrix = Literal["scores", "log_heads", "matches"]
"""Fields of an `Attention` with a value for each pair of patches."""


class _Fields(NamedTuple):
    """What an `Attention` is made of. Matrices may be a `_Blocks`, of which they are computed."""

    scores: Tensor | _Blocks
    centers: Float[Tensor, "batch height width 2"]
    """Mean position of each distribution, ``yx`` in reference patches, 0 at the centre of the first (eq. 15)."""
    mask: Bool[Tensor, "batch height width"]
    """True where the generated patch shows the garment and the sample has its condition."""
    conditioned: Bool[Tensor, " batch"]
    """False for samples whose condition was dropped: they are not counted."""
    target: Float[Tensor, "batch height width 2"] | None = None
    """True reference position of each generated patch, ``yx`` in reference patches, NaN where there is none.

    Fields from here on are optional: ``types.Need`` names them, and only terms that need one are given it."""
    matches: Tensor | _Blocks | None = None
    log_heads: Tensor | _Blocks | None = None
    log_mass: Float[Tensor, "batch height width"] | None = None
    """Logarithm of the share of each generated patch's attention that goes to the reference grid, at most 0; the rest
    goes to other tokens of the same softmax. Mean over heads."""
    slope: Float[Tensor, "batch 2"] | None = None
    """Reference patches per generated patch, ``yx``, over which the garment extends on the two grids
    (:func:`~i2am_train.ops.grids.garment_slope`)."""
    pictures: Pictures | None = None


class Attention(_Fields):
    """What one layer attended to, on its two grids; at least float32. :func:`attention_on_grids` makes it.

    ``scores``, ``matches`` and ``log_heads`` are matrices, with a value for each pair of patches. Of a large layer they
    are computed, and then kept, when they are read; :meth:`by_patch` does without.
    """

    __slots__ = ()

    @property
    def scores(self) -> Float[Tensor, "batch height width rows columns"]:
        """For each patch of the generated grid (height x width) a distribution over the reference grid (rows x
        columns); mean over heads."""
        found = self._matrix("scores")
        assert found is not None, "the field has no default"
        return found

    @property
    def matches(self) -> Float[Tensor, "batch height width rows columns"] | None:
        """Share of each generated patch's matches that lie in each reference patch; zeros for a patch without any."""
        return self._matrix("matches")

    @property
    def log_heads(self) -> Float[Tensor, "batch head height width rows columns"] | None:
        """Logarithm of each head's scores: finite where the scores themselves are too small for float32."""
        return self._matrix("log_heads")

    @property
    def reference_grid(self) -> GridSize:
        """Rows and columns of the reference grid."""
        given = self._given("scores")
        return given.reference_grid if isinstance(given, _Blocks) else GridSize(*given.shape[-2:])

    def by_patch(
        self,
        function: Callable[..., Tensor],
        *inputs: Float[Tensor, "batch height width *rest"],
        of: tuple[PatchMatrix, ...] = ("scores",),
    ) -> Float[Tensor, "batch height width *other"]:
        """A function of each generated patch's part of the matrices, without keeping those of a large layer.

        ``function(*matrices, *inputs)`` is called with all patches, or with blocks of them and in backward with each
        once more. It must treat every patch alone. ``*patches`` are the axes height and width, or one axis in a block.

        Args:
            function: gives ``[batch, *patches, ...]``.
            inputs: other values of each patch, which may have a gradient, too.
            of: names of the matrices, ``[batch, *patches, rows, columns]`` (``log_heads``: ``[batch, head, *patches,
                rows, columns]``).

        Raises:
            CaptureError: a matrix is not there, or inputs or results are not those of the patches.

        >>> on = attention_on_grids(torch.eye(4)[None], torch.ones(1, 4).bool(), GridSize(1, 4), GridSize(2, 2))
        >>> on.by_patch(lambda scores: scores.amax(dim=(-2, -1)))
        tensor([[[1., 1., 1., 1.]]])
        """
        given = [self._given(name) for name in of]
        if missing := [name for name, one in zip(of, given, strict=True) if one is None]:
            raise CaptureError(
                f"A term needs {missing[0]}, which this Attention does not have. Hand it to attention_on_grids; in "
                "training, a term gets what it says that it needs."
            )
        patches = self.mask.shape
        for each in inputs:
            if each.shape[:3] != patches:
                raise CaptureError(
                    f"by_patch got an input of shape {list(each.shape)}; expected {[*patches, '...']}: a value, or a "
                    "row of values, for each patch."
                )
        blocks = given[0]
        if isinstance(blocks, _Blocks) and all(one is blocks for one in given):
            found = blocks.map(function, of, [each.flatten(1, 2) for each in inputs])
            return torch.unflatten(found, 1, patches[1:])
        found = function(*(self._matrix(name) for name in of), *inputs)
        _check_patches(found, patches)
        return found

    def _given(self, name: PatchMatrix) -> Any:
        """A matrix as it was given."""
        return self[self._fields.index(name)]

    def _matrix(self, name: PatchMatrix) -> Tensor | None:
        given = self._given(name)
        return given.matrix(name, self.mask.shape) if isinstance(given, _Blocks) else given


@dataclass(frozen=True, eq=False)
class _Blocks:
    """A large layer's matrices, which are computed by blocks of generated patches."""

    inputs: AttentionInputs
    conditioned: Bool[Tensor, " batch"]
    reference_grid: GridSize
    matches: Callable[[slice], Float[Tensor, "batch generated reference"]] | None
    block_bytes: int | None
    _kept: dict[PatchMatrix, Tensor] = field(default_factory=dict)
    """Whole matrices that somebody read."""

    def map(self, function: Callable[..., Tensor], of: tuple[PatchMatrix, ...], inputs: list[Tensor]) -> Tensor:
        """``function`` of all patches, ``[batch, generated, ...]``."""

        def of_rows(logits: Tensor, rows: slice) -> Tensor:
            matrices = (self._rows(name, logits, rows) for name in of)
            found = function(*matrices, *(each[:, rows] for each in inputs))
            _check_patches(found, (len(logits), logits.shape[2]))
            return found

        return map_rows(of_rows, *self.inputs, block_bytes=self.block_bytes)

    def matrix(self, name: PatchMatrix, patches: torch.Size) -> Tensor:
        """A whole matrix on its grids."""
        if name not in self._kept:
            first = 2 if name == "log_heads" else 1
            whole = self.map(lambda rows: rows.movedim(first, 1), (name,), [])
            self._kept[name] = torch.unflatten(whole, 1, patches[1:]).movedim((1, 2), (first, first + 1))
        return self._kept[name]

    def _rows(self, name: PatchMatrix, logits: Tensor, rows: slice) -> Tensor:
        match name:
            case "scores":
                found = _counted(mean_over_heads(logits), self.conditioned)
            case "log_heads":
                found = _counted_logarithms(logits.log_softmax(dim=-1), self.conditioned)
            case "matches":
                assert self.matches is not None, "else the field is None"
                found = self.matches(rows).to(logits)
        return torch.unflatten(found, -1, self.reference_grid)


def _check_patches(found: Tensor, patches: tuple[int, ...]) -> None:
    """Refuses the result of a function that is not by patch."""
    if found.shape[: len(patches)] != patches:
        raise CaptureError(
            f"A function handed to by_patch gave the shape {list(found.shape)}; expected "
            f"{[*patches, '...']}: a value, or a row of values, for each patch that it got."
        )


def _counted(scores: Tensor, conditioned: Tensor) -> Tensor:
    """Scores ``[batch, generated, reference]``, uniform for dropped conditions: not zero, as a term may take
    logarithms."""
    return torch.where(conditioned[:, None, None], scores, 1 / scores.shape[-1])


def _counted_logarithms(heads: Tensor, conditioned: Tensor) -> Tensor:
    """The same of the logarithms of each head's."""
    return torch.where(conditioned[:, None, None, None], heads, -math.log(heads.shape[-1]))


def needed(attention: Attention, name: str, term: str) -> Tensor:
    """An optional tensor of an attention, for a term that cannot do without.

    Raises:
        CaptureError: it is not there.

    >>> on = Attention(torch.ones(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 2), *[torch.ones(1, 1, 1).bool()] * 2)
    >>> needed(on, "slope", "dcml")
    Traceback (most recent call last):
        ...
    i2am_train.errors.CaptureError: The attention term 'dcml' needs slope, which this Attention does not have. ...
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
        CaptureError: a grid does not have as many cells as there are tokens, or the mask is not that of the tokens.

    >>> scores, garment = torch.eye(4)[None], torch.tensor([[True, False, True, True]])
    >>> on = attention_on_grids(scores, garment, GridSize(2, 2), GridSize(1, 4))
    >>> on.centers[0, :, :, 1], on.mask[0, 0]  # x: each patch looks at its own column
    (tensor([[0., 1.],
            [2., 3.]]), tensor([ True, False]))
    """
    _check_sizes(scores.shape, mask, reference_grid)
    scores = at_least_float32(scores)
    conditioned = _or_all(conditioned, mask)
    on_reference = _counted(scores, conditioned).reshape(*scores.shape[:2], *reference_grid)
    if matches is not None:
        matches = matches.reshape(len(matches), *generated_grid, *reference_grid).to(scores)
    if log_heads is not None:
        log_heads = _counted_logarithms(at_least_float32(log_heads), conditioned)
        log_heads = log_heads.reshape(*log_heads.shape[:2], *generated_grid, *reference_grid)
    given = _Fields(
        unflatten(on_reference, generated_grid), centers(on_reference), mask, conditioned,
        target, matches, log_heads, log_mass, slope, pictures,
    )  # fmt: skip
    return _on_generated_grid(given, generated_grid)


def attention_of_tokens(
    tokens: AttentionInputs,
    mask: Bool[Tensor, "batch generated"],
    generated_grid: GridSize,
    reference_grid: GridSize,
    *,
    conditioned: Bool[Tensor, " batch"] | None = None,
    centers: Callable[[Tensor], Tensor] = attention_centers,
    matches: Callable[[slice], Float[Tensor, "batch some reference"]] | None = None,
    log_heads: bool = False,
    block_bytes: int | None = None,
    **parts: Any,
) -> Attention:
    """What a layer attended to, of its queries and keys. The matrices of a small layer are made and kept
    (:func:`~i2am_train.ops.rows.keeps_matrix`), those of a large one are not.

    Args:
        tokens: of the patches of both grids alone.
        matches: gives the rows of some generated tokens.
        log_heads: whether the attention has them.
        block_bytes: no matrix is kept, and blocks have at most so many bytes. None: by size.
        parts: ``target``, ``log_mass``, ``slope`` and ``pictures``; these and the rest as in
            :func:`attention_on_grids`.

    Raises:
        CaptureError: as there.

    >>> generator = torch.Generator().manual_seed(0)
    >>> tokens = AttentionInputs(*torch.randn(2, 1, 3, 8, 4, generator=generator), None)
    >>> both = [
    ...     attention_of_tokens(tokens, torch.ones(1, 8).bool(), GridSize(4, 2), GridSize(2, 4), block_bytes=size)
    ...     for size in (None, 200)
    ... ]
    >>> torch.allclose(both[0].centers, both[1].centers)
    True
    """
    samples, _, rows, _ = tokens.generated.shape
    _check_sizes((samples, rows, tokens.reference.shape[2]), mask, reference_grid)
    conditioned = _or_all(conditioned, mask)
    if block_bytes is None and keeps_matrix(tokens.generated, tokens.reference):
        return attention_on_grids(
            head_mean_scores(*tokens),
            mask,
            generated_grid,
            reference_grid,
            conditioned=conditioned,
            centers=centers,
            matches=matches(slice(0, rows)) if matches else None,
            log_heads=log_head_scores(*tokens) if log_heads else None,
            **parts,
        )
    blocks = _Blocks(tokens, conditioned, reference_grid, matches, block_bytes)
    given = _Fields(
        blocks,
        blocks.map(centers, ("scores",), []),
        mask,
        conditioned,
        matches=blocks if matches else None,
        log_heads=blocks if log_heads else None,
        **parts,
    )
    return _on_generated_grid(given, generated_grid)


def _check_sizes(scores: tuple[int, ...], mask: Tensor, reference_grid: GridSize) -> None:
    """Refuses scores ``[batch, generated, reference]`` that do not fit their grid or the mask."""
    if scores[2] != reference_grid.tokens:
        raise CaptureError(
            f"The scores have {scores[2]} reference tokens, but a reference grid of {reference_grid} has "
            f"{reference_grid.tokens}. Drop special tokens before the softmax and pass the grid of the patches."
        )
    if mask.shape != scores[:2]:
        raise CaptureError(
            f"The mask has the shape {list(mask.shape)}, and the attention {scores[0]} samples of {scores[1]} tokens. "
            "Bring each sample's mask to the layer's generated grid (ops.grids.mask_on_grid)."
        )


def _or_all(conditioned: Bool[Tensor, " batch"] | None, mask: Bool[Tensor, "batch generated"]) -> Tensor:
    return torch.ones(len(mask), dtype=torch.bool, device=mask.device) if conditioned is None else conditioned


def _on_generated_grid(given: _Fields, grid: GridSize) -> Attention:
    """What is left to do with parts whose matrices are on their grids, and all else of tokens in one axis."""
    _, centers, mask, conditioned, target, _, _, log_mass, _, pictures = given
    if log_mass is not None:
        log_mass = unflatten(torch.where(conditioned[:, None], at_least_float32(log_mass), 0.0), grid)
    if pictures is not None:
        pictures = pictures._replace(worn=pictures.worn & conditioned[:, None, None])
    return Attention._make(given)._replace(
        centers=unflatten(centers, grid),
        mask=unflatten(mask & conditioned[:, None], grid),
        target=None if target is None else unflatten(target, grid).to(centers),
        log_mass=log_mass,
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
    points: Float[Tensor, "*cells 2"], scores: Float[Tensor, "*cells rows columns"], origin: int
) -> Float[Tensor, "*cells rows columns"]:
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
