"""Everything that is wrong with a dataset folder in VITON-HD layout, found before training does.

An *error* means that training or evaluation would fail or learn from wrong pictures; a *warning* is worth a look.
Masks are judged by simple rules that hold for shop pictures: the garment's mask does not touch most of the
border, the agnostic picture is grey where its mask says so, and the worn garment lies inside the inpainting region.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from tqdm import tqdm

from i2am_train.datasets.arrays import Mask
from i2am_train.datasets.pictures import what_is_broken
from i2am_train.datasets.viton_hd import (
    CORRESPONDENCE,
    GARMENT_FOLDERS,
    OPTIONAL_FOLDERS,
    PERSON_FOLDERS,
    WARPED_MASK,
    Layout,
    Pair,
    read_pairs,
)
from i2am_train.errors import DataError
from i2am_train.types import GridSize, Split

Level = Literal["error", "warning"]

CHECK_SIZE = 128
"""Masks are judged on pictures reduced to about this height: enough for their polarity, and fast."""
GREY_READING = {
    1: cv2.IMREAD_GRAYSCALE, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}  # fmt: skip
COLOUR_READING = {
    1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8,
}  # fmt: skip
ROWS_PER_CODE = 8
"""Findings of one kind that the table lists in full."""


@dataclass(frozen=True)
class Finding:
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
        """Whether training can start: there is no error (there may be warnings)."""
        return not any(finding.level == "error" for finding in self.findings)

    @property
    def counts(self) -> dict[str, int]:
        """Findings per level."""
        return {
            level: sum(f.level == level for f in self.findings) for level in ("error", "warning")
        }

    def table(self) -> str:
        """Plain text: a summary line, and one row per finding (long lists of one kind are cut)."""
        head = ("level", "code", "split", "folder", "file", "message")
        rows = [head, *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        widths.append(0)
        lines = ["  ".join(map(str.ljust, row, widths)) for row in rows]
        return "\n".join([self._summary(), *(lines if self.findings else [])])

    def _rows(self) -> Iterable[tuple[str, ...]]:
        ordered = sorted(self.findings, key=lambda f: (f.level, f.code, f.split, f.folder, f.file))
        seen: Counter[tuple[str, ...]] = Counter()
        for finding in ordered:
            kind: tuple[str, ...] = (finding.level, finding.code, finding.split, finding.folder)
            seen[kind] += 1
            if seen[kind] <= ROWS_PER_CODE:
                yield (*kind, finding.file, finding.message)
        for kind, count in seen.items():
            if count > ROWS_PER_CODE:
                yield (
                    *kind,
                    "...",
                    f"and {count - ROWS_PER_CODE} more (all of them are in the JSON report)",
                )

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
            "findings": [asdict(finding) for finding in self.findings],
        }  # fmt: skip
        return json.dumps(content, indent=2) + "\n"


def check_dataset(
    root: Path | str,
    size: GridSize | None = None,
    *,
    threads: int | None = None,
    progress: bool = True,
) -> DatasetReport:
    """Check a dataset folder: layout, pair lists, and every picture that they name.

    Args:
        root: the dataset folder.
        size: size that every picture must have; None: pictures must agree with the most frequent size.
        threads: readers at a time; None: two per core.
        progress: show a bar with the time left.
    """
    root = Path(root)
    if not root.is_dir():
        missing = Finding(
            "error", "missing_folder", "", "", "", f"There is no folder {root}. Check root=."
        )
        return DatasetReport(root, [missing], {}, 0, size)
    findings: list[Finding] = []
    pairs = {split: _check_list(root, split, findings) for split in Split}
    findings += _check_overlap(pairs)
    jobs: list[Callable[[], _Checked]] = []
    for split in Split:
        folders = _check_folders(Layout(root, split), findings)
        findings += _check_unlisted(Layout(root, split), folders, pairs[split])
        jobs += _jobs(Layout(root, split), folders, pairs[split])
    checked = _run(jobs, threads, progress)
    sizes = [entry for part in checked for entry in part.sizes]
    findings += [finding for part in checked for finding in part.findings]
    expected, wrong = _check_sizes(sizes, size)
    counts = {str(split): len(found) for split, found in pairs.items() if found}
    return DatasetReport(root, findings + wrong, counts, len(sizes), expected)


# -- lists and folders ---------------------------------------------------------------------------------------------


def _check_list(root: Path, split: Split, findings: list[Finding]) -> list[Pair]:
    """The pair list, with findings on the list itself."""
    file = f"{split}_pairs.txt"
    try:
        pairs = read_pairs(root, split)
    except DataError as error:
        findings.append(Finding("error", "pair_list", split, "", file, str(error)))
        return []
    repeated = [name for name, count in Counter(pair.person for pair in pairs).items() if count > 1]
    if repeated:
        text = f"names {len(repeated)} people more than once, for example {repeated[0]}; remove the extra lines."
        findings.append(Finding("warning", "repeated_name", split, "", file, text))
    same = sum(pair.person == pair.garment for pair in pairs)
    if split is Split.TEST and same:
        text = f"{same} of {len(pairs)} unpaired tests give people their own garment; use another one in column 2."
        findings.append(Finding("warning", "not_unpaired", split, "", file, text))
    return pairs


def _check_overlap(pairs: dict[Split, list[Pair]]) -> list[Finding]:
    """People who are in both lists."""
    train, test = ({pair.person for pair in pairs[split]} for split in (Split.TRAIN, Split.TEST))
    both = sorted(train & test)
    if not both:
        return []
    text = f"{len(both)} people are in both lists, for example {both[0]}: test scores would be too good."
    return [Finding("warning", "split_overlap", "", "", "", text)]


def _check_folders(layout: Layout, findings: list[Finding]) -> list[str]:
    """The folders that exist, with findings on those that do not."""
    needed = [*PERSON_FOLDERS, *GARMENT_FOLDERS] + (
        [WARPED_MASK] if layout.split is Split.TRAIN else []
    )
    existing = []
    for folder in [*PERSON_FOLDERS, *GARMENT_FOLDERS, *OPTIONAL_FOLDERS]:
        if (layout.folder / folder).is_dir():
            existing.append(folder)
        elif folder in needed:
            text = "is missing; it comes with VITON-HD (zalando-hd-resized), see data/README.md."
            findings.append(Finding("error", "missing_folder", layout.split, folder, "", text))
    return existing


def _stems(layout: Layout, folder: str, pairs: list[Pair]) -> set[str]:
    """People or garments whose file a folder must hold: each own garment, and for tests the list's as well."""
    people = {pair.person for pair in pairs}
    others = {pair.garment for pair in pairs} if layout.split is Split.TEST else set()
    return people | others if folder in GARMENT_FOLDERS else people


