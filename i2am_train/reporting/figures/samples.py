"""Samples side by side: inputs, what each arm made of them, where its attention went and whether
that was right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

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
from i2am_train.results.panels import SamplePanels

TEAR = 2.5
"""Neighbours on the person whose true positions on the garment lie further apart than this many
times the median are not joined: a sleeve in front of the body is no neighbour of it on the flat
garment. Chosen by us, by eye."""


MAX_PANEL_WIDTH = 2.1
"""Inches; with few columns the figure gets narrower instead of its pictures larger."""


class ColumnGroup(StrEnum):
    """Columns of a figure of samples that stand together."""

    INPUTS = "inputs"
    IMAGES = "images"
    GENERATED_MAPS = "generated_maps"
    REFERENCE_MAPS = "reference_maps"
    CENTERS = "centers"


_HEADINGS = {
    ColumnGroup.INPUTS: "Input and truth",
    ColumnGroup.IMAGES: "Generated",
    ColumnGroup.GENERATED_MAPS: "Attribution on the generated image",
    ColumnGroup.REFERENCE_MAPS: "Attribution on the garment",
    ColumnGroup.CENTERS: "Attention centres on the garment",
}
_SHORT_HEADINGS = {
    ColumnGroup.GENERATED_MAPS: "Map on image",
    ColumnGroup.REFERENCE_MAPS: "Map on garment",
    ColumnGroup.CENTERS: "Centres",
}

_INPUTS = {"garment": "garment", "agnostic": "agnostic", "pose": "densepose", "truth": "person"}


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    panels: Sequence[SamplePanels]
    """Of all samples."""
    draw: Callable[[Axes, SamplePanels], None]


@mpl.rc_context(STYLE)
def sample_figure(
    by_arm: Mapping[str, Sequence[SamplePanels]],
    groups: Sequence[ColumnGroup] = tuple(ColumnGroup),
    labels: Mapping[str, str] | None = None,
    colors: Mapping[str, str] | None = None,
    width: float = 11.0,
    rows: int | None = None,
) -> Figure:
    """One row per sample: garment, agnostic, pose, truth, then image, maps and centres per arm.

    Args:
        by_arm: what each arm kept of the same samples, in the order of columns.
        groups: which columns to draw.
        labels: column titles by arm; the arm's name where there is none.
        colors: colour of each arm's attention mesh.
        width: of the figure in inches, at most.
        rows: how many samples at most; all by default.

    Raises:
        ValueError: if the arms did not keep the same samples, or there is no arm.
    """
    first = _checked(by_arm)[:rows]
    colors = colors or arm_colors(by_arm)
    titles = {arm: (labels or {}).get(arm, arm) for arm in by_arm}
    by_group = {group: list(_columns(group, by_arm, titles, colors)) for group in groups}
    height, wide = first[0].garment.shape[:2]
    with_maps = any(group in _SHORT_HEADINGS and group != ColumnGroup.CENTERS for group in groups)
    margins = Margins(top=0.56, bottom=0.42 if with_maps else 0.06)
    columns = [column for of in by_group.values() for column in of]
    width = min(width, len(columns) * MAX_PANEL_WIDTH + 0.5)
    sizes = [len(of) for of in by_group.values()]
    grid = image_grid(len(first), sizes, height / wide, width, margins)
    for row in range(len(first)):
        for column, axes in zip(columns, grid.axes[row], strict=True):
            column.draw(axes, column.panels[row])
    grid.column_titles([column.title for column in columns])
    grid.row_titles([one.name for one in first])
    grid.group_titles([_heading(group, len(of), len(columns)) for group, of in by_group.items()])
    if with_maps:
        grid.color_bar(heat_scale(), "attribution, each map scaled to [0, 1]")
    return grid.figure


def _checked(by_arm: Mapping[str, Sequence[SamplePanels]]) -> Sequence[SamplePanels]:
    if not by_arm:
        raise ValueError("A figure of samples needs the panels of at least one arm.")
    named = [[(one.name, one.garment_name) for one in panels] for panels in by_arm.values()]
    for other in named:
        if other != named[0]:
            raise ValueError(
                f"The arms kept different samples: {named[0]} and {other}. "
                "Evaluate all arms with the same panel samples."
            )
    return next(iter(by_arm.values()))


def _heading(group: ColumnGroup, columns: int, all_columns: int) -> str:
    narrow = columns / all_columns < 0.3
    return _SHORT_HEADINGS.get(group, _HEADINGS[group]) if narrow else _HEADINGS[group]


def _columns(
    group: ColumnGroup,
    by_arm: Mapping[str, Sequence[SamplePanels]],
    titles: Mapping[str, str],
    colors: Mapping[str, str],
) -> Iterator[_Column]:
    if group is ColumnGroup.INPUTS:
        first = next(iter(by_arm.values()))
        for title, name in _INPUTS.items():
            # flat labels of the pose: no blending between the parts of a body
            interpolation = "nearest" if title == "pose" else "lanczos"
            yield _Column(title, first, partial(_draw_picture, name, interpolation))
        return
    for arm, panels in by_arm.items():
        yield _Column(titles[arm], panels, partial(_DRAWINGS[group], color=colors[arm]))


def _draw_picture(name: str, interpolation: str, axes: Axes, panels: SamplePanels, color: str = "") -> None:
    show_picture(axes, getattr(panels, name), interpolation)


def _draw_generated_map(axes: Axes, panels: SamplePanels, color: str) -> None:
    show_heat(axes, panels.map_generated, panels.generated)


def _draw_reference_map(axes: Axes, panels: SamplePanels, color: str) -> None:
    show_heat(axes, panels.map_reference, panels.garment)


def draw_center_field(axes: Axes, panels: SamplePanels, color: str) -> None:
    """Draw where the attention of each garment patch points, against where it should point.

    On the pale flat garment: the true positions of the generated patches as a grey mesh, the
    attention centres of the same patches as a mesh in ``color``, and a thin line from each centre
    to its truth. Patches without a known true position are left out.
    """
    grid = panels.reference_grid
    extent = (-0.5, grid.width - 0.5, grid.height - 0.5, -0.5)  # patches; the first one's centre is 0
    axes.imshow(faded(panels.garment, 0.55), extent=extent, aspect="auto")
    axes.set_autoscale_on(False)
    known, edges = mesh(panels)
    truth, centers = panels.target_centers, panels.centers
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


def mesh(panels: SamplePanels) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The generated patches with a known position, and the pairs of neighbours among them.

    Returns:
        ``patches [n]`` and ``edges [m, 2]``, both row-major indices of the generated grid. A pair
        across a tear (see ``TEAR``) is no edge.
    """
    grid = panels.generated_grid
    target = panels.target_centers
    finite = np.isfinite(target).all(-1) & np.isfinite(panels.centers).all(-1)
    known = finite & panels.mask
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


_DRAWINGS: Mapping[ColumnGroup, Callable[..., None]] = {
    ColumnGroup.IMAGES: partial(_draw_picture, "generated", "lanczos"),
    ColumnGroup.GENERATED_MAPS: _draw_generated_map,
    ColumnGroup.REFERENCE_MAPS: _draw_reference_map,
    ColumnGroup.CENTERS: draw_center_field,
}
"""What is drawn of one sample for each arm."""
