"""Files that samples are read from and that are not there: found when a dataset is opened, not in the tenth epoch.

Each folder is listed once, however many samples there are: on a network disk, one question per file takes minutes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from i2am_train.datasets.layouts import (
    DERIVED_ROLES,
    DESCRIPTION_FILE,
    GARMENT_ROLES,
    OPTIONAL_ROLES,
    PERSON_ROLES,
    Layout,
    Pair,
)
from i2am_train.errors import DataError
from i2am_train.types import Pairing

FILES_NAMED = 3
"""Missing files of a folder that a message names."""


class Gap(NamedTuple):
    """What a role's folder lacks."""

    role: str
    missing: list[str]
    """File names, sorted; never empty."""
    wanted: int
    """Files that the samples are read from, missing ones included."""
    others: list[str]
    """Files that are called as a missing one is, but for the ending."""


def check_files(layout: Layout, pairs: Sequence[Pair], pairing: Pairing) -> None:
    """Refuse samples that could not be read to the end.

    Args:
        layout: where the files lie; its folders exist.
        pairs: the samples that are read.
        pairing: how they were listed, for the message.

    Raises:
        DataError: a file that one of the pairs is read from is missing.
    """
    gaps = find_gaps(layout, pairs)
    if gaps:
        raise DataError(
            f"{layout.folder} lacks files that {layout.list_file(pairing).name} asks for: "
            f"{'; '.join(_described(layout, gap) for gap in gaps)}. Copy them there, or take the lines of their "
            f"samples out of the list. {_remedies(layout, gaps)}"
            f"Run 'i2am data check root={layout.root}' for everything that is wrong with the dataset."
        )


def find_gaps(layout: Layout, pairs: Sequence[Pair]) -> list[Gap]:
    """What the folders lack of the files that pairs are read from."""
    wanted = _wanted(layout, pairs)
    folders = {role: layout.folder / layout.place(role).folder for role in wanted}
    names = {folder: _listed(folder) for folder in set(folders.values())}
    gaps = []
    for role, stems in wanted.items():
        files = {layout.file_name(role, stem) for stem in stems}
        there = names[folders[role]]
        if missing := sorted(files - there):
            gaps.append(Gap(role, missing, len(files), _other_endings(missing, there)))
    return gaps


def _listed(folder: Path) -> set[str]:
    with os.scandir(folder) as scanned:
        return {entry.name for entry in scanned}


def _wanted(layout: Layout, pairs: Sequence[Pair]) -> dict[str, set[str]]:
    """Per role, whose files :class:`~i2am_train.datasets.reading.TryOnDataset` reads."""
    people = {pair.person for pair in pairs}
    garments = {pair.garment for pair in pairs}
    dressed = {pair.person for pair in pairs if layout.worn(pair)}
    return {
        **dict.fromkeys(PERSON_ROLES, people),
        **dict.fromkeys(GARMENT_ROLES, garments),
        **{role: dressed for role in OPTIONAL_ROLES if layout.has(role)},
    }


def _other_endings(missing: Sequence[str], there: set[str]) -> list[str]:
    stems = {Path(name).stem for name in missing}
    return sorted(name for name in there if Path(name).stem in stems)


def _described(layout: Layout, gap: Gap) -> str:
    """As ``2 of 20 in cloth (00002_00.jpg, 00007_00.jpg)``."""
    place = layout.place(gap.role)
    named = ", ".join(gap.missing[:FILES_NAMED])
    more = ", ..." if len(gap.missing) > FILES_NAMED else ""
    text = f"{len(gap.missing)} of {gap.wanted} in {place.folder} ({named}{more})"
    if gap.others:
        text += f", where {gap.others[0]} is, but a folder's files must end alike, here in '{place.ending}'"
    return text


def _remedies(layout: Layout, gaps: Sequence[Gap]) -> str:
    """What makes missing files again, as sentences with a space behind each."""
    text = ""
    if any(gap.role in DERIVED_ROLES for gap in gaps):
        text += f"'i2am data derive root={layout.root}' makes missing masks and agnostic pictures. "
    if (layout.root / DESCRIPTION_FILE).is_file():
        text += "'i2am data make' draws this dataset again once its folder is deleted. "
    return text
