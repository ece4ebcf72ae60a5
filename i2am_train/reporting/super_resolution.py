"""Super-resolution: whether each patch looks at its own place, layer by layer (paper 5.3, A.7; Figs. 9, 18).

The figures by time, head and layer (Figs. 8 and 17) are those of every model (``levels``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2am_train.attention.maps import AttributionMaps
from i2am_train.attention.recipe import LayerId
from i2am_train.attention.store import LayerRecord
from i2am_train.metrics.alignment import even_alignment, layer_alignment, patch_distance
from i2am_train.reporting.figures.canvas import GREY, OKABE_ITO, STYLE, new_figure
from i2am_train.reporting.figures.elements import (
    TO_GENERATED,
    TO_REFERENCE,
    layer_title,
    layers_of,
    patch_box,
    patch_colors,
    placed_box,
    plain_cell,
    same_place,
    specific_cells,
)
from i2am_train.reporting.figures.explained import Drawn, GridCell
from i2am_train.reporting.figures.sheet import (
    LINE,
    Box,
    Cell,
    Section,
    Sheet,
    warning_lines,
    write_warnings,
)

PATCHES_SHOWN = 4
"""Rows of the sheet, as in the paper's Fig. 9."""

PLOT_HEIGHT = 2.4
"""Inches of the plot below its marks (chosen by us)."""


def alignment_sheet(sample: Drawn, layers: Sequence[LayerId] | None = None) -> Sheet:
    """Where a place of the generated image looks in each layer, and how far away that is (Figs. 9, 18).

    Rows are the first patches of the sample's layer, columns the layers; the box is the patch's own
    place on the reference, the number the mean distance of its attention from there in percent of
    the picture's diagonal.

    Raises:
        CaptureError: the score matrix of a layer was not kept.
    """
    chosen = layers_of(sample.maps, layers)
    patches = sample.generated_patches[:PATCHES_SHOWN]
    columns = [_column(sample, patches, layer) for layer in chosen]
    rows = []
    for index, (patch, color) in enumerate(zip(patches, patch_colors(len(patches)), strict=True)):
        first = plain_cell(sample, TO_GENERATED)
        first = replace(first, boxes=(placed_box(sample, TO_GENERATED, patch, color),))
        rows.append((first, *(column[index] for column in columns)))
    titles = ["generated", *(layer_title(sample.maps, layer) for layer in chosen)]
    rows[0] = tuple(replace(cell, title=t) for cell, t in zip(rows[0], titles, strict=True))
    section = Section(
        rows=tuple(rows),
        row_titles=tuple(f"patch {y}, {x}" for y, x in patches),
        groups=(1, len(chosen)),
    )
    return Sheet(
        sections=(section,),
        caption=f"Alignment of {sample.name} ({sample.model}): where the boxed place of the generated "
        f"image looks on the {sample.reference_word} in each layer; the box there is the same place, "
        "the number the mean distance of the attention from it in percent of the diagonal.",
    )


def _column(sample: Drawn, patches: Sequence[GridCell], layer: str) -> list[Cell]:
    """One layer's map of each patch, with the patch's own place and the distance from it."""
    record = sample.maps.store.layer(layer)
    scores = sample.maps.scores(layer)
    away = patch_distance(scores, record.generated_grid, record.grid(TO_REFERENCE))[0].tolist()
    colors = patch_colors(len(patches))
    cells = []
    for cell, patch, color in zip(
        specific_cells(sample, patches, layer), patches, colors, strict=True
    ):
        y, x = same_place(patch, sample.grid(TO_GENERATED), record.generated_grid)
        note = f"{100 * away[y * record.generated_grid.width + x]:.0f} %"
        box = _own_place(sample, record, (y, x), color)
        cells.append(replace(cell, boxes=(box,), note=note, frame=None))
    return cells


def _own_place(sample: Drawn, record: LayerRecord, patch: GridCell, color: str) -> Box:
    """A generated patch of a layer, drawn at its own place on the reference."""
    grid, placement = record.generated_grid, sample.placement(TO_REFERENCE)
    box = patch_box(patch, grid, color)
    return box if placement is None else placement.box(box, grid)


def alignment_table(maps: AttributionMaps) -> list[dict[str, Any]]:
    """The mean over samples of each layer's alignment, ready for JSON, in the order of the layers.

    ``distance`` counts reference patches, ``relative`` is a share of the diagonal, ``within_one`` the
    share of the attention at most one patch away; ``even`` is the ``relative`` of attention that is
    spread evenly. Layers without a score matrix are left out.
    """
    rows = []
    for layer, found in layer_alignment(maps).items():
        record = maps.store.layer(layer)
        grids = record.generated_grid, record.grid(TO_REFERENCE)
        rows.append(
            {
                "layer": layer,
                "generated_grid": grids[0],
                "reference_grid": grids[1],
                "distance": float(found.distance.mean()),
                "relative": float(found.relative.mean()),
                "within_one": float(found.within.mean()),
                "even": float(even_alignment(*grids).relative),
            }
        )
    return rows


@mpl.rc_context(STYLE)
def alignment_plot(maps: AttributionMaps, width: float = 5.5) -> Figure:
    """Distance of the attention from the own place by layer, with that of even attention as a yardstick.

    The maps' marks stand above it; ``width`` is in inches.
    """
    rows = alignment_table(maps)
    marks = warning_lines(maps.marks, width)
    height = PLOT_HEIGHT + LINE * len(marks)
    figure = new_figure(width, height)
    write_warnings(figure, marks)
    scale = PLOT_HEIGHT / height
    axes = figure.add_axes((0.11, 0.24 * scale, 0.87, 0.68 * scale))
    _line(axes, [100 * row["relative"] for row in rows], OKABE_ITO[0], "o", "this model")
    _line(axes, [100 * row["even"] for row in rows], GREY, "_", "attention spread evenly")
    axes.set_xticks(
        range(len(rows)), [layer_title(maps, row["layer"]) for row in rows], fontsize=6.5
    )
    axes.set_ylabel("distance from the own place\n(% of the diagonal)", fontsize=7)
    axes.set_ylim(0, 1.1 * 100 * max(max(row["relative"], row["even"]) for row in rows))
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(fontsize=7, loc="lower right")
    return figure


def _line(axes: Axes, values: Sequence[float], color: str, marker: str, label: str) -> None:
    axes.plot(range(len(values)), values, color=color, marker=marker, linewidth=1.2, label=label)
