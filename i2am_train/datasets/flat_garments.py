"""Masks of flat garments photographed on a plain background.

The background is what is connected to the picture's border and no further from the border's colour than the border's
own noise allows. Holes that the border does not reach (inside a neckline, between straps) belong to the garment.
Backgrounds that are textured or of several colours are refused, because a flood through them would be a guess.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from i2am_train.datasets.arrays import Image, Mask
from i2am_train.errors import DataError

BORDER = 0.02
"""Width of the border that the background's colour is read from, as a share of the picture."""
PLAIN_DISTANCE = 20.0
"""Largest distance (CIE Lab) of a border pixel from the border's median that counts as plain."""
PLAIN_SHARE = 0.7
"""Share of the border that must be plain: a garment may touch it here and there."""
SMALLEST_TOLERANCE, MARGIN = 4.0, 2.0
"""Distance from the background's colour that is still background: the border's 95th percentile plus a margin."""
SMALLEST_SHARE, LARGEST_SHARE = 0.02, 0.95
"""Share of the picture that a garment covers."""
SMALLEST_PIECE = 0.02
"""Pieces smaller than this share of the largest one are specks."""


def garment_mask(picture: Image) -> Mask:
    """The garment of a flat photograph ``[H, W, 3]``.

    Raises:
        DataError: the background is not plain, or nothing (or nearly everything) is the garment.
    """
    distance, border = _distance_from_background(picture)
    plain = float((distance[border] <= PLAIN_DISTANCE).mean())
    if plain < PLAIN_SHARE:
        raise DataError(
            f"the background is not plain: {plain:.0%} of the picture's border has one colour, {PLAIN_SHARE:.0%} is "
            "needed. Photograph the garment on a plain background, or bring a mask of your own."
        )
    quiet = distance[border & (distance <= PLAIN_DISTANCE)]
    tolerance = max(SMALLEST_TOLERANCE, float(np.percentile(quiet, 95)) + MARGIN)
    mask = _without_specks(_sharpened(~_reached(distance <= tolerance, border), distance))
    share = float(mask.mean())
    if not SMALLEST_SHARE <= share <= LARGEST_SHARE:
        what = "the garment is empty" if share < SMALLEST_SHARE else "no background is left"
        raise DataError(
            f"{what}: the mask covers {share:.0%} of the picture, expected {SMALLEST_SHARE:.0%} to "
            f"{LARGEST_SHARE:.0%}. The garment may have the background's colour; bring a mask of your own."
        )
    return mask


def _distance_from_background(picture: Image) -> tuple[NDArray[np.float32], Mask]:
    """Distance of every pixel from the border's median colour, in CIE Lab, and the border itself."""
    lab = cv2.cvtColor(picture.astype(np.float32) / np.float32(255), cv2.COLOR_RGB2LAB)
    height, width = picture.shape[:2]
    border = np.ones((height, width), np.bool_)
    edge = max(1, round(BORDER * min(height, width)))
    border[edge:-edge, edge:-edge] = False
    colour = np.median(lab[border], axis=0)
    return np.asarray(np.linalg.norm(lab - colour, axis=-1), np.float32), border


def _reached(alike: Mask, border: Mask) -> Mask:
    """What the border reaches through pixels that are like the background."""
    _, pieces = cv2.connectedComponents(alike.astype(np.uint8), connectivity=4)
    outside = np.unique(pieces[border & alike])
    return np.isin(pieces, outside[outside > 0])


def _sharpened(mask: Mask, distance: NDArray[np.float32]) -> Mask:
    """The outermost two pixels, only where they are more garment than background: edges are blurred."""
    near = np.ones((5, 5), np.uint8)
    inner = cv2.erode(mask.astype(np.uint8), near, borderValue=1) > 0
    half = distance >= 0.5 * cv2.dilate(distance, near)
    return np.asarray(inner | (mask & half))


def _without_specks(mask: Mask) -> Mask:
    """Only the large pieces."""
    count, pieces, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    if count < 2:
        return mask
    areas = statistics[:, cv2.CC_STAT_AREA]
    large = np.flatnonzero(areas >= SMALLEST_PIECE * areas[1:].max())
    return np.isin(pieces, large[large > 0])
