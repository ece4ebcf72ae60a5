"""Everything that is wrong with a dataset folder, in VITON-HD or DressCode layout, found before training does.

An *error* means that training or evaluation would fail or learn from wrong pictures; a *warning* is worth a look.
What pictures show is judged in :mod:`i2am_train.data.plausibility`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray
from tqdm import tqdm

from i2am_train.data.dataset import AS_IT_LIES, Reading, halves
from i2am_train.data.layouts import GARMENT_ROLES, MASK_ROLES, OPTIONAL_ROLES, PERSON_ROLES, Layout, Pair
from i2am_train.data.parsing import usual_labels
from i2am_train.data.picture_files import (
    UnreadablePictureError,
    is_there,
    read_encoded_correspondence,
    read_grey,
    read_rgb,
    read_size,
)
from i2am_train.data.plausibility import Judgement, Level, Seen, judge_garment, judge_person
from i2am_train.errors import DataError
from i2am_train.types import GridSize, Pairing, Role, Split

ANNOTATION_ROLES = (Role.PARSING, Role.KEYPOINTS)
"""What ``derive`` starts from; training does not read it."""
CHECK_SIZE = 128
"""Pictures are judged on pictures reduced to about this height: enough for their polarity, and fast."""
ROWS_PER_CODE = 8
"""Findings of one kind that the table lists in full."""


class Finding(NamedTuple):
    """One thing that is wrong."""

    level: Level
    code: str
    split: str
    folder: str
    file: str
    message: str


@dataclass(frozen=True)
class DatasetReport:
    """All findings on a dataset folder."""

    root: Path
    findings: list[Finding]
    samples: dict[str, int]
    """Length of each pair list."""
    files: int
    """Pictures that were read."""
    size: GridSize | None
    """The size that pictures were compared with: the one asked for, or the most frequent one."""

    @property
    def ok(self) -> bool:
        """Whether training can start: there is no error (there may be warnings).

        >>> DatasetReport(Path("set"), [Finding("warning", "mixed_sizes", "", "", "", "")], {}, 0, None).ok
        True
        """
        return self.counts["error"] == 0

    @property
    def counts(self) -> dict[str, int]:
        """Findings per level.

        >>> DatasetReport(Path("set"), [Finding("error", "missing_file", "", "", "", "")], {}, 0, None).counts
        {'error': 1, 'warning': 0}
        """
        levels = [finding.level for finding in self.findings]
        return {level: levels.count(level) for level in ("error", "warning")}

    def table(self) -> str:
        """Plain text: a summary line, and one row per finding (long lists of one kind are cut).

        >>> DatasetReport(Path("set"), [], {"train": 2}, 8, GridSize(64, 48)).table()
        'set can be used: 2 train pairs, 8 pictures read of 64x48, 0 errors, 0 warnings.'
        """
        rows = [Finding._fields, *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        widths.append(0)
        lines = ["  ".join(map(str.ljust, row, widths)) for row in rows]
        return "\n".join([self._summary(), *(lines if self.findings else [])])

    def _rows(self) -> Iterable[tuple[str, ...]]:
        seen: Counter[tuple[str, ...]] = Counter()
        for finding in sorted(self.findings, key=lambda finding: finding[:5]):
            kind: tuple[str, ...] = finding[:4]
            seen[kind] += 1
            if seen[kind] <= ROWS_PER_CODE:
                yield finding
        for kind, count in seen.items():
            if count > ROWS_PER_CODE:
                more = f"and {count - ROWS_PER_CODE} more (all of them are in the JSON report)"
                yield (*kind, "...", more)

    def _summary(self) -> str:
        lists = ", ".join(f"{count} {split}" for split, count in self.samples.items()) or "no"
        verdict = "can be used" if self.ok else "cannot be used as it is"
        size = f" of {self.size}" if self.size else ""
        return (
            f"{self.root} {verdict}: {lists} pairs, {self.files} pictures read{size}, "
            f"{self.counts['error']} errors, {self.counts['warning']} warnings."
        )

    def to_json(self) -> str:
        """The whole report as JSON."""
        content = {
            "schema": 1, "root": str(self.root), "ok": self.ok, "counts": self.counts, "samples": self.samples,
            "files": self.files, "size": list(self.size) if self.size else None,
            "findings": [finding._asdict() for finding in self.findings],
        }  # fmt: skip
        return json.dumps(content, indent=2) + "\n"


def check_dataset(
    root: Path, size: GridSize | None = None, *, reading: Reading = AS_IT_LIES, progress: bool = True
) -> DatasetReport:
    """Check a dataset folder: layout, pair lists, and every picture that they name.

    Args:
        root: the dataset folder.
        size: size that every picture must have; None: the pictures of a person or garment must agree.
        reading: layout and categories.
        progress: show a bar with the time left.
    """
    if not root.is_dir():
        return _refused(root, f"There is no folder {root}. Check root=.", size)
    try:
        there, absent = halves(root, reading)
    except DataError as error:
        return _refused(root, str(error), size)
    findings = [_absent_half(layout) for layout in absent]
    parts = [_Part(layout, *_check_lists(layout, findings)) for layout in there]
    findings += _check_overlap(parts)
    findings += [
        Finding("error", "missing_folder", one.label, one.place(role).folder, "", _missing(one, role))
        for one in there
        for role in one.missing
    ]
    findings += _check_unlisted(parts)
    jobs = [job for part in parts for job in part.jobs()]
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:  # reading and decoding leave Python's lock
        results = pool.map(_Job.read, jobs)
        groups = list(tqdm(results, total=len(jobs), desc="checking pictures", unit="item", disable=not progress))
    findings += [finding for job in jobs for finding in job.findings]
    expected, wrong = _check_sizes([group for group in groups if group], size)
    counts = {part.layout.label: len(part.paired) for part in parts if part.paired}
    return DatasetReport(root, findings + wrong, counts, sum(map(len, groups)), expected)


def _refused(root: Path, why: str, size: GridSize | None) -> DatasetReport:
    return DatasetReport(root, [Finding("error", "missing_folder", "", "", "", why)], {}, 0, size)


# -- lists and folders -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A split (of a category) and its lists."""

    layout: Layout
    paired: list[Pair]
    """People with their own garments."""
    unpaired: list[Pair]
    """The test list of other garments; of training, empty."""

    @property
    def roles(self) -> list[Role]:
        """Roles whose folders exist."""
        known = [*PERSON_ROLES, *GARMENT_ROLES, *OPTIONAL_ROLES, *ANNOTATION_ROLES]
        return [role for role in known if self.layout.has(role)]

    def stems(self, role: Role) -> set[str]:
        """People or garments whose file a folder must hold."""
        pairs = [*self.paired, *self.unpaired]
        if role in GARMENT_ROLES:
            return {pair.garment for pair in pairs}
        return {pair.person for pair in pairs}

    def jobs(self) -> list[_Job]:
        """One job per person and one per garment."""
        instead = self._named_instead()
        person_roles = [role for role in self.roles if role not in GARMENT_ROLES]
        garment_roles = [role for role in self.roles if role in GARMENT_ROLES]
        people, garments = sorted(self.stems(Role.PERSON)), sorted(self.stems(Role.GARMENT))
        return [
            *(_Job(self.layout, person_roles, stem, judge_person) for stem in people),
            *(_Job(self.layout, garment_roles, stem, judge_garment, instead.get(stem)) for stem in garments),
        ]

    def _named_instead(self) -> dict[str, str]:
        """What column 2 names for people whose own garment no list names."""
        listed = self.layout.listed(Pairing.PAIRED) if self.paired else []
        named = {pair.garment for pair in [*listed, *self.unpaired]}
        return {
            own.garment: pair.garment for own, pair in zip(self.paired, listed, strict=True) if own.garment not in named
        }


