"""Tables over models as the paper has them: metrics (Table 2), thresholds (3), penalties (4), and the correlation of
IMACS with image quality over checkpoints, as a table and as a figure.

The paper reads the correlation off four models by eye (Table 2). Here the points are all evaluated checkpoints:
snapshots of training runs and their ends, of several seeds. Over one training almost everything improves together, so
that the correlation is also given with the training time taken out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from i2am_train.attention.recipe import layer_name
from i2am_train.metrics.attention import imacs_column
from i2am_train.metrics.registry import METRICS, MetricInfo, own_metrics
from i2am_train.reporting.ablation_tables import TRUTH_MARK, TRUTH_NOTE
from i2am_train.reporting.faithfulness import numbered_layer
from i2am_train.reporting.figures.canvas import GREY, OKABE_ITO, STYLE, new_figure, plain_text, with_index
from i2am_train.reporting.table import Cell, Heading, Row, Table, minus, number, with_best
from i2am_train.results.evaluations import Evaluation
from i2am_train.results.statistics import Correlation, Over, correlation, few_samples_note, mean_interval
from i2am_train.types import Pairing, PublishedModel

IMAGE_METRICS = (*("fid", "fd_efficientnet_lite0", "kid", "kd_efficientnet_lite0"), *("lpips", "stlpips", "ssim"))
"""The paper's image metrics in its order, each beside the one with packaged weights."""
ATTENTION_METRICS = ("imacs_g", "imacs_r")


# ---- Table 2 as printed --------------------------------------------------------------------------

_PUBLISHED: Mapping[PublishedModel, Sequence[float]] = {
    "dci_vton": (13.0953, 0.0334, 0.0824, 0.8612, 0.0785),
    "stableviton": (10.6755, 0.0064, 0.0817, 0.8634, 0.3083, 0.3388),
    "custom": (11.6572, 0.0042, 0.1020, 0.8396, 0.0833, 0.0403),
    "refined_custom": (11.5420, 0.0022, 0.0964, 0.8644, 0.2215, 0.0948),
}
TABLE_2: Mapping[PublishedModel, Mapping[str, float]] = {
    model: dict(zip(("fid", "kid", "lpips", "ssim", *ATTENTION_METRICS), row, strict=False))
    for model, row in _PUBLISHED.items()
}
"""VITON-HD at 512x384; SSIM, LPIPS and IMACS of paired images, FID and KID of unpaired ones."""

UNPAIRED = ("fid", "kid")
CAUTION = (
    "The paper's numbers are of VITON-HD's 2,032 test pairs at 512x384. Its FID compares with real images at 1024x768, "
    "and its KID comes from code that turns pictures black and white; this program does neither."
)


def published_values(model: PublishedModel, *, paired: bool) -> dict[str, float]:
    """The numbers of a row that the paper reports for this kind of pairs, by metric.

    >>> published_values("refined_custom", paired=False)
    {'fid': 11.542, 'kid': 0.0022}
    """
    return {n: value for n, value in TABLE_2[model].items() if (n not in UNPAIRED) == paired}


def published_row(model: PublishedModel) -> str:
    """A row in one line, with the metrics' names.

    >>> published_row("dci_vton")
    "The paper's Table 2, dci_vton: FID 13.0953, KID 0.0334, LPIPS 0.0824, SSIM 0.8612, IMACS_g 0.0785"
    """
    values = ", ".join(f"{METRICS[name].label} {value}" for name, value in TABLE_2[model].items())
    return f"The paper's Table 2, {model}: {values}"


# ---- scores --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Column:
    metric: str
    score: str
    """Name in the evaluation's scores."""
    label: str
    group: str
    pairing: Pairing = Pairing.PAIRED

    @property
    def info(self) -> MetricInfo:
        return METRICS[self.metric]


