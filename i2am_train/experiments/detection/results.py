"""What ``i2am detect`` keeps for reports, written and read back.

In its folder, beside images, maps and detections::

    samples.jsonl       boxes and IoU of every sample
    panels.safetensors  pictures and map of the first samples, all of one size
    results.json        means with intervals, settings, manifest
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from i2am_train.errors import RunFolderError
from i2am_train.files import written
from i2am_train.json_files import read_object
from i2am_train.reporting.figures.canvas import Picture
from i2am_train.results.finished_runs import PANELS, RESULTS, SAMPLES, read_samples

SCHEMA, KIND = 1, "detection"
"""Version and kind that ``results.json`` states."""

Results = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One sample to draw, all pictures of one size."""

    image: Picture
    mask: NDArray[np.bool_]
    reference: Picture
    generated: Picture
    heat: NDArray[np.floating]
    """Unified map in [0, 1], of the same size for all samples."""
    row: Mapping[str, Any]
    """Of ``samples.jsonl``."""


ARRAYS = ("image", "mask", "reference", "generated", "heat")
"""The fields of ``Example`` that ``panels.safetensors`` holds, stacked over samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Detected:
    """The experiment in a folder."""

    folder: Path
    results: Results
    """What ``results.json`` says."""
    rows: tuple[Mapping[str, Any], ...]
    """Of all samples."""
    examples: tuple[Example, ...]
    """The first samples; none where no pictures were kept."""


def write_examples(folder: Path, examples: Sequence[Example]) -> None:
    """Keep the pictures of the first samples in one step; no examples, no file."""
    if not examples:
        (folder / PANELS).unlink(missing_ok=True)
        return
    stacks = {name: np.stack([getattr(one, name) for one in examples]) for name in ARRAYS}
    names = {"names": json.dumps([one.row["name"] for one in examples])}
    with written(folder / PANELS) as unfinished:
        save_file(stacks, unfinished, names)


def read_detected(folder: Path) -> Detected:
    """The results in a folder of ``i2am detect``, with the pictures that it kept.

    Raises:
        RunFolderError: it is no such folder, of another version, or cannot be read.
    """
    results = _read_results(folder)
    rows = read_samples(folder / SAMPLES)
    examples = _read_examples(folder / PANELS, {row["name"]: row for row in rows})
    return Detected(folder=folder, results=results, rows=rows, examples=examples)


def _read_results(folder: Path) -> Results:
    path = folder / RESULTS
    results = read_object(path) if path.is_file() else {}
    if results.get("kind") != KIND:
        what = f"whose results are no detection ({path})" if results else f"without {RESULTS}"
        raise RunFolderError(
            f"Found {folder}, {what}, and expected the folder of a finished 'i2am detect'. Give such folders in "
            "detected; evaluations and studies belong in runs, explained samples in explained."
        )
    if results.get("schema") != SCHEMA:
        raise RunFolderError(
            f"{path} has schema {results.get('schema')!r}; this version reads schema {SCHEMA}. Give the command of "
            "its manifest again: images, maps and detections are kept."
        )
    return results


def _read_examples(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> tuple[Example, ...]:
    if not path.is_file():
        return ()
    try:
        with safe_open(path, framework="numpy") as file:
            names = json.loads(file.metadata()["names"])
            stacks = {name: file.get_tensor(name) for name in ARRAYS}
        return tuple(
            Example(row=rows[name], **{field: stack[place] for field, stack in stacks.items()})
            for place, name in enumerate(names)
        )
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunFolderError(
            f"{path} cannot be read: {error}. Give 'i2am detect' again; images and maps are kept."
        ) from None
