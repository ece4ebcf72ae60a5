"""Attribution maps: every view of one capture, chosen afterwards (paper section 4 and appendix A.3), and their file.

The names follow the paper: unified (ULAM), time-level (TLAM), head-level (HLAM), layer-level (LLAM) and
specific-reference (SRAM) attribution maps.

Averages are taken first and maps are resized last: for the axis that a map lies on the two commute, and the other axis
has gone already (exact for bilinear resizing by whole factors). All layers are on the paper's scale, i.e.
probabilities: dividing by the number of terms turns the paper's sums (eqs. 4, 7, 10-14) into means, which min-max
normalisation cannot tell apart.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from i2am_train.attention.recipe import LayerId
from i2am_train.attention.store import (
    AttributionStore,
    LayerRecord,
    Rollup,
    by_resolution,
    check_equal_heads,
    not_finite,
)
from i2am_train.errors import CaptureError, ConfigError, DataError
from i2am_train.files import written
from i2am_train.ops.grids import ResizeMode, normalise, on_picture, resize_maps, threshold
from i2am_train.types import Canvas, Direction, GridSize, LayerWeighting

MapAxis: TypeAlias = Literal["time", "head", "layer", "resolution", "patch"]
SoftmaxOver: TypeAlias = Literal["map", "reference"]
Patch: TypeAlias = int | tuple[int, int]
"""A token by its row-major index, or by row and column."""


@dataclass(frozen=True)
class HeatMap:
    """Maps of one kind for a batch of samples.

    ``axes`` name the axes between batch and height, ``labels`` their entries (one tuple of words per axis).
    ``is_normalised`` says that every map fills [0, 1].
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
        """On another grid, usually that of the picture.

        >>> HeatMap(torch.tensor([[[0.0, 1.0]]]), Direction.REFERENCE_TO_GENERATED).resized(GridSize(1, 4)).values
        tensor([[[0.0000, 0.2500, 0.7500, 1.0000]]])
        """
        if self.grid == size:
            return self
        return replace(self, values=resize_maps(self.values, size, mode), is_normalised=False)

    def on_reference(self, picture: GridSize, canvas: Canvas) -> HeatMap:
        """A reference-side map, resized to the reference picture as it was before the model fitted it to its own
        canvas; positions that the model did not see are zero.

        The canvas has the proportions of the map's grid.

        >>> heat_map = HeatMap(torch.ones(1, 2, 2), Direction.GENERATED_TO_REFERENCE)
        >>> heat_map.on_reference(GridSize(2, 4), Canvas.CENTRE_CROP).values[0, 0]
        tensor([0., 1., 1., 0.])
        """
        return replace(self, values=on_picture(self.values, picture, canvas), is_normalised=False)

    def on_picture(self, size: GridSize) -> HeatMap:
        """Normalised, resized to the picture and normalised again, as the authors' code does before IMACS (eq. 8).

        >>> heat_map = HeatMap(torch.tensor([[[0.2, 0.3]]]), Direction.REFERENCE_TO_GENERATED)
        >>> heat_map.on_picture(GridSize(1, 4)).values
        tensor([[[0.0000, 0.2500, 0.7500, 1.0000]]])
        """
        return self.normalised().resized(size).normalised()

    def normalised(self, *, joint: bool = False) -> HeatMap:
        """Each map to [0, 1] by its own minimum and maximum, or by those of all maps of its sample (``joint``).

        >>> heads = HeatMap(torch.tensor([[[[0.0, 1.0]], [[2.0, 4.0]]]]), Direction.REFERENCE_TO_GENERATED, ("head",))
        >>> heads.normalised().values.tolist(), heads.normalised(joint=True).values.tolist()
        ([[[[0.0, 1.0]], [[0.0, 1.0]]]], [[[[0.0, 0.25]], [[0.5, 1.0]]]])
        """
        joint_axes = len(self.axes) if joint else 0
        return replace(self, values=normalise(self.values, joint_axes=joint_axes), is_normalised=True)

    def thresholded(self, delta: float) -> HeatMap:
        """Normalised (unless it is), then without the values of at most ``delta``, in [0, 1) (eq. 5).

        >>> HeatMap(torch.tensor([[[1.0, 2.0, 3.0]]]), Direction.REFERENCE_TO_GENERATED).thresholded(0.5).values
        tensor([[[0., 0., 1.]]])
        """
        ready = self if self.is_normalised else self.normalised()
        return replace(ready, values=threshold(ready.values, delta))


