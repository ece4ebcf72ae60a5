"""``i2am detect``: the object detection experiment on COCO, with Paint-by-Example and detectors (paper 5.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from i2am_train.config.detection import DetectConfig
from i2am_train.experiments.detection.experiment import run_experiment
from i2am_train.experiments.detection.tables import tables_of
from i2am_train.locks import locked
from i2am_train.ops.devices import chosen_device
from i2am_train.reporting.table import terminal
from i2am_train.tracking.session import sync_advice


def run(config: DetectConfig) -> None:
    """Run the experiment, print its tables and say where everything lies."""
    folder = output_folder(config)
    with locked(folder):
        results = detect(config, folder)
    console = Console(markup=False, emoji=False)
    for table in tables_of(results):
        console.print(terminal(table))
    print(f"Everything of this experiment: {folder} (page: {folder / 'report.html'})")
    if advice := sync_advice(config.tracking, folder):
        print(advice)


def output_folder(config: DetectConfig) -> Path:
    """``output``, or a folder in ``runs/`` named after pipeline and data."""
    if config.output is not None:
        return config.output
    data = "shapes" if config.root is None else config.root.name
    return Path.cwd() / "runs" / f"detect-{Path(config.pipeline).name}-{data}"


def detect(config: DetectConfig, folder: Path) -> dict[str, Any]:
    """The results; what the folder holds already is not computed again.

    Raises:
        I2AMError: data, pipeline, detectors, device or folder do not fit the configuration; nothing is written then.
    """
    return run_experiment(config, folder, chosen_device(config.device))
