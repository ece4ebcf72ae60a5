"""Tables of models as the paper has them: Table 2 (metrics), Table 3 (thresholds), Table 4 (penalties)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from i2am_train.metrics.imacs import imacs_column
from i2am_train.metrics.registry import METRICS, MetricInfo, own_metrics
from i2am_train.reporting.table import Cell, Heading, Row, Table, with_best
from i2am_train.reporting.tables.ablation import TRUTH_MARK, TRUTH_NOTE
from i2am_train.results.evaluations import Evaluation
from i2am_train.results.statistics import Over, few_samples_note, mean_interval
from i2am_train.types import Pairing

IMAGE_METRICS = (*("fid", "fd_efficientnet_lite0", "kid", "kd_efficientnet_lite0"), *("lpips", "stlpips", "ssim"))
"""The paper's image metrics in its order, each beside the one with packaged weights."""
ATTENTION_METRICS = ("imacs_g", "imacs_r")
_SWEPT = re.compile(r"@d([\d.e+-]+)_l([\d.e+-]+)$")


@dataclass(frozen=True, slots=True)
class _Column:
    heading: Heading
    info: MetricInfo
    score: str
    """Name in the evaluation's scores."""
    pairing: Pairing = Pairing.PAIRED


def score_tables(evaluations: Sequence[Evaluation]) -> tuple[list[Table], dict[str, str]]:
    """The paper's tables that these evaluations allow, and what the others would need.

    Snapshots take no part: a model's row is the end of its training.
    """
    final = [evaluation for evaluation in evaluations if not evaluation.snapshot]
    tables = {
        "table2": _models_table(final),
        "table3": _sweep_table(final, 0, "table3", "IMACS by threshold δ", "Table 3"),
        "table4": _sweep_table(final, 1, "table4", "IMACS by penalty λ", "Table 4"),
    }
    missing = {name: _NEEDS[name] for name, table in tables.items() if table is None}
    return [table for table in tables.values() if table is not None], missing


_NEEDS = {
    "table2": "the evaluation of a finished model",
    "table3": "evaluations at several thresholds (i2am evaluate ... attribution=sweep)",
    "table4": "evaluations at several penalties (i2am evaluate ... attribution=sweep)",
}


def _models_table(evaluations: Sequence[Evaluation]) -> Table | None:
    """Models x image metrics and IMACS, paired and unpaired."""
    measured = {(name, e.pairing) for e in evaluations for name in e.metrics}
    pairings = [one for one in Pairing if any(e.pairing is one for e in evaluations)]
    columns = [
        _column(name, name, METRICS[name].label, pairing.capitalize() if len(pairings) > 1 else "", pairing)
        for pairing in pairings
        for name in (*IMAGE_METRICS, *own_metrics(), *ATTENTION_METRICS)
        if (name, pairing) in measured
    ]
    title = "Models by image metrics and IMACS"
    return _table(evaluations, columns, name="table2", title=title, source="Table 2")


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
    columns = [
        _column(side, imacs_column(side, *point), f"{'δλ'[vary]} = {point[vary]:g}", METRICS[side].label)
        for side in ATTENTION_METRICS
        for point in points
    ]
    note = f"All at {'δλ'[1 - vary]} = {fixed:g}. {_SWEEP_NOTES[vary]}"
    if len(points) < 2:
        return None
    return _table(evaluations, columns, name=name, title=title, source=source, notes=(note,))


_SWEEP_NOTES = (
    "Values of the normalised map below δ count as 0. All come from the same maps.",
    "IMACS is affine in λ: attribution inside the mask minus λ times that outside (paper eq. 8), so the columns of "
    "one side lie on a line, whose slope is the attribution outside.",
)


def _column(metric: str, score: str, label: str, group: str, pairing: Pairing = Pairing.PAIRED) -> _Column:
    info = METRICS[metric]
    heading = Heading(label, info.arrow, group, description=info.description)
    return _Column(heading, info, score, pairing)


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
        headings=tuple(column.heading for column in columns),
        rows=rows,
        notes=(*notes, *_notes(evaluations, rows)),
        **names,
    )


def evaluation_scores(results: Mapping[str, Any], expected: Mapping[str, float] | None = None) -> Table:
    """The scores of one evaluation, with the paper's beside them if given.

    Args:
        results: ``metrics`` and ``intervals`` by name, number of ``samples``.
        expected: what the paper reports, by metric.
    """
    good = {True: " (higher is better)", False: " (lower is better)", None: ""}
    rows = []
    for name, info in METRICS.items():
        if (value := results["metrics"].get(name)) is not None:
            ends = results["intervals"].get(name)
            interval = ends and (ends["low"], ends["high"])
            paper = Cell(str(expected[name])) if expected and name in expected else None
            cells = (Cell.of(value, info.digits, interval=interval), *([paper] if expected else []))
            rows.append(Row(info.label, (*cells, Cell(info.description + good[info.higher_is_better]))))
    return Table(
        title=f"{results['samples']} samples; intervals: 95 %, bootstrap over them",
        corner="Score",
        headings=(Heading("Value"), *([Heading("Paper")] if expected else []), Heading("Meaning", words=True)),
        rows=tuple(rows),
    )


def models_of(evaluations: Iterable[Evaluation]) -> dict[str, list[Evaluation]]:
    """The evaluations of each model, in order of appearance."""
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


def _notes(evaluations: Sequence[Evaluation], rows: Sequence[Row]) -> list[str]:
    cells = [cell for row in rows for cell in row.cells if cell is not None]
    samples = {int(evaluation.protocol["samples"]) for evaluation in evaluations}
    notes = [f"{_listed(samples)} samples each. Best as printed bold, second underlined."]
    seeds = {cell.n for cell in cells}
    if seeds - {1}:
        notes.append(
            f"Mean over {_listed(seeds - {1})} training seeds; brackets: its 95 % interval ({Over.SEEDS.interval})."
        )
    if any(cell.interval for cell in cells if cell.n == 1):
        notes.append(
            f"Of a single checkpoint: mean over samples; brackets: its 95 % interval ({Over.SAMPLES.interval}), which "
            "says nothing about another training seed. Distances between sets have none."
            f"{few_samples_note(min(samples))}"
        )
    return notes + [TRUTH_NOTE] * any(evaluation.truth for evaluation in evaluations)


def _listed(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))
