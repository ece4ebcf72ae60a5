"""``i2am report``: tables and figures for a paper from the folders of finished commands, without a model or a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from i2am_train.config.build import plain
from i2am_train.config.reporting import ReportConfig
from i2am_train.environment import now, provenance
from i2am_train.errors import ConfigError
from i2am_train.experiments.detection.report import plan_detections
from i2am_train.files import write_text
from i2am_train.json_files import read_json, write_json
from i2am_train.locks import locked
from i2am_train.reporting.figures.files import plan_figures
from i2am_train.reporting.pages import Section, left_out, report_page
from i2am_train.reporting.table_files import plan_tables
from i2am_train.runs import RunFolder

INDEX, PAGE, SCHEMA = "index.json", "report.html", 1

Write = Callable[[Path], "tuple[dict[str, Any], list[Section]]"]
"""Writes one part of a report into its folder; returns what the index says of it, and what the page shows."""


def run(config: ReportConfig) -> None:
    """Make the report, and say what was made, what was left out and why."""
    with locked(config.folder):
        folder = report(config)
    index = read_json(folder / INDEX)
    for table in index.get("tables", ()):
        print(f"{table['paper']:<12} {table['table']:<19} {', '.join(table['files'])}")
    for figure in index.get("figures", ()):
        print(f"{figure['paper']:<12} {figure['figure']:<19} {', '.join(figure['files'])}")
    for name, need in left_out(index).items():
        print(f"Left out: {name}, which needs {need}.")
    made = [f"{len(index[kind])} {kind}" for kind in ("tables", "figures") if kind in index]
    print(f"{' and '.join(made)}, listed in {folder / INDEX}\nPage: {folder / PAGE}")


def report(config: ReportConfig) -> Path:
    """Make the report and return its folder.

    All inputs are read and checked before anything is written.

    Raises:
        I2AMError: there is nothing to report, an input does not fit, or the folder is taken.
    """
    parts = [part for prepare in PARTS if (part := prepare(config)) is not None]
    if not parts:
        raise ConfigError(
            "There is nothing to report. Give runs=[FOLDER,...] with folders of evaluated models, "
            "explained=[FOLDER,...] with folders that 'i2am explain' wrote, or detected=[FOLDER,...] with folders "
            "that 'i2am detect' wrote."
        )
    folder = RunFolder.open(config.folder, plain(config), may_differ=APPEARANCE)
    folder.start()
    index: dict[str, Any] = {"schema": SCHEMA, **provenance(), "started": now()}
    index["settings"] = plain(config)
    sections: list[Section] = []
    for write in parts:
        entries, shown = write(folder.path)
        index = joined(index, entries)
        sections += shown
    write_json(folder / INDEX, index)
    write_text(folder / PAGE, report_page(index, sections))
    folder.finish()
    return folder.path


def tables(config: ReportConfig) -> Write | None:
    """The tables over evaluated models; None without such folders."""
    if not config.runs:
        return None

    planned = plan_tables(config.runs, config.names, mixed=config.mixed)
    return lambda folder: planned.write(folder, config.formats, config.dpi)


def figures(config: ReportConfig) -> Write | None:
    """The figures of explained samples; None without such folders."""
    if not config.explained:
        return None

    planned = plan_figures(config.explained, config.figures, config.models, config.layers)
    return lambda folder: planned.write(folder, config.formats, config.dpi)


def detections(config: ReportConfig) -> Write | None:
    """Tables and figures of detection experiments; None without such folders."""
    if not config.detected:
        return None

    planned = plan_detections(config.detected)
    return lambda folder: planned.write(folder, config.formats, config.dpi)


def joined(index: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
    """An index with the entries of one more part: lists and mappings that both have are joined.

    >>> joined({"schema": 1, "tables": ["a"]}, {"tables": ["b"], "left_out": {}})
    {'schema': 1, 'tables': ['a', 'b'], 'left_out': {}}
    """
    both = {}
    for name in index.keys() & entries.keys():
        first, second = index[name], entries[name]
        both[name] = [*first, *second] if isinstance(first, list) else {**first, **second}
    return {**index, **entries, **both}


PARTS: tuple[Callable[[ReportConfig], Write | None], ...] = (tables, figures, detections)
"""The parts of a report, in order; each checks its inputs and returns what writes it."""

APPEARANCE = ("output", "figures", "formats", "layers", "models", "names", "dpi")
"""Options that may change when a report of the same inputs is made again in its folder."""
