"""``i2am data derive``: masks and agnostic pictures from photographs, parsing maps and poses.

Order of work: parsing maps and keypoints that are missing (through models, if there are any), masks of flat garments,
then the people. Files that exist are kept unless told otherwise, every file is written in one step, and what cannot be
made is refused sample by sample with its reason, so a stopped run goes on where it was and one bad picture stops
nothing.
The rules are those of :mod:`~i2am_train.data.agnostic` and :mod:`~i2am_train.data.flat_garments`.
A mask beside an agnostic picture that is kept is read off its grey, and an agnostic picture beside a mask that is kept
is made with it: regions of two rules are never mixed.
A preview is a contact sheet: one row of pictures per person, to be looked at before training.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from tqdm import tqdm

from i2am_train.config.data import DataDeriveConfig
from i2am_train.data.agnostic import PersonMasks, Pose, grey_region, person_masks
from i2am_train.data.dataset import Reading, halves
from i2am_train.data.flat_garments import garment_mask
from i2am_train.data.layouts import Layout, Pair, entries
from i2am_train.data.needed_files import refuse_doubles
from i2am_train.data.parsing import HEAD, LABEL_SETS, LabelMap, LabelSet, read_labels, usual_labels, write_labels
from i2am_train.data.picture_files import is_there, read_mask, read_rgb, write_picture
from i2am_train.data.pictures import Image, Mask, fit_picture, resize_mask
from i2am_train.data.poses import (
    SIDES,
    Joints,
    chain,
    densepose_picture,
    draw_limb,
    drawn_parts,
    openpose_json,
    read_keypoints,
    read_parts,
    read_pose_picture,
    require_on_body,
)
from i2am_train.errors import DataError
from i2am_train.files import write_text
from i2am_train.fingerprints import PREVIEWS
from i2am_train.types import Category, GridSize, Pairing, Role, Split

T = TypeVar("T")

Parser = Callable[[Sequence[Image], LabelSet], list[LabelMap]]
"""Parsing maps of photographs, in the labels of a set; the photographs' sizes are kept."""

Box = tuple[float, float, float, float]
"""Left, top, width and height in pixels."""
PoseEstimator = Callable[[Sequence[Image], Sequence[Box]], list[Joints]]
"""Keypoints of the people in photographs, each in a box."""

_MODEL_BATCH = 4
"""Photographs that a model sees at a time."""
_TILE, _TINT = GridSize(320, 240), (220, 30, 30)
"""Size of a preview's pictures, and the colour of masks in them."""


@dataclass(frozen=True)
class Refusal:
    """A picture that nothing could be made of."""

    part: str
    name: str
    reason: str


