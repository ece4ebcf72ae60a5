"""Super-resolution: whether each patch looks at its own place, layer by layer (paper 5.3, A.7; Figs. 9, 18).

The figures by time, head and layer (Figs. 8 and 17) are those of every model (``by_layer``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2am_train.attention.maps import AttributionMaps
from i2am_train.attention.recipe import LayerId
from i2am_train.evaluation.explanation import TO_GENERATED, TO_REFERENCE, Explanation, PatchIndex
from i2am_train.metrics.alignment import alignment_table, patch_distance
from i2am_train.reporting.figures.canvas import GREY, OKABE_ITO, STYLE, new_figure
from i2am_train.reporting.figures.elements import (
    layer_title,
    layers_of,
    patch_colors,
    placed_box,
    same_patch,
    specific_panels,
)
from i2am_train.reporting.figures.patches import across_layers
from i2am_train.reporting.figures.sheet import LINE, Panel, Sheet, warning_lines, write_warnings

PATCHES_SHOWN = 4
"""Rows of the sheet, as in the paper's Fig. 9."""

PLOT_HEIGHT = 2.4
"""Inches of the plot below its marks (chosen by us)."""


def alignment_sheet(sample: Explanation, layers: Sequence[LayerId] | None = None) -> Sheet:
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
    return across_layers(
        sample, TO_GENERATED, patches, chosen, columns,
        f"Alignment of {sample.name} ({sample.model}): where the boxed place of the generated "
        f"image looks on the {sample.reference} in each layer; the box there is the same place, "
        "the number the mean distance of the attention from it in percent of the diagonal.",
        first_title="generated",
    )  # fmt: skip


def _column(sample: Explanation, patches: Sequence[PatchIndex], layer: str) -> list[Panel]:
    """One layer's map of each patch, with the patch's own place and the distance from it."""
    record = sample.maps.store.layer(layer)
    grid = record.generated_grid
    away = patch_distance(sample.maps.scores(layer), grid, record.grid(TO_REFERENCE))[0].tolist()
    panels = []
    for panel, patch, color in zip(
        specific_panels(sample, patches, layer), patches, patch_colors(len(patches)), strict=True
    ):
        y, x = same_patch(patch, sample.grid(TO_GENERATED), grid)
        box = placed_box(sample, TO_REFERENCE, (y, x), grid, color)
        note = f"{100 * away[y * grid.width + x]:.0f} %"
        panels.append(replace(panel, boxes=(box,), note=note, frame=None))
    return panels


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
    axes.set_xticks(range(len(rows)), [layer_title(maps, row["layer"]) for row in rows], fontsize=6.5)
    axes.set_ylabel("distance from the own place\n(% of the diagonal)", fontsize=7)
    axes.set_ylim(0, 1.1 * 100 * max(max(row["relative"], row["even"]) for row in rows))
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(fontsize=7, loc="lower right")
    return figure


def _line(axes: Axes, values: Sequence[float], color: str, marker: str, label: str) -> None:
    axes.plot(range(len(values)), values, color=color, marker=marker, linewidth=1.2, label=label)
