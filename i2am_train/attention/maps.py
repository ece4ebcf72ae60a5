"""Attribution maps: every view of one capture, chosen afterwards (paper section 4 and appendix A.3).

The names follow the paper: unified (ULAM), time-level (TLAM), head-level (HLAM), layer-level
(LLAM) and specific-reference (SRAM) attribution maps.

Averages are taken first and maps are resized last: for the axis that a map lies on the two commute,
and the other axis has gone already (exact for bilinear resizing by whole factors). All layers are on
the paper's scale, i.e. probabilities: dividing by the number of terms turns the paper's sums
(eqs. 4, 7, 10-14) into means, which min-max normalisation cannot tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from i2am_train.attention.recipe import LayerId
from i2am_train.attention.store import AttributionStore, LayerRecord
from i2am_train.errors import CaptureError, ConfigError
from i2am_train.ops.images import ResizeMode, on_picture, resize_maps
from i2am_train.types import Canvas, Direction, GridSize, LayerWeighting


def time_groups(steps: int, groups: int) -> tuple[slice, ...]:
    """Disjoint runs of sampling steps, noisiest first; lengths differ by one at most if ``groups`` does not divide.

    The paper's eq. 11 counts the step between two groups twice; the authors' code does not, nor do
    we (golden 08).

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
        """One layer's maps on its own grid: ``groups`` runs of steps (None: one), each head or their mean."""
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
        """Mean over layers, each resized once per grid. A layer counts once per head, as in the paper's sum."""
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
    """Heads of different layers can be put side by side only if there are equally many."""
    counts = sorted({record.heads for record in records})
    if len(counts) > 1:
        raise ConfigError(
            f"The layers have different numbers of heads ({', '.join(map(str, counts))}), so there "
            "is no map per head over all of them. Use maps.by_head_count(), or select layers with "
            "equally many heads."
        )


def by_resolution(store: AttributionStore) -> dict[GridSize, tuple[LayerRecord, ...]]:
    """Layers by the grid of their generated tokens, coarse to fine."""
    grids = sorted({record.generated_grid for record in store.layers}, key=lambda grid: grid.tokens)
    return {grid: tuple(record for record in store.layers if record.generated_grid == grid) for grid in grids}


MapAxis: TypeAlias = Literal["time", "head", "layer", "resolution", "patch"]
SoftmaxOver: TypeAlias = Literal["map", "reference"]
Patch: TypeAlias = int | tuple[int, int]
"""A token by its row-major index, or by row and column."""


_ROUNDING = 16
"""Units of the last place within which a map is constant: else min-max would show rounding noise as
a pattern. Chosen by us: a few sums and one resize."""


def normalise(
    values: Float[Tensor, "*batch height width"], *, joint_axes: int = 0, epsilon: float = 0.0
) -> Float[Tensor, "*batch height width"]:
    """Min-max per map to [0, 1]; a map that is constant (to rounding) becomes zeros, and one with a
    value that is not a number stays without numbers.

    ``joint_axes`` counts the axes before height and width that share one minimum and maximum, so
    that maps can be compared. ``epsilon`` is added to the range (the authors' code adds 1e-8).

    >>> normalise(torch.tensor([[2.0, 4.0], [3.0, 2.0]])).tolist()
    [[0.0, 1.0], [0.5, 0.0]]
    """
    axes = tuple(range(-2 - joint_axes, 0))
    low = values.amin(dim=axes, keepdim=True)
    high = values.amax(dim=axes, keepdim=True)
    rounding = _ROUNDING * torch.finfo(values.dtype).eps * torch.maximum(low.abs(), high.abs())
    spread = (values - low) / (high - low + epsilon)
    constant = (high - low <= rounding) & rounding.isfinite()
    return torch.where(constant, torch.zeros_like(values), spread)