@dataclass
class DeriveReport:
    """What was made, kept and refused."""

    root: Path
    pose: dict[str, str] = field(default_factory=dict)
    """Where bodies came from, per split (and category)."""
    made: Counter[str] = field(default_factory=Counter)
    """Files per folder."""
    kept: Counter[str] = field(default_factory=Counter)
    refused: list[Refusal] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON.

        >>> DeriveReport(Path("set"), kept=Counter({"cloth-mask": 3})).to_dict()["kept"]
        {'cloth-mask': 3}
        """
        return {
            "schema": 1, "root": str(self.root), "pose": self.pose, "made": dict(self.made), "kept": dict(self.kept),
            "refused": [asdict(refusal) for refusal in self.refused],
        }  # fmt: skip

    def summary(self) -> str:
        """A paragraph: counts per folder, and the first refusals.

        >>> refused = [Refusal("test", "00017_00", "no garment")]
        >>> print(DeriveReport(Path("set"), made=Counter({"agnostic-mask": 2}), refused=refused).summary())
        set: agnostic-mask: 2 made, 0 kept; 1 refused.
          test 00017_00: no garment
        """
        counts = [
            f"{folder}: {self.made[folder]} made, {self.kept[folder]} kept"
            for folder in sorted({*self.made, *self.kept})
        ]
        lines = [f"{self.root}: {'; '.join(counts) or 'nothing to make'}; {len(self.refused)} refused."]
        return "\n".join([*lines, *refusal_lines(self.refused)])


def refusal_lines(refused: Sequence[Refusal]) -> list[str]:
    """The first refusals, for a summary.

    >>> refusal_lines([Refusal("train", "00017_00", "it is all black.")])
    ['  train 00017_00: it is all black.']
    """
    lines = [f"  {one.part} {one.name}: {one.reason}" for one in refused[:10]]
    more = f"  and {len(refused) - 10} more (all of them are in the JSON report)"
    return [*lines, more] if len(refused) > 10 else lines


def split_lists(config: DataDeriveConfig) -> list[Layout]:
    """The splits (of each category) that have a pair list."""
    there, _ = halves(config.root, Reading(config.layout, tuple(config.categories), options=""))
    return [one for one in there if one.split is Split.TRAIN or one.list_file(Pairing.PAIRED).is_file()]


def derive_dataset(
    config: DataDeriveConfig,
    parser: Parser | None = None,
    estimator: PoseEstimator | None = None,
    progress: bool = True,
) -> DeriveReport:
    """Make what a dataset lacks.

    Args:
        config: the dataset, and what to make from what; models and report are the caller's.
        parser: makes missing parsing maps.
        estimator: makes missing keypoints.
        progress: show bars.

    Raises:
        DataError: before anything is written: there is no list, no photographs, and nothing to derive from.
    """
    parts = [_Part(layout, config, parser, estimator, progress) for layout in split_lists(config)]
    for part in parts:
        people = dict.fromkeys((Role.PERSON, Role.PARSING, Role.KEYPOINTS, Role.POSE_PICTURE), part.people)
        refuse_doubles(part.layout, people | {Role.GARMENT: part.garments})
    report = DeriveReport(config.root, {part.layout.label: part.pose_source for part in parts})
    for part in parts:
        part.run(report)
    return report


class _Part:
    """A split (of a category): what is there, checked before anything is written."""

    def __init__(
        self, layout: Layout, config: DataDeriveConfig, parser: Parser | None, estimator: PoseEstimator | None,
        progress: bool,
    ) -> None:  # fmt: skip
        self.layout, self.config, self.progress = layout, config, progress
        pairs = layout.pairs(Pairing.PAIRED)
        unpaired = layout.listed(Pairing.UNPAIRED) if layout.split is Split.TEST else []
        self.people = sorted({pair.person for pair in pairs})
        self.garments = sorted({pair.garment for pair in [*pairs, *unpaired]})
        self.labels = LABEL_SETS.get(config.labels) or usual_labels(layout.category)
        self.category: Category = layout.category or config.category
        self._models: dict[Role, Callable[[list[str]], set[str]]] = {}
        if parser is not None:
            self._models[Role.PARSING] = partial(self._parse, parser)
        if estimator is not None:
            self._models[Role.KEYPOINTS] = partial(self._estimate, estimator)
        self._check_inputs()
        self.pose_source = self._pose_source()
        has_densepose = layout.has(Role.POSE_PICTURE) and layout.place(Role.POSE_PICTURE).folder != Role.DRAWN_POSE
        self.draws_pose = self.pose_source == "keypoints" and not has_densepose

    def _check_inputs(self) -> None:
        needed = [Role.PERSON, Role.GARMENT, *({Role.PARSING} - self._models.keys())]
        missing = [role for role in needed if not self.layout.has(role)]
        if missing:
            folders = ", ".join(self.layout.folder_names(role) for role in missing)
            advice = "Give parser=FOLDER_OR_NAME to make parsing maps." if Role.PARSING in missing else ""
            raise DataError(
                f"{self.layout.folder} has no folder {folders} (found: {entries(self.layout.folder)}). "
                f"Nothing was written. {advice}".strip()
            )

    def _pose_source(self) -> str:
        """Keypoints, densepose or none."""
        roles = {"keypoints": Role.KEYPOINTS, "densepose": Role.POSE_PICTURE}
        wanted = self.config.pose
        if wanted == "none":
            return wanted
        if Role.KEYPOINTS in self._models and wanted != "densepose":
            return "keypoints"
        names = [*roles] if wanted == "auto" else [wanted]
        there = [name for name in names if self.layout.has(roles[name])]
        if not there:
            folders = " or ".join(self.layout.folder_names(roles[name]) for name in names)
            raise DataError(
                f"{self.layout.folder} has no folder {folders} (found: {entries(self.layout.folder)}): where bodies "
                "are is not known. Nothing was written. Add keypoints or DensePose pictures (data/README.md), give "
                "estimator=FOLDER_OR_NAME to make keypoints, or use pose=none for regions from the parsing map alone."
            )
        return there[0]

    def run(self, report: DeriveReport) -> None:
        """Make everything."""
        for role, make in self._models.items():
            self._run_model(role, make, report)
        self._run(self.garments, self._derive_garment, "garments", report)
        self._run(self.people, self._derive_person, "people", report)

    def _run(self, stems: list[str], work: Callable[[str], _Files], what: str, report: DeriveReport) -> None:
        """Do the work of many on threads (OpenCV leaves Python's lock)."""
        with ThreadPoolExecutor(self.config.workers or os.cpu_count() or 1) as pool:
            results = pool.map(partial(attempt, work), stems)
            for stem, outcome in zip(stems, self._bar(results, len(stems), what), strict=True):
                if isinstance(outcome, _Files):
                    report.made.update(outcome.made)
                    report.kept.update(outcome.kept)
                else:
                    report.refused.append(Refusal(self.layout.label, stem, outcome))

    def _run_model(self, role: Role, make: Callable[[list[str]], set[str]], report: DeriveReport) -> None:
        """Make the files of a role that are missing, in batches."""
        there = {stem for stem in self.people if is_there(self.layout.path(role, stem))}
        kept = set() if self.config.overwrite else there
        report.kept[role] += len(kept)
        todo = [stem for stem in self.people if stem not in kept]
        batches = [todo[first : first + _MODEL_BATCH] for first in range(0, len(todo), _MODEL_BATCH)]
        for batch in self._bar(batches, len(batches), role):
            refused = make(batch)
            report.made[role] += len(batch) - len(refused)

    def _bar(self, items: Iterable[Any], total: int, what: str) -> tqdm[Any]:
        description = f"{self.layout.label} {what}"
        return tqdm(items, total=total, desc=description, unit="item", disable=not self.progress)

    # -- models --------------------------------------------------------------------------------------------------------

    def _parse(self, parser: Parser, stems: list[str]) -> set[str]:
        """Write parsing maps; returns the people that cannot be read (who are refused when they are derived)."""
        pictures, refused = _all(stems, self._photograph)
        found = parser(list(pictures.values()), self.labels)
        for stem, labels in zip(pictures, found, strict=True):
            write_labels(self.layout.path(Role.PARSING, stem), labels, self.labels)
        return refused

    def _estimate(self, estimator: PoseEstimator, stems: list[str]) -> set[str]:
        """Write keypoints of the person in the parsing map's box; returns the people that cannot be read."""
        boxes, refused = _all(stems, self._box)
        pictures, unreadable = _all(list(boxes), self._photograph)
        found = estimator(list(pictures.values()), [boxes[stem] for stem in pictures])
        for stem, joints in zip(pictures, found, strict=True):
            write_text(self.layout.path(Role.KEYPOINTS, stem), openpose_json(joints))
        return refused | unreadable

    def _photograph(self, stem: str) -> Image:
        return read_rgb(self.layout.path(Role.PERSON, stem))

    def _box(self, stem: str) -> Box:
        path = self.layout.path(Role.PARSING, stem)
        rows, columns = np.nonzero(read_labels(path, self.labels))
        if not len(rows):
            raise DataError(f"{path} shows nobody: all of it is background. Make it again.")
        left, top = float(columns.min()), float(rows.min())
        return left, top, float(columns.max()) - left + 1, float(rows.max()) - top + 1

    # -- one garment, one person ---------------------------------------------------------------------------------------

    def _derive_garment(self, stem: str) -> _Files:
        """The mask of a flat garment."""
        files = _Files(self.layout, stem, [Role.GARMENT_MASK], self.config.overwrite)
        if files.wanted:
            files.write(Role.GARMENT_MASK, garment_mask(read_rgb(self.layout.path(Role.GARMENT, stem))))
        return files

    def _derive_person(self, stem: str) -> _Files:
        """Region to paint, agnostic picture and worn garment of a person, and a pose picture where there is none."""
        drawn = [Role.DRAWN_POSE] if self.draws_pose else []
        files = _Files(
            self.layout, stem, [Role.INPAINT_MASK, Role.AGNOSTIC, Role.WARPED_MASK, *drawn], self.config.overwrite
        )
        if files.wanted:
            self._make(stem, files)
        if self.config.preview:
            garment = self.layout.own_garment(stem)
            _write_sheet(self.layout, Pair(stem, garment), self.labels)
        return files

    def _make(self, stem: str, files: _Files) -> None:
        photograph = read_rgb(self.layout.path(Role.PERSON, stem))
        size = GridSize(*photograph.shape[:2])
        path = self.layout.path(Role.PARSING, stem)
        labels = read_labels(path, self.labels)
        require_size(path, labels.shape, size)
        pose = self._pose(stem, size)
        if isinstance(pose, dict):
            head = self.labels.inside(labels, HEAD | {"hair"})
            require_on_body(pose, labels > 0, head, self.layout.path(Role.KEYPOINTS, stem))
        masks = person_masks(labels, self.labels, self.category, pose)
        masks = PersonMasks(masks.worn, self._region(stem, files, photograph, masks.region))
        files.write(Role.INPAINT_MASK, masks.region)
        files.write(Role.AGNOSTIC, masks.agnostic(photograph))
        files.write(Role.WARPED_MASK, masks.worn)
        if self.draws_pose and isinstance(pose, dict):
            files.write(Role.DRAWN_POSE, densepose_picture(drawn_parts(pose, size)))

    def _region(self, stem: str, files: _Files, photograph: Image, derived: Mask) -> Mask:
        """The region to paint: of a mask or an agnostic picture that is kept, else the derived one; never a mixture."""
        if Role.INPAINT_MASK in files.kept:
            path = self.layout.path(Role.INPAINT_MASK, stem)
            mask = read_mask(path)
            require_size(path, mask.shape, GridSize(*derived.shape))
            return mask
        if Role.AGNOSTIC in files.kept:
            path = self.layout.path(Role.AGNOSTIC, stem)
            return grey_region(read_rgb(path), photograph, path)
        return derived

    def _pose(self, stem: str, size: GridSize) -> Pose:
        if self.pose_source == "keypoints":
            return read_keypoints(self.layout.path(Role.KEYPOINTS, stem), size)
        if self.pose_source == "densepose":
            path = self.layout.path(Role.POSE_PICTURE, stem)
            parts = read_parts(path)
            require_size(path, parts.shape, size)
            return parts
        return None


class _Files:
    """The files to make of one person or garment; those that exist are kept unless they are to be overwritten."""

    def __init__(self, layout: Layout, stem: str, roles: Sequence[Role], overwrite: bool) -> None:
        self.paths = {role: layout.path(role, stem) for role in roles}
        self.kept = [role for role in roles if not overwrite and is_there(self.paths[role])]
        self.made: list[Role] = []

    @property
    def wanted(self) -> bool:
        return len(self.kept) < len(self.paths)

    def write(self, role: Role, picture: np.ndarray[Any, Any]) -> None:
        """Write a picture or mask, unless it is to be kept."""
        if role not in self.kept:
            write_picture(self.paths[role], picture)
            self.made.append(role)


def require_size(path: Path, shape: tuple[int, ...], size: GridSize) -> None:
    """Refuse a file whose picture has another size than its photograph."""
    if tuple(shape) != tuple(size):
        raise DataError(
            f"{path} is {shape[0]}x{shape[1]} (height x width), and the photograph is {size}; expected the same size. "
            "Make it again from the photograph."
        )


def attempt(work: Callable[[str], T], stem: str) -> T | str:
    """The result, or the reason of a refusal.

    >>> attempt(lambda stem: len(stem), "00017_00")
    8
    """
    try:
        return work(stem)
    except DataError as error:
        return str(error)


def _all(stems: list[str], read: Callable[[str], T]) -> tuple[dict[str, T], set[str]]:
    """What can be read, and whose cannot."""
    found: dict[str, T] = {}
    for stem in stems:
        with suppress(DataError):
            found[stem] = read(stem)
    return found, set(stems) - set(found)


# -- previews ----------------------------------------------------------------------------------------------------------


def _write_sheet(layout: Layout, pair: Pair, labels: LabelSet) -> None:
    """Draw the files of a person and their garment, as they lie on disk, beside each other.

    From left to right: photograph; parsing map; keypoints; pose picture; region to paint; agnostic picture; worn
    garment; flat garment with its mask. What is not there is black.
    """
    person, garment = pair
    photograph = read_rgb(layout.path(Role.PERSON, person))

    def shown(draw: Callable[..., Image], stem: str, *roles: Role) -> Image:
        paths = [layout.path(role, stem) for role in roles]
        return draw(*paths) if all(map(is_there, paths)) else np.zeros_like(photograph)

    tiles = [
        photograph,
        shown(lambda path: labels.coloured(read_labels(path, labels)), person, Role.PARSING),
        shown(partial(_skeleton, photograph), person, Role.KEYPOINTS),
        shown(read_pose_picture, person, Role.POSE_PICTURE),
        shown(partial(_tinted, photograph), person, Role.INPAINT_MASK),
        shown(read_rgb, person, Role.AGNOSTIC),
        shown(partial(_tinted, photograph), person, Role.WARPED_MASK),
        shown(lambda flat, mask: _tinted(read_rgb(flat), mask), garment, Role.GARMENT, Role.GARMENT_MASK),
    ]
    path = layout.root / PREVIEWS / layout.label.replace(" ", "_") / f"{person}.jpg"
    write_picture(path, np.hstack([fit_picture(tile, _TILE, "pad", 255) for tile in tiles]))


def _tinted(picture: Image, path: Path) -> Image:
    """A picture with a red veil over the mask of a file."""
    inside = resize_mask(read_mask(path), GridSize(*picture.shape[:2]))
    veil = cv2.addWeighted(picture, 0.45, np.full_like(picture, _TINT), 0.55, 0.0)
    return np.where(inside[..., None], veil, picture)


def _skeleton(photograph: Image, path: Path) -> Image:
    """Limbs drawn over a pale photograph."""
    try:
        joints = read_keypoints(path, GridSize(*photograph.shape[:2]))
    except DataError:
        return np.zeros_like(photograph)
    lines = np.zeros(photograph.shape[:2], np.uint8)
    width = max(2.0, photograph.shape[0] / 100)
    for side in SIDES:
        for names in (("shoulder", "elbow", "wrist"), ("hip", "knee", "ankle")):
            draw_limb(lines, chain(joints, side, names), width, 1)
    pale = cv2.addWeighted(photograph, 0.5, np.full_like(photograph, 255), 0.5, 0.0)
    return np.where(lines[..., None] > 0, np.array(_TINT, np.uint8), pale)
