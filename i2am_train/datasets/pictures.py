"""Reading the pictures of a try-on dataset: whole files only, one size, masks as booleans."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from i2am_train.datasets.arrays import Image, Mask
from i2am_train.errors import DataError
from i2am_train.types import GridSize

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
PNG_START, PNG_END = b"\x89PNG", b"IEND\xaeB`\x82"
TAIL = 4096
"""Bytes at the end of a file in which its end mark is looked for (some writers append padding)."""


def read_picture(path: Path, flags: int) -> NDArray[Any]:
    """Decode a whole picture; OpenCV alone would fill the missing part of a cut-off JPEG with grey.

    Raises:
        DataError: the file is missing, cut off or no picture.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {error.strerror or error}. {_advice(path)}"
        ) from error
    fault = what_is_broken(content)
    picture = None if fault else cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    if picture is None:
        raise DataError(f"{path} {fault or 'cannot be decoded'}. {_advice(path)}")
    return cast("NDArray[Any]", picture)


def what_is_broken(content: bytes) -> str | None:
    """Why a file cannot be a whole JPEG or PNG picture, or None.

    >>> what_is_broken(b"")
    'is empty'
    """
    if not content:
        return "is empty"
    kinds = ((JPEG_START, JPEG_END), (PNG_START, PNG_END))
    for start, end in kinds:
        if content.startswith(start):
            return None if end in content[-TAIL:] else f"is cut off after {len(content)} bytes"
    return "is neither a JPEG nor a PNG picture"


def _advice(path: Path) -> str:
    """How to find all faults of the dataset that a file belongs to."""
    return f"Run 'i2am data check root={path.parents[2]}' to list everything that is wrong with the dataset."


def read_colour(path: Path, size: GridSize) -> Image:
    """RGB ``[H, W, 3]``, resized as :func:`resize_picture` does."""
    return resize_picture(
        cv2.cvtColor(read_picture(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB), size
    )


def read_native_mask(path: Path) -> Mask:
    """A mask at its own size: grey value at least 128."""
    return np.asarray(read_picture(path, cv2.IMREAD_GRAYSCALE) >= 128)


def resize_picture(picture: NDArray[Any], size: GridSize) -> Image:
    """Bilinear as in the authors' code up to a factor of two (there equal to a box mean), area mean beyond it."""
    if picture.shape[:2] == tuple(size):
        return cast(Image, picture)
    beyond = max(picture.shape[0] / size.height, picture.shape[1] / size.width) > 2.0
    mode = cv2.INTER_AREA if beyond else cv2.INTER_LINEAR
    return cast(Image, cv2.resize(picture, (size.width, size.height), interpolation=mode))


def resize_mask(mask: Mask, size: GridSize) -> Mask:
    """True where at least half of a pixel's area is inside."""
    if mask.shape == tuple(size):
        return mask
    area = cv2.resize(
        mask.astype(np.float32), (size.width, size.height), interpolation=cv2.INTER_AREA
    )
    return np.asarray(area >= 0.5)


def resize_nearest(array: NDArray[Any], size: GridSize) -> NDArray[Any]:
    """Nearest neighbour, for values that must not be mixed."""
    if array.shape[:2] == tuple(size):
        return array
    return cast(
        "NDArray[Any]",
        cv2.resize(array, (size.width, size.height), interpolation=cv2.INTER_NEAREST_EXACT),
    )
