"""What a capture keeps: of each layer, step and head two maps on their own grids, and whole matrices where asked for.

`SiteRecorder` reduces one site's queries and keys while the model runs; `AttributionStore` is what is left. Every map
is a view of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from i2am_train.attention.frames import Frame
from i2am_train.attention.hooks import AttentionInputs
from i2am_train.attention.lookup import SiteModule, SitePlaces
from i2am_train.attention.recipe import LayerId, find_layer, layer_numbers
from i2am_train.errors import CaptureError, ConfigError
from i2am_train.ops.attention import (
    HeadMatrices,
    HeadMeanMatrices,
    column_means,
    head_matrices,
    head_mean_matrices,
    reference_mass,
)
from i2am_train.ops.grids import ResizeMode, mask_on_grid, resize_maps
from i2am_train.ops.numerics import rows_at_fault
from i2am_train.types import Canvas, Direction, GridSize, LayerWeighting


@dataclass(frozen=True)
class LayerRecord:
    """One layer's attention over a sampling run.

    ``to_generated`` and ``to_reference`` are probabilities: each sums to one over its last axis. The optional score
    matrices are means over heads and steps; ``scores_over_reference`` has rows that sum to one (who a generated token
    looks at), ``scores_over_generated`` has columns that do (where a reference token goes); those called ``head_...``
    are the same of each head. ``functional`` is False where a single reference token makes queries and keys irrelevant
    to the picture (a softmax over one key is one whatever they are). ``mass`` is the share of its attention that a
    generated token gives to the reference, where the model's own softmax runs over both pictures; elsewhere it is one,
    and None here.

    >>> record = LayerRecord("a", GridSize(2, 1), GridSize(1, 3), torch.rand(1, 4, 8, 2), torch.rand(1, 4, 8, 3))
    >>> record.heads, record.grid(Direction.GENERATED_TO_REFERENCE), record.sample(0).to_generated.shape
    (8, GridSize(height=1, width=3), torch.Size([1, 4, 8, 2]))
    """

    layer: str
    generated_grid: GridSize
    reference_grid: GridSize | None
    to_generated: Float[Tensor, "batch step head generated"]
    to_reference: Float[Tensor, "batch step head reference"]
    functional: bool = True
    scores_over_reference: Float[Tensor, "batch generated reference"] | None = None
    scores_over_generated: Float[Tensor, "batch generated reference"] | None = None
    head_scores_over_reference: Float[Tensor, "batch head generated reference"] | None = None
    head_scores_over_generated: Float[Tensor, "batch head generated reference"] | None = None
    mass: Float[Tensor, "batch step head generated"] | None = None

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.to_generated.shape[2]

    def grid(self, direction: Direction) -> GridSize:
        """The grid that a direction's map lies on."""
        if direction is Direction.REFERENCE_TO_GENERATED:
            return self.generated_grid
        if self.reference_grid is None:
            raise CaptureError(
                f"The reference tokens of layer {self.layer} have no place in the reference "
                "picture (pooled vectors or words), so there is no map on it. Use "
                "Direction.REFERENCE_TO_GENERATED, or give the recipe a reference grid."
            )
        return self.reference_grid

    def sample(self, row: int) -> LayerRecord:
        """Only one sample of the batch."""
        cut: dict[str, Any] = {
            name: value[row : row + 1] for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **cut)

    def vectors(self, direction: Direction) -> Float[Tensor, "batch step head token"]:
        """The column means of a direction (eq. 6, averaged over the other picture's tokens)."""
        to_generated = direction is Direction.REFERENCE_TO_GENERATED
        return self.to_generated if to_generated else self.to_reference


