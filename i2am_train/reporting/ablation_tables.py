"""The tables of an ablation: arms by metrics, paired differences, and what a reader must know to judge them.

Which value is best, what a difference shows and how many digits are printed is decided here, once for all formats.
``verdict_sentences`` says the same in words, ``notes`` how to read it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from i2am_train.metrics.registry import MetricInfo
from i2am_train.reporting.pages import describe_machine
from i2am_train.reporting.table import (
    LATEX_NEEDS,
    Cell,
    Heading,
    Mark,
    Row,
    Table,
    interval_text,
    latex,
    markdown_rows,
    markdown_text,
    number,
    percent,
    terminal,
    with_best,
)
from i2am_train.results.statistics import Over, Verdict, few_samples_note, verdict
from i2am_train.results.study import START_ARM, Results, arm_labels, uses_truth

_GROUP_TITLES = {"attention": "Attention", "image": "Image"}
TRUTH_MARK = "†"
TRUTH_NOTE = f"{TRUTH_MARK} trained with the true correspondence, which the others do not have: not ranked."

Entry = Mapping[str, Any]
"""An entry of ``results["paired"]``: one metric of one arm against the reference arm."""

_MARKS = {
    Verdict.BETTER: Mark.BETTER,
    Verdict.WORSE: Mark.WORSE,
    **dict.fromkeys((Verdict.HIGHER, Verdict.LOWER), Mark.CHANGED),
    **dict.fromkeys((Verdict.NOT_SHOWN, Verdict.NOT_TESTED), Mark.FAINT),
}


def measured_metrics(results: Results) -> dict[str, MetricInfo]:
    """The metrics that were measured, groups kept together in order of appearance.

    >>> results = {"metrics": {"ssim": {"group": "image"}, "fid": {}}, "summary": {"refined": {"ssim": {}}}}
    >>> list(measured_metrics(results))
    ['ssim']
    """
    measured = {name for of_arm in results["summary"].values() for name in of_arm}
    metrics = {n: MetricInfo.of(n, e) for n, e in results["metrics"].items() if n in measured}
    order = list(dict.fromkeys(info.group for info in metrics.values()))
    return dict(sorted(metrics.items(), key=lambda item: order.index(item[1].group)))


def arm_table(results: Results) -> Table:
    """Mean and spread of every metric and arm.

    Ranks go by the printed number, so that equal print is equal rank. Arms that train on the
    ground truth are marked and take no part.

    >>> scores = {"metrics": {"ssim": {}}, "summary": {"refined": {"ssim": {"mean": 0.5, "n": 1}}}}
    >>> arm_table({"arms": [{"name": "refined"}], **scores}).rows[0].cells[0].text
    '0.500'
    """
    metrics, labels, summary = measured_metrics(results), arm_labels(results), results["summary"]
    arms = [arm for arm in results["arms"] if arm["name"] in summary]
    competing = [not uses_truth(arm) for arm in arms]
    columns = [
        with_best(
            [_mean(summary[arm["name"]].get(name), info.digits) for arm in arms], info.higher_is_better, competing
        )
        for name, info in metrics.items()
    ]
    return Table(
        corner="Arm",
        headings=tuple(_heading(info) for info in metrics.values()),
        rows=tuple(
            Row(
                labels[arm["name"]] + (f" {TRUTH_MARK}" if uses_truth(arm) else ""),
                tuple(column[index] for column in columns),
            )
            for index, arm in enumerate(arms)
        ),
    )


def _mean(entry: Mapping[str, Any] | None, digits: int) -> Cell | None:
    if entry is None:
        return None
    return Cell.of(entry["mean"], digits, std=entry.get("std"), n=entry["n"])


def _heading(info: MetricInfo) -> Heading:
    group = _GROUP_TITLES.get(info.group, info.group.capitalize())
    return Heading(info.label, info.arrow, group, info.unit, info.description)


def _comparisons(results: Results) -> dict[str, list[Entry]]:
    """The differences of each arm that was compared with the reference arm, metrics in the order of the tables."""
    metrics = list(measured_metrics(results))
    found = {
        arm: [e for e in results["paired"] if e["arm"] == arm and e["metric"] in metrics] for arm in arm_labels(results)
    }
    return {
        arm: sorted(entries, key=lambda entry: metrics.index(entry["metric"]))
        for arm, entries in found.items()
        if entries
    }


def difference_tables(results: Results) -> dict[str, Table]:
    """All metrics of each compared arm against the reference arm.

    >>> pair = {"arm": "ours", "against": "base", "metric": "ssim", "difference": 0.5, "n": 2}
    >>> results = {"arms": [{"name": "ours"}], "metrics": {"ssim": {}}, "summary": {"ours": {"ssim": {}}}}
    >>> difference_tables({**results, "paired": [pair]})["ours"].rows[0].cells[0].text
    '+0.5000'
    """
    metrics, labels = measured_metrics(results), arm_labels(results)
    return {
        arm: Table(
            title=f"{labels[arm]} − {labels.get(entries[0]['against'], entries[0]['against'])}",
            source=f"paired over {_over(entries)}",
            corner="Metric",
            headings=(
                Heading("Difference"),
                Heading(f"{percent(_confidence(entries))} interval"),
                Heading("In favour"),
                Heading("n"),
                Heading("Shows", words=True),
            ),
            rows=tuple(_difference_row(metrics[entry["metric"]], entry) for entry in entries),
        )
        for arm, entries in _comparisons(results).items()
    }


def _over(entries: Sequence[Entry]) -> Over:
    return Over.SAMPLES if any(e.get("over") == Over.SAMPLES for e in entries) else Over.SEEDS


def _confidence(entries: Sequence[Entry]) -> float:
    return float(entries[0].get("confidence", 0.95))


def _difference_row(info: MetricInfo, entry: Entry) -> Row:
    shows = _verdict(info, entry)
    texts = (*_difference(info, entry), _in_favour(info, entry), str(entry["n"]))
    cells = (Cell(text) if text else None for text in texts)
    return Row(info.heading, (*cells, Cell(shows, mark=_MARKS[shows])))


def _difference(info: MetricInfo, entry: Entry) -> tuple[str, str]:
    """Difference and interval as printed, the interval empty where there is none."""
    digits, ends = info.digits + 1, (entry.get("low"), entry.get("high"))
    interval = "" if None in ends else interval_text(ends, digits)  # type: ignore[arg-type]
    return number(entry["difference"], digits, signed=True), interval


def _verdict(info: MetricInfo, entry: Entry) -> Verdict:
    return verdict(info.higher_is_better, entry.get("low"), entry.get("high"))


def _in_favour(info: MetricInfo, entry: Entry) -> str:
    positive, n = entry.get("positive"), int(entry["n"])
    if positive is None or info.higher_is_better is None:
        return ""
    return f"{positive if info.higher_is_better else n - positive}/{n}"


# ---- words -------------------------------------------------------------------------------------


def verdict_sentences(results: Results) -> tuple[str, ...]:
    """The result in words, by rule: better or worse only where the interval excludes zero.

    One sentence group per compared arm that does not train on the truth.

    >>> verdict_sentences({"arms": [], "metrics": {}, "summary": {}, "paired": []})
    ('No two trained arms share a seed, so nothing is compared.',)
    """
    truth = {arm["name"] for arm in results["arms"] if uses_truth(arm)}
    compared = {arm: of for arm, of in _comparisons(results).items() if arm not in truth}
    if not compared:
        return ("No two trained arms share a seed, so nothing is compared.",)
    return tuple(_sentence(results, arm, entries) for arm, entries in compared.items())


def _sentence(results: Results, arm: str, entries: Sequence[Entry]) -> str:
    metrics, labels = measured_metrics(results), arm_labels(results)
    by_verdict: dict[Verdict, list[str]] = {}
    for entry in entries:
        info = metrics[entry["metric"]]
        shows, found = _verdict(info, entry), " ".join(filter(None, _difference(info, entry)))
        words = info.label if shows is Verdict.NOT_SHOWN else f"{info.label} ({found})"
        by_verdict.setdefault(shows, []).append(words)
    parts = [
        form.format(verdict=shows, metrics=_listed(by_verdict[shows]))
        for form, verdicts in _SENTENCES.items()
        for shows in verdicts
        if shows in by_verdict
    ]
    over, pairs = _over(entries), max(entry["n"] for entry in entries)
    counted = f"{pairs} {over if pairs > 1 else over.removesuffix('s')}"
    seed = " of one training seed" if over is Over.SAMPLES else ""
    against = labels.get(entries[0]["against"], entries[0]["against"])
    intervals = f"{percent(_confidence(entries))} intervals, {over.interval}"
    compared = f"{capitalised(labels[arm])} against {against} over {counted}{seed}"
    return f"{compared} ({intervals}): {'; '.join(parts)}."


_SENTENCES = {
    "{verdict} on {metrics}": (Verdict.BETTER, Verdict.WORSE),
    "{metrics} {verdict}": (Verdict.HIGHER, Verdict.LOWER),
    "{verdict}: {metrics}": (Verdict.NOT_SHOWN, Verdict.NOT_TESTED),
}


def capitalised(text: str) -> str:
    """The text with a capital first letter, the rest as it is.

    >>> capitalised("refined on SSIM")
    'Refined on SSIM'
    """
    return text[:1].upper() + text[1:]


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def notes(results: Results) -> tuple[str, ...]:
    """What a reader must know to judge the tables: counts, spread, intervals, machine, command.

    >>> notes({"arms": [], "cells": [], "metrics": {}, "summary": {}, "paired": [], "command": "i2am ablate"})
    ('One training seed: no spread between seeds is known.', 'Command: i2am ablate.')
    """
    found = (
        _spread_note(results),
        _sample_note(results),
        *_interval_notes(results),
        TRUTH_NOTE if any(map(uses_truth, results["arms"])) else "",
        _provenance_note(results),
    )
    return tuple(filter(None, found))


def _spread_note(results: Results) -> str:
    seeds = sorted({c["seed"] for c in results["cells"] if c["seed"] is not None})
    if len(seeds) < 2:
        return "One training seed: no spread between seeds is known."
    label = arm_labels(results).get(START_ARM)
    start = f" “{label}” is the one checkpoint that all arms start from." if label else ""
    listed = ", ".join(map(str, seeds))
    return f"Mean ± sample standard deviation over {len(seeds)} training seeds ({listed}).{start}"


def _sample_note(results: Results) -> str:
    counts = sorted({c["samples"] for c in results["cells"] if c.get("samples")})
    if not counts:
        return ""
    text = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    few = results.get("settings", {}).get("evaluation", {}).get("faithful_samples")
    fewer = f" (faithfulness: on the first {few})" if few else ""
    return f"Each value is measured on {text} held-out samples{fewer}. Bold: best as printed."


def _interval_notes(results: Results) -> Iterator[str]:
    """One for each kind of interval that the tables have."""
    compared = list(_comparisons(results).values())
    for over in Over:
        counts = [e["n"] for of in compared if _over(of) is over for e in of if e.get("low") is not None]
        if counts:
            level = percent(_confidence(compared[0]))
            yield f"Intervals: {level} ({over.interval}) of paired differences over {over}{_scope(over, min(counts))}"


def _scope(over: Over, fewest: int) -> str:
    """What intervals over so many seeds or samples do not say."""
    if over is Over.SAMPLES:
        note = " of one seed; they do not cover what another training seed would change."
        return note + few_samples_note(fewest)
    few = (
        " Two seeds say little of how far seeds lie apart, so these are wide and few differences can be shown: read "
        "the counts, or train more seeds."
    )
    return ", one metric at a time." + (few if fewest < 3 else "")


def _provenance_note(results: Results) -> str:
    command, minutes, machine = (results.get(name) for name in ("command", "minutes", "machine"))
    jobs = results.get("settings", {}).get("jobs", 1)
    wall = results.get("wall_minutes")
    by_clock = "" if wall is None else f" ({wall:.0f} minutes by the clock)"
    of_runs = f" of runs, {jobs} at a time{by_clock}," if jobs > 1 else ""
    made = (
        "" if minutes is None else f"{minutes:.0f} minutes{of_runs}",
        f"on {describe_machine(machine)}" if machine else "",
    )
    parts = (f"Command: {command}" if command else "", " ".join(filter(None, made)))
    return "".join(f"{part}. " for part in parts if part).rstrip()


def collapse_warnings(results: Results) -> tuple[str, ...]:
    """Warnings of the cells ("attention has collapsed ..."), each said once, with arm and seeds.

    Those that differ in numbers only are one warning, with the numbers of the first seed.

    >>> cells = [{"arm": "refined", "seed": seed, "warnings": ["spread fell"]} for seed in (0, 1)]
    >>> collapse_warnings({"arms": [{"name": "refined"}], "cells": cells})
    ('refined (seeds 0, 1): spread fell',)
    """
    labels, found = arm_labels(results), dict[tuple[str, str], list[tuple[str, str]]]()
    for cell in results["cells"]:
        for warning in cell.get("warnings") or ():
            kind = (cell["arm"], re.sub(r"\d+(\.\d+)?", "#", warning))
            found.setdefault(kind, []).append((str(cell["seed"]), warning))
    return tuple(f"{labels.get(arm, arm)}{_of_seeds(of)}: {of[0][1]}" for (arm, _), of in found.items())


def _of_seeds(found: Sequence[tuple[str, str]]) -> str:
    seeds = [seed for seed, _ in found if seed != "None"]
    listed = f" (seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)})" if seeds else ""
    differ = len({warning for _, warning in found}) > 1
    return listed + (f", with the numbers of seed {found[0][0]}" if differ else "")


# ---- documents ---------------------------------------------------------------------------------


def as_terminal(results: Results) -> RenderableType:
    """Tables, warnings and notes for a ``rich`` console; one table per group of metrics."""
    tables = (*arm_table(results).by_group(), *difference_tables(results).values())
    parts: list[RenderableType] = [terminal(table) for table in tables]
    parts += [Text(f"Warning: {text}", style="bold yellow") for text in collapse_warnings(results)]
    parts.append(Text("\n".join(notes(results)), style="dim"))
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def as_markdown(results: Results, compared: Collection[str] | None = None) -> str:
    """Arms, differences (of the arms ``compared``; None for all), warnings and notes as GitHub-flavoured Markdown.

    >>> results = {"arms": [{"name": "ours"}], "cells": [], "metrics": {"ssim": {}}, "paired": []}
    >>> as_markdown({**results, "summary": {"ours": {"ssim": {"mean": 0.5, "n": 1}}}}).splitlines()[2]
    '| ours | 0.500 |'
    """
    arms = arm_table(results)
    arms = replace(arms, headings=tuple(replace(heading, group="") for heading in arms.headings))
    parts = [markdown_rows(arms, underline=False)]
    for arm, table in difference_tables(results).items():
        if compared is None or arm in compared:
            parts += [f"**{markdown_text(table.title)}**, {table.source}:", markdown_rows(table)]
    parts += [f"> **Warning.** {markdown_text(text)}" for text in collapse_warnings(results)]
    parts.append("\n".join(f"- {markdown_text(note)}" for note in notes(results)))
    return "\n\n".join(parts) + "\n"


def as_latex(results: Results) -> str:
    """Arms and differences for a paper, notes as comments."""
    tables = (arm_table(results), *difference_tables(results).values())
    comments = "".join(f"% {note}\n" for note in notes(results))
    return "\n".join((f"{LATEX_NEEDS}\n", *map(latex, tables), comments))
