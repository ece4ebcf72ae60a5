"""Does IMACS go with image quality? Correlation over checkpoints, as a table.

The paper reads it off four models by eye (Table 2). Here the points are all evaluated checkpoints: snapshots of
training runs and their ends, of several seeds. Over one training almost everything improves together, so that the
correlation is also given with the training time taken out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from i2am_train.metrics.registry import METRICS, own_metrics
from i2am_train.reporting.table import Cell, Heading, Row, Table
from i2am_train.reporting.tables.scores import ATTENTION_METRICS, IMAGE_METRICS
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
        for _, of in groupby(sorted(points, key=step_of), key=step_of)
        if len(group := list(of)) > 1
        for point in group
        if point.step is not None
    )
    if len(with_others) >= MIN_POINTS and len({point.step for point in with_others}) > 1:
        yield Selection("At equal steps", with_others, at_equal_step=True)
    ends = tuple(point for point in points if not point.snapshot)
    if MIN_POINTS <= len(ends) < len(points):
        yield Selection("Ends of training", ends)


def step_of(point: Evaluation) -> int:
    """Optimizer steps, -1 where they are not known."""
    return -1 if point.step is None else point.step


def correlation_table(evaluations: Sequence[Evaluation]) -> Table | None:
    """Rows: image metrics by selection of checkpoints; columns: both coefficients for IMACS_g and IMACS_r.

    None where fewer than four checkpoints were evaluated.
    """
    rows = tuple(
        Row(METRICS[metric].heading, cells, selection.title)
        for selection in selections(evaluations)
        for metric in measured_by_all(selection.points)
        if any(cells := tuple(_cells(selection, metric)))
    )
    if not rows:
        return None
    return Table(
        name="correlation",
        title="Correlation of IMACS with image metrics over checkpoints",
        source="section 5.2",
        corner="Image metric",
        headings=tuple(
            Heading(label, group=METRICS[side].label)
            for side in ATTENTION_METRICS
            for label in ("Pearson r", "Spearman ρ")
        ),
        rows=rows,
        notes=tuple(_notes(evaluations)),
    )


def measured_by_all(points: Sequence[Evaluation]) -> list[str]:
    """The image metrics that every point has."""
    names = (*IMAGE_METRICS, *own_metrics())
    return [name for name in names if all(name in point.metrics for point in points)]


def _cells(selection: Selection, metric: str) -> Iterator[Cell | None]:
    for side in ATTENTION_METRICS:
        found = correlate(selection, side, metric)
        if found is None:
            yield from (None, None)
        else:
            yield Cell.of(found.pearson, DIGITS, interval=found.pearson_interval, n=found.n)
            yield Cell.of(found.spearman, DIGITS, interval=found.spearman_interval, n=found.n)


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
