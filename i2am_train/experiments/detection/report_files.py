"""Detection experiments in ``i2am report``: their tables and figures as files, and what the page shows of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from i2am_train.environment import command_line
from i2am_train.experiments.detection.report import FIGURE_CAPTION, drawing_of, sections
from i2am_train.experiments.detection.results import KIND, Detected, read_detected
from i2am_train.experiments.detection.tables import tables_of
from i2am_train.reporting.explained import numbered
from i2am_train.reporting.figures.canvas import save_figure
from i2am_train.reporting.figures.files import FOLDER as FIGURES
from i2am_train.reporting.figures.files import origin_of
from i2am_train.reporting.pages import Section
from i2am_train.reporting.provenance import code_state
from i2am_train.reporting.table_files import write_table


@dataclass(frozen=True, slots=True)
class Input:
    """One experiment, its name in files, and what made it."""

    label: str
    detected: Detected
    origin: Mapping[str, Any]

    @property
    def made_by(self) -> str:
        """The origin in one line."""
        origin = self.origin
        return (
            f"{self.label}: '{origin['command']}', pipeline {origin['settings']['pipeline']}, "
            f"data {origin['data']}, code {code_state(origin['git'])}"
        )


@dataclass(frozen=True, slots=True)
class DetectionSet:
    """Experiments whose tables and figures will be written."""

    inputs: tuple[Input, ...]

    def write(
        self, folder: Path, formats: Sequence[str], dpi: int
    ) -> tuple[dict[str, Any], list[Section]]:
        """Write ``tables/*`` and ``figures/*`` of each; the index of them, and the page's sections."""
        index: dict[str, Any] = {"tables": [], "figures": [], "left_out": {}}
        shown: list[Section] = []
        for one in self.inputs:
            for table in tables_of(one.detected.results):
                stem = f"{table.name}-{one.label}"
                index["tables"].append(write_table(table, folder, stem, [one.made_by]))
            drawing = drawing_of(one.detected.examples)
            if drawing is None:
                index["left_out"][f"samples of {one.label}"] = "'i2am detect' with pictures=N"
            else:
                index["figures"].append(_write_figure(one, drawing, folder, formats, dpi))
            shown += sections(one.detected, drawing, one.label)
        return index | {"detections": {one.label: dict(one.origin) for one in self.inputs}}, shown


def _write_figure(
    one: Input, drawing: Figure, folder: Path, formats: Sequence[str], dpi: int
) -> dict[str, Any]:
    """The figure in all formats; its entry of the index."""
    description = f"{FIGURE_CAPTION}\nMade by '{command_line()}' from\n{one.made_by}"
    files = [f"{FIGURES}/{KIND}-{one.label}.{file_format}" for file_format in formats]
    for file in files:
        save_figure(drawing, folder / file, dpi, description)
    about = {"figure": KIND, "paper": "section 5.1", "caption": FIGURE_CAPTION}
    return {**about, "files": files, "inputs": [one.label]}


def plan_detections(folders: Sequence[Path]) -> DetectionSet:
    """Read the experiments; each is called by its folder.

    Args:
        folders: what ``i2am detect`` wrote.

    Raises:
        RunFolderError: a folder is not one of ``i2am detect``, or its run did not come to its end.
    """
    labels = numbered([folder.name for folder in folders])
    return DetectionSet(
        tuple(
            Input(label, read_detected(folder), origin_of(folder))
            for label, folder in zip(labels, folders, strict=True)
        )
    )
