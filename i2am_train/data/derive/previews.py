"""Contact sheets of derived files: one row of pictures per person, to be looked at before training."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from i2am_train.data.arrays import Image, Mask
from i2am_train.data.derive.densepose import read_pose_picture
from i2am_train.data.derive.keypoints import SIDES, chain, draw_limb, read_keypoints
from i2am_train.data.derive.parsing import LabelSet, read_labels
from i2am_train.data.layouts import Layout, Pair
from i2am_train.data.picture_files import is_there, read_colour, read_native_mask, write_picture
from i2am_train.data.pictures import fit_picture, resize_mask
from i2am_train.errors import DataError
from i2am_train.fingerprints import PREVIEWS
from i2am_train.types import GridSize, Role

TILE = GridSize(320, 240)
TINT = (220, 30, 30)
LIMBS = (("shoulder", "elbow", "wrist"), ("hip", "knee", "ankle"))


def sheet_path(layout: Layout, pair: Pair) -> Path:
    """Where the sheet of a person lies."""
    return layout.root / PREVIEWS / layout.label.replace(" ", "_") / f"{pair.person}.jpg"


def write_sheet(layout: Layout, pair: Pair, labels: LabelSet) -> None:
    """Draw the files of a person and their garment, as they lie on disk, beside each other.

    From left to right: photograph; parsing map; keypoints; pose picture; region to paint; agnostic picture; worn
    garment; flat garment with its mask. What is not there is black.
    """
    photograph = read_colour(layout.path(Role.PERSON, pair.person))
    tiles = [photograph, *_steps(layout, pair, labels, photograph)]
    black = np.zeros_like(photograph)
    fitted = [fit_picture(black if tile is None else tile, TILE, "pad", 255) for tile in tiles]
    write_picture(sheet_path(layout, pair), np.hstack(fitted))


def _steps(layout: Layout, pair: Pair, labels: LabelSet, photograph: Image) -> list[Image | None]:
    person, garment = pair

    def there(role: Role, stem: str) -> Path | None:
        path = layout.path(role, stem)
        return path if is_there(path) else None

    parsing, keypoints = there(Role.PARSING, person), there(Role.KEYPOINTS, person)
    pose, agnostic = there(Role.POSE_PICTURE, person), there(Role.AGNOSTIC, person)
    region, worn = there(Role.INPAINT_MASK, person), there(Role.WARPED_MASK, person)
    flat, flat_mask = there(Role.GARMENT, garment), there(Role.GARMENT_MASK, garment)
    return [
        labels.coloured(read_labels(parsing, labels)) if parsing else None,
        _skeleton(photograph, keypoints) if keypoints else None,
        read_pose_picture(pose) if pose else None,
        _tinted(photograph, read_native_mask(region)) if region else None,
        read_colour(agnostic) if agnostic else None,
        _tinted(photograph, read_native_mask(worn)) if worn else None,
        _tinted(read_colour(flat), read_native_mask(flat_mask)) if flat and flat_mask else None,
    ]


def _tinted(picture: Image, mask: Mask) -> Image:
    """A picture with a red veil over a mask."""
    inside = resize_mask(mask, GridSize(*picture.shape[:2]))
    veil = cv2.addWeighted(picture, 0.45, np.full_like(picture, TINT), 0.55, 0.0)
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
        for names in LIMBS:
            draw_limb(lines, chain(joints, side, names), width, 1)
    pale = cv2.addWeighted(photograph, 0.5, np.full_like(photograph, 255), 0.5, 0.0)
    return np.where(lines[..., None] > 0, np.array(TINT, np.uint8), pale)
