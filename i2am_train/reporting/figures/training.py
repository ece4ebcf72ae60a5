"""Figures of a run: samples, curves of training, paired differences.

Every function takes arrays or plain records and returns a ``Figure``; ``save_figure`` writes it.
Nothing here knows a model or computes a score.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from i2am_train.metrics.registry import MetricInfo
from i2am_train.reporting.figures.canvas import BETTER, GREY, STYLE, WORSE, arm_colors, new_figure, plain_text
from i2am_train.reporting.tables.ablation import measured_metrics
from i2am_train.results.history import Curve, History
from i2am_train.results.statistics import Verdict, verdict
from i2am_train.results.study import Results, arm_labels

_VERDICT_COLORS = {Verdict.BETTER: BETTER, Verdict.WORSE: WORSE}


# ---- curves ------------------------------------------------------------------------------------


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
        labels: legend text by arm.
        colors: line colour by arm.
        width: of the figure in inches.
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
        steps, mean = mean_curve(curves)
        marker = "o" if len(steps) < 25 else None
        axes.plot(steps, mean, color=color, linewidth=1.9, marker=marker, markersize=3)


def mean_curve(curves: Sequence[Curve]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Mean over the curves at the steps that all of them have."""
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps)
    values = [curve.values[np.isin(curve.steps, steps)] for curve in curves]
    return steps, np.mean(values, axis=0)


def with_index(label: str) -> str:
    """A label with its index set low, for matplotlib.

    >>> with_index("IMACS_g")
    'IMACS$_g$'
    """
    return re.sub(r"_(\w)\b", r"$_\1$", label)


def _columns_of(plots: int) -> int:
    return 3 if plots <= 3 or plots in {5, 6, 9} else 4


def _small_multiples(count: int, width: float, panel_height: float, header: float = 0.0) -> tuple[Figure, list[Axes]]:
    columns = _columns_of(count)
    rows = -(-count // columns)
    height = rows * panel_height + header
    figure = new_figure(width, height)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - header / height), h_pad=0.07, w_pad=0.09)
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(count)]


# ---- differences -------------------------------------------------------------------------------


@mpl.rc_context(STYLE)
def difference_plot(results: Results, width: float = 11.0) -> Figure:
    """Paired differences to the reference arm with their intervals, one small plot per metric.

    A bar that does not touch the zero line is a difference that is shown: green where it is
    better, orange where it is worse. Small dots are the single seeds.
    """
    metrics = {n: i for n, i in measured_metrics(results).items() if any(_entries(results, n))}
    labels = {arm: plain_text(label) for arm, label in arm_labels(results).items()}
    arms = [arm for arm in labels if any(e["arm"] == arm for e in results["paired"])]
    panel_height = 0.8 + 0.24 * len(arms)
    figure, plots = _small_multiples(len(metrics), width, panel_height)
    for index, (axes, (name, info)) in enumerate(zip(plots, metrics.items(), strict=True)):
        _draw_differences(axes, results, name, info, arms)
        first_in_row = index % _columns_of(len(metrics)) == 0
        axes.set_yticks(range(len(arms)), [labels[arm] for arm in arms] if first_in_row else [])
    return figure


def _entries(results: Results, metric: str) -> Iterator[Mapping[str, Any]]:
    return (entry for entry in results["paired"] if entry["metric"] == metric)


def _draw_differences(axes: Axes, results: Results, metric: str, info: MetricInfo, arms: Sequence[str]) -> None:
    axes.axvline(0.0, color=GREY, linewidth=0.8, zorder=0)
    for entry in _entries(results, metric):
        height = arms.index(entry["arm"])
        low, high = entry.get("low"), entry.get("high")
        color = _VERDICT_COLORS.get(verdict(info.higher_is_better, low, high), GREY)
        dots = seed_differences(results, entry["arm"], entry["against"], metric)
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


def seed_differences(results: Results, arm: str, against: str, metric: str) -> list[float]:
    """Difference ``arm - against`` of every seed that both have, lowest seed first."""
    values: dict[tuple[str, int], float] = {
        (entry["arm"], entry["seed"]): entry["metrics"][metric]
        for entry in results["cells"]
        if entry["seed"] is not None and entry["metrics"].get(metric) is not None
    }
    seeds = sorted(seed for name, seed in values if name == arm and (against, seed) in values)
    return [values[arm, seed] - values[against, seed] for seed in seeds]
