"""Tables of models as the paper has them: Table 2 (metrics), Table 3 (thresholds), Table 4 (penalties).

What they say is decided here, from finished evaluations: which number, which interval, what is best. How it is
written down is ``reporting.score_table_formats``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np

from i2am_train.metrics.imacs import imacs_column
from i2am_train.metrics.registry import METRICS, MetricInfo
from i2am_train.reporting.tables import (
    TRUTH_MARK,
    arrow,
    few_samples_note,
    interval_text,
    number,
    printed_ranks,
)
from i2am_train.results.evaluations import Evaluation
from i2am_train.results.statistics import Over, mean_interval
from i2am_train.types import Pairing

IMAGE_METRICS = (
    *("fid", "fd_efficientnet_lite0", "kid", "kd_efficientnet_lite0"),
    *("lpips", "stlpips", "ssim"),
)
"""The paper's image metrics in its order, each beside the one with packaged weights."""
ATTENTION_METRICS = ("imacs_g", "imacs_r")
CONFIDENCE = 0.95
_SWEPT = re.compile(r"@d([\d.e+-]+)_l([\d.e+-]+)$")


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of a table: as it is printed and as it is."""

    text: str
    value: float
    interval: tuple[float, float] | None = None
    interval_text: str = ""
    rank: int = 0
    """1 for the best of the column, 2 for the second, else 0."""
    n: int = 1
    """Training seeds that the number is a mean of."""


@dataclass(frozen=True, slots=True)
class Heading:
    """Head of a column."""

    label: str
    arrow: str = ""
    group: str = ""
    """Title over this and its neighbours of the same group."""
    description: str = ""

    @property
    def text(self) -> str:
        """Label with arrow."""
        return f"{self.label} {self.arrow}".strip()


@dataclass(frozen=True, slots=True)
class Row:
    """One model, or whatever the table has a row for."""

    label: str
    cells: tuple[Cell | None, ...]
    group: str = ""
    """Title over this row and its neighbours of the same group."""


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """A table ready to be written in any format."""

    name: str
    """Of its files."""
    title: str
    source: str
    """What it is in the paper."""
    corner: str
    headings: tuple[Heading, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Titles over the headings and how many columns each spans."""
        return [(title, len(list(of))) for title, of in groupby(h.group for h in self.headings)]

    def as_json(self) -> dict[str, Any]:
        """The numbers without loss, for programs."""
        return {
            "name": self.name,
            "title": self.title,
            "paper": self.source,
            "columns": [{"label": h.label, "group": h.group} for h in self.headings],
            "rows": [
                {"label": row.label, "group": row.group, "cells": [*map(_cell_json, row.cells)]}
                for row in self.rows
            ],
            "notes": list(self.notes),
        }


def _cell_json(cell: Cell | None) -> dict[str, Any] | None:
    if cell is None:
        return None
    return {"value": cell.value, "interval": cell.interval, "rank": cell.rank, "n": cell.n}


@dataclass(frozen=True, slots=True)
class _Column:
    heading: Heading
    info: MetricInfo
    metric: str
    pairing: Pairing


def score_tables(evaluations: Sequence[Evaluation]) -> tuple[list[ScoreTable], dict[str, str]]:
    """The paper's tables that these evaluations allow, and what the others would need.

    Snapshots take no part: a model's row is the end of its training.
    """
    final = [evaluation for evaluation in evaluations if not evaluation.snapshot]
    tables, missing = [], {}
    for name, make in (("table2", _table2), ("table3", _table3), ("table4", _table4)):
        table = make(final) if final else None
        if table is None:
            missing[name] = _NEEDS[name]
        else:
            tables.append(table)
    return tables, missing


_NEEDS = {
    "table2": "the evaluation of a finished model",
    "table3": "evaluations at several thresholds (i2am evaluate ... attribution=sweep)",
    "table4": "evaluations at several penalties (i2am evaluate ... attribution=sweep)",
}


def _table2(evaluations: Sequence[Evaluation]) -> ScoreTable | None:
    """Models x image metrics and IMACS, paired and unpaired."""
    columns = [
        _column(name, name, pairing, pairing.value.capitalize())
        for pairing in Pairing
        for name in (*IMAGE_METRICS, *ATTENTION_METRICS)
        if any(name in e.metrics and e.pairing is pairing for e in evaluations)
    ]
    if len({column.pairing for column in columns}) == 1:
        columns = [_without_group(column) for column in columns]
    return _table("table2", "Models by image metrics and IMACS", "Table 2", evaluations, columns)


def _table3(evaluations: Sequence[Evaluation]) -> ScoreTable | None:
    """IMACS by threshold, at the evaluations' own penalty."""
    return _sweep("table3", "IMACS by threshold δ", "Table 3", evaluations, vary=0)


def _table4(evaluations: Sequence[Evaluation]) -> ScoreTable | None:
    """IMACS by penalty, at the evaluations' own threshold."""
    return _sweep("table4", "IMACS by penalty λ", "Table 4", evaluations, vary=1)


