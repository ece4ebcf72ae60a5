"""Pipeline folders of diffusers: what they hold, before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from i2am_train.config.locations import expanded
from i2am_train.errors import CheckpointError
from i2am_train.models.tryon import INDEX_FILE
from i2am_train.weight_files import read_object

T = TypeVar("T")
REASON = 300
"""Characters of a library's own message that are repeated."""


def check_pipeline(source: str, expected: Sequence[str], model: str) -> None:
    """Refuses the folder of another pipeline; a name on the hub is left to its download.

    Args:
        source: folder or name.
        expected: class names of pipelines that will do.
        model: name of the model that was asked for.

    Raises:
        CheckpointError: the folder is no pipeline's, or of another one.
    """
    folder = expanded(source)
    if not folder.is_dir():
        return
    found = pipeline_class(folder)
    if found in expected:
        return
    what = f"is of a {found}" if found else f"has no {INDEX_FILE}"
    raise CheckpointError(
        f"'{source}' {what}; model={model} needs the folder of a {' or '.join(expected)}. Give "
        f"checkpoint=FOLDER with such a {INDEX_FILE}, or another model=."
    )


def pipeline_class(folder: Path) -> str | None:
    """Name of the pipeline's class in a folder, or None if it has no index.

    Raises:
        CheckpointError: the index cannot be read.
    """
    file = folder / INDEX_FILE
    return str(read_object(file).get("_class_name")) if file.is_file() else None


def fitting(option: str, file: Path, fill: Callable[[], T]) -> T:
    """What ``fill`` makes of the weights of a file; the libraries' errors name the option and the file.

    Raises:
        CheckpointError: its tensors are not what the model has.
    """
    try:
        return fill()
    except CheckpointError:
        raise
    except Exception as error:  # weights of something else fail in the words of whoever uses them
        reason = " ".join(str(error).split())[:REASON]
        raise CheckpointError(
            f"{option}={file} does not fit this model ({type(error).__name__}: {reason}). Give the "
            "weights that were made for it."
        ) from error
