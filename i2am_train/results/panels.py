"""The panels of the first samples of an evaluation: pictures without the capture, in one file for all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from i2am_train.errors import RunFolderError
from i2am_train.files import written
from i2am_train.types import GridSize

PANELS = "panels.safetensors"


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
    """Write the panels of at least one sample, all of one size and layer, in one step."""
    shared = {name: str(getattr(panels[0], name)) for name in _SHARED}
    words = {f"{name}s": json.dumps([getattr(one, name) for one in panels]) for name in _WORDS}
    stacks = {
        name: np.stack([getattr(one, name) for one in panels])
        for name in _ARRAYS
        if getattr(panels[0], name) is not None
    }
    with written(folder / PANELS) as unfinished:
        save_file(stacks, unfinished, shared | words)


def read_panels(folder: Path) -> tuple[SamplePanels, ...]:
    """The panels that an evaluation kept in its folder; none where it kept none.

    Raises:
        RunFolderError: the file cannot be read.
    """
    path = folder / PANELS
    if not path.is_file():
        return ()
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            stacks = {name: file.get_tensor(name) for name in _ARRAYS if name in file.keys()}  # noqa: SIM118 - not a dict
        return tuple(
            SamplePanels(
                name=name,
                garment_name=garment_name,
                layer=about["layer"],
                generated_grid=_grid(about["generated_grid"]),
                reference_grid=_grid(about["reference_grid"]),
                **{name: stack[row] for name, stack in stacks.items()},
            )
            for row, (name, garment_name) in enumerate(
                zip(*(json.loads(about[f"{name}s"]) for name in _WORDS), strict=True)
            )
        )
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read: {error}. Evaluate again.") from None


def _grid(text: str) -> GridSize:
    height, width = text.split("x")
    return GridSize(int(height), int(width))
