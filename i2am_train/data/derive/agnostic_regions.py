"""The region to paint, read off an agnostic picture that somebody else made.

Distributions of VITON-HD hold agnostic pictures and no masks, and each author's region is another: a mask by our own
rule beside such a picture would show the model clothes, or hide what the picture shows. So the region is what the
agnostic picture has in one grey where the photograph has something else. Where the photograph has that grey, too (a
grey garment or wall), nothing tells; small places of the kind inside the region are filled, large ones refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from i2am_train.data.arrays import Image, Mask
from i2am_train.errors import DataError

CHANGED = 24
"""Difference from the photograph, in any channel, that JPEG does not make: there the grey is read."""
TOLD = 8
"""Difference from the photograph by which a grey place is told from it."""
FLAT = 4
"""Distance from the grey, and range within 3x3 pixels, of what was painted: photographs are not that even."""
NEAR = 12
"""Largest distance from the grey in any channel: JPEG's noise."""
NEUTRAL = 8
"""Largest spread between the channels of a grey."""
PAINTED_SHARE = 0.9
"""Share of what was changed that has the one grey; the rest is blurred edges."""
SMALLEST, LARGEST = 0.01, 0.9
"""Share of the picture that a region to paint covers."""
LARGEST_DOUBT = 0.1
"""Share of the region where the photograph may be as grey as the agnostic picture."""
CLOSED = 0.01
"""Width of gaps and specks in the grey, as a share of the picture's height: blocks of JPEG."""


def grey_region(agnostic: Image, photograph: Image, path: Path) -> Mask:
    """Where an agnostic picture ``[H, W, 3]`` is grey and its photograph is not.

    Args:
        agnostic: the picture.
        photograph: of the same person and size.
        path: of the agnostic picture, for messages.

    Raises:
        DataError: the two differ in more than one grey, or the grey cannot be told from the photograph.
    """
    if agnostic.shape != photograph.shape:
        found, expected = ("x".join(map(str, one.shape[:2])) for one in (agnostic, photograph))
        raise _unreadable(path, f"it is {found} (height x width), and the photograph is {expected}")
    changed = _differs(agnostic, photograph, CHANGED)
    share = float(changed.mean())
    if share < SMALLEST:
        raise _unreadable(path, f"it differs from the photograph in {share:.1%} of its pixels")
    grey = np.median(agnostic[changed], axis=0)
    near = ~_differs(agnostic, grey, NEAR)
    painted = float(near[_inner(changed)].mean()) if _inner(changed).any() else 0.0
    if np.ptp(grey) > NEUTRAL or painted < PAINTED_SHARE:
        colour = tuple(int(level) for level in grey)
        raise _unreadable(path, f"{painted:.0%} of what differs from the photograph is {colour}")
    painted_over = _is_flat(agnostic, grey) & ~_is_flat(photograph, grey)
    region = _smooth(near & (_differs(agnostic, photograph, TOLD) | painted_over))
    alike = near & ~region
    doubtful = alike & _touching(alike, region)
    if doubtful.sum() > LARGEST_DOUBT * region.sum():
        raise _unreadable(
            path,
            f"beside its region the photograph is as grey as it ({doubtful.mean():.0%} of the picture)",
        )
    if not SMALLEST <= region.mean() <= LARGEST:
        raise _unreadable(path, f"its grey covers {region.mean():.0%} of the picture")
    return region


def _unreadable(path: Path, why: str) -> DataError:
    return DataError(
        f"The region to paint cannot be read off the agnostic picture {path}: {why}. A mask by another rule would not "
        "fit it. Bring a mask of your own, or delete the agnostic picture (or use overwrite=true) to have both made "
        "anew."
    )


def _differs(picture: Image, other: NDArray[Any], limit: int) -> Mask:
    """Where any channel differs by more than a limit."""
    return np.asarray((np.abs(picture.astype(np.int16) - other) > limit).any(axis=-1))


def _is_flat(picture: Image, grey: NDArray[Any]) -> Mask:
    """Where a picture is evenly of a grey."""
    square = np.ones((3, 3), np.uint8)
    spread = cv2.dilate(picture, square).astype(np.int16) - cv2.erode(picture, square)
    return np.asarray(~_differs(picture, grey, FLAT) & (spread.max(axis=-1) <= FLAT))


def _inner(mask: Mask) -> Mask:
    """Without the outermost pixels, which are blurred."""
    return cv2.erode(mask.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0


def _smooth(mask: Mask) -> Mask:
    """Without the gaps and specks of JPEG, and with what the region encloses."""
    width = 2 * max(1, round(CLOSED * mask.shape[0] / 2)) + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), *(4 * (width,)), cv2.BORDER_REPLICATE)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, disc)
    opened = cv2.morphologyEx(closed, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    return opened[width:-width, width:-width] > 0


def _touching(pieces: Mask, region: Mask) -> Mask:
    """The pieces that touch a region."""
    _, numbers = cv2.connectedComponents((pieces | region).astype(np.uint8), connectivity=8)
    touching = np.unique(numbers[region])
    return np.asarray(np.isin(numbers, touching))
