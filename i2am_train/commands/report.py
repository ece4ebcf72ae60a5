"""``i2am report``: figures for a paper from the folders of finished commands, without a model or a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from i2am_train.commands.entry import entry
from i2am_train.config.schema import ReportConfig

INDEX, SCHEMA = "index.json", 1

Write = Callable[[Path], dict[str, Any]]
"""Writes one part of a report into its folder and returns what the index says of it."""


def run(config: ReportConfig) -> None:
    """Make the report, and say what was made, what was left out and why."""
    from i2am_train.runs import read_json

    folder = report(config)
    index = read_json(folder / INDEX)
    for figure in index["figures"]:
        print(f"{figure['paper']:<9} {figure['figure']:<19} {', '.join(figure['files'])}")
    for name, need in index["left_out"].items():
        print(f"Left out: {name}, which needs {need}.")
    print(f"{len(index['figures'])} figures and {INDEX} in {folder}")


def report(config: ReportConfig) -> Path:
    """Make the report and return its folder.

    All inputs are read and checked before anything is written.

    Raises:
        I2AMError: there is nothing to report, an input does not fit, or the folder is taken.
    """
    from i2am_train.config.build import plain
    from i2am_train.errors import ConfigError
    from i2am_train.runs import RunFolder, provenance, write_json

    parts = [part for prepare in PARTS if (part := prepare(config)) is not None]
    if not parts:
        raise ConfigError(
            "There is nothing to report. Give explained=[FOLDER,...] with folders that "
            "'i2am explain' wrote."
        )
    folder = RunFolder.open(config.folder, plain(config), may_differ=APPEARANCE)
    folder.start()
    index = {"schema": SCHEMA, **provenance(), "settings": plain(config)}
    for write in parts:
        index |= write(folder.path)
    write_json(folder / INDEX, index)
    folder.finish()
    return folder.path


def figures(config: ReportConfig) -> Write | None:
    """The figures of explained samples; None without such folders."""
    if not config.explained:
        return None
    from i2am_train.reporting.figure_files import plan_figures

    planned = plan_figures(config.explained, config.figures, config.models, config.layers)
    return lambda folder: planned.write(folder, config.formats, config.dpi)


PARTS: tuple[Callable[[ReportConfig], Write | None], ...] = (figures,)
"""The parts of a report, in order; each checks its inputs and returns what writes it."""

APPEARANCE = ("output", "figures", "formats", "layers", "models", "dpi")
"""Options that may change when a report of the same inputs is made again in its folder."""


if __name__ == "__main__":
    entry("report", run)