@dataclass(frozen=True)
class AttributionStore:
    """All captured layers of one sampling run, in the order in which the model runs them.

    ``timesteps`` holds the scheduler's number of each step, noisiest first, or None where the model was not told.
    ``recipe``, ``partial`` and ``canvas`` are those of the recipe (`i2am_train.attention.recipe.Recipe`). ``model``
    names all layers of the recipe, captured or not, by which layer numbers are understood; empty: those that were
    captured.
    """

    layers: tuple[LayerRecord, ...]
    timesteps: tuple[float | int | None, ...]
    recipe: str = ""
    partial: str | None = None
    canvas: Canvas = Canvas.STRETCH
    model: tuple[str, ...] = ()

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.layers[0].to_generated.shape[0]

    @property
    def steps(self) -> int:
        """Number of sampling steps."""
        return len(self.timesteps)

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Those that have a map: both, or only that on the generated image if reference tokens of some layer have no
        place in the reference picture."""
        spatial = all(record.reference_grid is not None for record in self.layers)
        return tuple(Direction) if spatial else (Direction.REFERENCE_TO_GENERATED,)

    @property
    def functional(self) -> bool:
        """Whether queries and keys of any layer can influence the image."""
        return any(record.functional for record in self.layers)

    @property
    def joint(self) -> bool:
        """Whether the model's own softmax runs over both pictures, so that every layer has a ``mass``."""
        return all(record.mass is not None for record in self.layers)

    @property
    def marks(self) -> tuple[str, ...]:
        """What a reader must know before trusting the maps, each a short sentence; empty if nothing.

        >>> one_key = LayerRecord("a", GridSize(1, 1), None, torch.ones(1, 1, 8, 1), torch.ones(1, 1, 8, 1), False)
        >>> AttributionStore((one_key,), (None,), partial="by a second way").marks[1]
        'partial: by a second way'
        """
        unmoved = "not functional: with a single reference token, queries and keys cannot influence "
        found = [] if self.functional else [unmoved + "the image"]
        return (*found, *(() if self.partial is None else (f"partial: {self.partial}",)))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(record.layer for record in self.layers)

    def layer(self, layer: LayerId) -> LayerRecord:
        """One layer by name or by number (`layer_numbers`)."""
        return self.layers[self.index(layer)]

    def index(self, layer: LayerId) -> int:
        """Position of a layer among those captured; an error that lists them if it is none."""
        return self.names.index(find_layer(layer, self.names, self.model))

    def select(self, layers: Sequence[LayerId]) -> AttributionStore:
        """Only the given layers."""
        return replace(self, layers=tuple(self.layer(layer) for layer in layers))

    def sample(self, row: int) -> AttributionStore:
        """Only one sample of the batch."""
        return replace(self, layers=tuple(record.sample(row) for record in self.layers))


def time_groups(steps: int, groups: int) -> tuple[slice, ...]:
    """Disjoint runs of sampling steps, noisiest first; lengths differ by one at most if ``groups`` does not divide.

    The paper's eq. 11 counts the step between two groups twice; the authors' code does not, nor do we (golden 08).

    >>> time_groups(20, 4)[1]
    slice(5, 10, None)
    """
    if not 1 <= groups <= steps:
        raise ConfigError(
            f"{steps} sampling steps cannot be cut into {groups} time groups. "
            f"Choose between 1 and {steps} groups, or sample with more steps."
        )
    borders = [round(group * steps / groups) for group in range(groups + 1)]
    return tuple(slice(start, stop) for start, stop in pairwise(borders))


