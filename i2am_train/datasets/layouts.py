"""Where the files of a dataset lie: what VITON-HD's and DressCode's folders have in common.

A *role* is what a file is to a sample, named after the folder that VITON-HD keeps it in. A :class:`Layout` knows, for
one split (and one category), where each role lies on disk; distributions of the same dataset spell some folders
differently, so a role may have several places, and the first that exists is taken.
"""

from __future__ import annotations

import os
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from i2am_train.errors import DataError
from i2am_train.types import Pairing, Split

PERSON, GARMENT = "image", "cloth"
AGNOSTIC, INPAINT_MASK, POSE_PICTURE = "agnostic-v3.2", "agnostic-mask", "image-densepose"
GARMENT_MASK, WARPED_MASK, CORRESPONDENCE = "cloth-mask", "gt_cloth_warped_mask", "correspondence"
PARSING, KEYPOINTS = "image-parse-v3", "openpose_json"
DRAWN_POSE = "pose-drawn"
"""Pose pictures that ``i2am data derive`` drew from keypoints, in a folder of their own: DensePose never mixes in."""

PERSON_ROLES = (PERSON, AGNOSTIC, INPAINT_MASK, POSE_PICTURE)
"""What every person needs."""
GARMENT_ROLES = (GARMENT, GARMENT_MASK)
"""What every garment needs."""
OPTIONAL_ROLES = (WARPED_MASK, CORRESPONDENCE)
"""Read where they exist: the warped mask is needed in training only, the correspondence is synthetic only."""
MASK_ROLES = (INPAINT_MASK, GARMENT_MASK, WARPED_MASK)
DERIVED_ROLES = (AGNOSTIC, INPAINT_MASK, GARMENT_MASK, WARPED_MASK)
"""What ``i2am data derive`` makes."""

Category = Literal["upper_body", "lower_body", "dresses"]
CATEGORIES: tuple[Category, ...] = ("upper_body", "lower_body", "dresses")
"""What a garment covers; the names are DressCode's folders."""

DESCRIPTION_FILE = "dataset.json"
"""What made a dataset, in its root; datasets that were photographed have none."""

ENTRIES_LOOKED_AT = 20
"""Entries of a folder that decide how its files are named."""


class Pair(NamedTuple):
    """A line of a pair list, without suffixes."""

    person: str
    garment: str


class Place(NamedTuple):
    """A folder, and the name in it of the file of ``{}``."""

    folder: str
    pattern: str

    @property
    def ending(self) -> str:
        """What all file names end with."""
        return self.pattern.partition("{}")[2]


