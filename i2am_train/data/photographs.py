"""Single pictures and masks that a user names on the command line, outside of any dataset."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from i2am_train.data.arrays import Image, Mask
from i2am_train.data.picture_files import (
    UnreadablePictureError,
    is_there,
    read_grey,
    read_rgb,
)
from i2am_train.data.pictures import INSIDE
from i2am_train.errors import DataError


def read_photograph(path: Path, option: str) -> Image:
    """A picture as RGB ``[height, width, 3]``, turned upright; what is transparent becomes white.

    Args:
        path: a picture file (:mod:`~i2am_train.data.picture_files`).
        option: how the command line calls it, for messages.

    Raises:
        DataError: there is no such file, or it is no whole picture.
    """
    with _named(path, option):
        return read_rgb(path)


def read_region(path: Path, option: str, picture: Image, of: str) -> Mask:
    """The white region of a mask ``[height, width]`` that belongs to a picture.

    Args:
        path: a picture file (:mod:`~i2am_train.data.picture_files`).
        option: how the command line calls it, for messages.
        picture: of the same size.
        of: how the command line calls the picture.

    Raises:
        DataError: it cannot be read, has another size, or no white pixel.
    """
    with _named(path, option):
        mask = np.asarray(read_grey(path) >= INSIDE)
    height, width = picture.shape[:2]
    if mask.shape != (height, width):
        raise DataError(
            f"{option}={path} is {mask.shape[0]}x{mask.shape[1]} (height x width), and {of}= is "
            f"{height}x{width}. Give a mask of the same size, white inside the region."
        )
    if not mask.any():
        raise DataError(
            f"{option}={path} has no white pixel, so there is no region. Paint it white, the rest "
            "black."
        )
    return mask


@contextmanager
def _named(path: Path, option: str) -> Iterator[None]:
    """Puts the option into the error of its file."""
    if not is_there(path):
        raise DataError(f"There is no file {path}. Give {option}=FILE, a picture.")
    try:
        yield
    except UnreadablePictureError as error:
        raise DataError(f"{option}={error}") from error