@dataclass(frozen=True)
class Rollup:
    """How layers become maps: direction, weights of the layers, the common grid, and how maps are resized to it."""

    direction: Direction
    weighting: LayerWeighting
    mode: ResizeMode = "bilinear"

    def common_grid(self, store: AttributionStore) -> GridSize:
        """The finest grid of the direction's maps."""
        grids = [record.grid(self.direction) for record in store.layers]
        return max(grids, key=lambda grid: grid.tokens)

    def layer_maps(
        self, record: LayerRecord, *, groups: int | None = None, heads: bool = False
    ) -> Float[Tensor, "batch group head height width"]:
        """One layer's maps on its own grid: ``groups`` runs of steps (None: one), each head or their mean.

        >>> record = LayerRecord("a", GridSize(1, 2), None, torch.tensor([[[[0.75, 0.25]]]]), torch.ones(1, 1, 1, 1))
        >>> Rollup(Direction.REFERENCE_TO_GENERATED, LayerWeighting.DENSITY).layer_maps(record).flatten()
        tensor([1.5000, 0.5000])
        """
        steps = record.vectors(self.direction)
        runs = time_groups(steps.shape[1], 1 if groups is None else groups)
        grouped = torch.stack([steps[:, run].mean(dim=1) for run in runs], dim=1)
        if not heads:
            grouped = grouped.mean(dim=2, keepdim=True)
        grid = record.grid(self.direction)
        density = grid.tokens if self.weighting is LayerWeighting.DENSITY else 1.0
        return grouped.reshape(*grouped.shape[:-1], *grid) * density

    def combine(
        self, records: Sequence[LayerRecord], size: GridSize, *, groups: int | None = None, heads: bool = False
    ) -> Float[Tensor, "batch group head height width"]:
        """Mean over layers, each resized once per grid. A layer counts once per head, as in the paper's sum (eq. 4)."""
        if heads:
            check_equal_heads(records)
        sums: dict[GridSize, Tensor] = {}
        for record in records:
            maps = self.layer_maps(record, groups=groups, heads=heads) * record.heads
            grid = record.grid(self.direction)
            sums[grid] = sums[grid] + maps if grid in sums else maps
        resized = [self._resize(maps, size) for maps in sums.values()]
        return torch.stack(resized).sum(dim=0) / sum(record.heads for record in records)

    def _resize(self, maps: Tensor, size: GridSize) -> Tensor:
        """Bicubic overshoots below zero, where a probability cannot be (the authors clamp too)."""
        if tuple(maps.shape[-2:]) == size:
            return maps
        resized = resize_maps(maps, size, self.mode)
        return resized if self.mode == "bilinear" else resized.clamp(min=0)


def check_equal_heads(records: Sequence[LayerRecord]) -> None:
    """Heads of different layers can be put side by side only if there are equally many.

    Raises `ConfigError` otherwise.
    """
    counts = sorted({record.heads for record in records})
    if len(counts) > 1:
        raise ConfigError(
            f"The layers have different numbers of heads ({', '.join(map(str, counts))}), so there is no map per head "
            "over all of them. Use maps.by_head_count(), or select layers with equally many heads."
        )


def by_resolution(store: AttributionStore) -> dict[GridSize, tuple[LayerRecord, ...]]:
    """Layers by the grid of their generated tokens, coarse to fine.

    >>> a, b = (LayerRecord(str(grid), grid, None, torch.ones(1, 1, 1, grid.tokens), torch.ones(1, 1, 1, 1))
    ...         for grid in (GridSize(4, 2), GridSize(2, 1)))
    >>> [record.layer for records in by_resolution(AttributionStore((a, b), (None,))).values() for record in records]
    ['2x1', '4x2']
    """
    grids = sorted({record.generated_grid for record in store.layers}, key=lambda grid: grid.tokens)
    return {grid: tuple(record for record in store.layers if record.generated_grid == grid) for grid in grids}


def not_finite(store: AttributionStore) -> str | None:
    """Where the first map that is not finite comes from, in words; None if all are finite.

    >>> steps = torch.tensor([1.0, torch.nan]).view(1, 2, 1, 1)
    >>> not_finite(AttributionStore((LayerRecord("a", GridSize(1, 1), None, steps, steps),), (999, 500)))
    'the attention of layer a in step 2 of 2 (timestep 500)'
    """
    found = [
        (int(step), record.layer)
        for record in store.layers
        for vectors in (record.to_generated, record.to_reference, record.mass)
        if vectors is not None
        for step in rows_at_fault(vectors.transpose(0, 1)).nonzero().flatten()
    ]
    if found:
        step, layer = min(found, key=lambda where: where[0])
        timestep = store.timesteps[step]
        at = "" if timestep is None else f" (timestep {timestep:g})"
        return f"the attention of layer {layer} in step {step + 1} of {store.steps}{at}"
    for record in store.layers:
        for matrix in (record.scores_over_reference, record.scores_over_generated):  # heads' are in their means
            if matrix is not None and not matrix.isfinite().all():
                return f"the score matrix of layer {record.layer}"
    return None


