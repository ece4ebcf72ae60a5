"""Where the files of a dataset lie: what folder layouts have in common, and those of VITON-HD and DressCode.

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
from collections.abc import Mapping, Sequence
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

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""Of pictures, in capitals or not."""
_BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
"""How editors and PowerShell mark the encoding of a text."""
_PAIR_LINE = "'person.jpg garment.jpg'"


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
        """What file names end with.

        >>> Place("agnostic-mask", "{}_mask.png").ending
        '_mask.png'
        """
        return self.pattern.partition("{}")[2]


class Layout(ABC):
    """Paths of the files of one split of a dataset folder, as the user gives it."""

    places: ClassVar[Mapping[str, tuple[Place, ...]]]
    """Per role, where its files may lie; the first is where new ones are written."""
    small_mask_rule: ClassVar[bool]
    """Whether the authors' rule on small inpainting masks is meant for this dataset."""

    def __init__(self, root: Path, split: Split) -> None:
        self.root, self.split, kind = root, split, type(self)
        self.own = "" if kind.__module__ == __name__ else f" layout={kind.__module__}:{kind.__qualname__}"
        """How a command names a layout of the user's own, with a space before; empty for those of this module."""
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
        """The pair list for a pairing, as it stands in its file: two names a line, with a tab or spaces between.

        Raises:
            DataError: the list is missing, empty or no text, or a line has not two names.
        """
        file = self.list_file(pairing)
        if not file.is_file():
            raise DataError(
                f"{file.parent} has no pair list {file.name} (found: {entries(file.parent)})."
                f"{_nearby(self.root, file.name)} Put it there{', or change list_file of' * bool(self.own)}{self.own}; "
                "data/README.md shows the layouts that are known, and 'i2am data make' makes the embedded dataset."
            )
        lines = [line.strip() for line in re.split(r"\r\n|\n|\r", _text(file)) if line.strip()]
        if not lines:
            raise DataError(f"{file} is empty; expected lines {_PAIR_LINE}. Restore the list of the dataset.")
        pairs = []
        for number, line in enumerate(lines, start=1):
            ways = _ways_to_read(line)
            if len(ways) > 1:  # spaces within names
                ways = [way for way in ways if self._is_there(_pair(way))] or [way for way in ways if way[0] == way[1]]
            if len(ways) != 1:
                raise DataError(
                    f"{file} has {len(line.split())} names in entry {number} ('{line}'); expected lines {_PAIR_LINE}. "
                    "Where names have spaces, put a tab between the two, or restore the list of the dataset."
                )
            pairs.append(_pair(ways[0]))
        return pairs

    def _is_there(self, pair: Pair) -> bool:
        """Whether a person and a garment of these names have files."""
        return bool(self.spellings(Role.PERSON, pair.person) and self.spellings(Role.GARMENT, pair.garment))

    def key(self, stem: str) -> str:
        """What takes the place of ``{}`` in patterns."""
        return stem

    def place(self, role: Role) -> Place:
        """Where the files of a role lie, or would lie.

        >>> VitonHDLayout(Path("set"), Split.TEST).place(Role.INPAINT_MASK)
        Place(folder='agnostic-mask', pattern='{}_mask.png')
        """
        if role not in self._found:
            place = self._look(role)
            if place is None:
                return self.places[role][0]
            self._found[role] = place
        return self._found[role]

    def _look(self, role: Role) -> Place | None:
        """The first place of a role whose folder exists, with the ending that its files have."""
        spellings: dict[str, list[Place]] = {}
        for place in self.places[role]:
            spellings.setdefault(place.folder, []).append(place)
        for folder, places in spellings.items():  # a folder once: another thread may be making it
            if names := self._in_folder(folder):
                exact = (p for p in places if any(name.endswith(p.ending) for name in names))
                alike = (p for p in places if any(_ends_like(name, p.ending) for name in names))
                return next(exact, next(alike, places[0]))
            if (self.folder / folder).is_dir():
                return places[0]
        return None

    def names(self, role: Role) -> frozenset[str]:
        """What the folder of a role holds; it is listed once, because a network disk takes its time."""
        return self._in_folder(self.place(role).folder)

    def _in_folder(self, name: str) -> frozenset[str]:
        folder = self.folder / name
        if folder not in self._names:
            if not folder.is_dir():
                return frozenset()
            with os.scandir(folder) as scanned:
                self._names[folder] = frozenset(entry.name for entry in scanned)
        return self._names[folder]

    def unusual(self, role: Role) -> dict[str, list[str]]:
        """Files of a role that are not named as most, by their names without ending in the composed form of accents."""
        folder, ending = self.folder_of(role), self.place(role).ending
        if folder not in self._unusual:
            found: dict[str, list[str]] = {}
            for name in self.names(role):
                is_usual = name.endswith(ending) and name.isascii()
                if not is_usual and _same_kind(name, ending):
                    found.setdefault(stem_of(name), []).append(name)
            self._unusual[folder] = found
        return self._unusual[folder]

    def folder_of(self, role: Role) -> Path:
        """The folder that the files of a role lie in, or would lie in.

        >>> VitonHDLayout(Path("set"), Split.TEST).folder_of(Role.GARMENT).as_posix()
        'set/test/cloth'
        """
        return self.folder / self.place(role).folder

    def has(self, role: Role) -> bool:
        """Whether the folder of a role exists."""
        return self.folder_of(role).is_dir()

    def spellings(self, role: Role, stem: str) -> list[str]:
        """All files that could be that of a person or garment: more than one is not to be decided."""
        usual = self.place(role).pattern.format(self.key(stem))
        others = self.unusual(role).get(stem_of(usual), [])
        return sorted({*others, *([usual] if usual in self.names(role) else [])})

    def path(self, role: Role, stem: str) -> Path:
        """The file of a person or garment in one of the roles.

        Files that end otherwise than most (``.JPG``, ``.webp``), or whose accents are stored otherwise, are found.

        >>> VitonHDLayout(Path("set"), Split.TEST).path(Role.INPAINT_MASK, "00017_00").as_posix()
        'set/test/agnostic-mask/00017_00_mask.png'
        """
        usual = self.place(role).pattern.format(self.key(stem))
        if usual in self.names(role):
            return self.folder_of(role) / usual
        return self.folder_of(role) / next(iter(self.spellings(role, stem)), usual)

    def pairs(self, pairing: Pairing) -> list[Pair]:
        """Samples for a pairing: paired gives people their own garment, whatever the list says."""
        listed = self.listed(pairing)
        if pairing is Pairing.UNPAIRED:
            return listed
        return [Pair(person, self.own_garment(person)) for person, _ in listed]

    def worn(self, pair: Pair) -> bool:
        """Whether the person of a pair wears its garment.

        >>> layout = VitonHDLayout(Path("set"), Split.TEST)
        >>> layout.worn(Pair("00017_00", "00017_00")), layout.worn(Pair("00017_00", "00018_00"))
        (True, False)
        """
        return pair.garment == self.own_garment(pair.person)

    @property
    def missing(self) -> list[Role]:
        """Roles that every sample of this split needs and that have no folder."""
        needed = [*PERSON_ROLES, *GARMENT_ROLES, *([Role.WARPED_MASK] if self.split is Split.TRAIN else [])]
        return [role for role in needed if not self.has(role)]

    def folder_names(self, role: Role) -> str:
        """The folder that a role was looked for in, with its other spellings.

        >>> VitonHDLayout(Path("set"), Split.TEST).folder_names(Role.AGNOSTIC)
        "'agnostic-v3.2' (or agnostic-v3.3, agnostic)"
        """
        first, *others = dict.fromkeys(place.folder for place in self.places[role])
        return f"'{first}'" + (f" (or {', '.join(others)})" if others else "")