def threshold(values: Float[Tensor, "*batch height width"], delta: float) -> Float[Tensor, "*batch height width"]:
    """Values above ``delta`` as they are, others zero: ``m * 1(m > delta)`` (paper eq. 5; strictly
    greater). What is not a number stays so.

    >>> threshold(torch.tensor([[0.2, 0.4, 0.7]]), 0.4).tolist()
    [[0.0, 0.0, 0.699999988079071]]
    """
    if not 0 <= delta < 1:
        raise ConfigError(f"delta is {delta}; it must be at least 0 and below 1 (the paper uses 0.4).")
    return torch.where(values <= delta, torch.zeros_like(values), values)


@dataclass(frozen=True)
class HeatMap:
    """Maps of one kind for a batch of samples.

    ``axes`` name the axes between batch and height, ``labels`` their entries (one tuple of words
    per axis). ``is_normalised`` says that every map fills [0, 1].
    """

    values: Float[Tensor, "batch *axes height width"]
    direction: Direction
    axes: tuple[MapAxis, ...] = ()
    labels: tuple[tuple[str, ...], ...] = ()
    is_normalised: bool = False

    @property
    def grid(self) -> GridSize:
        """Size of the maps."""
        return GridSize(*self.values.shape[-2:])

    def resized(self, size: GridSize, mode: ResizeMode = "bilinear") -> HeatMap:
        """On another grid, usually that of the picture."""
        if self.grid == size:
            return self
        return replace(self, values=resize_maps(self.values, size, mode), is_normalised=False)

    def on_reference(self, picture: GridSize, canvas: Canvas) -> HeatMap:
        """A reference-side map, resized to the reference picture as it was before the model fitted
        it to its own canvas; positions that the model did not see are zero.

        The canvas has the proportions of the map's grid.
        """
        return replace(self, values=on_picture(self.values, picture, canvas), is_normalised=False)

    def on_picture(self, size: GridSize) -> HeatMap:
        """Normalised, resized to the picture and normalised again, as the authors' code does before IMACS (eq. 8)."""
        return self.normalised().resized(size).normalised()

    def normalised(self, *, joint: bool = False) -> HeatMap:
        """Each map to [0, 1] by its own minimum and maximum, or by those of all maps of its sample (``joint``)."""
        joint_axes = len(self.axes) if joint else 0
        return replace(self, values=normalise(self.values, joint_axes=joint_axes), is_normalised=True)

    def thresholded(self, delta: float) -> HeatMap:
        """Normalised (unless it is), then without the values of at most ``delta``, which must lie in [0, 1)."""
        ready = self if self.is_normalised else self.normalised()
        return replace(ready, values=threshold(ready.values, delta))