@dataclass(eq=False)
class SiteRecorder:
    """Collects one site over the evaluations of a sampling run.

    ``to_generated`` and ``to_reference`` hold one ``[batch, head, token]`` tensor per recorded evaluation; matrices are
    summed over evaluations, so that they cost the same for any number of steps.
    """

    site: SiteModule
    byte_budget: int
    keeps_matrices: bool = False
    keeps_heads: bool = False
    """Of the matrices, each head's."""
    generated_mask: Bool[Tensor, "batch height width"] | None = None
    to_generated: list[Tensor] = field(default_factory=list)
    to_reference: list[Tensor] = field(default_factory=list)
    mass: list[Tensor] = field(default_factory=list)
    matrices: HeadMeanMatrices | HeadMatrices | None = None
    places: SitePlaces | None = None
    key_tokens: int = 0
    heads: int | None = None
    _weights: Tensor | None = None
    _last_call: int = -1

    @property
    def calls(self) -> int:
        """Evaluations recorded so far."""
        return len(self.to_generated)

    def record(self, frame: Frame, inputs: AttentionInputs) -> None:
        """Reduce what the conditional rows of one evaluation attend with, and keep the result."""
        self._check_once_per_frame(frame)
        self._check_device(inputs.generated)
        _, self.heads, queries_count, _ = inputs.generated.shape
        self.key_tokens = inputs.reference.shape[2]
        places = self._places_as_before(self.site.places(queries_count, self.key_tokens, frame.latent))
        queries = places.generated.take(inputs.generated)
        keys = places.reference.take(inputs.reference)
        means = column_means(
            queries,
            keys,
            inputs.scale,
            generated_weights=self._row_weights(places.generated.grid, queries),
            byte_budget=self.byte_budget,
        )
        self.to_generated.append(means.to_generated)
        self.to_reference.append(means.to_reference)
        if self.site.site.joint:
            at = places.reference.index
            self.mass.append(reference_mass(queries, inputs.reference, at, inputs.scale, self.byte_budget))
        if self.keeps_matrices:
            made = head_matrices if self.keeps_heads else head_mean_matrices
            self._add(made(queries, keys, inputs.scale))

    def layer_record(self, steps: Sequence[Sequence[int]]) -> LayerRecord:
        """What is kept of the site; ``steps`` are the positions of the evaluations of each sampling step.

        Raises `CaptureError` where the recipe gives the generated tokens no grid.
        """
        places = self.places
        assert places is not None, "a complete recorder has seen its tokens"
        if places.generated.grid is None:
            raise CaptureError(
                f"The recipe gives the generated tokens of layer {self.site.layer} no grid. "
                "Set the site's generated tokens to a GridSize or 'latent'."
            )
        matrices = [None, None] if self.matrices is None else list(self.matrices)
        kept = [None if total is None else (total / self.calls).float().cpu() for total in matrices]
        by_head = kept if self.keeps_heads else [None, None]
        over_reference, over_generated = (one if one is None or one.ndim == 3 else one.mean(dim=1) for one in kept)
        return LayerRecord(
            layer=self.site.layer,
            generated_grid=places.generated.grid,
            reference_grid=places.reference.grid,
            to_generated=_stack_steps(self.to_generated, steps),
            to_reference=_stack_steps(self.to_reference, steps),
            mass=_stack_steps(self.mass, steps) if self.mass else None,
            functional=self.key_tokens > 1,
            scores_over_reference=over_reference,
            scores_over_generated=over_generated,
            head_scores_over_reference=by_head[0],
            head_scores_over_generated=by_head[1],
        )

    def summary(self, model: Sequence[str]) -> SiteSummary:
        """One line about what was seen so far; ``model`` has the names of all layers."""
        places = self.places
        return SiteSummary(
            layer=self.site.layer,
            path=self.site.path,
            heads=self.heads,
            generated_grid=None if places is None else places.generated.grid,
            reference_tokens=None if places is None else places.reference.count,
            reference_grid=None if places is None else places.reference.grid,
            calls=self.calls,
            functional=self.key_tokens != 1,
            numbers=layer_numbers(self.site.layer, model),
        )

    def _places_as_before(self, places: SitePlaces) -> SitePlaces:
        first = self.places = self.places or places
        for now, before in zip(places, first, strict=True):
            if (now.count, now.grid) != (before.count, before.grid):
                raise CaptureError(
                    f"The tokens of layer {self.site.layer} changed from {before.count} to "
                    f"{now.count} during the trace. Use one trace per picture size."
                )
        return places

    def _check_once_per_frame(self, frame: Frame) -> None:
        if frame.call == self._last_call:
            raise CaptureError(
                f"Layer {self.site.layer} ran twice in one evaluation of the denoiser (tiles, or a shared module). "
                "Switch tiling off, or write a recipe whose root is the module that runs once per tile."
            )
        self._last_call = frame.call

    def _check_device(self, generated: Tensor) -> None:
        before = self.to_generated[0].device if self.to_generated else generated.device
        if before != generated.device:
            raise CaptureError(
                f"The model moved from {before} to {generated.device} during the trace. Move it "
                "before entering the trace's block."
            )

    def _row_weights(self, grid: GridSize | None, queries: Tensor) -> Tensor | None:
        if self.generated_mask is None or grid is None:
            return None
        if self._weights is None:
            weights: Float[Tensor, "batch generated"] = mask_on_grid(self.generated_mask, grid).float()
            if weights.shape[0] != queries.shape[0]:
                raise CaptureError(
                    f"generated_mask has {weights.shape[0]} samples, but the model was called with "
                    f"{queries.shape[0]} conditional rows. Give one mask per sample."
                )
            self._weights = weights.to(queries.device)
        return self._weights

    def _add(self, matrices: HeadMeanMatrices | HeadMatrices) -> None:
        if self.matrices is None:
            self.matrices = matrices
        else:
            for total, more in zip(self.matrices, matrices, strict=True):
                total += more