@dataclass(frozen=True)
class AttributionMaps:
    """All maps of one sampling run. Values are means over what a map does not show; see `Rollup` for the weights.

    Every method takes ``size`` (None: the finest grid of the layers) and returns a `HeatMap` of float32 values. Maps of
    a `trace` lie on the CPU, wherever the model ran: compare them with masks on the CPU.

    >>> record = LayerRecord("a", GridSize(2, 1), GridSize(1, 3), torch.rand(1, 4, 8, 2), torch.rand(1, 4, 8, 3))
    >>> maps = AttributionMaps(AttributionStore((record,), (None,) * 4))  # one sample, four steps, eight heads
    >>> maps.unified(Direction.REFERENCE_TO_GENERATED).grid, maps.unified(Direction.GENERATED_TO_REFERENCE).grid
    (GridSize(height=2, width=1), GridSize(height=1, width=3))
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

        ``softmax_over="reference"`` is DAAM's direction for generated-side maps: softmax over the reference, averaged
        over the reference. Rows of a softmax sum to one, so it is the constant ``1 / reference tokens`` whatever the
        model does (appendix A.7); it is there to show that.

        >>> steps = torch.tensor([[[[0.9, 0.1]], [[0.7, 0.3]]]])  # of one sample, two steps, one head
        >>> record = LayerRecord("a", GridSize(1, 2), GridSize(1, 4), steps, torch.full((1, 2, 1, 4), 0.25))
        >>> maps = AttributionMaps(AttributionStore((record,), (999, 500)))
        >>> maps.unified(Direction.REFERENCE_TO_GENERATED).values
        tensor([[[0.8000, 0.2000]]])
        >>> maps.unified(Direction.REFERENCE_TO_GENERATED, softmax_over="reference").values
        tensor([[[0.2500, 0.2500]]])
        """
        records = self._daam_layers(direction) if softmax_over == "reference" else self.store.layers
        return HeatMap(self._combined(Rollup(direction, weighting, mode), size, records)[:, 0, 0], direction)

    @property
    def marks(self) -> tuple[str, ...]:
        """What a reader must know before trusting the maps: "not functional: ...", "partial: ..."."""
        return self.store.marks

    def mass(self, size: GridSize | None = None) -> HeatMap:
        """Share of its attention that a generated position gives to the reference, in [0, 1]:
        ``[batch, height, width]``, the mean over steps, heads and layers.

        For models whose softmax runs over both pictures' tokens (IDM-VTON, OOTDiffusion, CatVTON); raises
        `CaptureError` for others, where the reference gets all of it.

        >>> even, mass = torch.full((1, 1, 1, 2), 0.5), torch.tensor([[[[0.25, 0.75]]]])
        >>> record = LayerRecord("a", GridSize(1, 2), GridSize(1, 2), even, even, mass=mass)
        >>> AttributionMaps(AttributionStore((record,), (None,))).mass().values
        tensor([[[0.2500, 0.7500]]])
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
        return HeatMap(self._combined(rollup, size, shares)[:, 0, 0], rollup.direction)

    def time_level(
        self,
        direction: Direction,
        groups: int = 5,
        weighting: LayerWeighting = LayerWeighting.PAPER,
        size: GridSize | None = None,
    ) -> HeatMap:
        """TLAM: ``[batch, time, height, width]``; group 0 holds the first, noisiest steps (eqs. 10 and 11).

        >>> steps = torch.tensor([1.0, 0.8, 0.6, 0.4]).view(1, 4, 1, 1)
        >>> record = LayerRecord("a", GridSize(1, 1), None, steps, steps)
        >>> maps = AttributionMaps(AttributionStore((record,), (None,) * 4))
        >>> maps.time_level(Direction.REFERENCE_TO_GENERATED, groups=2).values.flatten()
        tensor([0.9000, 0.5000])
        """
        maps = self._combined(Rollup(direction, weighting), size, groups=groups)
        return HeatMap(maps[:, :, 0], direction, ("time",), (_numbers(groups),))

    def head_level(
        self, direction: Direction, weighting: LayerWeighting = LayerWeighting.PAPER, size: GridSize | None = None
    ) -> HeatMap:
        """HLAM: ``[batch, head, height, width]``; each layer is averaged before layers are (eq. 12).

        Raises `ConfigError` if layers differ in their number of heads; see `by_head_count`.

        >>> record = LayerRecord("a", GridSize(2, 1), None, torch.rand(1, 4, 8, 2), torch.rand(1, 4, 8, 3))
        >>> maps = AttributionMaps(AttributionStore((record,), (None,) * 4))
        >>> maps.head_level(Direction.REFERENCE_TO_GENERATED).values.shape
        torch.Size([1, 8, 2, 1])
        """
        maps = self._combined(Rollup(direction, weighting), size, heads=True)
        return HeatMap(maps[:, 0], direction, ("head",), (_numbers(maps.shape[2]),))

    def layer_level(self, direction: Direction, size: GridSize | None = None) -> HeatMap:
        """LLAM: ``[batch, layer, height, width]`` in the order of `layers` (eq. 13), as densities (mean 1).

        >>> record = LayerRecord("a", GridSize(1, 2), None, torch.tensor([[[[0.75, 0.25]]]]), torch.ones(1, 1, 1, 1))
        >>> maps = AttributionMaps(AttributionStore((record,), (None,)))
        >>> maps.layer_level(Direction.REFERENCE_TO_GENERATED).values
        tensor([[[[1.5000, 0.5000]]]])
        """
        rollup = Rollup(direction, LayerWeighting.DENSITY)
        maps = [self._combined(rollup, size, [record])[:, 0, 0] for record in self.store.layers]
        return HeatMap(torch.stack(maps, dim=1), direction, ("layer",), (self.layers,))

    def two_axis(
        self,
        direction: Direction,
        rows: Literal["time", "head"],
        *,
        groups: int = 5,
        weighting: LayerWeighting = LayerWeighting.PAPER,
        size: GridSize | None = None,
    ) -> HeatMap:
        """Time x resolution or head x resolution (paper Fig. 20): ``[batch, row, resolution, height, width]``.

        Resolutions are the grids of the generated tokens, coarse to fine, in both directions.
        """
        rollup, levels, heads = Rollup(direction, weighting), by_resolution(self.store), rows == "head"
        if heads:
            check_equal_heads(self.store.layers)
        maps = [
            self._combined(rollup, size, level, groups=None if heads else groups, heads=heads)
            for level in levels.values()
        ]
        values = torch.stack([level[:, 0] if heads else level[:, :, 0] for level in maps], dim=2)
        names = tuple(str(grid) for grid in levels)
        return HeatMap(values, direction, (rows, "resolution"), (_numbers(values.shape[1]), names))

    def specific_reference(self, patches: Sequence[Patch], layer: LayerId, size: GridSize | None = None) -> HeatMap:
        """SRAM: where given generated patches look, ``[batch, patch, height, width]`` on the reference (eq. 14).

        ``layer`` must have been traced with its matrices (``trace(..., matrix_layers=[layer])``).

        >>> scores, even = torch.tensor([[[0.8, 0.2], [0.3, 0.7]]]), torch.full((1, 1, 1, 2), 0.5)
        >>> record = LayerRecord("a", GridSize(2, 1), GridSize(1, 2), even, even, scores_over_reference=scores)
        >>> AttributionMaps(AttributionStore((record,), (None,))).specific_reference([(1, 0)], "a").values
        tensor([[[[0.3000, 0.7000]]]])
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

        The column of the softmax over generated positions (named but not defined by the paper).

        >>> scores, even = torch.tensor([[[0.8, 0.2], [0.2, 0.8]]]), torch.full((1, 1, 1, 2), 0.5)
        >>> record = LayerRecord("a", GridSize(2, 1), GridSize(1, 2), even, even, scores_over_generated=scores)
        >>> AttributionMaps(AttributionStore((record,), (None,))).reverse_specific_reference([1], "a").values.flatten()
        tensor([0.2000, 0.8000])
        """
        record = self.store.layer(layer)
        at = patch_indices(patches, record.grid(Direction.GENERATED_TO_REFERENCE))
        columns = self.scores(layer, over="generated")[:, :, at].transpose(1, 2)
        return _patch_maps(columns, record.generated_grid, Direction.REFERENCE_TO_GENERATED, at, size)

    def scores(
        self, layer: LayerId, over: Literal["reference", "generated"] = "reference", head: int | None = None
    ) -> Float[Tensor, "batch generated reference"]:
        """Step-mean scores of a layer traced with its matrices; softmax over the axis named; of a head, or the mean of
        all."""
        record = self.store.layer(layer)
        scores = record.scores_over_reference if over == "reference" else record.scores_over_generated
        if scores is None:
            kept = [other.layer for other in self.store.layers if other.scores_over_reference is not None]
            raise CaptureError(
                f"The score matrix of layer {record.layer} was not kept (kept: {', '.join(kept) or 'none'}). Trace "
                f"with matrix_layers=[{record.layer!r}]."
            )
        if head is None:
            return scores
        heads = record.head_scores_over_reference if over == "reference" else record.head_scores_over_generated
        if heads is None or not 0 <= head < heads.shape[1]:
            found = "the mean of its heads only" if heads is None else f"{record.heads} heads, numbered from 0"
            raise CaptureError(
                f"There are no scores of head {head} of layer {record.layer}: kept were {found}. Trace with "
                "matrix_heads=True, and give one of its heads."
            )
        return heads[:, head]

    def _daam_layers(self, direction: Direction) -> tuple[LayerRecord, ...]:
        if direction is not Direction.REFERENCE_TO_GENERATED:
            raise ConfigError(
                "softmax_over='reference' (DAAM) makes a map on the generated image. "
                "Use Direction.REFERENCE_TO_GENERATED."
            )
        return tuple(
            replace(record, to_generated=torch.full_like(record.to_generated, 1 / record.to_reference.shape[-1]))
            for record in self.store.layers
        )

    def _combined(
        self,
        rollup: Rollup,
        size: GridSize | None,
        records: Sequence[LayerRecord] | None = None,
        *,
        groups: int | None = None,
        heads: bool = False,
    ) -> Float[Tensor, "batch group head height width"]:
        """Mean over the given layers (None: all), on the finest grid of all layers unless another is asked for."""
        records = self.store.layers if records is None else records
        return rollup.combine(records, size or rollup.common_grid(self.store), groups=groups, heads=heads)


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
                f"Patch {patch} lies outside the grid of {grid}. Choose an index in 0..{grid.tokens - 1}, or a row in "
                f"0..{grid.height - 1} and a column in 0..{grid.width - 1}."
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


_NAME = "i2am-attribution-"
_FORMAT = f"{_NAME}1"
_OPTIONAL = (
    "mass",
    "scores_over_reference",
    "scores_over_generated",
    "head_scores_over_reference",
    "head_scores_over_generated",
)


@dataclass(frozen=True)
class Archive:
    """A loaded capture: its maps, and the names of its samples."""

    maps: AttributionMaps
    names: tuple[str, ...]


def save_maps(maps: AttributionMaps, path: str | os.PathLike[str], names: Sequence[str] = ()) -> Path:
    """Write everything that `maps` can be made from; the file appears whole or not at all.

    ``names`` are those of the samples, in the order of the batch. Raises `DataError` for maps that are not finite, and
    for other numbers of names.
    """
    target = Path(path)
    if (where := not_finite(maps.store)) is not None:
        raise DataError(
            f"The maps are not finite numbers: {where}. Nothing was written to '{target}'. Run the "
            "model in a precision that holds its values (float32, bfloat16)."
        )
    if names and len(names) != maps.store.batch:
        raise DataError(
            f"{len(names)} names were given for {maps.store.batch} samples. Give one name per sample, or none."
        )
    with written(target) as unfinished:
        save_file(_tensors(maps.store), unfinished, metadata=_metadata(maps.store, names))
    return target


def load_maps(path: str | os.PathLike[str]) -> Archive:
    """Read what `save_maps` wrote. Raises `DataError` for anything else, and for maps that are not finite."""
    source = Path(path)
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"'{source}' cannot be read as an attribution archive ({error}). Make it again with 'i2am explain'."
        ) from error
    if metadata.get("format", "").startswith(_NAME) and metadata["format"] != _FORMAT:
        raise DataError(
            f"'{source}' is an attribution archive of another version (its format is {metadata['format']!r}, this "
            f"program reads {_FORMAT!r}). Make it again with 'i2am explain'."
        )
    if metadata.get("format") != _FORMAT:
        raise DataError(
            f"'{source}' is not an attribution archive (its format is {metadata.get('format')!r}, "
            f"expected {_FORMAT!r}). Give a file that 'i2am explain' or save_maps() wrote."
        )
    layers = tuple(_layer(entry, tensors) for entry in json.loads(metadata["layers"]))
    recipe, partial, canvas = json.loads(metadata.get("model", '["", null, "stretch"]'))
    store = AttributionStore(
        layers,
        tuple(json.loads(metadata["timesteps"])),
        recipe,
        partial,
        Canvas(canvas),
        tuple(json.loads(metadata.get("model_layers", "[]"))),
    )
    if (where := not_finite(store)) is not None:
        raise DataError(
            f"'{source}' holds maps that are not finite numbers: {where}. Make it again, with the "
            "model in a precision that holds its values (float32, bfloat16)."
        )
    return Archive(AttributionMaps(store), tuple(json.loads(metadata["names"])))


def _tensors(store: AttributionStore) -> dict[str, Tensor]:
    return {
        f"{record.layer}/{name}": value.contiguous()
        for record in store.layers
        for name in ("to_generated", "to_reference", *_OPTIONAL)
        if (value := getattr(record, name)) is not None
    }


def _metadata(store: AttributionStore, names: Sequence[str]) -> dict[str, str]:
    described = ("layer", "generated_grid", "reference_grid", "functional")
    layers = [{name: getattr(record, name) for name in described} for record in store.layers]
    return {
        "format": _FORMAT,
        "layers": json.dumps(layers),
        "timesteps": json.dumps(store.timesteps),
        "model": json.dumps([store.recipe, store.partial, store.canvas]),
        "model_layers": json.dumps(list(store.model)),
        "names": json.dumps(list(names)),
    }


def _layer(entry: dict[str, Any], tensors: dict[str, Tensor]) -> LayerRecord:
    layer, reference_grid = entry["layer"], entry["reference_grid"]
    return LayerRecord(
        layer=layer,
        generated_grid=GridSize(*entry["generated_grid"]),
        reference_grid=None if reference_grid is None else GridSize(*reference_grid),
        to_generated=tensors[f"{layer}/to_generated"],
        to_reference=tensors[f"{layer}/to_reference"],
        functional=entry["functional"],
        **{name: tensors.get(f"{layer}/{name}") for name in _OPTIONAL},
    )
