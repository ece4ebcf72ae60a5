"""Single pictures and masks that a user names on the command line, outside of any dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageOps, UnidentifiedImageError

from i2am_train.datasets.arrays import Image, Mask
from i2am_train.errors import DataError

INSIDE = 128
"""Grey value from which a mask's pixel is inside."""


def read_photograph(path: Path, option: str) -> Image:
    """A picture as RGB ``[height, width, 3]``, turned upright; what is transparent becomes white.

    Args:
        path: a file that Pillow reads.
        option: how the command line calls it, for messages.

    Raises:
        DataError: there is no such file, or it is no whole picture.
    """
    picture = _open(path, option)
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        picture = PillowImage.new("RGBA", rgba.size, "white")
        picture.alpha_composite(rgba)
    return np.asarray(picture.convert("RGB"))


def read_region(path: Path, option: str, picture: Image, of: str) -> Mask:
    """The white region of a mask ``[height, width]`` that belongs to a picture.

    Args:
        path: a file that Pillow reads.
        option: how the command line calls it, for messages.
        picture: of the same size.
        of: how the command line calls the picture.

    Raises:
        DataError: it cannot be read, has another size, or no white pixel.
    """
    mask = np.asarray(_open(path, option).convert("L")) >= INSIDE
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


def _open(path: Path, option: str) -> PillowImage.Image:
    try:
        with PillowImage.open(path) as opened:
            opened.load()
            return ImageOps.exif_transpose(opened)
    except FileNotFoundError as error:
        raise DataError(f"There is no file {path}. Give {option}=FILE, a picture.") from error
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise DataError(
            f"{option}={path} cannot be read as a picture ({error}). Save it as PNG or JPEG again."
        ) from error
