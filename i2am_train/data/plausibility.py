"""What is wrong with the pictures of a person or garment, judged together: rules that hold for shop pictures.

Pictures are judged reduced to about 128 rows, masks in grey. An *error* would break training or teach it wrong
pictures, a *warning* is worth a look. The rules:

- a mask has two values, but for the noise of JPEG and the blur of edges; photographs, agnostic pictures and garments
  that were cut out have more;
- the garment's mask does not touch most of the border;
- the agnostic picture is in one grey where the mask is white, and shows the photograph elsewhere;
- the worn garment lies inside the region to paint;
- pose pictures show a body in DensePose's colours;
- a parsing map has the photograph's size and the labels of its layout's set, and keypoints lie on the body.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from i2am_train.data.parsing import HEAD, LabelSet, read_labels
from i2am_train.data.pictures import GREY, Image, Mask, differs, local_range
from i2am_train.data.poses import pose_picture_fault, read_keypoints, require_on_body
from i2am_train.errors import DataError
from i2am_train.types import GridSize, Role

Level = Literal["error", "warning"]

EDGE = 40
"""Range of grey values within 3x3 pixels that is an edge and not a place of one value."""
VALUE_NOISE = 12
"""Distance from a mask's two values that JPEG explains."""
BLACK = 48
"""Largest grey value of a mask's outside."""
LARGEST_OTHER = 0.03
"""Share of the places of one value that may have neither."""
GREY_NOISE = 10
"""Distance from 128 in any channel that is still the agnostic picture's grey."""
CHANGED = 24
"""Difference of agnostic picture and photograph, in any channel, that JPEG and reduction do not make."""
LARGEST_MISMATCH = 0.08
"""Share of the mask that may show the photograph, and of the grey that may lie outside the mask."""


class Judgement(NamedTuple):
    """Something that is wrong with the picture of a role."""

    level: Level
    code: str
    role: Role
    message: str


@dataclass
class Seen:
    """What was read of a person or a garment."""

    pictures: dict[str, NDArray[Any]] = field(default_factory=dict)
    """By role, reduced."""
    files: dict[str, Path] = field(default_factory=dict)
    """Of parsing map and keypoints, where there are any; they are read when they are judged."""
    size: GridSize | None = None
    """Of the photograph."""
    labels: LabelSet | None = None
    """Usual in the layout."""

    def mask(self, role: Role) -> Mask | None:
        """White is inside.

        >>> Seen({Role.GARMENT_MASK: np.array([[0, 255]], np.uint8)}).mask(Role.GARMENT_MASK)
        array([[False,  True]])
        """
        return self.pictures[role] >= 128 if role in self.pictures else None


def judge_garment(seen: Seen) -> Iterator[Judgement]:
    """The flat garment's mask: a mask, neither empty nor inverted.

    >>> [judgement] = judge_garment(Seen({Role.GARMENT_MASK: np.zeros((8, 6), np.uint8)}))
    >>> judgement.level, judgement.code
    ('error', 'empty_mask')
    """
    yield from _judge_values(seen, Role.GARMENT_MASK)
    mask = seen.mask(Role.GARMENT_MASK)
    if mask is None:
        return
    if not mask.any():
        yield Judgement("error", "empty_mask", Role.GARMENT_MASK, "has no white pixel: the garment would be ignored.")
    elif _border_share(mask) > 0.5 and _center_share(mask) < 0.5:
        text = "is white around the garment; white must be the garment."
        yield Judgement("error", "inverted_mask", Role.GARMENT_MASK, text)


def judge_person(seen: Seen) -> Iterator[Judgement]:
    """The person's pictures, against each other.

    >>> [judgement] = judge_person(Seen({Role.INPAINT_MASK: np.full((8, 6), 255, np.uint8)}))
    >>> judgement.level, judgement.code
    ('warning', 'full_mask')
    """
    for role in (Role.INPAINT_MASK, Role.WARPED_MASK):
        yield from _judge_values(seen, role)
    region = seen.mask(Role.INPAINT_MASK)
    if region is not None:
        judgements = list(_judge_region(region, seen))
        yield from judgements
        if any(judgement.code == "inverted_mask" for judgement in judgements):
            region = ~region  # so that the other masks are judged against what was meant
    worn = seen.mask(Role.WARPED_MASK)
    if worn is not None:
        yield from _judge_worn(worn, region)
    if Role.CORRESPONDENCE in seen.pictures:
        encoded = seen.pictures[Role.CORRESPONDENCE]
        if encoded.dtype != np.uint16 or encoded.ndim != 3:
            text = "must have 16 bits and three channels (y, x, valid)."
            yield Judgement("error", "wrong_format", Role.CORRESPONDENCE, text)
    if Role.POSE_PICTURE in seen.pictures:
        yield from _judge_pose(seen.pictures[Role.POSE_PICTURE])
    yield from _judge_annotations(seen)


# -- masks -------------------------------------------------------------------------------------------------------------


def _judge_values(seen: Seen, role: Role) -> Iterator[Judgement]:
    """Whether a mask is one; what is none is not judged further."""
    if role not in seen.pictures:
        return
    others = share_of_other_values(seen.pictures[role])
    if others > LARGEST_OTHER:
        text = (
            f"is not a mask: {others:.0%} of it has neither of two values, as a photograph, an agnostic picture or a "
            "cut-out has; a mask is white inside its region and black outside. Bring masks, or delete the folder and "
            "have them made by 'i2am data derive'."
        )
        del seen.pictures[role]
        yield Judgement("error", "not_a_mask", role, text)


