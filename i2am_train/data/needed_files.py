"""Files that samples need and that are missing, double or broken: found when a run begins, not in its tenth epoch.

Each folder is listed once, however many samples there are: on a network disk, one question per file takes minutes. Of
each file the header is read, and whether its end is there; damage between the two shows only when a picture is decoded,
which is what ``i2am data check`` does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Protocol

from tqdm import tqdm

from i2am_train.data.layouts import DERIVED_ROLES, GARMENT_ROLES, OPTIONAL_ROLES, PERSON_ROLES, Layout, Pair, entries
from i2am_train.data.picture_files import UnreadablePictureError, read_size
from i2am_train.errors import DataError
from i2am_train.fingerprints import DESCRIPTION_FILE, note_unreadable
from i2am_train.types import Pairing, Role

FILES_NAMED = 3
"""Missing files of a folder that a message names."""
READERS = 4
"""Threads: enough to wait for a network disk, and few because headers are read under Python's lock."""
PART = 200
"""Files that a thread reads at a time."""
QUICK = 2.0
"""Seconds after which a bar is shown."""
NAMED = 10
"""Broken pictures that a message names."""


class _Opened(Protocol):
    """A dataset that was opened, so that its files are there."""

    root: Path

    def parts(self) -> list[tuple[Layout, list[Pair]]]:
        """Each layout with the samples that are read of it."""


@contextmanager
def advises(layout: Layout) -> Iterator[None]:
    """Adds to the error of a picture how to find all faults of the dataset that it belongs to."""
    try:
        yield
    except UnreadablePictureError as error:
        raise UnreadablePictureError(f"{error} {find_all(layout)}") from error


def find_all(layout: Layout) -> str:
    """How to find all faults of a dataset, a sentence.

    >>> from i2am_train.data.layouts import VitonHDLayout
    >>> from i2am_train.types import Split
    >>> find_all(VitonHDLayout(Path("my set"), Split.TEST))
    "Run `i2am data check 'root=my set'` for everything that is wrong with the dataset."
    """
    command = f"i2am data check {quote(f'root={layout.root}')}{layout.own}"
    return f"Run `{command}` for everything that is wrong with the dataset."


def check_files(layout: Layout, pairs: Sequence[Pair], pairing: Pairing) -> None:
    """Refuse samples that could not be read to the end.

    Args:
        layout: where the files lie.
        pairs: the samples that are read.
        pairing: how they were listed, for the message.

    Raises:
        DataError: a folder, or a file that one of the pairs is read from, is missing, or there are two of its name.
    """
    if layout.missing:
        what = ", ".join(layout.folder_names(role) for role in layout.missing)
        advice = " ".join(dict.fromkeys(layout.advice(role) for role in layout.missing))
        raise DataError(
            f"{layout.folder} has no folder {what} (found: {entries(layout.folder)}). {advice} {find_all(layout)}"
        )
    wanted = _wanted_files(layout, pairs)
    refuse_doubles(layout, wanted)
    gaps: dict[Role, str] = {}
    for role, stems in wanted.items():
        files = {layout.path(role, stem).name for stem in stems}
        if missing := sorted(files - layout.names(role)):
            named = ", ".join(missing[:FILES_NAMED]) + (", ..." if len(missing) > FILES_NAMED else "")
            gaps[role] = f"{len(missing)} of {len(files)} in {layout.place(role).folder} ({named})"
    if gaps:
        raise DataError(
            f"{layout.folder} lacks files that {layout.list_file(pairing).name} asks for: "
            f"{'; '.join(gaps.values())}. Copy them there, or take the lines of their samples out of the list. "
            f"{_own_garments(layout, gaps, pairing)}{_remedies(layout, gaps)}"
            f"{find_all(layout)}"
        )