def score_tables(evaluations: Sequence[Evaluation]) -> tuple[list[Table], dict[str, str]]:
    """The paper's tables that these evaluations allow, and what the others would need.

    Snapshots take no part: a model's row is the end of its training.
    """
    final = [evaluation for evaluation in evaluations if not evaluation.snapshot]
    tables = {
        "table2": _models_table(final),
        "table3": _sweep_table(final, 0, "table3", "IMACS by threshold δ", "Table 3"),
        "table4": _sweep_table(final, 1, "table4", "IMACS by penalty λ", "Table 4"),
        "faithfulness": _faithfulness_table(final),
    }
    missing = {name: _NEEDS[name] for name, table in tables.items() if table is None}
    return [table for table in tables.values() if table is not None], missing


_NEEDS = {
    "table2": "the evaluation of a finished model",
    "table3": "evaluations at several thresholds (i2am evaluate ... attribution=sweep)",
    "table4": "evaluations at several penalties (i2am evaluate ... attribution=sweep)",
    "faithfulness": "evaluations that made samples again (i2am evaluate ... evaluation=faithful)",
}


def _models_table(evaluations: Sequence[Evaluation]) -> Table | None:
    """Models x image metrics and IMACS, paired and unpaired."""
    measured = {(name, e.pairing) for e in evaluations for name in e.metrics}
    pairings = [one for one in Pairing if any(e.pairing is one for e in evaluations)]
    columns = [
        _Column(name, name, METRICS[name].label, pairing.capitalize() if len(pairings) > 1 else "", pairing)
        for pairing in pairings
        for name in (*IMAGE_METRICS, *own_metrics(), *ATTENTION_METRICS)
        if (name, pairing) in measured
    ]
    title = "Models by image metrics and IMACS"
    return _table(evaluations, columns, name="table2", title=title, source="Table 2")


def _faithfulness_table(evaluations: Sequence[Evaluation]) -> Table | None:
    """Models by use, where and deletion, of paired samples."""
    names = [name for name, info in METRICS.items() if info.group == "faithfulness"]
    columns = [_Column(name, name, METRICS[name].label, "") for name in names]
    counts = {of["n"] for e in evaluations for name, of in e.intervals.items() if name in names and "n" in of}
    return _table(
        evaluations,
        columns,
        name="faithfulness",
        title="Whether attention is a cause of the images",
        notes=(
            f"Of the first {_listed(map(int, counts))} samples, made again with changed references."
            f"{_judged_layer(evaluations)}",
        ),
    )


def _judged_layer(evaluations: Sequence[Evaluation]) -> str:
    """Which layer's attention the columns judge that are of one layer."""
    layers = [(e.settings.get("attribution") or {}).get("layer") for e in evaluations if "use" in e.metrics]
    named = " or ".join(sorted({numbered_layer(layer_name(layer)) for layer in layers if layer is not None}))
    return f" Use and where (but for all layers) judge the attention of layer {named}." if named else ""


MATCHED_NOTE = (
    "The correspondence of these data was matched (`i2am data match`) and is not true: error, PCK and spread of the "
    "attention are by matched places, and of matched pixels alone."
)

_SWEPT = re.compile(r"@d([\d.e+-]+)_l([\d.e+-]+)$")


def _sweep_table(evaluations: Sequence[Evaluation], vary: int, name: str, title: str, source: str) -> Table | None:
    """IMACS by threshold (``vary`` 0) or penalty (1), at the evaluations' own value of the other."""
    options = [e.settings["attribution"] for e in evaluations if e.settings.get("attribution")]
    if not options:
        return None
    fixed = float(options[0][("penalty", "delta")[vary]])
    swept = {
        tuple(map(float, match.groups()))
        for evaluation in evaluations
        for metric in evaluation.metrics
        if (match := _SWEPT.search(metric))
    }
    points = sorted(point for point in swept if point[1 - vary] == fixed)
    if len(points) < 2:
        return None
    columns = [
        _Column(side, imacs_column(side, *point), f"{'δλ'[vary]} = {point[vary]:g}", METRICS[side].label)
        for side in ATTENTION_METRICS
        for point in points
    ]
    note = f"All at {'δλ'[1 - vary]} = {fixed:g}. {_SWEEP_NOTES[vary]}"
    return _table(evaluations, columns, name=name, title=title, source=source, notes=(note,))


