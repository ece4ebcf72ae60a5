"""What a capture keeps: of each layer, step and head two maps on their own grids, and whole matrices where asked for.

`AttributionStore` is what a trace leaves (`i2am_train.attention.recorder` fills it). Every map is a view of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from i2am_train.attention.recipe import LayerId, find_layer
from i2am_train.errors import CaptureError, ConfigError
from i2am_train.ops.grids import ResizeMode, resize_maps
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