@dataclass(frozen=True)
class AttributionMaps:
    """All maps of one sampling run. Values are means over what a map does not show; see `Rollup` for the weights.

    Every method takes ``size`` (None: the finest grid of the layers) and returns a `HeatMap` of
    float32 values. Maps of a `trace` lie on the CPU, wherever the model ran: compare them with
    masks on the CPU.
    """

    store: AttributionStore

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the captured layers."""
        return self.store.names

    def select(self, layers: Sequence[LayerId]) -> AttributionMaps:
        """Maps of some of the layers, by name or by the paper's number."""
        return AttributionMaps(self.store.select(layers))

    def by_head_count(self) -> dict[int, AttributionMaps]:
        """Maps per number of heads, for models whose layers differ in it."""
        counts = sorted({record.heads for record in self.store.layers})
        return {
            count: self.select([record.layer for record in self.store.layers if record.heads == count])
            for count in counts
        }

    def unified(
        self,
        direction: Direction,
        weighting: LayerWeighting = LayerWeighting.PAPER,
        size: GridSize | None = None,
        *,
        mode: ResizeMode = "bilinear",
        softmax_over: SoftmaxOver = "map",
    ) -> HeatMap:
        """ULAM: over all steps, heads and layers (eq. 7), ``[batch, height, width]``.

        ``softmax_over="reference"`` is DAAM's direction for generated-side maps: softmax over the
        reference, averaged over the reference. Rows of a softmax sum to one, so it is the constant
        ``1 / reference tokens`` whatever the model does (appendix A.7); it is there to show that.
        """
        rollup = Rollup(direction, weighting, mode)
        common = size or rollup.common_grid(self.store)
        source = self._daam_store(direction) if softmax_over == "reference" else self.store
        return HeatMap(rollup.combine(source.layers, common)[:, 0, 0], direction)

    @property
    def marks(self) -> tuple[str, ...]:
        """What a reader must know before trusting the maps: "not functional: ...", "partial: ..."."""
        return self.store.marks

    def mass(self, size: GridSize | None = None) -> HeatMap:
        """Share of its attention that a generated position gives to the reference, in [0, 1]:
        ``[batch, height, width]``, the mean over steps, heads and layers.

        For models whose softmax runs over both pictures' tokens (IDM-VTON, OOTDiffusion, CatVTON);
        raises `CaptureError` for others, where the reference gets all of it.
        """
        shares = tuple(
            replace(record, to_generated=record.mass) for record in self.store.layers if record.mass is not None
        )
        if len(shares) < len(self.store.layers):
            raise CaptureError(
                "This model attends to the reference alone, so the reference's share is one "
                "everywhere. mass() is for self-attention over both pictures (Site(joint=True))."
            )
        rollup = Rollup(Direction.REFERENCE_TO_GENERATED, LayerWeighting.PAPER)
        common = size or rollup.common_grid(self.store)
        return HeatMap(rollup.combine(shares, common)[:, 0, 0], rollup.direction)

    def time_level(
        self,
        direction: Direction,
        groups: int = 5,
        weighting: LayerWeighting = LayerWeighting.PAPER,
        size: GridSize | None = None,
    ) -> HeatMap:
        """TLAM: ``[batch, time, height, width]``; group 0 holds the first, noisiest steps (eqs. 10 and 11)."""
        rollup = Rollup(direction, weighting)
        common = size or rollup.common_grid(self.store)
        maps = rollup.combine(self.store.layers, common, groups=groups)
        return HeatMap(maps[:, :, 0], direction, ("time",), (_numbers(groups),))

    def head_level(
        self, direction: Direction, weighting: LayerWeighting = LayerWeighting.PAPER, size: GridSize | None = None
    ) -> HeatMap:
        """HLAM: ``[batch, head, height, width]``; each layer is averaged before layers are (eq. 12).

        Raises `ConfigError` if layers differ in their number of heads; see `by_head_count`.
        """
        rollup = Rollup(direction, weighting)
        common = size or rollup.common_grid(self.store)
        maps = rollup.combine(self.store.layers, common, heads=True)
        return HeatMap(maps[:, 0], direction, ("head",), (_numbers(maps.shape[2]),))

    def layer_level(self, direction: Direction, size: GridSize | None = None) -> HeatMap:
        """LLAM: ``[batch, layer, height, width]`` in the order of `layers` (eq. 13), as densities (mean 1)."""
        rollup = Rollup(direction, LayerWeighting.DENSITY)
        common = size or rollup.common_grid(self.store)
        maps = [rollup.combine([record], common)[:, 0, 0] for record in self.store.layers]
        return HeatMap(torch.stack(maps, dim=1), direction, ("layer",), (self.layers,))

    def two_axis(
        self,
        direction: Direction,
        rows: Literal["time", "head"],
        columns: Literal["resolution"] = "resolution",
        *,
        groups: int = 5,
        weighting: LayerWeighting = LayerWeighting.PAPER,
        size: GridSize | None = None,
    ) -> HeatMap:
        """Time x resolution or head x resolution (paper Fig. 20): ``[batch, row, resolution, height, width]``.

        Resolutions are the grids of the generated tokens, coarse to fine, in both directions.
        """
        rollup = Rollup(direction, weighting)
        common = size or rollup.common_grid(self.store)
        levels = by_resolution(self.store)
        heads = rows == "head"
        if heads:
            check_equal_heads(self.store.layers)
        maps = [
            rollup.combine(level, common, groups=None if heads else groups, heads=heads) for level in levels.values()
        ]
        values = torch.stack([level[:, 0] if heads else level[:, :, 0] for level in maps], dim=2)
        names = tuple(str(grid) for grid in levels)
        return HeatMap(values, direction, (rows, columns), (_numbers(values.shape[1]), names))

    def specific_reference(self, patches: Sequence[Patch], layer: LayerId, size: GridSize | None = None) -> HeatMap:
        """SRAM: where given generated patches look, ``[batch, patch, height, width]`` on the reference (eq. 14).

        ``layer`` must have been traced with its matrices (``trace(..., matrix_layers=[layer])``).
        """
        record = self.store.layer(layer)
        at = patch_indices(patches, record.generated_grid)
        rows = self.scores(layer)[:, at]
        grid = record.grid(Direction.GENERATED_TO_REFERENCE)
        return _patch_maps(rows, grid, Direction.GENERATED_TO_REFERENCE, at, size)

    def reverse_specific_reference(
        self, patches: Sequence[Patch], layer: LayerId, size: GridSize | None = None
    ) -> HeatMap:
        """Where given reference patches go, ``[batch, patch, height, width]`` on the generated image.

        The column of the softmax over generated positions (named but not defined by the paper; spec
        4).
        """
        record = self.store.layer(layer)
        at = patch_indices(patches, record.grid(Direction.GENERATED_TO_REFERENCE))
        columns = self.scores(layer, over="generated")[:, :, at].transpose(1, 2)
        return _patch_maps(columns, record.generated_grid, Direction.REFERENCE_TO_GENERATED, at, size)

    def scores(
        self, layer: LayerId, over: Literal["reference", "generated"] = "reference"
    ) -> Float[Tensor, "batch generated reference"]:
        """Head- and step-mean scores of a layer traced with its matrices; softmax over the axis named."""
        record = self.store.layer(layer)
        scores = record.scores_over_reference if over == "reference" else record.scores_over_generated
        if scores is None:
            kept = [other.layer for other in self.store.layers if other.scores_over_reference is not None]
            raise CaptureError(
                f"The score matrix of layer {record.layer} was not kept (kept: "
                f"{', '.join(kept) or 'none'}). "
                f"Trace with matrix_layers=[{record.layer!r}]."
            )
        return scores

    def _daam_store(self, direction: Direction) -> AttributionStore:
        if direction is not Direction.REFERENCE_TO_GENERATED:
            raise ConfigError(
                "softmax_over='reference' (DAAM) makes a map on the generated image. "
                "Use Direction.REFERENCE_TO_GENERATED."
            )
        layers = tuple(
            replace(record, to_generated=torch.full_like(record.to_generated, 1 / record.to_reference.shape[-1]))
            for record in self.store.layers
        )
        return replace(self.store, layers=layers)


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(count))


def patch_indices(patches: Sequence[Patch], grid: GridSize) -> list[int]:
    """Row-major indices; an error for a patch outside the grid.

    >>> patch_indices([(1, 2), 3], GridSize(4, 3))
    [5, 3]
    """
    indices = []
    for patch in patches:
        y, x = divmod(patch, grid.width) if isinstance(patch, int) else patch
        if not (0 <= y < grid.height and 0 <= x < grid.width):
            raise ConfigError(
                f"Patch {patch} lies outside the grid of {grid}. Choose an index in "
                f"0..{grid.tokens - 1}, "
                f"or a row in 0..{grid.height - 1} and a column in 0..{grid.width - 1}."
            )
        indices.append(y * grid.width + x)
    return indices


def _patch_maps(
    rows: Float[Tensor, "batch patch token"],
    grid: GridSize,
    direction: Direction,
    at: Sequence[int],
    size: GridSize | None,
) -> HeatMap:
    labels = (tuple(str(index) for index in at),)
    heat_map = HeatMap(rows.reshape(*rows.shape[:-1], *grid), direction, ("patch",), labels)
    return heat_map if size is None else heat_map.resized(size)