def _check_unlisted(layout: Layout, folders: list[str], pairs: list[Pair]) -> list[Finding]:
    """Files that no pair uses: one finding per folder."""
    found = []
    for folder in folders:
        expected = {layout.path(folder, stem).name for stem in _stems(layout, folder, pairs)}
        extra = sorted(
            entry.name for entry in os.scandir(layout.folder / folder) if entry.name not in expected
        )
        if extra:
            text = (
                f"{len(extra)} files belong to no pair of {layout.split}_pairs.txt: "
                "the list is too short, or they are left over."
            )
            found.append(Finding("warning", "unpaired_file", layout.split, folder, extra[0], text))
    return found


# -- pictures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sized:
    """A picture and its size."""

    split: str
    folder: str
    file: str
    size: GridSize


@dataclass
class _Checked:
    """What one job found."""

    findings: list[Finding] = field(default_factory=list)
    sizes: list[_Sized] = field(default_factory=list)


def _jobs(layout: Layout, folders: list[str], pairs: list[Pair]) -> list[Callable[[], _Checked]]:
    """One job per person and one per garment."""
    person_folders = [name for name in folders if name not in GARMENT_FOLDERS]
    garment_folders = [name for name in folders if name in GARMENT_FOLDERS]
    people, garments = (
        sorted(_stems(layout, "image", pairs)),
        sorted(_stems(layout, "cloth", pairs)),
    )
    return [
        *(_Job(layout, person_folders, stem, _judge_person) for stem in people),
        *(_Job(layout, garment_folders, stem, _judge_garment) for stem in garments),
    ]


