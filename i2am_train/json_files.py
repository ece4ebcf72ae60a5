"""JSON files of results: written in one step, and errors that name the file where one is not what it should be."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from i2am_train.errors import RunFolderError
from i2am_train.files import write_text
from i2am_train.redaction import shown


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON in one step; paths become text, NaN null, secrets in addresses ``***``."""
    plain = shown(without_nan(value))
    write_text(path, json.dumps(plain, indent=2, default=str, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        RunFolderError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(f"{path} is missing: {path.parent} is not the folder of a run.") from None
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} is not readable JSON ({error}). Delete {path.parent} and run again.") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        RunFolderError: it is missing, damaged, or holds something else.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise RunFolderError(
            f"{path} holds a value of type {type(found).__name__} where an object is expected, so {path.parent} is not "
            "the folder of a run, or the file was damaged. Run the command that made it again."
        )
    return found


@contextmanager
def entries_of(path: Path) -> Iterator[None]:
    """While the entries of a file of ours are looked up: one that is missing or of another type names the file.

    Raises:
        RunFolderError: an entry is missing or has an impossible value.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise RunFolderError(
            f"{path} has not the entries that this program writes ({reason}): it was changed, or is another program's. "
            "Run the command that made its folder again."
        ) from error


def require_own_json(path: Path, names: Collection[str]) -> None:
    """Fails where a file that is to be written is there already and is not an older one of the same kind.

    Args:
        path: of the file.
        names: that every such file has at its top, or those of its first entry if it is a list.

    Raises:
        RunFolderError: it is something else.
    """
    if not os.path.lexists(path):
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        there = content[0] if isinstance(content, list) else content
        ours = isinstance(there, dict) and set(names) <= there.keys()
    except (OSError, ValueError, IndexError):
        ours = False
    if not ours:
        raise RunFolderError(
            f"{path} exists and is no file that this command writes. Nothing was changed. Give another name, or move "
            "that file away."
        )


def without_nan(value: Any) -> Any:
    """Plain nested values, of which numbers that are NaN or infinite are None."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, Mapping):
        return {str(name): without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return value
