"""Where the files of a dataset lie: what VITON-HD's and DressCode's folders have in common.

A *role* is what a file is to a sample, named after the folder that VITON-HD keeps it in. A :class:`Layout` knows, for
one split (and one category), where each role lies on disk; distributions of the same dataset spell some folders
differently, so a role may have several places, and the first that exists is taken.
"""

from __future__ import annotations

import codecs
import os
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

from i2am_train.errors import DataError
from i2am_train.locks import LOCK
from i2am_train.types import Category, Pairing, Role, Split

PERSON_ROLES = (Role.PERSON, Role.AGNOSTIC, Role.INPAINT_MASK, Role.POSE_PICTURE)
"""What every person needs."""
GARMENT_ROLES = (Role.GARMENT, Role.GARMENT_MASK)
"""What every garment needs."""
OPTIONAL_ROLES = (Role.WARPED_MASK, Role.CORRESPONDENCE)
"""Read where they exist: the warped mask is needed in training only, the correspondence is synthetic only."""
MASK_ROLES = (Role.INPAINT_MASK, Role.GARMENT_MASK, Role.WARPED_MASK)
DERIVED_ROLES = (Role.AGNOSTIC, Role.INPAINT_MASK, Role.GARMENT_MASK, Role.WARPED_MASK)
"""What ``i2am data derive`` makes."""

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""Of pictures, in capitals or not."""
BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
"""How editors and PowerShell mark the encoding of a text."""


PAIR_LINE = "'person.jpg garment.jpg'"


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
        """What file names end with."""
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
        self._names: dict[Path, frozenset[str]] = {}
        self._unusual: dict[Path, dict[str, list[str]]] = {}

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
    def advice(self, role: Role) -> str:
        """Where the files of a role come from, as a sentence."""

    def listed(self, pairing: Pairing) -> list[Pair]:
        """The pair list for a pairing, as it stands in its file.

        Raises:
            DataError: the list is missing, empty or no text, or a line has not two names.
        """
        return read_list(self.list_file(pairing), self.root, self._is_there)

    def _is_there(self, pair: Pair) -> bool:
        """Whether a person and a garment of these names have files."""
        return bool(self.spellings(Role.PERSON, pair.person) and self.spellings(Role.GARMENT, pair.garment))

    def key(self, stem: str) -> str:
        """What takes the place of ``{}`` in patterns."""
        return stem

    def place(self, role: Role) -> Place:
        """Where the files of a role lie, or would lie."""
        if role not in self._found:
            place = self._look(role)
            if place is None:
                return self.places[role][0]
            self._found[role] = place
        return self._found[role]

    def _look(self, role: Role) -> Place | None:
        """The first place of a role whose folder exists, with the ending that its files have."""
        for place in self.places[role]:
            if names := self._listed(place.folder):
                spellings = [other for other in self.places[role] if other.folder == place.folder]
                exact = (p for p in spellings if any(name.endswith(p.ending) for name in names))
                alike = (p for p in spellings if any(_ends_like(name, p.ending) for name in names))
                return next(exact, next(alike, place))
            if (self.folder / place.folder).is_dir():
                return place
        return None

    def names(self, role: Role) -> frozenset[str]:
        """What the folder of a role holds; it is listed once, because a network disk takes its time."""
        return self._listed(self.place(role).folder)

    def _listed(self, name: str) -> frozenset[str]:
        folder = self.folder / name
        if folder not in self._names:
            if not folder.is_dir():
                return frozenset()
            with os.scandir(folder) as scanned:
                self._names[folder] = frozenset(entry.name for entry in scanned)
        return self._names[folder]

    def unusual(self, role: Role) -> dict[str, list[str]]:
        """Files of a role that are not named as most, by their names without ending in the composed form of accents."""
        place = self.place(role)
        folder = self.folder / place.folder
        if folder not in self._unusual:
            found: dict[str, list[str]] = {}
            for name in self.names(role):
                is_usual = name.endswith(place.ending) and name.isascii()
                if not is_usual and _same_kind(name, place.ending):
                    found.setdefault(stem_of(name), []).append(name)
            self._unusual[folder] = found
        return self._unusual[folder]

    def has(self, role: Role) -> bool:
        """Whether the folder of a role exists."""
        return (self.folder / self.place(role).folder).is_dir()

    def file_name(self, role: Role, stem: str) -> str:
        """The name, in its folder, of the file of a person or garment in one of the roles.

        Files that end otherwise than most (``.JPG``, ``.webp``), or whose accents are stored otherwise, are found.
        """
        usual = self.place(role).pattern.format(self.key(stem))
        if usual in self.names(role):
            return usual
        return next(iter(self.spellings(role, stem)), usual)

    def spellings(self, role: Role, stem: str) -> list[str]:
        """All files that could be that of a person or garment: more than one is not to be decided."""
        usual = self.place(role).pattern.format(self.key(stem))
        others = self.unusual(role).get(stem_of(usual), [])
        return sorted({*others, *([usual] if usual in self.names(role) else [])})

    def path(self, role: Role, stem: str) -> Path:
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
    def needed(self) -> list[Role]:
        """Roles that every sample of this split needs."""
        return [*PERSON_ROLES, *GARMENT_ROLES, *([Role.WARPED_MASK] if self.split is Split.TRAIN else [])]

    @property
    def missing(self) -> list[Role]:
        """Needed roles whose folders do not exist."""
        return [role for role in self.needed if not self.has(role)]

    def folder_names(self, role: Role) -> str:
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


def read_list(file: Path, root: Path, is_there: Callable[[Pair], bool]) -> list[Pair]:
    """A pair list.

    Args:
        file: lines of two names, separated by a tab or by spaces.
        root: the dataset folder, for the advice.
        is_there: whether a pair's pictures exist; asked where spaces within names leave several ways to read a line.

    Raises:
        DataError: the list is missing, empty or no text, or a line has not two names.
    """
    if not file.is_file():
        raise DataError(
            f"{file.parent} has no pair list {file.name} (found: {entries(file.parent)}).{_nearby(root, file.name)} "
            f"Run 'i2am data check root={root}' for the expected layout, or 'i2am data make' for the embedded dataset."
        )
    lines = [line.strip() for line in re.split(r"\r\n|\n|\r", _text(file)) if line.strip()]
    if not lines:
        raise DataError(f"{file} is empty; expected lines {PAIR_LINE}. Restore the list of the dataset.")
    pairs = []
    for number, line in enumerate(lines, start=1):
        ways = _ways_to_read(line)
        if len(ways) > 1:
            ways = [way for way in ways if is_there(_pair(way))] or [way for way in ways if way[0] == way[1]]
        if len(ways) != 1:
            raise DataError(
                f"{file} has {len(line.split())} names in entry {number} ('{line}'); expected lines {PAIR_LINE}. "
                "Where names have spaces, put a tab between the two, or restore the list of the dataset."
            )
        pairs.append(_pair(ways[0]))
    return pairs


def _text(file: Path) -> str:
    """A list's text: UTF-8, or what its byte order mark says.

    Raises:
        DataError: it is no such text.
    """
    content = file.read_bytes()
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise _no_text(file, f"byte {content[error.start]:#04x} in line {line}") from error
    if "\0" in text:
        raise _no_text(file, "zeros between the letters")
    return text


def _no_text(file: Path, found: str) -> DataError:
    return DataError(
        f"{file} is no text in UTF-8 ({found}); names that are read otherwise would not be those of the files. Save "
        "the list as UTF-8."
    )


def _ways_to_read(line: str) -> list[tuple[str, str]]:
    """Two names out of a line: at its only tab, else at any space behind which both halves look like files."""
    if line.count("\t") == 1:
        left, right = (name.strip() for name in line.split("\t"))
        return [(left, right)] if left and right else []
    ways = [(line[: gap.start()], line[gap.end() :]) for gap in re.finditer(r"\s+", line)]
    files = [way for way in ways if all(name.lower().endswith(ENDINGS) for name in way)]
    return files or ways


def _pair(way: tuple[str, str]) -> Pair:
    return Pair(stem_of(way[0]), stem_of(way[1]))


def _same_kind(name: str, ending: str) -> bool:
    """Whether a file can be of a role whose files end so: any picture for pictures."""
    if ending.endswith(ENDINGS):
        return name.lower().endswith(ENDINGS)
    return name.endswith(ending)


def _ends_like(name: str, ending: str) -> bool:
    """Whether a name differs from an ending in the kind of picture alone, as ``x_mask.PNG`` from ``_mask.jpg``."""
    return _same_kind(name, ending) and Path(name).stem.endswith(Path(f"x{ending}").stem[1:])


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
    names = (entry.name for entry in folder.iterdir() if entry.name != LOCK)
    return ", ".join(sorted(names)) or "nothing"


def _nearby(root: Path, list_name: str) -> str:
    """A hint if the dataset lies one folder deeper than the user said."""
    if not root.is_dir():
        return ""
    deeper = sorted(path.parent for path in root.glob(f"*/{list_name}"))
    return f" Did you mean {deeper[0]}?" if deeper else ""