def _absent_half(layout: Layout) -> Finding:
    file = layout.list_file(Pairing.PAIRED).name
    can, cannot = ("evaluation", "training") if layout.split is Split.TRAIN else ("training", "tests")
    text = f"is not there, and nothing else of this half: the dataset is for {can} alone, {cannot} would fail."
    return Finding("warning", "missing_half", layout.label, "", file, text)


def _missing(layout: Layout, role: Role) -> str:
    return f"is missing: there is no folder {layout.folder_of(role)}. {layout.advice(role)}"


def _check_lists(layout: Layout, findings: list[Finding]) -> tuple[list[Pair], list[Pair]]:
    """Pairs of people and their own garments, and the unpaired tests, with findings on the lists."""
    file = layout.list_file(Pairing.UNPAIRED).name
    try:
        paired = layout.pairs(Pairing.PAIRED)
        unpaired = layout.listed(Pairing.UNPAIRED) if layout.split is Split.TEST else []
    except DataError as error:
        findings.append(Finding("error", "pair_list", layout.label, "", file, str(error)))
        return [], []
    repeated = [name for name, count in Counter(pair.person for pair in paired).items() if count > 1]
    if repeated:
        text = f"lists {len(repeated)} people more than once, for example {repeated[0]}; remove the extra lines."
        findings.append(Finding("warning", "repeated_name", layout.label, "", file, text))
    same = sum(layout.worn(pair) for pair in unpaired)
    if same:
        text = f"{same} of {len(unpaired)} unpaired tests give people their own garment; use another one in column 2."
        findings.append(Finding("warning", "not_unpaired", layout.label, "", file, text))
    return paired, unpaired


def _check_overlap(parts: list[_Part]) -> list[Finding]:
    """People who are in a training and in a test list of the same folder or category."""
    people = {
        split: {
            (part.layout.category, pair.person) for part in parts if part.layout.split is split for pair in part.paired
        }
        for split in Split
    }
    both = sorted(name for _, name in people[Split.TRAIN] & people[Split.TEST])
    if not both:
        return []
    text = f"{len(both)} people are in both lists, for example {both[0]}: test scores would be too good."
    return [Finding("warning", "split_overlap", "", "", "", text)]


