"""``i2am report``: tables and figures for a paper from the folders of finished commands, without a model or a GPU.

``i2am dashboard``: the project's workspace and report in Weights & Biases, or their definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from i2am_train.config.options import plain
from i2am_train.config.reporting import DashboardConfig, ReportConfig
from i2am_train.detection.report import plan_detections
from i2am_train.environment import now, provenance
from i2am_train.errors import ConfigError
from i2am_train.files import read_json, require_own_json, write_json, write_text
from i2am_train.locks import locked
from i2am_train.reporting.pages import Section
from i2am_train.reporting.report_files import left_out, plan_figures, plan_tables, report_page
from i2am_train.runs import RunFolder
from i2am_train.tracking.dashboard import dashboard_json, save_dashboard

INDEX, PAGE, SCHEMA = "index.json", "report.html", 1

APPEARANCE = ("output", "figures", "formats", "layers", "models", "names", "dpi")
"""Options that may change when a report of the same inputs is made again in its folder."""


class _Plan(Protocol):
    """A part of a report, whose inputs were read and checked."""

    def write(self, folder: Path, formats: Sequence[str], dpi: int, /) -> tuple[dict[str, Any], list[Section]]:
        """Writes it into the report's folder; what the index says of it, and what the page shows."""


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
    plans = _plans(config)
    if not plans:
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
    for plan in plans:
        entries, shown = plan.write(folder.path, config.formats, config.dpi)
        index = _joined(index, entries)
        sections += shown
    write_json(folder / INDEX, index)
    write_text(folder / PAGE, report_page(index, sections))
    folder.finish()
    return folder.path


def _plans(config: ReportConfig) -> list[_Plan]:
    """The parts that there are folders for, in order."""
    plans: list[_Plan] = []
    if config.runs:
        plans.append(plan_tables(config.runs, config.names, mixed=config.mixed))
    if config.explained:
        plans.append(plan_figures(config.explained, config.figures, config.models, config.layers))
    if config.detected:
        plans.append(plan_detections(config.detected))
    return plans


def _joined(index: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
    """An index with the entries of one more part: lists and mappings that both have are joined.

    >>> _joined({"schema": 1, "tables": ["a"]}, {"tables": ["b"], "left_out": {}})
    {'schema': 1, 'tables': ['a', 'b'], 'left_out': {}}
    """
    both = {}
    for name in index.keys() & entries.keys():
        first, second = index[name], entries[name]
        both[name] = [*first, *second] if isinstance(first, list) else {**first, **second}
    return {**index, **entries, **both}


def dashboard(config: DashboardConfig) -> None:
    """Save workspace and report and print their addresses; with ``output`` write a file instead, without network.

    Raises:
        TrackingError: not logged in, or the server cannot be reached.
    """
    if config.output is not None:
        require_own_json(config.output, ("project", "workspace", "report"))
        write_json(config.output, dashboard_json(config.project, config.group))
        print(f"Definition of workspace and report: {config.output}")
        return
    workspace, saved = save_dashboard(config.entity, config.project, config.group)
    print(f"Workspace: {workspace}\nReport:    {saved}")
