"""DensePose's 24 body parts: as labels, and in the colours that VITON-HD's ``image-densepose`` shows them in.

Parts (detectron2's numbering): 1, 2 torso; 3, 4 hands; 5, 6 feet; 7-10 upper legs; 11-14 lower legs; 15-18 upper arms;
19-22 lower arms; 23, 24 head. Their colours are OpenCV's colour map PARULA at label x 255 / 24, on black. DressCode
stores the labels themselves. The embedded dataset draws its bodies in colours of its own, which are read, too.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from i2am_train.data.arrays import Image, Mask
from i2am_train.data.picture_files import advice_on, read_values
from i2am_train.errors import DataError

TORSO, HANDS, FEET = (1, 2), (3, 4), (5, 6)
LEGS, ARMS, HEAD = tuple(range(7, 15)), tuple(range(15, 23)), (23, 24)
PARTS = 24

SURE = 40
"""Largest distance of a colour from a part's colour, in RGB: beyond it, it is no DensePose colour."""
GRID_BITS, CELL_BITS = 5, 3
"""Colours are looked up with the upper 5 of their 8 bits."""
SMALLEST_BODY = 0.005
"""Share of a pose picture that a body covers."""
LARGEST_UNSURE_SHARE = 0.1
"""Share of coloured pixels, edges left out, that may be far from every part's colour."""


def _palette() -> Image:
    """RGB of the labels 0...24."""
    levels = (np.arange(PARTS + 1) * 255 / PARTS).astype(np.uint8)
    shown = cv2.applyColorMap(levels[:, None], cv2.COLORMAP_PARULA)
    colours = np.array(shown[:, 0, ::-1], np.uint8)
    colours[0] = 0
    return colours


PALETTE = _palette()
# fmt: off
EMBEDDED_COLOURS = {
    2: (48, 96, 232), 23: (232, 228, 64), 16: (232, 80, 48), 15: (48, 208, 80), 20: (248, 168, 48), 19: (112, 240, 208),
    3: (248, 144, 208), 4: (250, 170, 220), 9: (152, 48, 208), 10: (72, 152, 152),
}
# fmt: on
"""RGB by part of the embedded dataset's pose pictures, which are drawn and not DensePose's."""


def _embedded_palette() -> Image:
    """Like the other palette; parts that are not drawn have the colour of no part."""
    colours = np.zeros_like(PALETTE)
    for part, colour in EMBEDDED_COLOURS.items():
        colours[part] = colour
    return colours


PALETTES = (PALETTE, _embedded_palette())
"""Whose colours are read: one picture has those of one."""


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
    foreground = picture.max(axis=-1) > SURE
    labels, unsure = _explained(picture, foreground & _even(picture))
    if unsure > LARGEST_UNSURE_SHARE:
        raise DataError(
            f"{path} is not in DensePose's colours ({unsure:.0%} of its body is none of "
            "them); expected detectron2's dp_segm on black (OpenCV's PARULA), or labels 0...24. Use pose=keypoints."
        )
    return labels


def what_is_strange(picture: Image) -> str | None:
    """Why a pose picture ``[H, W, 3]``, maybe reduced, shows no body in DensePose's colours; None if it does."""
    if not np.ptp(picture, axis=-1).any() and 0 < picture.max() <= PARTS:
        return None  # labels
    foreground = picture.max(axis=-1) > SURE
    if foreground.mean() < SMALLEST_BODY:
        return f"shows nobody: {1 - foreground.mean():.0%} of it is black"
    _, unsure = _explained(picture, foreground & _even(picture))
    if unsure > LARGEST_UNSURE_SHARE:
        return f"is not in DensePose's colours: {unsure:.0%} of its body is none of them"
    return None


def _even(picture: Image) -> Mask:
    """Where there is no edge within 3x3 pixels: edges are blurred, by JPEG and where a picture was reduced."""
    square = np.ones((3, 3), np.uint8)
    range_ = cv2.dilate(picture, square).astype(np.int16) - cv2.erode(picture, square)
    return np.asarray(range_.max(axis=-1) <= SURE)


def _explained(picture: Image, body: Mask) -> tuple[NDArray[np.uint8], float]:
    """Labels by the palette that explains a body best, and the share of it that is far from all of its colours."""
    cells = (picture >> CELL_BITS).astype(np.int32)
    index = (cells[..., 0] << 2 * GRID_BITS) | (cells[..., 1] << GRID_BITS) | cells[..., 2]
    found = []
    for palette in range(len(PALETTES)):
        nearest, distances = _nearest(palette)
        unsure = float((body & (distances[index] > SURE)).sum() / max(1, body.sum()))
        found.append((unsure, palette, nearest))
    unsure, _, nearest = min(found, key=lambda entry: entry[:2])
    return np.asarray(nearest[index]), unsure


@cache
def _nearest(palette: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The nearest label and its distance for every cell of a coarse grid of colours: much faster than every pixel."""
    levels = np.arange(1 << GRID_BITS, dtype=np.float32) * (1 << CELL_BITS) + (1 << CELL_BITS) / 2
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    distances = np.linalg.norm(colours - PALETTES[palette].astype(np.float32), axis=-1)
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