_SWEEP_NOTES = (
    "Values of the normalised map below δ count as 0. All come from the same maps.",
    "IMACS is affine in λ: attribution inside the mask minus λ times that outside (paper eq. 8), so the columns of "
    "one side lie on a line, whose slope is the attribution outside.",
)


def _table(
    evaluations: Sequence[Evaluation], columns: Sequence[_Column], notes: tuple[str, ...] = (), **names: str
) -> Table | None:
    models = models_of(evaluations)
    competing = [not of[0].truth for of in models.values()]
    cells = [
        with_best([_mean(of, column) for of in models.values()], column.info.higher_is_better, competing)
        for column in columns
    ]
    if not any(any(column) for column in cells):
        return None
    rows = tuple(
        Row(of[0].label + (f" {TRUTH_MARK}" if of[0].truth else ""), tuple(column[index] for column in cells))
        for index, of in enumerate(models.values())
    )
    return Table(
        corner="Model",
        headings=tuple(Heading(c.label, c.info.arrow, c.group, description=c.info.description) for c in columns),
        rows=rows,
        notes=(*notes, *_score_notes(evaluations, rows)),
        **names,
    )


def models_of(evaluations: Iterable[Evaluation]) -> dict[str, list[Evaluation]]:
    """The evaluations of each model, in order of appearance.

    >>> from types import SimpleNamespace
    >>> {model: len(of) for model, of in models_of([SimpleNamespace(model=name) for name in "aba"]).items()}
    {'a': 2, 'b': 1}
    """
    models: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        models.setdefault(evaluation.model, []).append(evaluation)
    return models


def _mean(evaluations: Sequence[Evaluation], column: _Column) -> Cell | None:
    """Mean over the seeds of one model with its interval; over samples where there is one seed."""
    found = [e for e in evaluations if e.pairing is column.pairing and column.score in e.metrics]
    if not found:
        return None
    values = [float(e.metrics[column.score]) for e in found]
    low, high = mean_interval(values, Over.SEEDS)
    if len(values) == 1:
        over_samples = found[0].intervals.get(column.score, {})
        low, high = over_samples.get("low"), over_samples.get("high")
    interval = None if low is None or high is None else (low, high)
    return Cell.of(float(np.mean(values)), column.info.digits, interval=interval, n=len(values))


def _score_notes(evaluations: Sequence[Evaluation], rows: Sequence[Row]) -> list[str]:
    cells = [cell for row in rows for cell in row.cells if cell is not None]
    samples = {int(evaluation.protocol["samples"]) for evaluation in evaluations}
    notes = [f"{_listed(samples)} samples each. Best as printed bold, second underlined."]
    if seeds := {cell.n for cell in cells} - {1}:
        notes.append(f"Mean over {_listed(seeds)} training seeds; brackets: its 95 % interval ({Over.SEEDS.interval}).")
    if any(cell.interval for cell in cells if cell.n == 1):
        notes.append(
            f"Of a single checkpoint: mean over samples; brackets: its 95 % interval ({Over.SAMPLES.interval}), which "
            "says nothing about another training seed. Distances between sets have none."
            f"{few_samples_note(min(samples))}"
        )
    if any(evaluation.protocol.get("protocol.correspondence") == "matched" for evaluation in evaluations):
        notes.append(MATCHED_NOTE)
    return notes + [TRUTH_NOTE] * any(evaluation.truth for evaluation in evaluations)


