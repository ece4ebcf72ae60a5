"""What a training run logged, step by step: Lightning's ``metrics.csv``."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


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
    """What Lightning's CSV logger wrote, or ``None`` if there is no file.

    Each row of the file holds only what was logged at that moment, so every column is read by
    itself. If a step occurs twice (a resumed run), the later row holds.
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