def _places(folders: Sequence[str], patterns: Sequence[str]) -> tuple[Place, ...]:
    """All combinations, the usual folder and pattern first."""
    return tuple(Place(folder, pattern) for folder in folders for pattern in patterns)


class VitonHDLayout(Layout):
    """``<root>/{train,test}/<role>/<name>``, and ``<root>/{train,test}_pairs.txt``: VITON-HD, and own photographs.

    Two distributions are about: ``zalando-hd-resized``, and the folders of HR-VITON and StableVITON. They differ in
    spelling (``cloth_mask`` for ``cloth-mask``) and in what they hold.
    """

    small_mask_rule = True
    category = None  # upper garments in VITON-HD, others in own photographs
    places = {
        Role.PERSON: _places(["image"], ["{}.jpg", "{}.png", "{}.jpeg"]),
        Role.GARMENT: _places(["cloth"], ["{}.jpg", "{}.png", "{}.jpeg"]),
        Role.GARMENT_MASK: _places(["cloth-mask", "cloth_mask"], ["{}.jpg", "{}.png"]),
        Role.AGNOSTIC: _places(["agnostic-v3.2", "agnostic-v3.3", "agnostic"], ["{}.jpg", "{}.png"]),
        Role.INPAINT_MASK: _places(["agnostic-mask", "agnostic_mask"], ["{}_mask.png", "{}.png", "{}.jpg"]),
        Role.POSE_PICTURE: _places(["image-densepose", "image_densepose", Role.DRAWN_POSE], ["{}.jpg", "{}.png"]),
        Role.DRAWN_POSE: _places([Role.DRAWN_POSE], ["{}.jpg"]),
        Role.WARPED_MASK: _places(["gt_cloth_warped_mask", "gt-cloth-warped-mask"], ["{}.jpg", "{}.png"]),
        Role.CORRESPONDENCE: _places(["correspondence"], ["{}.png"]),
        Role.PARSING: _places(["image-parse-v3", "image-parse"], ["{}.png"]),
        Role.KEYPOINTS: _places(["openpose_json", "openpose-json"], ["{}_keypoints.json"]),
    }

    @property
    def folder(self) -> Path:
        """The split's folder.

        >>> VitonHDLayout(Path("set"), Split.TEST).folder.as_posix()
        'set/test'
        """
        return self.root / self.split

    @property
    def label(self) -> str:
        """The split."""
        return str(self.split)

    def list_file(self, pairing: Pairing) -> Path:
        """Both pairings share a list.

        >>> VitonHDLayout(Path("set"), Split.TEST).list_file(Pairing.PAIRED).as_posix()
        'set/test_pairs.txt'
        """
        return self.root / f"{self.split}_pairs.txt"

    def own_garment(self, person: str) -> str:
        """The garment of the same name."""
        return person

    def advice(self, role: Role) -> str:
        """Where the files of a role come from."""
        if role in DERIVED_ROLES:
            return (
                f"Some downloads of VITON-HD lack it; 'i2am data derive root={self.root}{self.own}' makes it from "
                "human-parsing maps and keypoints or DensePose."
            )
        if self.own:
            return f"Put it there, or let `places` and `folder` of{self.own} say where it is."
        if role == Role.POSE_PICTURE:
            return (
                "DensePose pictures come with VITON-HD's zalando-hd-resized, or from detectron2; 'i2am data derive' "
                "draws a stand-in from keypoints."
            )
        return "It comes with VITON-HD (zalando-hd-resized); for own photographs see data/README.md."


