"""Which dataset a run reads, told by names and sizes; and which change of it is only a repair.

A run or a cache keeps the names and sizes of the files that it began with, and which of them it could not read. Files
that it could not read may be replaced, also under another ending: nothing was made of them. Any other change is
another dataset.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from i2am_train.files import written
from i2am_train.locks import LOCK
from i2am_train.types import CATEGORIES, Split

DATASET_FOLDERS = (*Split, *CATEGORIES)
"""The folders of a dataset, VITON-HD's and DressCode's. What lies beside them (runs, reports) is no part of it."""
DESCRIPTION_FILE = "dataset.json"
"""What made a dataset, in its root; datasets that were photographed have none."""
DERIVED_REPORT, PREVIEWS = "derived.json", "previews"
"""What ``i2am data derive`` leaves in a dataset folder beside the dataset."""
MATCHED_REPORT = "matched.json"
"""What ``i2am data match`` leaves there: the mark that the dataset's correspondence was found, and is not true."""
RECORD_FILE = "data_files.json.gz"
"""Where a run or cache keeps the files of its dataset."""


@dataclass(frozen=True)
class DataState:
    """The files of a dataset at one time."""

    fingerprint: str
    """16 hexadecimal digits for names and sizes of all files and the content of the pair lists."""
    files: Mapping[str, str]
    """By name below the root: the size, of pair lists also a digest."""


def correspondence_mark(root: Path) -> dict[str, str]:
    """What results on a dataset say of its correspondence: that it was matched; nothing where it is the true one.

    >>> correspondence_mark(Path("/nowhere"))
    {}
    """
    return {"correspondence": "matched"} if (root / MATCHED_REPORT).is_file() else {}


def is_of_dataset(name: PurePath) -> bool:
    """Whether a name below a dataset's root belongs to the dataset: its folders, pair lists and description.

    >>> [is_of_dataset(PurePath(name)) for name in ("train/cloth/a.jpg", "train_pairs.txt", "runs/a", "report.json")]
    [True, True, False, False]
    """
    return name.parts[:1] == (DESCRIPTION_FILE,) or _is_pair_list(name) or name.parts[0] in DATASET_FOLDERS


def part_of(root: Path) -> Callable[[PurePath], bool]:
    """Which names below a root belong to the dataset: all of them where it has none of `DATASET_FOLDERS`.

    >>> part_of(Path("/nowhere"))(PurePath("runs/a"))
    False
    """
    usual = any((root / name).is_dir() for name in DATASET_FOLDERS) or not root.is_dir()
    return is_of_dataset if usual else lambda name: True


def _is_pair_list(name: PurePath) -> bool:
    return name.suffix == ".txt" and "_pairs" in name.name


def data_state(root: Path) -> DataState:
    """The files of a dataset; what else lies in its folder is left out, so that outputs may lie there, too.

    Fast (no picture is read); the folder's place and times do not matter.
    """
    return _state(root, part_of(root))


def folder_state(folder: Path) -> DataState:
    """As `data_state`, of all files of a folder that is no dataset."""
    return _state(folder, lambda name: True)


def _state(root: Path, counts: Callable[[PurePath], bool]) -> DataState:
    digest, files = hashlib.sha256(), {}
    for file in sorted(_files(root, (), lambda path: counts(path.relative_to(root)))):
        name = file.relative_to(root)
        if name.name.startswith(LOCK):
            continue
        size = str(file.stat().st_size)
        digest.update(f"{name.as_posix()}\t{size}\n".encode())
        if _is_pair_list(name):
            content = file.read_bytes()
            digest.update(content)
            size += f" {hashlib.sha256(content).hexdigest()[:16]}"
        files[name.as_posix()] = size
    return DataState(digest.hexdigest()[:16], files)


def _files(folder: Path, above: tuple[Path, ...], counts: Callable[[Path], bool]) -> Iterator[Path]:
    """All files below a folder that count; a link to one of the folders above it is not followed."""
    real = folder.resolve()
    if real in above:
        return
    with os.scandir(folder) as scanned:
        entries = list(scanned)
    for entry in entries:
        if not above and not counts(Path(entry.path)):
            continue
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link that leads to itself
            continue
        if is_folder:
            yield from _files(Path(entry.path), (*above, real), counts)
        elif is_file:
            yield Path(entry.path)


class DataRecord:
    """What a folder of results remembers of its dataset.

    Args:
        folder: of a run or cache.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / RECORD_FILE

    def write(self, state: DataState) -> None:
        """Remember the files that are there now."""
        self._write({"files": dict(state.files), "failures": []})

    def keep(self, state: DataState) -> None:
        """Remember them unless that was done."""
        if not self.file.is_file():
            self.write(state)

    def note(self, failure: str) -> None:
        """Remember the message of an error that names files that cannot be read."""
        content = self._read()
        self._write(content | {"failures": [*content["failures"], failure]})

    def repaired(self, now: DataState) -> list[str] | None:
        """The files that were replaced because they could not be read; None if anything else changed, too."""
        if not self.file.is_file():
            return None
        content = self._read()
        then: dict[str, str] = content["files"]
        changed = sorted(name for name in then.keys() | now.files.keys() if then.get(name) != now.files.get(name))
        unreadable = {_without_ending(name) for name in then if any(name in failure for failure in content["failures"])}
        stands_in = {_without_ending(name) for name in now.files}
        if any(_without_ending(n) not in unreadable or _without_ending(n) not in stands_in for n in changed):
            return None
        return changed

    def changes(self, now: DataState) -> str:
        """How many files were added, removed and changed, with an example of each; empty without a record."""
        if not self.file.is_file():
            return ""
        then: dict[str, str] = self._read()["files"]
        kinds = {
            "added": now.files.keys() - then.keys(),
            "removed": then.keys() - now.files.keys(),
            "changed": {n for n in then.keys() & now.files.keys() if then[n] != now.files[n]},
        }
        return ", ".join(f"{len(names)} {kind} ({min(names)})" for kind, names in kinds.items() if names)

    def _read(self) -> dict[str, Any]:
        try:
            return dict(json.loads(gzip.decompress(self.file.read_bytes())))
        except (OSError, EOFError, ValueError, zlib.error):  # damaged: then nothing counts as a repair
            return {"files": {}, "failures": []}

    def _write(self, content: Mapping[str, Any]) -> None:
        with written(self.file) as unfinished:
            unfinished.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))


def note_unreadable(folder: Path, failure: str) -> None:
    """Tell all records in a folder, as a study's and those of its runs, which files cannot be read."""
    for file in folder.rglob(RECORD_FILE):
        with suppress(OSError):  # the error itself is what the user has to see
            DataRecord(file.parent).note(failure)


def _without_ending(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))
