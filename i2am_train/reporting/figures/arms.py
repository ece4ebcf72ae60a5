"""Arms of a study side by side: their samples, curves of training, paired differences, attention against pictures.

Of a sample: inputs, what each arm made of them, where its attention went, and whether that was right.

Every function takes arrays or plain records and returns a ``Figure``; nothing here knows a model or computes a score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from i2am_train.metrics.registry import MetricInfo
from i2am_train.reporting.ablation_tables import measured_metrics
from i2am_train.reporting.figures.canvas import (
    BETTER,
    GREY,
    INK,
    STYLE,
    TRUTH_COLOR,
    WORSE,
    add_bare_axes,
    add_color_bar,
    add_group_title,
    arm_colors,
    column_lefts,
    faded,
    new_figure,
    plain_text,
    show_heat,
    with_index,
)
from i2am_train.results.run_files import Curve, History, SamplePanels
from i2am_train.results.statistics import Verdict, verdict
from i2am_train.results.study import Results, arm_labels, uses_truth

TEAR = 2.5
"""Neighbours on the person whose true positions on the garment lie further apart than this many
times the median are not joined: a sleeve in front of the body is no neighbour of it on the flat
garment. Chosen by us, by eye."""

_MAX_PANEL_WIDTH = 2.1
"""Inches; with few columns the figure gets narrower instead of its pictures larger."""
_LEFT, _RIGHT, _TOP, _GAP, _GROUP_GAP = 0.24, 0.06, 0.56, 0.05, 0.2
"""Inches around and between the pictures."""


# ---- samples -------------------------------------------------------------------------------------


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
    columns = [column for of in by_group.values() for column in of]
    sizes = [len(of) for of in by_group.values()]
    with_maps = ColumnGroup.GENERATED_MAPS in groups or ColumnGroup.REFERENCE_MAPS in groups

    width = min(width, len(columns) * _MAX_PANEL_WIDTH + 0.5)
    gaps = _GAP * (len(columns) - len(sizes)) + _GROUP_GAP * (len(sizes) - 1)
    panel_width = (width - _LEFT - _RIGHT - gaps) / len(columns)
    picture_height, picture_width = first[0].garment.shape[:2]
    panel_height = panel_width * (picture_height / picture_width)
    bottom = 0.42 if with_maps else 0.06
    height = _TOP + len(first) * panel_height + (len(first) - 1) * _GAP + bottom
    figure = new_figure(width, height)
    lefts = column_lefts(sizes, _LEFT, panel_width, _GAP, _GROUP_GAP)
    for row, one in enumerate(first):
        low = height - _TOP - (row + 1) * panel_height - row * _GAP
        for column, left in zip(columns, lefts, strict=True):
            box = (left / width, low / height, panel_width / width, panel_height / height)
            axes = add_bare_axes(figure, box)
            column.draw(axes, column.panels[row])
            if row == 0:
                axes.set_title(plain_text(column.title), fontsize=8.5, pad=4, color=INK)
            if column is columns[0]:
                axes.set_ylabel(plain_text(one.name), fontsize=7, color=GREY, labelpad=3)
    y = (height - _TOP + 0.27) / height
    for start, (group, of) in zip(np.cumsum([0, *sizes]), by_group.items(), strict=False):
        ends = (lefts[start] / width, (lefts[start + len(of) - 1] + panel_width) / width)
        title = _heading(group, len(of) / len(columns))
        add_group_title(figure, ends, y, title, above=0.05, fontsize=9.5, linewidth=0.6, weight="bold")
    if with_maps:
        add_color_bar(figure, "attribution, each map scaled to [0, 1]", 1.8, _RIGHT, size=8)
    return figure


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


def _heading(group: ColumnGroup, share: float) -> str:
    """Of a group of columns, the short one where they are few of all."""
    return _SHORT_HEADINGS.get(group, _HEADINGS[group]) if share < 0.3 else _HEADINGS[group]


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
    axes.imshow(getattr(panels, name), interpolation=interpolation, aspect="auto")


def _draw_map(heat: str, picture: str, axes: Axes, panels: SamplePanels, color: str) -> None:
    show_heat(axes, getattr(panels, heat), getattr(panels, picture))


def _draw_center_field(axes: Axes, panels: SamplePanels, color: str) -> None:
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
        lines = list(segments[..., ::-1])  # yx to xy
        axes.add_collection(
            LineCollection(lines, colors=line_color, linewidths=line_width * weight, alpha=alpha, capstyle="round")
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
    across, down = (order[:, :-1], order[:, 1:]), (order[:-1], order[1:])
    pairs = np.concatenate([np.stack(ends, -1).reshape(-1, 2) for ends in (across, down)])
    edges = pairs[known[pairs].all(-1)]
    lengths = np.linalg.norm(target[edges[:, 0]] - target[edges[:, 1]], axis=-1)
    if len(edges):
        edges = edges[lengths <= TEAR * np.median(lengths)]
    return np.flatnonzero(known), edges


_DRAWINGS: Mapping[ColumnGroup, Callable[..., None]] = {
    ColumnGroup.IMAGES: partial(_draw_picture, "generated", "lanczos"),
    ColumnGroup.GENERATED_MAPS: partial(_draw_map, "map_generated", "generated"),
    ColumnGroup.REFERENCE_MAPS: partial(_draw_map, "map_reference", "garment"),
    ColumnGroup.CENTERS: _draw_center_field,
}
"""What is drawn of one sample for each arm."""


# ---- curves --------------------------------------------------------------------------------------


@mpl.rc_context(STYLE)
def metric_curves(
    histories: Sequence[History],
    quantities: Mapping[str, str],
    labels: Mapping[str, str] | None = None,
    colors: Mapping[str, str] | None = None,
    width: float = 11.0,
) -> Figure:
    """Logged quantities over optimiser steps: a thin line per seed, a thick one for their mean.

    Args:
        histories: one per arm and seed.
        quantities: title of each small plot by the name of the logged column.
        labels: legend text by arm, like ``colors`` of the lines.
        width: of the figure in inches.

    >>> curve = Curve(np.array([0, 10]), np.array([0.5, 0.75]))
    >>> figure = metric_curves([History("refined", 0, {"val/ssim": curve})], {"val/ssim": "SSIM"})
    >>> figure.axes[0].lines[0].get_ydata().tolist()
    [0.5, 0.75]
    """
    arms = list(dict.fromkeys(history.arm for history in histories))
    colors = colors or arm_colors(arms)
    figure, plots = _small_multiples(len(quantities), width, panel_height=1.9, header=0.35)
    for axes, (name, title) in zip(plots, quantities.items(), strict=True):
        axes.set_title(with_index(title), loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for arm in arms:
            curves = [h.curves[name] for h in histories if h.arm == arm and name in h.curves]
            _draw_curves(axes, curves, colors[arm])
    for axes in plots[-_columns_of(len(quantities)) :]:
        axes.set_xlabel("optimiser step")
    handles = [Line2D([], [], color=colors[arm], linewidth=2) for arm in arms]
    texts = [plain_text((labels or {}).get(arm, arm)) for arm in arms]
    figure.legend(handles, texts, loc="upper left", ncols=len(arms), fontsize=9)
    return figure


def _draw_curves(axes: Axes, curves: Sequence[Curve], color: str) -> None:
    if len(curves) > 1:
        for curve in curves:
            axes.plot(curve.steps, curve.values, color=color, linewidth=0.7, alpha=0.4)
    if curves:
        steps, mean = _mean_curve(curves)
        marker = "o" if len(steps) < 25 else None
        axes.plot(steps, mean, color=color, linewidth=1.9, marker=marker, markersize=3)


def _mean_curve(curves: Sequence[Curve]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Mean over the curves at the steps that all of them have."""
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps)
    values = [curve.values[np.isin(curve.steps, steps)] for curve in curves]
    return steps, np.mean(values, axis=0)