def refuse_doubles(layout: Layout, wanted: Mapping[Role, Collection[str]]) -> None:
    """Refuse people or garments, by role, that have two files with different endings: which is meant is not said."""
    for role, stems in wanted.items():
        for stem in sorted(stems) if layout.unusual(role) else ():
            if len(files := layout.spellings(role, stem)) > 1:
                raise DataError(
                    f"{layout.folder_of(role)} holds {' and '.join(files)}, and which of them is "
                    f"meant by '{stem}' is not said. Keep one of them there."
                )


def _wanted_files(layout: Layout, pairs: Sequence[Pair]) -> dict[Role, set[str]]:
    """Per role, whose files :class:`~i2am_train.data.dataset.TryOnDataset` reads."""
    people = {pair.person for pair in pairs}
    garments = {pair.garment for pair in pairs}
    dressed = {pair.person for pair in pairs if layout.worn(pair)}
    return {
        **dict.fromkeys(PERSON_ROLES, people),
        **dict.fromkeys(GARMENT_ROLES, garments),
        **{role: dressed for role in OPTIONAL_ROLES if layout.has(role)},
    }


def _own_garments(layout: Layout, gaps: Collection[Role], pairing: Pairing) -> str:
    """What column 2 means, where garments are missing that it does not name."""
    if pairing is Pairing.UNPAIRED or not any(role in GARMENT_ROLES for role in gaps):
        return ""
    others = [pair for pair in layout.listed(pairing) if not layout.worn(pair)]
    if not others:
        return ""
    return (
        f"Paired samples read the garment of the person's own name, and column 2 of "
        f"{layout.list_file(pairing).name} names others (as '{others[0].garment}' for '{others[0].person}'), which "
        "only unpaired tests read: give garments the names of those who wear them. "
    )


def _remedies(layout: Layout, gaps: Collection[Role]) -> str:
    """What makes missing files again, as sentences with a space behind each."""
    text = ""
    if any(role in DERIVED_ROLES for role in gaps):
        text += f"'i2am data derive root={layout.root}{layout.own}' makes missing masks and agnostic pictures. "
    if (layout.root / DESCRIPTION_FILE).is_file():
        text += "'i2am data make' draws this dataset again once its folder is deleted. "
    return text


def refuse_broken_pictures(datasets: Sequence[_Opened]) -> None:
    """Refuse datasets that could not be read to the end; shows a bar where that takes long.

    Args:
        datasets: what is read, one at least.

    Raises:
        UnreadablePictureError: some files are no whole pictures of a kind that is read.
    """
    files = sorted(
        {
            layout.path(role, stem)
            for dataset in datasets
            for layout, pairs in dataset.parts()
            for role, stems in _wanted_files(layout, pairs).items()
            for stem in stems
        }
    )
    parts = [files[first : first + PART] for first in range(0, len(files), PART)]
    with (
        ThreadPoolExecutor(READERS) as pool,
        tqdm(total=len(files), desc="looking at pictures", unit="file", delay=QUICK) as bar,
    ):
        broken = []
        for part, found in zip(parts, pool.map(_broken, parts), strict=True):
            broken += found
            bar.update(len(part))
    if broken:
        named = "; ".join(f"{path} {error.fault}" for path, error in broken[:NAMED])
        more = f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        raise UnreadablePictureError(
            f"{len(broken)} of the {len(files)} pictures that are needed cannot be read: {named}{more}. "
            f"{broken[0][1].advice} {find_all(datasets[0].parts()[0][0])}"
        )


def _broken(files: list[Path]) -> list[tuple[Path, UnreadablePictureError]]:
    found = []
    for path in files:
        try:
            read_size(path)
        except UnreadablePictureError as error:
            found.append((path, error))
    return found


@contextmanager
def noted_in(folder: Path) -> Iterator[None]:
    """Lets a folder of results remember pictures that could not be read: when they are replaced, it may go on."""
    try:
        yield
    except UnreadablePictureError as error:
        note_unreadable(folder, str(error))
        raise