Pictures = dict[str, NDArray[Any]]
Judgement = tuple[Level, str, str, str]
"""Level, code, folder, message."""


@dataclass(frozen=True)
class _Job:
    """Read all pictures of a person or a garment, then judge them together."""

    layout: Layout
    folders: list[str]
    stem: str
    judge: Callable[[Pictures], Iterable[Judgement]]

    def __call__(self) -> _Checked:
        checked = _Checked()
        pictures = {
            folder: picture
            for folder in self.folders
            if (picture := self._read(folder, checked)) is not None
        }
        for level, code, folder, text in self.judge(pictures):
            checked.findings.append(self._finding(folder, code, text, level))
        return checked

    def _finding(self, folder: str, code: str, text: str, level: Level = "error") -> Finding:
        return Finding(
            level, code, self.layout.split, folder, self.layout.path(folder, self.stem).name, text
        )

    def _read(self, folder: str, checked: _Checked) -> NDArray[Any] | None:
        """A picture, reduced where that saves time; its faults and its size go to ``checked``."""
        path = self.layout.path(folder, self.stem)
        try:
            content = path.read_bytes()
        except OSError:
            text = "is in the pair list, but there is no such file."
            checked.findings.append(self._finding(folder, "missing_file", text))
            return None
        fault = what_is_broken(content)
        size, picture = (None, None) if fault else _decode(content, folder)
        if size is None or picture is None:
            text = f"{fault or 'cannot be decoded'}; copy it again from the source."
            checked.findings.append(self._finding(folder, "unreadable", text))
            return None
        checked.sizes.append(_Sized(self.layout.split, folder, path.name, size))
        return picture


def _decode(content: bytes, folder: str) -> tuple[GridSize | None, NDArray[Any] | None]:
    """Size and reduced picture of a whole file; (None, None) if it cannot be decoded."""
    try:
        with PILImage.open(io.BytesIO(content)) as opened:
            size = GridSize(opened.height, opened.width)
    except (OSError, ValueError):
        return None, None
    return size, cv2.imdecode(np.frombuffer(content, np.uint8), _decoding(folder, size.height))


def _decoding(folder: str, height: int) -> int:
    """OpenCV's flag for a folder's pictures: grey for masks, reduced while they are large."""
    if folder == CORRESPONDENCE:
        return cv2.IMREAD_UNCHANGED
    reductions = (
        GREY_READING if folder in ("cloth-mask", "agnostic-mask", WARPED_MASK) else COLOUR_READING
    )
    fitting = [flag for factor, flag in reductions.items() if height >= factor * CHECK_SIZE]
    return fitting[-1] if fitting else next(iter(reductions.values()))


def _judge_garment(pictures: Pictures) -> Iterable[Judgement]:
    """The flat garment's mask: neither empty nor inverted."""
    if "cloth-mask" not in pictures:
        return
    mask = pictures["cloth-mask"] >= 128
    if not mask.any():
        yield (
            "error",
            "empty_mask",
            "cloth-mask",
            "has no white pixel: the garment would be ignored.",
        )
    elif _border_share(mask) > 0.5 and _center_share(mask) < 0.5:
        yield (
            "error",
            "inverted_mask",
            "cloth-mask",
            "is white around the garment; white must be the garment.",
        )


