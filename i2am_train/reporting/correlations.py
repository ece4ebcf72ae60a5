"""Does IMACS go with image quality? Correlation over checkpoints, as a table and as a picture.

The paper reads it off four models by eye (Table 2). Here the points are all evaluated checkpoints: snapshots of
training runs and their ends, of several seeds. Over one training almost everything improves together, so that the
correlation is also given with the training time taken out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from i2am_train.metrics.registry import METRICS
from i2am_train.reporting.figures.canvas import GREY, OKABE_ITO, STYLE, new_figure, plain_text
from i2am_train.reporting.figures.training import with_index
from i2am_train.reporting.score_tables import (
    ATTENTION_METRICS,
    IMAGE_METRICS,
    Cell,
    Heading,
    Row,
    ScoreTable,
)
from i2am_train.reporting.table_formats import minus
from i2am_train.reporting.tables import arrow, interval_text, number
from i2am_train.results.evaluations import Evaluation
from i2am_train.results.statistics import Correlation, correlation
from i2am_train.types import Pairing

DIGITS = 2
MIN_POINTS = 4
NEED = f"paired evaluations of {MIN_POINTS} checkpoints or more"
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Selection:
    """Some of the checkpoints, and what is taken out before correlating."""

    title: str
    points: tuple[Evaluation, ...]
    at_equal_step: bool = False


def selections(evaluations: Sequence[Evaluation]) -> Iterator[Selection]:
    """All checkpoints; the same at equal steps; the ends of training alone; whichever have enough points."""
    points = tuple(e for e in evaluations if e.pairing is Pairing.PAIRED)
    if len(points) >= MIN_POINTS:
        yield Selection("All checkpoints", points)
    with_others = tuple(
        point
        for _, of in groupby(sorted(points, key=_step), key=_step)
        if len(group := list(of)) > 1
        for point in group
        if point.step is not None
    )
    if len(with_others) >= MIN_POINTS and len({point.step for point in with_others}) > 1:
        yield Selection("At equal steps", with_others, at_equal_step=True)
    ends = tuple(point for point in points if not point.snapshot)
    if MIN_POINTS <= len(ends) < len(points):
        yield Selection("Ends of training", ends)


def _step(point: Evaluation) -> int:
    return -1 if point.step is None else point.step


def correlation_table(evaluations: Sequence[Evaluation]) -> ScoreTable | None:
    """Rows: image metrics by selection of checkpoints; columns: both coefficients for IMACS_g and IMACS_r.

    None where fewer than four checkpoints were evaluated.
    """
    rows = [
        Row(f"{METRICS[metric].label} {_arrow(metric)}", cells, selection.title)
        for selection in selections(evaluations)
        for metric in _measured(selection.points)
        if any(cells := tuple(_cells(selection, metric)))
    ]
    if not rows:
        return None
    headings = tuple(
        Heading(label, "", METRICS[side].label)
        for side in ATTENTION_METRICS
        for label in ("Pearson r", "Spearman ρ")
    )
    return ScoreTable(
        "correlation",
        "Correlation of IMACS with image metrics over checkpoints",
        "section 5.2",
        "Image metric",
        headings,
        tuple(rows),
        tuple(_notes(evaluations)),
    )


def _arrow(metric: str) -> str:
    return arrow(METRICS[metric].higher_is_better)


def _measured(points: Sequence[Evaluation]) -> list[str]:
    return [name for name in IMAGE_METRICS if all(name in point.metrics for point in points)]


def _cells(selection: Selection, metric: str) -> Iterator[Cell | None]:
    for side in ATTENTION_METRICS:
        found = correlate(selection, side, metric)
        if found is None:
            yield from (None, None)
            continue
        yield _cell(found.pearson, found.pearson_interval, found.n)
        yield _cell(found.spearman, found.spearman_interval, found.n)


def _cell(value: float, interval: tuple[float, float] | None, n: int) -> Cell:
    return Cell(number(value, DIGITS), value, interval, interval_text(interval, DIGITS), n=n)


def correlate(selection: Selection, side: str, metric: str) -> Correlation | None:
    """Correlation of one IMACS with one metric over a selection; None where it is not defined."""
    points = [p for p in selection.points if side in p.metrics and metric in p.metrics]
    if len(points) < MIN_POINTS:
        return None
    x, y = (np.array([point.metrics[name] for point in points]) for name in (side, metric))
    if selection.at_equal_step:
        steps = [point.step for point in points]
        x, y = (_without_step_means(values, steps) for values in (x, y))
    return correlation(x, y, [point.run for point in points])


def _without_step_means(values: FloatArray, steps: Sequence[int | None]) -> FloatArray:
    """Deviations from the mean of the checkpoints of the same step."""
    centred = values.copy()
    for step in set(steps):
        same = np.array([other == step for other in steps])
        centred[same] -= values[same].mean()
    return centred


def _notes(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    chosen = list(selections(evaluations))
    for selection in chosen:
        runs = len({point.run for point in selection.points})
        yield f"{selection.title}: {len(selection.points)} checkpoints of {runs} training runs."
    if any(selection.at_equal_step for selection in chosen):
        yield (
            "At equal steps: deviations from the mean of the checkpoints of the same step, so that what all runs "
            "gain by training longer counts for nothing."
        )
    yield (
        "Brackets: 95 % interval (Fisher's z) for as many independent values as there are training runs, which is "
        "wide where checkpoints of one run differ much; none with fewer than four runs, or at exactly 1 or -1. IMACS "
        "goes with quality where the sign is that of the arrow: plus for ↑, minus for ↓."
    )


@mpl.rc_context(STYLE)
def correlation_figure(evaluations: Sequence[Evaluation]) -> Figure | None:
    """Scatter plots of both IMACS against every image metric; a line follows the checkpoints of a run.

    None where ``correlation_table`` is None.
    """
    selection = next(selections(evaluations), None)
    metrics = [] if selection is None else _measured(selection.points)
    if selection is None or not metrics:
        return None
    models = list(dict.fromkeys(point.label for point in selection.points))
    colors = {label: OKABE_ITO[i % len(OKABE_ITO)] for i, label in enumerate(models)}
    columns = len(metrics)
    figure = new_figure(2.5 * columns + 0.3, 5.2)
    grid = figure.subplots(2, columns, squeeze=False, sharex="row", sharey="col")
    for row, side in zip(grid, ATTENTION_METRICS, strict=True):
        for axes, metric in zip(row, metrics, strict=True):
            for label in models:
                of_model = [point for point in selection.points if point.label == label]
                for run in dict.fromkeys(point.run for point in of_model):
                    points = sorted((p for p in of_model if p.run == run), key=_step)
                    x = [point.metrics.get(side, np.nan) for point in points]
                    y = [point.metrics[metric] for point in points]
                    axes.plot(x, y, color=colors[label], linewidth=0.8, alpha=0.5)
                    sizes = [12 if point.snapshot else 30 for point in points]
                    axes.scatter(
                        x,
                        y,
                        sizes,
                        color=colors[label],
                        edgecolors="white",
                        linewidths=0.4,
                        zorder=3,
                    )
            found = correlate(selection, side, metric)
            if found is not None:
                text = minus(f"r = {number(found.pearson, 2)}, ρ = {number(found.spearman, 2)}")
                axes.set_title(text, fontsize=8, color=GREY)
            axes.set_xlabel(f"{with_index(METRICS[side].label)} ↑")
            axes.tick_params(labelleft=True)
            axes.xaxis.set_major_locator(MaxNLocator(4))  # more numbers would touch each other
            axes.set_ylabel(f"{METRICS[metric].label} {_arrow(metric)}")
    handles = [
        Line2D(
            [], [], color=colors[m], marker="o", markersize=4, linewidth=0.8, label=plain_text(m)
        )
        for m in models
    ]
    figure.legend(handles=handles, loc="upper center", ncols=min(len(handles), 5), fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    return figure


CAPTION = (
    "IMACS against image metrics, one point per evaluated checkpoint. Lines follow the snapshots of a training run "
    "to its end (large points). r: Pearson, ρ: Spearman over all points."
)
