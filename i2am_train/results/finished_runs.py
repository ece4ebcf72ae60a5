"""The files of a finished run, read into plain values: all that tables, figures and pages need.

A part that is not there (no history, no panels) is listed in ``RunRecord.missing`` and the report
goes without it. A part that is there but cannot be read is an error that names the file.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from i2am_train.errors import RunFolderError
from i2am_train.results.statistics import summarise_results
from i2am_train.types import GridSize

RESULTS, SAMPLES, PANELS = "results.json", "samples.jsonl", "panels.safetensors"
"""Files of a finished evaluation; a study has a ``results.json``, too."""

SCHEMA = 1
"""The version of ``results.json`` that this module reads."""

Results: TypeAlias = Mapping[str, Any]
"""Content of ``results.json``: command, machine, metrics, arms, seeds, cells, summary, paired."""

ImageStack: TypeAlias = NDArray[np.uint8]
"""Pictures ``[sample, height, width, 3]``."""

FloatArray: TypeAlias = NDArray[np.floating[Any]]

START_ARM = "base"
"""Name of the arm that is not trained: the checkpoint that all others start from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panels:
    """What is drawn of the first few samples of one evaluation.

    ``map_generated`` and ``map_reference`` are unified maps in [0, 1]; ``centers`` and
    ``target_centers`` are yx in 0-based reference patches per generated patch, NaN where unknown;
    ``mask`` marks the generated patches that lie on the garment.
    """

    names: tuple[str, ...]
    garment_names: tuple[str, ...]
    layer: str
    generated_grid: GridSize
    reference_grid: GridSize
    garment: ImageStack
    agnostic: ImageStack
    densepose: ImageStack
    person: ImageStack
    generated: ImageStack
    map_generated: FloatArray
    map_reference: FloatArray
    centers: FloatArray
    target_centers: FloatArray
    mask: NDArray[np.bool_]


PANEL_ARRAYS = (
    *("garment", "agnostic", "densepose", "person", "generated"),
    *("map_generated", "map_reference", "centers", "target_centers", "mask"),
)
"""The fields of ``Panels`` that hold an entry per sample, as ``panels.safetensors`` names them."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One logged quantity over optimiser steps."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class History:
    """Everything logged by one training run, by column name (``val/imacs_g``, ``loss/total``)."""

    arm: str
    seed: int | None
    curves: Mapping[str, Curve]


@dataclass(frozen=True, slots=True)
class CellRecord:
    """One arm trained with one seed: where it lies and what was kept of it."""

    arm: str
    seed: int | None
    folder: Path
    evaluated: int | None
    samples: tuple[Mapping[str, Any], ...]
    panels: Panels | None
    history: History | None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run folder in memory; ``results`` always has ``summary`` and ``paired``."""

    folder: Path
    results: Results
    cells: tuple[CellRecord, ...]
    missing: tuple[str, ...]

    def of_arm(self, arm: str) -> tuple[CellRecord, ...]:
        """The cells of one arm, lowest seed first."""
        cells = [cell for cell in self.cells if cell.arm == arm]
        return tuple(sorted(cells, key=lambda cell: -1 if cell.seed is None else cell.seed))


def read_run(folder: Path) -> RunRecord:
    """Read ``results.json`` and what the cells kept.

    Raises:
        RunFolderError: no ``results.json``, or a file that cannot be read.
    """
    results = read_results(folder / RESULTS)
    cells = tuple(_read_cell(folder, cell) for cell in results["cells"])
    return RunRecord(
        folder=folder,
        results=_completed(results, cells),
        cells=cells,
        missing=tuple(_missing_parts(cells)),
    )


def read_results(path: Path) -> dict[str, Any]:
    """Read one ``results.json`` and check its version and that the required entries are there."""
    if not path.is_file():
        raise RunFolderError(
            f"{path.parent} has no {path.name}, so there is nothing to report yet. "
            "Give the folder of a finished 'i2am ablate', or run that first."
        )
    results = _read_json(path)
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        found = results.get("schema") if isinstance(results, dict) else type(results).__name__
        raise RunFolderError(f"{path} has schema {found!r}; this version reads schema {SCHEMA}.")
    absent = [key for key in ("metrics", "arms", "cells") if key not in results]
    if absent:
        raise RunFolderError(f"{path} lacks {', '.join(absent)}; run 'i2am ablate' again.")
    return results


def reference_arm(results: Results) -> str | None:
    """The arm that the others are compared with: that of the paired entries, else "baseline"."""
    for entry in results.get("paired", ()):
        return str(entry["against"])
    trained = [arm["name"] for arm in results["arms"] if arm["name"] != START_ARM]
    if "baseline" in trained:
        return "baseline"
    return str(trained[0]) if len(trained) > 1 else None


def uses_truth(arm: Mapping[str, Any]) -> bool:
    """Whether an arm is trained with the true correspondence, so that it is not ranked among arms without.

    >>> uses_truth({"name": "supervised", "losses": {"weights": {"supervised": 0.1}}})
    True
    >>> uses_truth({"losses": {"terms": {"mine": {"fn": "my:loss", "weight": 0.1, "truth": True}}}})
    True
    """
    losses = arm.get("losses") or {}
    weights = {**losses, **(losses.get("weights") or {})}
    own = (losses.get("terms") or {}).values()
    return bool(weights.get("supervised")) or any(t.get("truth") and t["weight"] for t in own)


