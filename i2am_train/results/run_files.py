"""What a training run and an evaluation keep in their folders, read back: curves, scores of samples, panels."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from i2am_train.errors import RunFolderError
from i2am_train.files import written
from i2am_train.types import GridSize

RESULTS, SAMPLES, PANELS = "results.json", "samples.jsonl", "panels.safetensors"
"""Files of a finished evaluation; a study has a ``results.json``, too."""

SampleScores: TypeAlias = Sequence[Mapping[str, Any]]
"""Lines of ``samples.jsonl``: ``name`` and one number per per-sample metric."""


def read_samples(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The scores of single samples that an evaluation kept, or nothing if it kept none.

    >>> read_samples(Path("no/evaluation") / SAMPLES)
    ()
    """
    if not path.is_file():
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = tuple(json.loads(line) for line in lines if line.strip())
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} is not readable JSON lines: {error}. Evaluate again.") from None
    if not all(isinstance(row, dict) for row in rows):
        raise RunFolderError(f"{path} has lines that are no JSON objects. Evaluate again.")
    return rows


# ---- curves of training --------------------------------------------------------------------------


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


def read_history(path: Path, arm: str, seed: int | None) -> History | None:
    """What Lightning's CSV logger wrote (``metrics.csv``), or ``None`` if there is no file.

    Each row of the file holds only what was logged at that moment, so every column is read by
    itself. If a step occurs twice (a resumed run), the later row holds.

    >>> read_history(Path("no/metrics.csv"), "refined", seed=0) is None
    True
    """
    if not path.is_file():
        return None
    columns: dict[str, dict[int, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            numbers = {name: value for name, text in row.items() if (value := _number(text)) is not None}
            step = numbers.pop("step", None)
            for name, value in numbers.items():
                if step is not None and name != "epoch":
                    columns.setdefault(name, {})[int(step)] = value
    return History(arm, seed, {name: _curve(points) for name, points in columns.items()})


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _curve(points: Mapping[int, float]) -> Curve:
    steps = sorted(points)
    return Curve(np.array(steps, np.int64), np.array([points[s] for s in steps], np.float64))


# ---- panels of the first samples -----------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePanels:
    """What figures and dashboards show of one sample: light enough to keep, and to send between processes.

    Pictures are uint8 ``[height, width, 3]``, unified maps ``[height, width]`` in [0, 1]. Centres are yx in
    reference patches (0 is the first) of each generated patch ``[generated, 2]``, NaN where unknown.
    """

    name: str
    garment_name: str
    layer: str
    """The layer of the centres."""
    generated_grid: GridSize
    reference_grid: GridSize
    garment: NDArray[np.uint8]
    agnostic: NDArray[np.uint8]
    densepose: NDArray[np.uint8]
    person: NDArray[np.uint8]
    generated: NDArray[np.uint8]
    map_generated: NDArray[np.floating]
    map_reference: NDArray[np.floating]
    centers: NDArray[np.floating]
    target_centers: NDArray[np.floating]
    mask: NDArray[np.bool_]
    """Generated patches that lie on the garment, ``[generated]``."""
    inpaint_mask: NDArray[np.bool_] | None = None
    """Of the generated picture; None where an older version wrote the file."""
    garment_mask: NDArray[np.bool_] | None = None


_WORDS = ("name", "garment_name")
_SHARED = ("layer", "generated_grid", "reference_grid")
_ARRAYS = tuple(field.name for field in fields(SamplePanels) if field.name not in (*_WORDS, *_SHARED))


def write_panels(folder: Path, panels: Sequence[SamplePanels]) -> None:
    """Write the panels of at least one sample, all of one size and layer, as one file in one step."""
    shared = {name: str(getattr(panels[0], name)) for name in _SHARED}
    words = {f"{name}s": json.dumps([getattr(one, name) for one in panels]) for name in _WORDS}
    known = [name for name in _ARRAYS if getattr(panels[0], name) is not None]
    stacks = {name: np.stack([getattr(one, name) for one in panels]) for name in known}
    with written(folder / PANELS) as unfinished:
        save_file(stacks, unfinished, shared | words)


def read_panels(folder: Path) -> tuple[SamplePanels, ...]:
    """The panels that an evaluation kept in its folder; none where it kept none.

    Raises:
        RunFolderError: the file cannot be read.

    >>> read_panels(Path("no/evaluation"))
    ()
    """
    path = folder / PANELS
    if not path.is_file():
        return ()
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            stacks = {name: file.get_tensor(name) for name in _ARRAYS if name in file.keys()}  # noqa: SIM118 - not a dict
        names = zip(*(json.loads(about[f"{name}s"]) for name in _WORDS), strict=True)
        return tuple(
            SamplePanels(
                name=name,
                garment_name=garment_name,
                layer=about["layer"],
                generated_grid=_grid(about["generated_grid"]),
                reference_grid=_grid(about["reference_grid"]),
                **{name: stack[row] for name, stack in stacks.items()},
            )
            for row, (name, garment_name) in enumerate(names)
        )
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}. Evaluate again.") from None


def _grid(text: str) -> GridSize:
    height, width = text.split("x")
    return GridSize(int(height), int(width))
