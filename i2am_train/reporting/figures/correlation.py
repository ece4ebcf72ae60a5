"""Does IMACS go with image quality? Scatter plots over checkpoints (``tables.correlation``)."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from i2am_train.metrics.registry import METRICS
from i2am_train.reporting.figures.canvas import GREY, OKABE_ITO, STYLE, new_figure, plain_text
from i2am_train.reporting.figures.training import with_index
from i2am_train.reporting.formatting import minus, number
from i2am_train.reporting.tables.correlation import Selection, correlate, measured_by_all, selections, step_of
from i2am_train.reporting.tables.scores import ATTENTION_METRICS
from i2am_train.results.evaluations import Evaluation

CAPTION = (
    "IMACS against image metrics, one point per evaluated checkpoint. Lines follow the snapshots of a training run "
    "to its end (large points). r: Pearson, ρ: Spearman over all points."
)


@mpl.rc_context(STYLE)
def correlation_figure(evaluations: Sequence[Evaluation]) -> Figure | None:
    """Scatter plots of both IMACS against every image metric; a line follows the checkpoints of a run.

    None where ``correlation_table`` is None.
    """
    selection = next(selections(evaluations), None)
    metrics = [] if selection is None else measured_by_all(selection.points)
    if selection is None or not metrics:
        return None
    models = dict.fromkeys(point.label for point in selection.points)
    colors = {label: OKABE_ITO[i % len(OKABE_ITO)] for i, label in enumerate(models)}
    figure = new_figure(2.5 * len(metrics) + 0.3, 5.2)
    grid = figure.subplots(2, len(metrics), squeeze=False, sharex="row", sharey="col")
    for row, side in zip(grid, ATTENTION_METRICS, strict=True):
        for axes, metric in zip(row, metrics, strict=True):
            _draw(axes, selection, side, metric, colors)
    handles = [
        Line2D([], [], color=color, marker="o", markersize=4, linewidth=0.8, label=plain_text(name))
        for name, color in colors.items()
    ]
    figure.legend(handles=handles, loc="upper center", ncols=min(len(handles), 5), fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    return figure


def _draw(axes: Axes, selection: Selection, side: str, metric: str, colors: dict[str, str]) -> None:
    for label, run in dict.fromkeys((point.label, point.run) for point in selection.points):
        of_run = (p for p in selection.points if (p.label, p.run) == (label, run))
        points = sorted(of_run, key=step_of)
        x = [point.metrics.get(side, np.nan) for point in points]
        y = [point.metrics[metric] for point in points]
        axes.plot(x, y, color=colors[label], linewidth=0.8, alpha=0.5)
        sizes = [12 if point.snapshot else 30 for point in points]
        axes.scatter(x, y, sizes, color=colors[label], ec="white", linewidths=0.4, zorder=3)
    found = correlate(selection, side, metric)
    if found is not None:
        text = minus(f"r = {number(found.pearson, 2)}, ρ = {number(found.spearman, 2)}")
        axes.set_title(text, fontsize=8, color=GREY)
    axes.set_xlabel(f"{with_index(METRICS[side].label)} ↑")
    axes.tick_params(labelleft=True)
    axes.xaxis.set_major_locator(MaxNLocator(4))  # more numbers would touch each other
    axes.set_ylabel(METRICS[metric].heading)
