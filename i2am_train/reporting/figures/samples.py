"""Samples side by side: inputs, what each arm made of them, where its attention went and whether
that was right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from i2am_train.reporting.figures.canvas import (
    STYLE,
    TRUTH_COLOR,
    Margins,
    arm_colors,
    faded,
    heat_scale,
    image_grid,
    show_heat,
    show_picture,
)
from i2am_train.results.study import Panels

TEAR = 2.5
"""Neighbours on the person whose true positions on the garment lie further apart than this many
times the median are not joined: a sleeve in front of the body is no neighbour of it on the flat
garment. Chosen by us, by eye."""


MAX_CELL_WIDTH = 2.1
"""Inches; with few columns the figure gets narrower instead of its pictures larger."""


class PanelPart(StrEnum):
    """A group of columns of a sample panel."""

    INPUTS = "inputs"
    IMAGES = "images"
    GENERATED_MAPS = "generated_maps"
    REFERENCE_MAPS = "reference_maps"
    CENTERS = "centers"


ALL_PARTS = tuple(PanelPart)

_HEADINGS = {
    PanelPart.INPUTS: "Input and truth",
    PanelPart.IMAGES: "Generated",
    PanelPart.GENERATED_MAPS: "Attribution on the generated image",
    PanelPart.REFERENCE_MAPS: "Attribution on the garment",
    PanelPart.CENTERS: "Attention centres on the garment",
}
_SHORT_HEADINGS = {
    PanelPart.GENERATED_MAPS: "Map on image",
    PanelPart.REFERENCE_MAPS: "Map on garment",
    PanelPart.CENTERS: "Centres",
}

Draw = Callable[[Axes, int], None]


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    draw: Draw


@mpl.rc_context(STYLE)
def sample_panel(
    panels_by_arm: Mapping[str, Panels],
    parts: Sequence[PanelPart] = ALL_PARTS,
    labels: Mapping[str, str] | None = None,
    colors: Mapping[str, str] | None = None,
    width: float = 11.0,
    rows: int | None = None,
) -> Figure:
    """One row per sample: garment, agnostic, pose, truth, then image, maps and centres per arm.

    Args:
        panels_by_arm: what each arm kept of the same samples, in the order of columns.
        parts: which groups of columns to draw.
        labels: column titles by arm; the arm's name where there is none.
        colors: colour of each arm's attention mesh.
        width: of the figure in inches, at most.
        rows: how many samples at most; all by default.

    Raises:
        ValueError: if the arms did not keep the same samples, or there is no arm.
    """
    first = _checked(panels_by_arm)
    colors = colors or arm_colors(panels_by_arm)
    titles = {arm: (labels or {}).get(arm, arm) for arm in panels_by_arm}
    groups = {part: list(_columns(part, panels_by_arm, titles, colors)) for part in parts}
    count = min(rows or len(first.names), len(first.names))
    height, wide = first.garment.shape[1:3]
    with_maps = any(part in _SHORT_HEADINGS and part != PanelPart.CENTERS for part in parts)
    margins = Margins(top=0.56, bottom=0.42 if with_maps else 0.06)
    columns = [column for of in groups.values() for column in of]
    width = min(width, len(columns) * MAX_CELL_WIDTH + 0.5)
    grid = image_grid(count, [len(of) for of in groups.values()], height / wide, width, margins)
    for row in range(count):
        for column, axes in zip(columns, grid.axes[row], strict=True):
            column.draw(axes, row)
    grid.column_titles([column.title for column in columns])
    grid.row_titles(first.names[:count])
    grid.group_titles([_heading(part, len(of), len(columns)) for part, of in groups.items()])
    if with_maps:
        grid.color_bar(heat_scale(), "attribution, each map scaled to [0, 1]")
    return grid.figure


def _checked(panels_by_arm: Mapping[str, Panels]) -> Panels:
    if not panels_by_arm:
        raise ValueError("A sample panel needs the panels of at least one arm.")
    first, *others = panels_by_arm.values()
    for other in others:
        if (other.names, other.garment_names) != (first.names, first.garment_names):
            raise ValueError(
                f"The arms kept different samples: {first.names} and {other.names}. "
                "Evaluate all arms with the same panel samples."
            )
    return first


def _heading(part: PanelPart, columns: int, all_columns: int) -> str:
    narrow = columns / all_columns < 0.3
    return _SHORT_HEADINGS.get(part, _HEADINGS[part]) if narrow else _HEADINGS[part]


def _columns(
    part: PanelPart,
    panels_by_arm: Mapping[str, Panels],
    titles: Mapping[str, str],
    colors: Mapping[str, str],
) -> Iterator[_Column]:
    if part is PanelPart.INPUTS:
        yield from _input_columns(next(iter(panels_by_arm.values())))
        return
    for arm, panels in panels_by_arm.items():
        yield _Column(titles[arm], _arm_drawing(part, panels, colors[arm]))


def _input_columns(panels: Panels) -> Iterator[_Column]:
    for title, pictures, interpolation in (
        ("garment", panels.garment, "lanczos"),
        ("agnostic", panels.agnostic, "lanczos"),
        ("pose", panels.densepose, "nearest"),  # flat labels: no blending between parts
        ("truth", panels.person, "lanczos"),
    ):
        yield _Column(title, _picture_drawing(pictures, interpolation))


def _picture_drawing(pictures: NDArray[np.uint8], interpolation: str) -> Draw:
    return lambda axes, row: show_picture(axes, pictures[row], interpolation)


def _arm_drawing(part: PanelPart, panels: Panels, color: str) -> Draw:
    if part is PanelPart.IMAGES:
        return _picture_drawing(panels.generated, "lanczos")
    if part is PanelPart.GENERATED_MAPS:
        return lambda axes, row: show_heat(axes, panels.map_generated[row], panels.generated[row])
    if part is PanelPart.REFERENCE_MAPS:
        return lambda axes, row: show_heat(axes, panels.map_reference[row], panels.garment[row])
    return lambda axes, row: draw_center_field(axes, panels, row, color)


def draw_center_field(axes: Axes, panels: Panels, index: int, color: str) -> None:
    """Draw where the attention of each garment patch points, against where it should point.

    On the pale flat garment: the true positions of the generated patches as a grey mesh, the
    attention centres of the same patches as a mesh in ``color``, and a thin line from each centre
    to its truth. Patches without a known true position are left out.
    """
    grid = panels.reference_grid
    extent = (
        -0.5,
        grid.width - 0.5,
        grid.height - 0.5,
        -0.5,
    )  # patch units; centre of patch 0 at 0
    axes.imshow(faded(panels.garment[index], 0.55), extent=extent, aspect="auto")
    axes.set_autoscale_on(False)
    known, edges = mesh(panels, index)
    truth, centers = panels.target_centers[index], panels.centers[index]
    weight = float(np.clip(8.0 / panels.generated_grid.height, 0.35, 1.0))
    errors = np.stack([centers[known], truth[known]], axis=1)
    for segments, line_color, line_width, alpha in (
        (truth[edges], TRUTH_COLOR, 1.2, 1.0),
        (errors, color, 0.7, 0.45),
        (centers[edges], color, 1.4, 1.0),
    ):
        axes.add_collection(
            LineCollection(
                list(segments[..., ::-1]),  # yx to xy
                colors=line_color,
                linewidths=line_width * weight,
                alpha=alpha,
                capstyle="round",
            )
        )
    y, x = centers[known].T
    axes.scatter(x, y, s=9 * weight, color=color, edgecolors="white", linewidths=0.4, zorder=3)


def mesh(panels: Panels, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The generated patches with a known position, and the pairs of neighbours among them.

    Returns:
        ``patches [n]`` and ``edges [m, 2]``, both row-major indices of the generated grid. A pair
        across a tear (see ``TEAR``) is no edge.
    """
    grid = panels.generated_grid
    target = panels.target_centers[index]
    finite = np.isfinite(target).all(-1) & np.isfinite(panels.centers[index]).all(-1)
    known = finite & panels.mask[index]
    order = np.arange(grid.tokens).reshape(grid)
    pairs = np.concatenate(
        [
            np.stack([order[:, :-1], order[:, 1:]], -1).reshape(-1, 2),
            np.stack([order[:-1], order[1:]], -1).reshape(-1, 2),
        ]
    )
    edges = pairs[known[pairs].all(-1)]
    lengths = np.linalg.norm(target[edges[:, 0]] - target[edges[:, 1]], axis=-1)
    if len(edges):
        edges = edges[lengths <= TEAR * np.median(lengths)]
    return np.flatnonzero(known), edges