def arm_labels(results: Results) -> dict[str, str]:
    """Label of every arm by name, in the order of the file."""
    return {arm["name"]: str(arm.get("label") or arm["name"]) for arm in results["arms"]}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(
            f"{path} is not readable JSON: {error}. Run the command again."
        ) from None


def _read_cell(run_folder: Path, cell: Mapping[str, Any]) -> CellRecord:
    folder = run_folder / cell["folder"]
    evaluation = folder / "evaluation"
    arm, seed = str(cell["arm"]), cell["seed"]
    return CellRecord(
        arm=arm,
        seed=seed,
        folder=folder,
        evaluated=_read_count(evaluation / RESULTS),
        samples=read_samples(evaluation / SAMPLES),
        panels=read_panels(evaluation / PANELS),
        history=read_history(folder / "metrics.csv", arm, seed),
    )


def _read_count(path: Path) -> int | None:
    samples = _read_json(path).get("samples") if path.is_file() else None
    return None if samples is None else int(samples)


def read_samples(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The scores of single samples that an evaluation kept, or nothing if it kept none."""
    if not path.is_file():
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = tuple(json.loads(line) for line in lines if line.strip())
    except (ValueError, RecursionError) as error:
        raise RunFolderError(
            f"{path} is not readable JSON lines: {error}. Evaluate again."
        ) from None
    if not all(isinstance(row, dict) for row in rows):
        raise RunFolderError(f"{path} has lines that are no JSON objects. Evaluate again.")
    return rows


def read_panels(path: Path) -> Panels | None:
    """The panel samples of one evaluation, or ``None`` if none were kept."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in PANEL_ARRAYS}
        return Panels(
            names=tuple(json.loads(metadata["names"])),
            garment_names=tuple(json.loads(metadata["garment_names"])),
            layer=metadata["layer"],
            generated_grid=_grid(metadata["generated_grid"]),
            reference_grid=_grid(metadata["reference_grid"]),
            **arrays,
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}. Evaluate again.") from None


def _grid(text: str) -> GridSize:
    height, width = text.split("x")
    return GridSize(int(height), int(width))


def read_history(path: Path, arm: str, seed: int | None) -> History | None:
    """What Lightning's CSV logger wrote, or ``None`` if there is no file.

    Each row of the file holds only what was logged at that moment, so every column is read by
    itself. If a step occurs twice (a resumed run), the later row holds.
    """
    if not path.is_file():
        return None
    columns: dict[str, dict[int, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            _collect(row, columns)
    return History(arm, seed, {name: _curve(points) for name, points in columns.items()})


def _collect(row: Mapping[str, str | None], columns: dict[str, dict[int, float]]) -> None:
    step = _number(row.get("step"))
    if step is None:
        return
    for name, text in row.items():
        value = _number(text)
        if name not in {"step", "epoch"} and value is not None:
            columns.setdefault(name, {})[int(step)] = value


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _curve(points: Mapping[int, float]) -> Curve:
    steps = sorted(points)
    return Curve(np.array(steps, np.int64), np.array([points[s] for s in steps], np.float64))


def _completed(results: dict[str, Any], cells: Sequence[CellRecord]) -> dict[str, Any]:
    """Results with sample counts, and summary and differences by this version's rules, whichever wrote the file."""
    entries = [
        {**entry, "samples": entry.get("samples", record.evaluated)}
        for entry, record in zip(results["cells"], cells, strict=True)
    ]
    samples = {e["folder"]: r.samples for e, r in zip(entries, cells, strict=True)}
    return recompared({**results, "cells": entries}, samples)


def recompared(
    results: Results, samples: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
) -> dict[str, Any]:
    """Results with ``summary`` and ``paired`` worked out anew from their cells.

    ``samples`` are the scores of single samples by the cells' folders, for studies of one seed.
    """
    settings = results.get("settings") or {}
    options = {
        option: settings[name]
        for option, name in (("confidence", "confidence"), ("resamples", "bootstrap_samples"))
        if name in settings
    }
    names = [arm["name"] for arm in results["arms"]]
    return {
        **results,
        **summarise_results(
            results["cells"],
            results["metrics"],
            names,
            reference_arm(results) or "",
            samples,
            **options,
        ),
    }


def _missing_parts(cells: Sequence[CellRecord]) -> Iterator[str]:
    trained = [cell for cell in cells if cell.arm != START_ARM]
    if not any(cell.history for cell in trained):
        yield "No training history (cells/*/metrics.csv) was kept, so there are no curves."
    if not any(cell.panels for cell in cells):
        yield "No panels (cells/*/evaluation/panels.safetensors) were kept, so no samples."
    if not any(cell.samples for cell in cells):
        yield "No per-sample scores (cells/*/evaluation/samples.jsonl) were kept."