def _columns_of(plots: int) -> int:
    return 3 if plots <= 3 or plots in {5, 6, 9} else 4


def _small_multiples(count: int, width: float, panel_height: float, header: float = 0.0) -> tuple[Figure, list[Axes]]:
    columns = _columns_of(count)
    rows = -(-count // columns)
    height = rows * panel_height + header
    figure = new_figure(width, height)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - header / height), h_pad=0.07, w_pad=0.09)
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(count)]


# ---- differences ---------------------------------------------------------------------------------


@mpl.rc_context(STYLE)
def difference_plot(results: Results, width: float = 11.0) -> Figure:
    """Paired differences to the reference arm with their intervals, one small plot per metric.

    A bar that does not touch the zero line is a difference that is shown: green where it is
    better, orange where it is worse. Small dots are the single seeds. ``width`` is in inches.
    """
    metrics = {n: i for n, i in measured_metrics(results).items() if any(_entries(results, n))}
    labels = {arm: plain_text(label) for arm, label in arm_labels(results).items()}
    arms = [arm for arm in labels if any(e["arm"] == arm for e in results["paired"])]
    figure, plots = _small_multiples(len(metrics), width, panel_height=0.8 + 0.24 * len(arms))
    for index, (axes, (name, info)) in enumerate(zip(plots, metrics.items(), strict=True)):
        _draw_differences(axes, results, name, info, arms)
        first_in_row = index % _columns_of(len(metrics)) == 0
        axes.set_yticks(range(len(arms)), [labels[arm] for arm in arms] if first_in_row else [])
    return figure


def _entries(results: Results, metric: str) -> Iterator[Mapping[str, Any]]:
    return (entry for entry in results["paired"] if entry["metric"] == metric)


_VERDICT_COLORS = {Verdict.BETTER: BETTER, Verdict.WORSE: WORSE}