def share_of_other_values(grey: Image) -> float:
    """How much of a picture has neither of its two values, edges left out.

    >>> share_of_other_values(np.repeat(np.uint8([[0, 0, 255, 255]]), 3, axis=0))
    0.0
    """
    values = grey[local_range(grey) <= EDGE].astype(np.int16)
    if not len(values):
        return 1.0
    low, high = values[values < 128], values[values >= 128]
    if len(low) and np.median(low) > BLACK:
        return _strange(high) / len(values) + len(low) / len(values)
    return (_strange(low) + _strange(high)) / len(values)


def _strange(values: NDArray[np.int16]) -> int:
    """How many values are not the usual one."""
    return int((np.abs(values - np.median(values)) > VALUE_NOISE).sum()) if len(values) else 0


def _judge_region(region: Mask, seen: Seen) -> Iterator[Judgement]:
    """The region to paint: neither empty nor everything, and what the agnostic picture has in grey."""
    if not region.any():
        yield Judgement("error", "empty_mask", Role.INPAINT_MASK, "has no white pixel: nothing would be painted.")
        return
    if region.all():
        text = "is white everywhere: the whole picture would be painted."
        yield Judgement("warning", "full_mask", Role.INPAINT_MASK, text)
        return
    agnostic = seen.pictures.get(Role.AGNOSTIC)
    if agnostic is None or agnostic.shape[:2] != region.shape:
        return
    grey = ~differs(agnostic, GREY, GREY_NOISE)
    inside, outside = float(grey[region].mean()), float(grey[~region].mean())
    if outside > inside + 0.3:
        text = (
            f"is black where the agnostic picture is grey ({outside:.0%} grey outside, {inside:.0%} inside); "
            "white must be the region to paint."
        )
        yield Judgement("error", "inverted_mask", Role.INPAINT_MASK, text)
    elif inside < 0.25:
        text = f"is grey in only {inside:.0%} of its mask: it may show the clothes."
        yield Judgement("warning", "agnostic_not_grey", Role.AGNOSTIC, text)
    else:
        yield from _judge_fit(region, agnostic, grey, seen.pictures.get(Role.PERSON))


def _judge_fit(region: Mask, agnostic: Image, grey: Mask, photograph: Image | None) -> Iterator[Judgement]:
    """Whether mask and grey are of one rule, but for the outermost pixels."""
    if photograph is None or photograph.shape != agnostic.shape:
        return
    painted = grey & differs(agnostic, photograph, CHANGED)
    square = np.ones((3, 3), np.uint8)
    core = cv2.erode(region.astype(np.uint8), square) > 0
    around = cv2.dilate(region.astype(np.uint8), square) > 0
    near_grey = cv2.dilate(grey.astype(np.uint8), square) > 0
    shown = float((core & ~near_grey).sum() / region.sum())
    beyond = float((painted & ~around).sum() / max(1, painted.sum()))
    if max(shown, beyond) > LARGEST_MISMATCH:
        text = (
            f"does not fit the agnostic picture: {shown:.0%} of the mask shows the photograph there, {beyond:.0%} of "
            "its grey lies outside the mask. They are of different rules: take both from one source, or delete one of "
            "the folders and have it made by 'i2am data derive'."
        )
        yield Judgement("warning", "mask_mismatch", Role.INPAINT_MASK, text)


def _judge_worn(worn: Mask, region: Mask | None) -> Iterator[Judgement]:
    """The garment on the person: not empty, and inside the region to paint."""
    if not worn.any():
        text = "has no white pixel: attention losses skip this sample."
        yield Judgement("warning", "empty_mask", Role.WARPED_MASK, text)
        return
    if region is None or region.shape != worn.shape or region.all() or not region.any():
        return
    if worn[~region].mean() > 0.5 and worn[region].mean() < 0.9:
        text = "is white around the person; white must be the garment on the person."
        yield Judgement("error", "inverted_mask", Role.WARPED_MASK, text)


def _border_share(mask: Mask) -> float:
    """White share of the outermost pixels."""
    return float(np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).mean())


def _center_share(mask: Mask) -> float:
    """White share of the middle quarter."""
    height, width = mask.shape
    return float(mask[3 * height // 8 : 5 * height // 8, 3 * width // 8 : 5 * width // 8].mean())


# -- bodies ------------------------------------------------------------------------------------------------------------


def _judge_pose(picture: Image) -> Iterator[Judgement]:
    """Whether a pose picture shows a body, as it is coloured for models."""
    fault = pose_picture_fault(picture)
    if fault is not None:
        text = f"{fault}; expected detectron2's dp_segm on black (OpenCV's PARULA), or labels 0...24."
        yield Judgement("warning", "not_densepose", Role.POSE_PICTURE, text)


def _judge_annotations(seen: Seen) -> Iterator[Judgement]:
    """Parsing map and keypoints, as ``derive`` reads them."""
    if seen.size is None or seen.labels is None:
        return
    body = head = None
    if Role.PARSING in seen.files:
        path = seen.files[Role.PARSING]
        try:
            labels = read_labels(path, seen.labels)
            if labels.shape == tuple(seen.size):
                body, head = labels > 0, seen.labels.inside(labels, HEAD | {"hair"})
            else:
                found = GridSize(*labels.shape)
                text = f"is {found} (height x width), and the photograph is {seen.size}."
                yield Judgement("warning", "parsing_map", Role.PARSING, text)
        except DataError as error:
            yield Judgement("warning", "parsing_map", Role.PARSING, _without_name(error, path))
    if Role.KEYPOINTS in seen.files:
        path = seen.files[Role.KEYPOINTS]
        try:
            joints = read_keypoints(path, seen.size)
            if body is not None and head is not None:
                require_on_body(joints, body, head, path)
        except DataError as error:
            yield Judgement("warning", "keypoints", Role.KEYPOINTS, _without_name(error, path))


def _without_name(error: DataError, path: Path) -> str:
    """A message that continues a file's name."""
    return str(error).removeprefix(str(path)).strip()