def _sweep(
    name: str, title: str, source: str, evaluations: Sequence[Evaluation], vary: int
) -> ScoreTable | None:
    fixed = next((own for e in evaluations if (own := _own_point(e)) is not None), None)
    if fixed is None:
        return None
    swept = {
        tuple(map(float, match.groups()))
        for evaluation in evaluations
        for metric in evaluation.metrics
        if (match := _SWEPT.search(metric))
    }
    points = sorted(p for p in swept if p[1 - vary] == fixed[1 - vary])
    if len(points) < 2:
        return None
    symbol = "δλ"[vary]
    columns = []
    for metric in ATTENTION_METRICS:
        for point in points:
            heading = f"{symbol} = {point[vary]:g}"
            columns.append(
                _column(
                    metric,
                    imacs_column(metric, *point),
                    Pairing.PAIRED,
                    METRICS[metric].label,
                    heading,
                )
            )
    other = f"{'δλ'[1 - vary]} = {fixed[1 - vary]:g}"
    note = f"All at {other}. {_SWEEP_NOTES[vary]}"
    return _table(name, title, source, evaluations, columns, [note])


_SWEEP_NOTES = (
    "Values of the normalised map below δ count as 0. All come from the same maps.",
    "IMACS is affine in λ: attribution inside the mask minus λ times that outside (paper eq. 8), so the columns of "
    "one side lie on a line, whose slope is the attribution outside.",
)


def _own_point(evaluation: Evaluation) -> tuple[float, float] | None:
    options = evaluation.settings.get("attribution")
    return None if options is None else (float(options["delta"]), float(options["penalty"]))


def _column(
    metric: str, column: str, pairing: Pairing, group: str, label: str | None = None
) -> _Column:
    info = METRICS[metric]
    heading = Heading(label or info.label, arrow(info.higher_is_better), group, info.description)
    return _Column(heading, info, column, pairing)


def _without_group(column: _Column) -> _Column:
    return replace(column, heading=replace(column.heading, group=""))


def _table(
    name: str,
    title: str,
    source: str,
    evaluations: Sequence[Evaluation],
    columns: Sequence[_Column],
    notes: Iterable[str] = (),
) -> ScoreTable | None:
    models = models_of(evaluations)
    cells = {model: [_cell(of, column) for column in columns] for model, of in models.items()}
    if not columns or not any(any(row) for row in cells.values()):
        return None
    competing = [model for model, of in models.items() if not of[0].truth]
    ranked = {model: list(row) for model, row in cells.items()}
    for index, column in enumerate(columns):
        values = {m: cell.value for m in competing if (cell := cells[m][index]) is not None}
        ranks = printed_ranks(values, column.info.digits, column.info.higher_is_better)
        for model, rank in ranks.items():
            ranked[model][index] = _with_rank(cells[model][index], rank)
    rows = tuple(
        Row(of[0].label + (f" {TRUTH_MARK}" if of[0].truth else ""), tuple(ranked[model]))
        for model, of in models.items()
    )
    return ScoreTable(
        name, title, source, "Model", tuple(c.heading for c in columns), rows,
        (*notes, *_notes(evaluations, rows)),
    )  # fmt: skip


def models_of(evaluations: Iterable[Evaluation]) -> dict[str, list[Evaluation]]:
    """The evaluations of each model, in order of appearance."""
    models: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        models.setdefault(evaluation.model, []).append(evaluation)
    return models


def _cell(evaluations: Sequence[Evaluation], column: _Column) -> Cell | None:
    """Mean over the seeds of one model with its interval; over samples where there is one seed."""
    of_column = [
        e for e in evaluations if e.pairing is column.pairing and column.metric in e.metrics
    ]
    if not of_column:
        return None
    values = [float(e.metrics[column.metric]) for e in of_column]
    low, high = mean_interval(values, Over.SEEDS, CONFIDENCE)
    if len(values) == 1:
        over_samples = of_column[0].intervals.get(column.metric, {})
        low, high = over_samples.get("low"), over_samples.get("high")
    mean, digits = float(np.mean(values)), column.info.digits
    interval = None if low is None or high is None else (low, high)
    return Cell(
        text=number(mean, digits),
        value=mean,
        interval=interval,
        interval_text=interval_text(interval, digits),
        n=len(values),
    )


def _with_rank(cell: Cell | None, rank: int) -> Cell | None:
    return None if cell is None else replace(cell, rank=rank)


def _notes(evaluations: Sequence[Evaluation], rows: Sequence[Row]) -> list[str]:
    cells = [cell for row in rows for cell in row.cells if cell is not None]
    samples = {int(evaluation.protocol["samples"]) for evaluation in evaluations}
    notes = [f"{_listed(samples)} samples each. Best as printed bold, second underlined."]
    seeds = {cell.n for cell in cells}
    if seeds - {1}:
        notes.append(
            f"Mean over {_listed(seeds - {1})} training seeds; brackets: its 95 % interval ({Over.SEEDS.interval})."
        )
    if 1 in seeds and any(cell.interval for cell in cells if cell.n == 1):
        notes.append(
            f"Of a single checkpoint: mean over samples; brackets: its 95 % interval ({Over.SAMPLES.interval}), which "
            "says nothing about another training seed. Distances between sets have none."
            f"{few_samples_note(min(samples))}"
        )
    if any(evaluation.truth for evaluation in evaluations):
        notes.append(
            f"{TRUTH_MARK} trained with the true correspondence, which the others do not have: not ranked."
        )
    return notes


def _listed(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))