class DressCodeLayout(Layout):
    """DressCode as its authors distribute it; splits of a category share folders, and differ in their lists alone.

    ::

        <root>/{upper_body,lower_body,dresses}/
            train_pairs.txt, test_pairs_paired.txt, test_pairs_unpaired.txt    lines "000000_0.jpg <tab> 000000_1.jpg"
            images/000000_0.jpg, images/000000_1.jpg                           person, garment
            label_maps/000000_4.png      human parsing, 18 labels              skeletons/000000_5.jpg    not used here
            dense/000000_5.png           DensePose's part labels 0...24        keypoints/000000_2.json   18 joints

    Agnostic pictures and masks are not distributed; ``i2am data derive`` writes them beside the others, in folders
    with VITON-HD's names. The authors' rule on small inpainting masks is off: DressCode shows whole people, and many
    garments are smaller than that rule allows.
    """

    small_mask_rule = False
    places = {
        Role.PERSON: _places(["images"], ["{}_0.jpg"]),
        Role.GARMENT: _places(["images"], ["{}_1.jpg"]),
        Role.GARMENT_MASK: _places(["cloth-mask", "cloth_mask", "masks"], ["{}_1.png"]),
        Role.AGNOSTIC: _places(["agnostic-v3.2", "agnostic"], ["{}_0.jpg"]),
        Role.INPAINT_MASK: _places(["agnostic-mask"], ["{}_0_mask.png", "{}_0.png"]),
        Role.POSE_PICTURE: (Place("dense", "{}_5.png"), *_places(["image-densepose", Role.DRAWN_POSE], ["{}_0.jpg"])),
        Role.DRAWN_POSE: _places([Role.DRAWN_POSE], ["{}_0.jpg"]),
        Role.WARPED_MASK: _places(["gt_cloth_warped_mask"], ["{}_0.png", "{}_0.jpg"]),
        Role.CORRESPONDENCE: _places(["correspondence"], ["{}_0.png"]),
        Role.PARSING: _places(["label_maps"], ["{}_4.png"]),
        Role.KEYPOINTS: _places(["keypoints"], ["{}_2.json"]),
    }

    def __init__(self, root: Path, split: Split, category: Category) -> None:
        super().__init__(root, split)
        self._category: Category = category

    @property
    def folder(self) -> Path:
        """The category's folder.

        >>> DressCodeLayout(Path("set"), Split.TEST, "dresses").folder.as_posix()
        'set/dresses'
        """
        return self.root / self._category

    @property
    def label(self) -> str:
        """Category and split.

        >>> DressCodeLayout(Path("set"), Split.TEST, "dresses").label
        'dresses test'
        """
        return f"{self._category} {self.split}"

    @property
    def category(self) -> Category:
        """The category."""
        return self._category

    def key(self, stem: str) -> str:
        """The number that all files of a person and their own garment share.

        >>> DressCodeLayout(Path("set"), Split.TEST, "dresses").key("000000_0")
        '000000'
        """
        return stem.rpartition("_")[0]

    def own_garment(self, person: str) -> str:
        """``000000_1`` for ``000000_0``.

        >>> DressCodeLayout(Path("set"), Split.TEST, "dresses").own_garment("000000_0")
        '000000_1'
        """
        return f"{self.key(person)}_1"

    def list_file(self, pairing: Pairing) -> Path:
        """Training has one list, tests have one per pairing.

        >>> DressCodeLayout(Path("set"), Split.TEST, "dresses").list_file(Pairing.UNPAIRED).as_posix()
        'set/dresses/test_pairs_unpaired.txt'
        """
        name = "train_pairs.txt" if self.split is Split.TRAIN else f"test_pairs_{pairing}.txt"
        return self.folder / name

    def listed(self, pairing: Pairing) -> list[Pair]:
        """The pair list; names that are not DressCode's are refused."""
        pairs = super().listed(pairing)
        for pair in pairs:
            if not (pair.person.endswith("_0") and pair.garment.endswith("_1")):
                raise DataError(
                    f"{self.list_file(pairing)} names '{pair.person}' and '{pair.garment}'; expected a person "
                    "NNNNNN_0.jpg and a garment NNNNNN_1.jpg. Use DressCode's own lists, or layout=viton_hd."
                )
        return pairs

    def advice(self, role: Role) -> str:
        """Where the files of a role come from."""
        if role in DERIVED_ROLES:
            return (
                f"DressCode does not distribute it; 'i2am data derive root={self.root}' makes it from label_maps and "
                "keypoints."
            )
        return "It comes with DressCode (https://github.com/aimagelab/dress-code, on request)."