def _judge_person(pictures: Pictures) -> Iterable[Judgement]:
    """The person's masks, against each other and against the agnostic picture."""
    inpaint = pictures["agnostic-mask"] >= 128 if "agnostic-mask" in pictures else None
    if inpaint is not None:
        judgements = list(_judge_inpaint(inpaint, pictures.get("agnostic-v3.2")))
        yield from judgements
        if any(code == "inverted_mask" for _, code, _, _ in judgements):
            inpaint = ~inpaint  # so that the other masks are judged against what was meant
    if WARPED_MASK in pictures:
        yield from _judge_warped(pictures[WARPED_MASK] >= 128, inpaint)
    if CORRESPONDENCE in pictures:
        encoded = pictures[CORRESPONDENCE]
        if encoded.dtype != np.uint16 or encoded.ndim != 3:
            yield (
                "error",
                "wrong_format",
                CORRESPONDENCE,
                "must have 16 bits and three channels (y, x, valid).",
            )


def _judge_inpaint(inpaint: Mask, agnostic: NDArray[Any] | None) -> Iterable[Judgement]:
    """The region to paint: neither empty nor everything, and grey in the agnostic picture."""
    if not inpaint.any():
        yield (
            "error",
            "empty_mask",
            "agnostic-mask",
            "has no white pixel: nothing would be painted.",
        )
        return
    if inpaint.all():
        yield (
            "warning",
            "full_mask",
            "agnostic-mask",
            "is white everywhere: the whole picture would be painted.",
        )
        return
    if agnostic is None or agnostic.shape[:2] != inpaint.shape:
        return
    grey = np.asarray((np.abs(agnostic.astype(np.int16) - 128) <= 10).all(axis=-1))
    inside, outside = float(grey[inpaint].mean()), float(grey[~inpaint].mean())
    if outside > inside + 0.3:
        text = (
            f"is black where the agnostic picture is grey ({outside:.0%} grey outside, {inside:.0%} inside); "
            "white must be the region to paint."
        )
        yield "error", "inverted_mask", "agnostic-mask", text
    elif inside < 0.25:
        text = f"is grey in only {inside:.0%} of its mask: it may show the clothes."
        yield "warning", "agnostic_not_grey", "agnostic-v3.2", text


def _judge_warped(warped: Mask, inpaint: Mask | None) -> Iterable[Judgement]:
    """The garment on the person: not empty, and inside the region to paint."""
    if not warped.any():
        yield (
            "warning",
            "empty_mask",
            WARPED_MASK,
            "has no white pixel: attention losses skip this sample.",
        )
        return
    if inpaint is None or inpaint.shape != warped.shape or inpaint.all() or not inpaint.any():
        return
    if warped[~inpaint].mean() > 0.5 and warped[inpaint].mean() < 0.9:
        text = "is white around the person; white must be the garment on the person."
        yield "error", "inverted_mask", WARPED_MASK, text


def _border_share(mask: Mask) -> float:
    """White share of the outermost pixels."""
    return float(np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).mean())


def _center_share(mask: Mask) -> float:
    """White share of the middle quarter."""
    height, width = mask.shape
    return float(mask[3 * height // 8 : 5 * height // 8, 3 * width // 8 : 5 * width // 8].mean())


def _run(jobs: list[Callable[[], _Checked]], threads: int | None, progress: bool) -> list[_Checked]:
    """Run all jobs on threads (reading and decoding leave Python's lock)."""
    count = threads or 2 * (os.cpu_count() or 1)
    with ThreadPoolExecutor(count) as pool:
        results = pool.map(lambda job: job(), jobs)
        return list(
            tqdm(
                results,
                total=len(jobs),
                desc="checking pictures",
                unit="item",
                disable=not progress,
            )
        )


def _check_sizes(
    sizes: list[_Sized], wanted: GridSize | None
) -> tuple[GridSize | None, list[Finding]]:
    """Pictures whose size differs from the wanted or the most frequent one."""
    if not sizes:
        return wanted, []
    expected = wanted or Counter(entry.size for entry in sizes).most_common(1)[0][0]
    origin = "was asked for" if wanted else "is the size of most"
    wrong = [
        Finding(
            "error",
            "wrong_size",
            e.split,
            e.folder,
            e.file,
            f"is {e.size} (height x width); {expected} {origin}.",
        )
        for e in sizes
        if e.size != expected
    ]
    return expected, wrong