def _listed(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def evaluation_scores(results: Mapping[str, Any], expected: Mapping[str, float] | None = None) -> Table:
    """The scores of one evaluation, with the paper's beside them if given.

    Args:
        results: ``metrics`` and ``intervals`` by name, number of ``samples``, and ``settings`` if known.
        expected: what the paper reports, by metric.

    >>> table = evaluation_scores({"samples": 8, "metrics": {"ssim": 0.8}, "intervals": {}}, {"ssim": 0.8396})
    >>> [cell.text for cell in table.rows[0].cells[:2]]
    ['0.8000', '0.8396']
    """
    layer = results.get("settings", {}).get("attribution", {}).get("layer")
    where = "" if layer is None else f"; correspondence error, PCK, spread and entropy of layer {layer}"
    good = {True: " (higher is better)", False: " (lower is better)", None: ""}
    rows = []
    for name, info in METRICS.items():
        if (value := results["metrics"].get(name)) is not None:
            ends = results["intervals"].get(name)
            interval = ends and (ends["low"], ends["high"])
            paper = Cell(str(expected[name])) if expected and name in expected else None
            cells = (Cell.of(value, info.digits, interval=interval), *([paper] if expected else []))
            fewer = f"; {ends['n']} samples" if ends and ends.get("n", results["samples"]) < results["samples"] else ""
            rows.append(Row(info.label, (*cells, Cell(info.description + good[info.higher_is_better] + fewer))))
    return Table(
        title=f"{results['samples']} samples; intervals: 95 %, bootstrap over them{where}",
        corner="Score",
        headings=(Heading("Value"), *([Heading("Paper")] if expected else []), Heading("Meaning", words=True)),
        rows=tuple(rows),
    )


# ---- correlation ---------------------------------------------------------------------------------

_MIN_POINTS = 4
CORRELATION_NEEDS = f"paired evaluations of {_MIN_POINTS} checkpoints or more"
CORRELATION_CAPTION = (
    "IMACS against image metrics, one point per evaluated checkpoint. Lines follow the snapshots of a training run "
    "to its end (large points). r: Pearson, ρ: Spearman over all points."
)


@dataclass(frozen=True, slots=True)
class _Selection:
    """Some of the checkpoints, and what is taken out before correlating."""

    title: str
    points: tuple[Evaluation, ...]
    at_equal_step: bool = False


def selections(evaluations: Sequence[Evaluation]) -> Iterator[_Selection]:
    """All checkpoints; the same at equal steps; the ends of training alone; whichever have enough points.

    >>> from types import SimpleNamespace
    >>> points = [SimpleNamespace(pairing=Pairing.PAIRED, step=step, snapshot=False) for step in range(4)]
    >>> [(selection.title, len(selection.points)) for selection in selections(points)]
    [('All checkpoints', 4)]
    """
    points = tuple(e for e in evaluations if e.pairing is Pairing.PAIRED)
    if len(points) >= _MIN_POINTS:
        yield _Selection("All checkpoints", points)
    with_others = tuple(
        point
        for _, of in groupby(sorted(points, key=_step_of), key=_step_of)
        if len(group := list(of)) > 1
        for point in group
        if point.step is not None
    )
    if len(with_others) >= _MIN_POINTS and len({point.step for point in with_others}) > 1:
        yield _Selection("At equal steps", with_others, at_equal_step=True)
    ends = tuple(point for point in points if not point.snapshot)
    if _MIN_POINTS <= len(ends) < len(points):
        yield _Selection("Ends of training", ends)


def _step_of(point: Evaluation) -> int:
    """Optimizer steps, -1 where they are not known."""
    return -1 if point.step is None else point.step


def correlation_table(evaluations: Sequence[Evaluation]) -> Table | None:
    """Rows: image metrics by selection of checkpoints; columns: both coefficients for IMACS_g and IMACS_r.

    None where fewer than four checkpoints were evaluated.
    """
    rows = tuple(
        Row(METRICS[metric].heading, cells, selection.title)
        for selection in selections(evaluations)
        for metric in _measured_by_all(selection.points)
        if any(cells := tuple(_correlation_cells(selection, metric)))
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
        notes=tuple(_correlation_notes(evaluations)),
    )


def _measured_by_all(points: Sequence[Evaluation]) -> list[str]:
    """The image metrics that every point has."""
    names = (*IMAGE_METRICS, *own_metrics())
    return [name for name in names if all(name in point.metrics for point in points)]


def _correlation_cells(selection: _Selection, metric: str) -> Iterator[Cell | None]:
    for side in ATTENTION_METRICS:
        found = _correlate(selection, side, metric)
        if found is None:
            yield from (None, None)
        else:
            yield Cell.of(found.pearson, 2, interval=found.pearson_interval, n=found.n)
            yield Cell.of(found.spearman, 2, interval=found.spearman_interval, n=found.n)


def _correlate(selection: _Selection, side: str, metric: str) -> Correlation | None:
    """Correlation of one IMACS with one metric over a selection; None where it is not defined."""
    points = [p for p in selection.points if side in p.metrics and metric in p.metrics]
    if len(points) < _MIN_POINTS:
        return None
    x, y = (np.array([point.metrics[name] for point in points]) for name in (side, metric))
    if selection.at_equal_step:
        steps = [point.step for point in points]
        x, y = (_without_step_means(values, steps) for values in (x, y))
    return correlation(x, y, [point.run for point in points])


def _without_step_means(values: NDArray[np.float64], steps: Sequence[int | None]) -> NDArray[np.float64]:
    """Deviations from the mean of the checkpoints of the same step."""
    centred = values.copy()
    for step in set(steps):
        same = np.array([other == step for other in steps])
        centred[same] -= values[same].mean()
    return centred


def _correlation_notes(evaluations: Sequence[Evaluation]) -> Iterator[str]:
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
    metrics = [] if selection is None else _measured_by_all(selection.points)
    if selection is None or not metrics:
        return None
    models = dict.fromkeys(point.label for point in selection.points)
    colors = {label: OKABE_ITO[i % len(OKABE_ITO)] for i, label in enumerate(models)}
    figure = new_figure(2.5 * len(metrics) + 0.3, 5.2)
    grid = figure.subplots(2, len(metrics), squeeze=False, sharex="row", sharey="col")
    for row, side in zip(grid, ATTENTION_METRICS, strict=True):
        for axes, metric in zip(row, metrics, strict=True):
            _scatter(axes, selection, side, metric, colors)
    handles = [
        Line2D([], [], color=color, marker="o", markersize=4, linewidth=0.8, label=plain_text(name))
        for name, color in colors.items()
    ]
    figure.legend(handles=handles, loc="upper center", ncols=min(len(handles), 5), fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    return figure


def _scatter(axes: Axes, selection: _Selection, side: str, metric: str, colors: dict[str, str]) -> None:
    for label, run in dict.fromkeys((point.label, point.run) for point in selection.points):
        points = sorted((p for p in selection.points if (p.label, p.run) == (label, run)), key=_step_of)
        x = [point.metrics.get(side, np.nan) for point in points]
        y = [point.metrics[metric] for point in points]
        axes.plot(x, y, color=colors[label], linewidth=0.8, alpha=0.5)
        sizes = [12 if point.snapshot else 30 for point in points]
        axes.scatter(x, y, sizes, color=colors[label], ec="white", linewidths=0.4, zorder=3)
    found = _correlate(selection, side, metric)
    if found is not None:
        text = minus(f"r = {number(found.pearson, 2)}, ρ = {number(found.spearman, 2)}")
        axes.set_title(text, fontsize=8, color=GREY)
    axes.set_xlabel(f"{with_index(METRICS[side].label)} ↑")
    axes.tick_params(labelleft=True)
    axes.xaxis.set_major_locator(MaxNLocator(4))  # more numbers would touch each other
    axes.set_ylabel(METRICS[metric].heading)