def _stack_steps(recorded: Sequence[Tensor], steps: Sequence[Sequence[int]]) -> Tensor:
    """``[batch, step, head, token]`` on the CPU; evaluations of the same step are averaged."""
    means = [
        recorded[step[0]] if len(step) == 1 else torch.stack([recorded[at] for at in step]).mean(dim=0)
        for step in steps
    ]
    return torch.stack(means, dim=1).float().cpu()


@dataclass(frozen=True)
class SiteSummary:
    """One line about a captured attention module."""

    layer: str
    path: str
    heads: int | None
    generated_grid: GridSize | None
    reference_tokens: int | None
    reference_grid: GridSize | None
    calls: int
    functional: bool
    numbers: str
    """Those that mean the layer in this model: ``2``, ``1-3``, or empty."""


class SiteTable(tuple[SiteSummary, ...]):
    """The captured attention modules; prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        header = ("layer", "no.", "generated", "heads", "reference tokens", "grid", "calls", "functional")
        lines = [header, *(_cells(site) for site in self)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def _cells(site: SiteSummary) -> tuple[str, ...]:
    values = (
        site.layer,
        site.numbers or None,
        site.generated_grid,
        site.heads,
        site.reference_tokens,
        site.reference_grid,
        site.calls,
        "yes" if site.functional else "no (one key)",
    )
    return tuple("-" if value is None else str(value) for value in values)
