"""What the tables of an ablation say, before anyone writes them down.

``main_table`` and ``difference_tables`` decide once which value is best, what a difference shows
and how many digits are printed; ``reporting.table_formats`` only writes it for the terminal,
Markdown, HTML and LaTeX. ``verdict_sentences`` says the same in words, ``notes`` how to read it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any, Self

from i2am_train.results.finished_runs import (
    START_ARM,
    Results,
    arm_labels,
    uses_truth,
)
from i2am_train.results.statistics import Over

GROUP_TITLES = {"attention": "Attention", "image": "Image"}
TRUTH_MARK = "†"

BOOTSTRAP_COVERAGE = {5: 85, 10: 90, 20: 93}
"""True coverage in percent of the 95 % bootstrap interval by number of samples: simulated by us,
4000 draws of normal values through ``mean_interval``. With two to five values it misses in 50 to
15 %, which is why the interval over seeds is another."""


class Verdict(StrEnum):
    """What a paired difference shows about an arm."""

    BETTER = "better"
    WORSE = "worse"
    NOT_SHOWN = "no difference shown"
    HIGHER = "higher"
    LOWER = "lower"
    NOT_TESTED = "not tested"


@dataclass(frozen=True, slots=True)
class MetricColumn:
    """One column of the tables, as ``results["metrics"]`` describes it."""

    name: str
    label: str
    higher_is_better: bool | None
    digits: int
    group: str
    unit: str = ""
    description: str = ""

    @classmethod
    def of(cls, name: str, entry: Mapping[str, Any]) -> Self:
        """From one entry of ``results["metrics"]``."""
        return cls(
            name=name,
            label=str(entry.get("label") or name),
            higher_is_better=entry.get("higher_is_better"),
            digits=int(entry.get("digits", 3)),
            group=str(entry.get("group", "")),
            unit=str(entry.get("unit") or ""),
            description=str(entry.get("description") or ""),
        )

    @property
    def arrow(self) -> str:
        """Where better values lie: up, down, or empty if neither is better."""
        return arrow(self.higher_is_better)

    @property
    def heading(self) -> str:
        """Label with arrow."""
        return f"{self.label} {self.arrow}".strip()


@dataclass(frozen=True, slots=True)
class Value:
    """One number of the main table; ``rank`` is 1 for the best, 2 for the second, else 0."""

    mean: str
    std: str | None
    rank: int


@dataclass(frozen=True, slots=True)
class ArmRow:
    """One arm of the main table; a metric without a value is ``None``."""

    arm: str
    label: str
    values: tuple[Value | None, ...]


@dataclass(frozen=True, slots=True)
class MainTable:
    """Arms x metrics, metrics of one group side by side."""

    columns: tuple[MetricColumn, ...]
    rows: tuple[ArmRow, ...]

    @property
    def groups(self) -> list[tuple[str, list[int]]]:
        """Title of each group and the indices of its columns."""
        pairs = groupby(enumerate(self.columns), key=lambda pair: pair[1].group)
        return [(GROUP_TITLES.get(g, g.capitalize()), [i for i, _ in of]) for g, of in pairs]


@dataclass(frozen=True, slots=True)
class DifferenceRow:
    """One paired difference: what was measured and what it shows."""

    column: MetricColumn
    difference: str
    interval: str | None
    n: int
    in_favour: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class DifferenceTable:
    """All metrics of one arm against the reference arm."""

    arm: str
    label: str
    against: str
    against_label: str
    over: Over
    confidence: float
    rows: tuple[DifferenceRow, ...]

    @property
    def title(self) -> str:
        """``refined - baseline``."""
        return f"{self.label} − {self.against_label}"


def metric_columns(results: Results) -> tuple[MetricColumn, ...]:
    """The metrics that were measured, groups kept together in order of appearance."""
    measured = {name for of_arm in results["summary"].values() for name in of_arm}
    metrics = results["metrics"]
    columns = [MetricColumn.of(name, metrics[name]) for name in metrics if name in measured]
    order = list(dict.fromkeys(column.group for column in columns))
    return tuple(sorted(columns, key=lambda column: order.index(column.group)))


def main_table(results: Results) -> MainTable:
    """Mean and spread of every metric and arm.

    Ranks go by the printed number, so that equal print is equal rank. Arms that train on the
    ground truth are marked and take no part.
    """
    columns, labels = metric_columns(results), arm_labels(results)
    arms = [arm for arm in results["arms"] if arm["name"] in results["summary"]]
    competing = [arm["name"] for arm in arms if not uses_truth(arm)]
    ranks = {column.name: _ranks(column, results["summary"], competing) for column in columns}
    rows = []
    for arm in arms:
        name = arm["name"]
        of_arm = results["summary"][name]
        values = (_value(c, of_arm.get(c.name), ranks[c.name].get(name, 0)) for c in columns)
        mark = f" {TRUTH_MARK}" if uses_truth(arm) else ""
        rows.append(ArmRow(name, labels[name] + mark, tuple(values)))
    return MainTable(columns, tuple(rows))


def _ranks(
    column: MetricColumn, summary: Mapping[str, Any], competing: Sequence[str]
) -> dict[str, int]:
    means = {
        arm: summary[arm][column.name]["mean"] for arm in competing if column.name in summary[arm]
    }
    return printed_ranks(means, column.digits, column.higher_is_better)


def printed_ranks(
    means: Mapping[str, float], digits: int, higher_is_better: bool | None
) -> dict[str, int]:
    """1 for the best and 2 for the second by name, among numbers as they are printed.

    Equal print is equal rank. Nothing is best where there is one number only, where all are equal,
    or where neither direction is better.

    >>> printed_ranks({"a": 0.701, "b": 0.702, "c": 0.6}, 2, True)
    {'a': 1, 'b': 1, 'c': 2}
    """
    printed = {name: round(mean, digits) for name, mean in means.items()}
    order = sorted(set(printed.values()), reverse=bool(higher_is_better))
    if higher_is_better is None or len(order) < 2:
        return {}
    return {name: order.index(value) + 1 for name, value in printed.items() if value in order[:2]}


def _value(column: MetricColumn, entry: Mapping[str, Any] | None, rank: int) -> Value | None:
    if entry is None:
        return None
    std = entry.get("std")
    spread = None if std is None else number(std, column.digits)
    return Value(number(entry["mean"], column.digits), spread, rank)


def arrow(higher_is_better: bool | None) -> str:
    """Where better values lie: up, down, or empty if neither is better."""
    return {True: "↑", False: "↓", None: ""}[higher_is_better]


def interval_text(interval: tuple[float, float] | None, digits: int) -> str:
    """An interval as tables print it; empty where there is none.

    >>> interval_text((0.12345, 0.5), 3)
    '[0.123, 0.500]'
    """
    if interval is None:
        return ""
    return f"[{number(interval[0], digits)}, {number(interval[1], digits)}]"


def number(value: float, digits: int, signed: bool = False) -> str:
    """A number with fixed digits, never "-0.00".

    >>> number(-0.0004, 3), number(0.25, 2, signed=True)
    ('0.000', '+0.25')
    """
    rounded = round(value, digits) + 0.0  # minus zero plus zero is zero
    return f"{rounded:{'+' if signed and rounded else ''}.{digits}f}"


def difference_tables(results: Results) -> tuple[DifferenceTable, ...]:
    """One table per arm that was compared with the reference arm."""
    columns, labels = {c.name: c for c in metric_columns(results)}, arm_labels(results)
    tables = []
    for arm in labels:
        entries = [e for e in results["paired"] if e["arm"] == arm and e["metric"] in columns]
        entries.sort(key=lambda e: list(columns).index(e["metric"]))
        if entries:
            tables.append(_difference_table(entries, columns, labels))
    return tuple(tables)


def _difference_table(
    entries: Sequence[Mapping[str, Any]],
    columns: Mapping[str, MetricColumn],
    labels: Mapping[str, str],
) -> DifferenceTable:
    arm, against = entries[0]["arm"], entries[0]["against"]
    over_samples = any(entry.get("over") == "samples" for entry in entries)
    return DifferenceTable(
        arm=arm,
        label=labels[arm],
        against=against,
        against_label=labels.get(against, against),
        over=Over.SAMPLES if over_samples else Over.SEEDS,
        confidence=float(entries[0].get("confidence", 0.95)),
        rows=tuple(_difference_row(columns[entry["metric"]], entry) for entry in entries),
    )


def _difference_row(column: MetricColumn, entry: Mapping[str, Any]) -> DifferenceRow:
    digits = column.digits + 1  # differences are smaller than values
    low, high = entry.get("low"), entry.get("high")
    interval = None
    if low is not None and high is not None:
        interval = interval_text((low, high), digits)
    return DifferenceRow(
        column=column,
        difference=number(entry["difference"], digits, signed=True),
        interval=interval,
        n=int(entry["n"]),
        in_favour=_in_favour(column, entry),
        verdict=verdict(column.higher_is_better, low, high),
    )


def _in_favour(column: MetricColumn, entry: Mapping[str, Any]) -> str:
    positive, n = entry.get("positive"), int(entry["n"])
    if positive is None or column.higher_is_better is None:
        return ""
    return f"{positive if column.higher_is_better else n - positive}/{n}"


def verdict(higher_is_better: bool | None, low: float | None, high: float | None) -> Verdict:
    """What an interval of a difference shows.

    >>> str(verdict(False, -0.4, -0.1)), str(verdict(True, -0.4, 0.1))
    ('better', 'no difference shown')
    """
    if low is None or high is None:
        return Verdict.NOT_TESTED
    if low <= 0 <= high:
        return Verdict.NOT_SHOWN
    if higher_is_better is None:
        return Verdict.HIGHER if low > 0 else Verdict.LOWER
    return Verdict.BETTER if (low > 0) == higher_is_better else Verdict.WORSE


def notes(results: Results) -> tuple[str, ...]:
    """What a reader must know to judge the tables: counts, spread, intervals, machine, command."""
    return tuple(
        note
        for note in (
            _spread_note(results),
            _sample_note(results),
            *_interval_notes(results),
            _truth_note(results),
            _provenance_note(results),
        )
        if note
    )


def _spread_note(results: Results) -> str:
    seeds = sorted({c["seed"] for c in results["cells"] if c["seed"] is not None})
    if len(seeds) < 2:
        return "One training seed: no spread between seeds is known."
    listed = ", ".join(map(str, seeds))
    start = _start_note(results)
    return f"Mean ± sample standard deviation over {len(seeds)} training seeds ({listed}).{start}"


def _start_note(results: Results) -> str:
    label = arm_labels(results).get(START_ARM)
    return f" “{label}” is the one checkpoint that all arms start from." if label else ""


def _sample_note(results: Results) -> str:
    counts = sorted({c["samples"] for c in results["cells"] if c.get("samples")})
    if not counts:
        return ""
    text = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Each value is measured on {text} held-out samples. Bold: best as printed."


def percent(share: float) -> str:
    """A share as text: ``95 %``."""
    return f"{share:.0%}".replace("%", " %")


def _interval_notes(results: Results) -> Iterator[str]:
    """One for each kind of interval that the tables have."""
    tables = difference_tables(results)
    for over in Over:
        counts = [r.n for t in tables if t.over is over for r in t.rows if r.interval is not None]
        if counts:
            level = percent(tables[0].confidence)
            kind = f"Intervals: {level} ({over.interval}) of paired differences over {over}"
            yield kind + _INTERVAL_NOTES[over](min(counts))


def _seeds_note(fewest: int) -> str:
    note = ", one metric at a time."
    if fewest == 2:
        note += (
            " Two seeds say little of how far seeds lie apart, so these are wide and few differences can be shown: "
            "read the counts, or train more seeds."
        )
    return note


def _samples_note(fewest: int) -> str:
    note = " of one seed; they do not cover what another training seed would change."
    return note + few_samples_note(fewest)


def few_samples_note(fewest: int) -> str:
    """What a bootstrap over so few samples is worth; empty where there are enough."""
    if fewest >= max(BOOTSTRAP_COVERAGE):
        return ""
    covers = ", ".join(f"{c} % with {n}" for n, c in BOOTSTRAP_COVERAGE.items())
    return f" With few samples they are too narrow (95 % intervals cover {covers})."


_INTERVAL_NOTES = {Over.SEEDS: _seeds_note, Over.SAMPLES: _samples_note}


def _truth_note(results: Results) -> str:
    if not any(uses_truth(arm) for arm in results["arms"]):
        return ""
    return f"{TRUTH_MARK} trained with the true correspondence, which the others do not have: not ranked."


def _provenance_note(results: Results) -> str:
    parts = [
        f"Command: {results['command']}" if results.get("command") else "",
        f"{results['minutes']:.0f} minutes" if results.get("minutes") is not None else "",
        f"on {describe_machine(results['machine'])}" if results.get("machine") else "",
    ]
    text = " ".join(part for part in parts[1:] if part)
    return ". ".join(part for part in (parts[0], text) if part) + ("." if any(parts) else "")


def describe(facts: Mapping[str, Any]) -> str:
    """A flat mapping as one line.

    >>> describe({"cpu": "Xeon", "cores": 2, "gpu": None})
    'cpu Xeon, cores 2'
    """
    texts = (_fact(key.replace("_", " "), value) for key, value in facts.items())
    return ", ".join(text for text in texts if text)


def _fact(name: str, value: object) -> str:
    if isinstance(value, bool):
        return name if value else ""
    return f"{name} {value}" if isinstance(value, (str, int, float)) and value != "" else ""


def describe_machine(machine: Mapping[str, Any]) -> str:
    """Processor, cores, memory and GPU as one phrase; other facts follow by name.

    >>> describe_machine({"cpu": "Xeon", "cores": 2, "memory_gib": 15.6, "gpu": None})
    'Xeon, 2 cores, 15.6 GiB memory'
    """
    units = {"cpu": "{}", "cores": "{} cores", "memory_gib": "{} GiB memory", "gpu": "{}"}
    known = [text.format(machine[name]) for name, text in units.items() if machine.get(name)]
    others = describe({name: value for name, value in machine.items() if name not in units})
    return ", ".join([*known, *filter(None, [others])])


def collapse_warnings(results: Results) -> tuple[str, ...]:
    """Warnings of the cells ("attention has collapsed ..."), each said once, with arm and seeds.

    Those that differ in numbers only are one warning, with the numbers of the first seed.
    """
    labels, found = arm_labels(results), dict[tuple[str, str], list[tuple[str, str]]]()
    for cell in results["cells"]:
        for warning in cell.get("warnings") or ():
            kind = (cell["arm"], re.sub(r"\d+(\.\d+)?", "#", warning))
            found.setdefault(kind, []).append((str(cell["seed"]), warning))
    return tuple(
        f"{labels.get(arm, arm)}{_seed_list([seed for seed, _ in of])}{_whose_numbers(of)}: {of[0][1]}"
        for (arm, _), of in found.items()
    )


def _whose_numbers(found: Sequence[tuple[str, str]]) -> str:
    differ = len({warning for _, warning in found}) > 1
    return f", with the numbers of seed {found[0][0]}" if differ else ""


def _seed_list(seeds: Sequence[str]) -> str:
    named = [seed for seed in seeds if seed != "None"]
    if not named:
        return ""
    return f" (seed{'s' if len(named) > 1 else ''} {', '.join(named)})"


def verdict_sentences(results: Results) -> tuple[str, ...]:
    """The result in words, by rule: better or worse only where the interval excludes zero.

    One sentence group per compared arm that does not train on the truth.
    """
    truth = {arm["name"] for arm in results["arms"] if uses_truth(arm)}
    tables = [table for table in difference_tables(results) if table.arm not in truth]
    if not tables:
        return ("No two trained arms share a seed, so nothing is compared.",)
    return tuple(_verdict_of(table) for table in tables)


def _verdict_of(table: DifferenceTable) -> str:
    by_verdict: dict[Verdict, list[str]] = {}
    for row in table.rows:
        by_verdict.setdefault(row.verdict, []).append(_in_words(row))
    found = [f"{v} on {_join(by_verdict[v])}" for v in Verdict if v in by_verdict and _judged(v)]
    found += [f"{_join(by_verdict[v])} {v}" for v in _UNJUDGED if v in by_verdict]
    found += [f"{v}: {_join(by_verdict[v])}" for v in _SILENT if v in by_verdict]
    pairs = max(row.n for row in table.rows)
    over = f"{pairs} {table.over if pairs > 1 else table.over.removesuffix('s')}"
    seed = " of one training seed" if table.over is Over.SAMPLES else ""
    compared = f"{capitalised(table.label)} against {table.against_label} over {over}{seed}"
    intervals = f"{percent(table.confidence)} intervals, {table.over.interval}"
    return f"{compared} ({intervals}): {'; '.join(found)}."


_UNJUDGED = (Verdict.HIGHER, Verdict.LOWER)
_SILENT = (Verdict.NOT_SHOWN, Verdict.NOT_TESTED)


def capitalised(text: str) -> str:
    """The text with a capital first letter, the rest as it is.

    >>> capitalised("refined on SSIM")
    'Refined on SSIM'
    """
    return text[:1].upper() + text[1:]


def _judged(found: Verdict) -> bool:
    return found in {Verdict.BETTER, Verdict.WORSE}


def _in_words(row: DifferenceRow) -> str:
    if row.verdict is Verdict.NOT_SHOWN:
        return row.column.label
    return f"{row.column.label} ({' '.join(filter(None, (row.difference, row.interval)))})"


def _join(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