class Layout(ABC):
    """Paths of the files of one split.

    Args:
        root: the dataset folder, as the user gives it.
        split: which half.
    """

    places: ClassVar[Mapping[str, tuple[Place, ...]]]
    """Per role, where its files may lie; the first is where new ones are written."""
    small_mask_rule: ClassVar[bool]
    """Whether the authors' rule on small inpainting masks is meant for this dataset."""

    def __init__(self, root: Path, split: Split) -> None:
        self.root, self.split = root, split
        self._found: dict[str, Place] = {}

    @property
    @abstractmethod
    def folder(self) -> Path:
        """The folder that the roles' folders lie in."""

    @property
    @abstractmethod
    def label(self) -> str:
        """How messages call this part of the dataset."""

    @property
    @abstractmethod
    def category(self) -> Category | None:
        """The category of all garments, None if the layout does not say."""

    @abstractmethod
    def list_file(self, pairing: Pairing) -> Path:
        """The file of the pair list for a pairing."""

    @abstractmethod
    def own_garment(self, person: str) -> str:
        """The garment that a person wears."""

    @abstractmethod
    def advice(self, role: str) -> str:
        """Where the files of a role come from, as a sentence."""

    def listed(self, pairing: Pairing) -> list[Pair]:
        """The pair list for a pairing, as it stands in its file.

        Raises:
            DataError: the list is missing, empty, or a line has not two names.
        """
        return read_list(self.list_file(pairing), self.root)

    def key(self, stem: str) -> str:
        """What takes the place of ``{}`` in patterns."""
        return stem

    def place(self, role: str) -> Place:
        """Where the files of a role lie, or would lie."""
        if role not in self._found:
            place = self._look(role)
            if place is None:
                return self.places[role][0]
            self._found[role] = place
        return self._found[role]

    def _look(self, role: str) -> Place | None:
        """The first place of a role whose folder exists, with the ending that its files have."""
        for place in self.places[role]:
            folder = self.folder / place.folder
            if folder.is_dir():
                spellings = [other for other in self.places[role] if other.folder == place.folder]
                with os.scandir(folder) as scanned:
                    names = [entry.name for entry in islice(scanned, ENTRIES_LOOKED_AT)]
                fitting = (p for p in spellings if any(name.endswith(p.ending) for name in names))
                return next(fitting, place)
        return None

    def has(self, role: str) -> bool:
        """Whether the folder of a role exists."""
        return (self.folder / self.place(role).folder).is_dir()

    def file_name(self, role: str, stem: str) -> str:
        """The name, in its folder, of the file of a person or garment in one of the roles."""
        return self.place(role).pattern.format(self.key(stem))

    def path(self, role: str, stem: str) -> Path:
        """The file of a person or garment in one of the roles."""
        return self.folder / self.place(role).folder / self.file_name(role, stem)

    def pairs(self, pairing: Pairing) -> list[Pair]:
        """Samples for a pairing: paired gives people their own garment, whatever the list says."""
        listed = self.listed(pairing)
        if pairing is Pairing.UNPAIRED:
            return listed
        return [Pair(person, self.own_garment(person)) for person, _ in listed]

    def worn(self, pair: Pair) -> bool:
        """Whether the person of a pair wears its garment."""
        return pair.garment == self.own_garment(pair.person)

    @property
    def needed(self) -> list[str]:
        """Roles that every sample of this split needs."""
        return [
            *PERSON_ROLES,
            *GARMENT_ROLES,
            *([WARPED_MASK] if self.split is Split.TRAIN else []),
        ]

    @property
    def missing(self) -> list[str]:
        """Needed roles whose folders do not exist."""
        return [role for role in self.needed if not self.has(role)]

    def folder_names(self, role: str) -> str:
        """The folder that a role was looked for in, with its other spellings."""
        first, *others = dict.fromkeys(place.folder for place in self.places[role])
        return f"'{first}'" + (f" (or {', '.join(others)})" if others else "")

    def check_folders(self) -> None:
        """Raise DataError unless all folders that every sample needs exist."""
        if not self.missing:
            return
        what = ", ".join(self.folder_names(role) for role in self.missing)
        advice = " ".join(dict.fromkeys(self.advice(role) for role in self.missing))
        raise DataError(
            f"{self.folder} has no folder {what} (found: {entries(self.folder)}). {advice} "
            f"Run 'i2am data check root={self.root}' for everything that is wrong with the dataset."
        )


def read_list(file: Path, root: Path) -> list[Pair]:
    """A pair list.

    Args:
        file: lines of two names, separated by space or tab.
        root: the dataset folder, for the advice.

    Raises:
        DataError: the list is missing, empty, or a line has not two names.
    """
    if not file.is_file():
        raise DataError(
            f"{file.parent} has no pair list {file.name} (found: {entries(file.parent)}).{_nearby(root, file.name)} "
            f"Run 'i2am data check root={root}' for the expected layout, or 'i2am data make' for the embedded dataset."
        )
    lines = [line.split() for line in file.read_text().splitlines() if line.strip()]
    wrong = next((number for number, words in enumerate(lines, start=1) if len(words) != 2), None)
    if wrong is not None or not lines:
        where = "is empty" if not lines else f"has {len(lines[wrong - 1])} names in entry {wrong}"  # type: ignore[operator]
        raise DataError(
            f"{file} {where}; expected lines 'person.jpg garment.jpg'. Restore the list of the dataset."
        )
    return [Pair(Path(person).stem, Path(garment).stem) for person, garment in lines]


def stem_of(name: str) -> str:
    """A file name without its ending, in the composed form of its accents (macOS stores them apart).

    >>> stem_of("cafe\u0301.jpg") == "caf\u00e9"
    True
    """
    return unicodedata.normalize("NFC", Path(name).stem)


def entries(folder: Path) -> str:
    """The names in a folder, for messages."""
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"


def _nearby(root: Path, list_name: str) -> str:
    """A hint if the dataset lies one folder deeper than the user said."""
    if not root.is_dir():
        return ""
    deeper = sorted(path.parent for path in root.glob(f"*/{list_name}"))
    return f" Did you mean {deeper[0]}?" if deeper else ""
