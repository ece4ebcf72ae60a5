"""DensePose's 24 body parts: as labels, and in the colours that VITON-HD's ``image-densepose`` shows them in.

Parts (detectron2's numbering): 1, 2 torso; 3, 4 hands; 5, 6 feet; 7-10 upper legs; 11-14 lower legs; 15-18 upper arms;
19-22 lower arms; 23, 24 head. Their colours are OpenCV's colour map PARULA at label x 255 / 24, on black. DressCode
stores the labels themselves.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from i2am_train.datasets.arrays import Image, Mask
from i2am_train.datasets.picture_files import read_values
from i2am_train.datasets.pictures import advice_on
from i2am_train.errors import DataError

TORSO, HANDS, FEET = (1, 2), (3, 4), (5, 6)
LEGS, ARMS, HEAD = tuple(range(7, 15)), tuple(range(15, 23)), (23, 24)
PARTS = 24

SURE = 40
"""Largest distance of a colour from a part's colour, in RGB: beyond it, it is no DensePose colour."""
GRID_BITS, CELL_BITS = 5, 3
"""Colours are looked up with the upper 5 of their 8 bits."""
LARGEST_UNSURE_SHARE = 0.1
"""Share of coloured pixels that may be far from every part's colour (edges are blurred by JPEG)."""


def _palette() -> Image:
    """RGB of the labels 0...24."""
    levels = (np.arange(PARTS + 1) * 255 / PARTS).astype(np.uint8)
    shown = cv2.applyColorMap(levels[:, None], cv2.COLORMAP_PARULA)
    colours = np.array(shown[:, 0, ::-1], np.uint8)
    colours[0] = 0
    return colours


PALETTE = _palette()


def coloured(labels: NDArray[np.uint8]) -> Image:
    """Labels ``[H, W]`` as RGB ``[H, W, 3]``."""
    return PALETTE[labels]


def read_pose_picture(path: Path) -> Image:
    """The body parts in colours ``[H, W, 3]``, from a picture or from labels.

    Raises:
        DataError: the file is broken, or grey and no label map.
    """
    picture = _values(path)
    return coloured(_checked(picture, path)) if picture.ndim == 2 else picture


def read_parts(path: Path) -> NDArray[np.uint8]:
    """The labels ``[H, W]`` of a picture in DensePose's colours, or of a label map.

    Raises:
        DataError: the file is broken, or its colours are not DensePose's.
    """
    picture = _values(path)
    return _checked(picture, path) if picture.ndim == 2 else parts_of(picture, path)


def _values(path: Path) -> NDArray[Any]:
    """Labels ``[H, W]`` of a grey picture, RGB of another, black where it is transparent."""
    with advice_on(path):
        return read_values(path, palette=False)


def parts_of(picture: Image, path: Path) -> NDArray[np.uint8]:
    """The nearest label for every colour.

    Raises:
        DataError: many colours are far from all of DensePose's.
    """
    nearest, distances = _nearest()
    cells = (picture >> CELL_BITS).astype(np.int32)
    index = (cells[..., 0] << 2 * GRID_BITS) | (cells[..., 1] << GRID_BITS) | cells[..., 2]
    labels: NDArray[np.uint8] = nearest[index]
    foreground = picture.max(axis=-1) > SURE
    unsure = foreground & (distances[index] > SURE)
    if unsure.sum() > LARGEST_UNSURE_SHARE * max(1, foreground.sum()):
        raise DataError(
            f"{path} is not in DensePose's colours ({unsure.sum() / foreground.sum():.0%} of its body is none of "
            "them); expected detectron2's dp_segm on black (OpenCV's PARULA), or labels 0...24. Use pose=keypoints."
        )
    return labels


@cache
def _nearest() -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The nearest label and its distance for every cell of a coarse grid of colours: much faster than every pixel."""
    levels = np.arange(1 << GRID_BITS, dtype=np.float32) * (1 << CELL_BITS) + (1 << CELL_BITS) / 2
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(
        -1, 1, 3
    )
    distances = np.linalg.norm(colours - PALETTE.astype(np.float32), axis=-1)
    return distances.argmin(axis=1).astype(np.uint8), distances.min(axis=1)


def inside(labels: NDArray[np.uint8], parts: tuple[int, ...]) -> Mask:
    """Where any of the parts is."""
    return np.isin(labels, parts)


def _checked(labels: NDArray[np.uint8], path: Path) -> NDArray[np.uint8]:
    if labels.dtype != np.uint8 or labels.max() > PARTS:
        raise DataError(
            f"{path} holds values up to {labels.max()}; expected DensePose's labels 0...{PARTS}, or a picture in "
            "colours."
        )
    return labels