# -- pair lists --------------------------------------------------------------------------------------------------------


def _text(file: Path) -> str:
    """A list's text: UTF-8, or what its byte order mark says; other texts are refused."""
    content = file.read_bytes()
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
        fault = "zeros between the letters" if "\0" in text else None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        text, fault = "", f"byte {content[error.start]:#04x} in line {line}"
    if fault is not None:
        raise DataError(
            f"{file} is no text in UTF-8 ({fault}); names that are read otherwise would not be those of the files. "
            "Save the list as UTF-8."
        )
    return text


def _ways_to_read(line: str) -> list[tuple[str, str]]:
    """Two names out of a line: at its only tab, else at any space behind which both halves look like files."""
    if line.count("\t") == 1:
        left, right = (name.strip() for name in line.split("\t"))
        return [(left, right)] if left and right else []
    ways = [(line[: gap.start()], line[gap.end() :]) for gap in re.finditer(r"\s+", line)]
    return [way for way in ways if all(name.lower().endswith(_ENDINGS) for name in way)] or ways


def _pair(way: tuple[str, str]) -> Pair:
    return Pair(stem_of(way[0]), stem_of(way[1]))


def _same_kind(name: str, ending: str) -> bool:
    """Whether a file can be of a role whose files end so: any picture for pictures."""
    return name.lower().endswith(_ENDINGS) if ending.endswith(_ENDINGS) else name.endswith(ending)


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
    """The names in a folder, for messages.

    >>> entries(Path("nowhere"))
    'no such folder'
    """
    if not folder.is_dir():
        return "no such folder"
    names = (entry.name for entry in folder.iterdir() if entry.name != LOCK)
    return ", ".join(sorted(names)) or "nothing"


def _nearby(root: Path, list_name: str) -> str:
    """A hint if the dataset lies one folder deeper than the user said."""
    return next((f" Did you mean {path.parent}?" for path in sorted(root.glob(f"*/{list_name}"))), "")
