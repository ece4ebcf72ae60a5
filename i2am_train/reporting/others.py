"""What ``i2am explain`` keeps and draws of other people's models: files, figures, and what they mean.

In the run folder (beside ``settings.json`` and ``manifest.json``)::

    scores.json         recipe, marks, layer, patches, scores, mean share of attention (mass)
    maps.safetensors    the capture (attention/archive.py)
    images/*.png        generated, reference
    masks/*.png         generated (the region that was filled in), reference; white inside
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from i2am_train.attention.archive import save_maps
from i2am_train.attention.known import of_same_picture
from i2am_train.attention.maps import AttributionMaps
from i2am_train.json_files import write_json
from i2am_train.reporting.explained import SCORES, write_png
from i2am_train.reporting.figures.by_layer import layer_maps, time_and_head_maps
from i2am_train.reporting.figures.canvas import Picture
from i2am_train.reporting.figures.elements import TO_GENERATED, TO_REFERENCE, map_cell
from i2am_train.reporting.figures.explained import (
    SHOWN_AT_MOST,
    WHITE,
    GridCell,
    Mask,
    Placement,
    array,
    frame_of,
    framed,
)
from i2am_train.reporting.figures.patches import reverse_across_layers, specific_reference
from i2am_train.reporting.figures.sheet import Cell, Section, Sheet, draw_sheet
from i2am_train.reporting.super_resolution import (
    alignment_plot,
    alignment_sheet,
    alignment_table,
)
from i2am_train.types import Direction, GridSize, LayerWeighting

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainedPicture:
    """One picture by another model, and the attention that made it. See `drawn.Drawn`.

    Pictures are uint8 ``[height, width, 3]``; generated and reference may differ in size.
    """

    name: str
    model: str
    """How captions call the model."""
    layer: str
    generated: Picture
    reference: Picture
    """As the user gave it."""
    generated_mask: Mask | None
    reference_mask: Mask | None
    maps: AttributionMaps
    scores: Mapping[str, float | None]
    generated_patches: tuple[GridCell, ...]
    reference_patches: tuple[GridCell, ...]
    origin: Mapping[str, Any]
    """What it was made by and from."""
    delta: float
    weighting: LayerWeighting
    time_groups: int

    @property
    def reference_word(self) -> str:
        """What captions call the reference."""
        return "reference"

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Those that have maps."""
        return self.maps.store.directions

    @property
    def size(self) -> GridSize:
        """Of the generated picture."""
        return GridSize(*self.generated.shape[:2])

    def grid(self, direction: Direction) -> GridSize:
        """Grid of the layer's generated or reference patches."""
        return self.maps.store.layer(self.layer).grid(direction)

    def picture(self, direction: Direction) -> Picture:
        """The generated picture, or the reference in a white frame of the same aspect."""
        if direction is TO_GENERATED:
            return self.generated
        return cast(Picture, framed(self._small(self.reference), self._frame, WHITE))

    def outline(self, direction: Direction) -> Mask | None:
        """The region that a map of the direction should fill."""
        if direction is TO_GENERATED:
            return self.generated_mask
        if self.reference_mask is None:
            return None
        return cast(Mask, framed(self._small(self.reference_mask), self._frame, 0))

    def placement(self, direction: Direction) -> Placement | None:
        """Where the reference's grids lie in its frame."""
        if direction is TO_GENERATED:
            return None
        picture = GridSize(*self._small(self.reference).shape[:2])
        return Placement(picture, self._frame, self.maps.store.canvas)

    def true_places(self, grid: GridSize, reference_grid: GridSize) -> NDArray[np.float32]:
        """Not known: NaN, ``[generated, 2]``."""
        return np.full((grid.tokens, 2), np.nan, np.float32)

    @property
    def _frame(self) -> GridSize:
        return frame_of(GridSize(*self._small(self.reference).shape[:2]), self.size)

    def _small(self, array: NDArray[Any]) -> NDArray[Any]:
        """Every n-th pixel, so that the longer side fits."""
        step = -(-max(array.shape[:2]) // SHOWN_AT_MOST)
        return array[::step, ::step]


def write_picture(folder: Path, explained: ExplainedPicture) -> None:
    """Write the files of one picture into its run folder; ``scores.json`` comes last."""
    write_png(folder / "images" / "generated.png", explained.generated)
    write_png(folder / "images" / "reference.png", explained.reference)
    masks = {"generated": explained.generated_mask, "reference": explained.reference_mask}
    for name, mask in masks.items():
        if mask is not None:
            write_png(folder / "masks" / f"{name}.png", mask.astype(np.uint8) * np.uint8(WHITE))
    save_maps(explained.maps, folder / "maps.safetensors", [explained.name])
    write_json(folder / SCORES, description(explained))


def description(explained: ExplainedPicture) -> dict[str, Any]:
    """``scores.json``: what the maps are of, what they mean, and the scores."""
    store = explained.maps.store
    mass = float(explained.maps.mass().values.mean()) if explained.maps.store.joint else None
    return {
        "schema": SCHEMA,
        "recipe": store.recipe,
        "model": explained.model,
        "marks": list(store.marks),
        "functional": store.functional,
        "partial": store.partial,
        "directions": [str(direction) for direction in explained.directions],
        "name": explained.name,
        "layer": explained.layer,
        "layers": [
            {
                "layer": record.layer,
                "heads": record.heads,
                "generated_grid": record.generated_grid,
                "reference_grid": record.reference_grid,
                "functional": record.functional,
                "mass": None if record.mass is None else float(record.mass.mean()),
            }
            for record in store.layers
        ],
        "scores": dict(explained.scores),
        "mass": mass,
        "alignment": alignment_table(explained.maps) if _aligned_layers(explained) else None,
        "generated_patches": explained.generated_patches,
        "reference_patches": explained.reference_patches,
        "origin": dict(explained.origin),
        "delta": explained.delta,
        "weighting": explained.weighting,
        "time_groups": explained.time_groups,
    }


def figures(explained: ExplainedPicture) -> dict[str, Figure]:
    """Every figure that the model allows, by name; each carries the marks."""
    sheets = {
        "unified": unified_maps(explained),
        "layers": layer_maps(explained),
        "time_heads": time_and_head_maps(explained),
    }
    if explained.maps.store.joint:
        sheets["mass"] = mass_maps(explained)
    record = explained.maps.store.layer(explained.layer)
    if TO_REFERENCE in explained.directions and record.scores_over_reference is not None:
        sheets["specific_reference"] = specific_reference(explained)
        sheets["reverse_specific"] = reverse_across_layers(explained, [explained.layer])
    drawn = {}
    if traced := _aligned_layers(explained):
        sheets["alignment"] = alignment_sheet(explained, traced)
        drawn["alignment_layers"] = alignment_plot(explained.maps)
    marks = explained.maps.marks
    return drawn | {
        name: draw_sheet(replace(sheet, warnings=marks + sheet.warnings))
        for name, sheet in sheets.items()
    }


def _aligned_layers(explained: ExplainedPicture) -> list[str]:
    """Layers with score matrices, where the reference shows what is generated."""
    if not of_same_picture(explained.maps.store.recipe):
        return []
    layers = explained.maps.store.layers
    return [one.layer for one in layers if one.scores_over_reference is not None]


def unified_maps(explained: ExplainedPicture) -> Sheet:
    """Both pictures, and the unified map of each direction that there is."""
    pictures = (
        Cell(picture=explained.picture(TO_REFERENCE), title="reference"),
        Cell(picture=explained.generated, title="generated"),
    )
    names = {TO_GENERATED: "$M_g$", TO_REFERENCE: "$M_r$"}
    maps = tuple(
        map_cell(explained, direction, _unified(explained, direction), names[direction], note)
        for direction, note in zip(explained.directions, _notes(explained), strict=False)
    )
    section = Section(rows=((*pictures, *maps),), groups=(2, len(maps)))
    return Sheet(
        sections=(section,),
        caption=f"Unified attribution maps of {explained.name} ({explained.model}).",
    )


def _unified(explained: ExplainedPicture, direction: Direction) -> NDArray[np.float32]:
    return array(explained.maps.unified(direction, explained.weighting).normalised())


def _notes(explained: ExplainedPicture) -> tuple[str, str]:
    """The scores under the maps of both directions, where there are any."""
    found = (explained.scores.get(name) for name in ("imacs_g", "imacs_r"))
    first, second = ("" if score is None else f"IMACS {score:.3f}" for score in found)
    return first, second


def mass_maps(explained: ExplainedPicture) -> Sheet:
    """Share of its attention that each place gives to the reference: all layers, then by resolution."""
    store = explained.maps.store
    grids = sorted({record.generated_grid for record in store.layers}, key=lambda grid: grid.tokens)
    parts = {"all layers": explained.maps} | {
        str(grid): explained.maps.select(
            [record.layer for record in store.layers if record.generated_grid == grid]
        )
        for grid in grids
    }
    cells = []
    for title, maps in parts.items():
        values = array(maps.mass())
        cell = map_cell(explained, TO_GENERATED, values, title, f"mean {values.mean():.2f}")
        cells.append(cell)
    first = Cell(picture=explained.generated, title="generated")
    return Sheet(
        sections=(Section(rows=((first, *cells),), groups=(1, len(cells))),),
        caption=f"Share of attention that goes to the reference, {explained.name} "
        f"({explained.model}); the rest goes to the generated picture itself.",
        scale="share of attention that goes to the reference",
    )