def _draw_differences(axes: Axes, results: Results, metric: str, info: MetricInfo, arms: Sequence[str]) -> None:
    axes.axvline(0.0, color=GREY, linewidth=0.8, zorder=0)
    for entry in _entries(results, metric):
        height = arms.index(entry["arm"])
        low, high = entry.get("low"), entry.get("high")
        color = _VERDICT_COLORS.get(verdict(info.higher_is_better, low, high), GREY)
        dots = _seed_differences(results, entry["arm"], entry["against"], metric)
        if len(dots) > 1:
            axes.scatter(dots, [height - 0.22] * len(dots), s=7, color=color, alpha=0.5, lw=0)
        if low is not None and high is not None:
            axes.plot([low, high], [height] * 2, color=color, lw=2.4, solid_capstyle="round")
        axes.scatter([entry["difference"]], [height], s=26, color=color, ec="white", zorder=3)
    axes.set_ylim(len(arms) - 0.5, -0.6)
    axes.margins(x=0.12)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_title(with_index(info.label), loc="left")
    hint = {True: "better →", False: "← better", None: ""}[info.higher_is_better]
    axes.set_title(hint, loc="right", fontsize=7.5, color=GREY)


def _seed_differences(results: Results, arm: str, against: str, metric: str) -> list[float]:
    """Difference ``arm - against`` of every seed that both have, lowest seed first."""
    values: dict[tuple[str, int], float] = {
        (entry["arm"], entry["seed"]): entry["metrics"][metric]
        for entry in results["cells"]
        if entry["seed"] is not None and entry["metrics"].get(metric) is not None
    }
    seeds = sorted(seed for name, seed in values if name == arm and (against, seed) in values)
    return [values[arm, seed] - values[against, seed] for seed in seeds]


# ---- trade-off -----------------------------------------------------------------------------------

_MARKERS = ("o", "s", "^", "D", "v", "P")
"""One for each round through the colours, so that up to 36 arms look different."""


def tradeoff_metrics(results: Results) -> dict[str, MetricInfo]:
    """The image metrics of a study whose arms can be drawn over their correspondence error; empty without that error.

    >>> results = {"metrics": {"ssim": {"group": "image", "higher_is_better": True}, "correspondence_error": {}}}
    >>> list(tradeoff_metrics({**results, "summary": {"ours": {"correspondence_error": {}, "ssim": {}}}}))
    ['ssim']
    """
    metrics = measured_metrics(results)
    images = {
        name: info for name, info in metrics.items() if info.group == "image" and info.higher_is_better is not None
    }
    return images if _ERROR in metrics else {}


_ERROR = "correspondence_error"


@mpl.rc_context(STYLE)
def tradeoff_plot(results: Results, width: float = 11.0) -> Figure:
    """Does better attention come with better pictures? Image quality over correspondence error, one point a run.

    One small plot per image metric, drawn so that right and up are better. Small points are runs, the large one is the
    mean of an arm; hollow ones are trained with the truth. ``width`` is in inches.
    """
    metrics, labels = tradeoff_metrics(results), arm_labels(results)
    arms = [arm for arm in labels if _runs(results, arm, next(iter(metrics)))]
    truth = {arm["name"] for arm in results["arms"] if uses_truth(arm)}
    rounds = {arm: arms.index(arm) // len(set(arm_colors(arms).values())) for arm in arms}
    looks: dict[str, dict[str, Any]] = {
        arm: {"marker": _MARKERS[rounds[arm] % len(_MARKERS)], "edgecolors": color, "linewidths": 0.9}
        | {"facecolors": "white" if arm in truth else color}
        for arm, color in arm_colors(arms).items()
    }
    rows = -(-len(arms) // 5)
    figure, plots = _small_multiples(len(metrics), width, panel_height=2.6, header=0.1 + 0.2 * rows)
    error = MetricInfo.of(_ERROR, results["metrics"][_ERROR])
    for axes, (name, info) in zip(plots, metrics.items(), strict=True):
        for arm in arms:
            runs = np.array(_runs(results, arm, name)).reshape(-1, 2)
            axes.scatter(runs[:, 0], runs[:, 1], s=12, alpha=0.55, **looks[arm])
            if len(runs):
                axes.scatter(runs[:, 0].mean(), runs[:, 1].mean(), s=58, zorder=3, **looks[arm])
        axes.invert_xaxis()
        if info.higher_is_better is False:
            axes.invert_yaxis()
        axes.margins(0.08)
        axes.set_title(with_index(info.label), loc="left")
        axes.set_title("better ↗", loc="right", fontsize=7.5, color=GREY)
        axes.set_xlabel(f"{error.label.lower()} ({error.unit})" if error.unit else error.label.lower())
    handles = [axes.scatter([], [], s=40, label=plain_text(labels[arm]), **looks[arm]) for arm in arms]
    figure.legend(handles=handles, loc="upper left", ncols=5, fontsize=8.5, handletextpad=0.2)
    return figure


def _runs(results: Results, arm: str, metric: str) -> list[tuple[float, float]]:
    """Correspondence error and the metric of each run of an arm that has both."""
    of_arm = (cell["metrics"] for cell in results["cells"] if cell["arm"] == arm)
    pairs = ((metrics.get(_ERROR), metrics.get(metric)) for metrics in of_arm)
    return [(x, y) for x, y in pairs if x is not None and y is not None]