def _check_unlisted(parts: list[_Part]) -> list[Finding]:
    """Files that no pair uses: one finding per folder (DressCode's splits and roles share folders)."""
    expected: dict[Path, set[str]] = {}
    labels: dict[Path, list[str]] = {}
    for part in parts:
        for role in part.roles:
            folder = part.layout.folder_of(role)
            names = {part.layout.path(role, stem).name for stem in part.stems(role)}
            expected.setdefault(folder, set()).update(names)
            labels.setdefault(folder, []).append(part.layout.label)
    found = []
    for folder, names in expected.items():
        # DensePose's UV maps lie beside DressCode's labels
        extra = sorted(entry.name for entry in folder.iterdir() if entry.name not in names and entry.suffix != ".npz")
        if extra:
            label = ", ".join(dict.fromkeys(labels[folder]))
            text = f"{len(extra)} files belong to no pair of the lists: a list is too short, or they are left over."
            found.append(Finding("warning", "unpaired_file", label, folder.name, extra[0], text))
    return found


# -- pictures ----------------------------------------------------------------------------------------------------------


class _Sized(NamedTuple):
    """A picture and its size."""

    split: str
    folder: str
    file: str
    size: GridSize


@dataclass(frozen=True)
class _Job:
    """Read all pictures of a person or a garment, then judge them together."""

    layout: Layout
    roles: list[Role]
    stem: str
    judge: Callable[[Seen], Iterable[Judgement]]
    listed: str | None = None
    """Of a garment that no list names and that is read as its person's own: what column 2 names instead."""
    findings: list[Finding] = field(default_factory=list)

    def read(self) -> list[_Sized]:
        """The pictures that could be read; what is wrong with them goes to ``findings``."""
        for role in self.roles:
            if len(files := self.layout.spellings(role, self.stem)) > 1:
                text = f"is one of {', '.join(files)}: which of them is meant is not said; keep one."
                self._find(role, "ambiguous_name", text)
        seen, sizes = Seen(labels=usual_labels(self.layout.category)), []
        for role in self.roles:
            path = self.layout.path(role, self.stem)
            if role in ANNOTATION_ROLES:
                seen.files |= {role: path} if is_there(path) else {}
                continue
            try:
                size, seen.pictures[role] = read_size(path), _reduced(path, role)
            except UnreadablePictureError as error:
                if is_there(path):
                    self._find(role, "unreadable", f"{error.fault}. {error.advice}")
                else:
                    self._find(role, "missing_file", self._missing())
                continue
            sizes.append(_Sized(self.layout.label, path.parent.name, path.name, size))
            seen.size = size if role == Role.PERSON else seen.size
        for level, code, role, text in self.judge(seen):
            self._find(role, code, text, level)
        return sizes

    def _find(self, role: Role, code: str, text: str, level: Level = "error") -> None:
        path = self.layout.path(role, self.stem)
        self.findings.append(Finding(level, code, self.layout.label, path.parent.name, path.name, text))

    def _missing(self) -> str:
        if self.listed is None:
            return "is in the pair list, but there is no such file."
        file = self.layout.list_file(Pairing.PAIRED).name
        return (
            f"does not exist: paired samples read the garment of the person's own name; column 2 of {file} names "
            f"'{self.listed}', which only unpaired tests read. Give the garment its person's name."
        )


def _reduced(path: Path, role: Role) -> NDArray[Any]:
    """A picture as it is judged: grey for masks, reduced while it is large."""
    if role == Role.CORRESPONDENCE:
        return read_encoded_correspondence(path)
    if role in MASK_ROLES:
        return read_grey(path, CHECK_SIZE)
    return read_rgb(path, about=CHECK_SIZE)


def _check_sizes(groups: list[list[_Sized]], wanted: GridSize | None) -> tuple[GridSize | None, list[Finding]]:
    """Pictures that differ from the wanted size, or from the others of their person or garment.

    People may differ from each other, as own photographs do: then there is no common size, and a warning.
    """
    if not groups:
        return wanted, []
    common = [Counter(entry.size for entry in group).most_common(1)[0][0] for group in groups]
    origin = "was asked for" if wanted else "is the size of most"
    findings = []
    for group, usual in zip(groups, common, strict=True):
        for entry in group:
            if entry.size != (wanted or usual):
                text = f"is {entry.size} (height x width); {wanted or usual} {origin}."
                findings.append(Finding("error", "wrong_size", *entry[:3], text))
    usual, number = Counter(common).most_common(1)[0]
    if wanted is None and number < len(groups):
        other = next(group[0] for group, size in zip(groups, common, strict=True) if size != usual)
        text = (
            f"is {other.size} (height x width), one of {len(groups) - number} people or garments that are not "
            f"{usual}: data.fit says how they come to one size."
        )
        findings.append(Finding("warning", "mixed_sizes", *other[:3], text))
    return wanted or usual, findings
