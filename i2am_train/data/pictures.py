"""Pictures and masks as numpy arrays, and at another size (as files: :mod:`~i2am_train.data.picture_files`).

Without torch: the processes that draw the synthetic dataset start faster.

Pictures of another size than the one asked for are resized. Where the aspect differs, too, ``Fit`` says how:
``stretch`` changes the proportions (what the authors do, and harmless where the aspect is the same), ``pad`` keeps
the whole picture and adds equal margins on two sides, ``crop`` keeps the largest centred part and loses the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from i2am_train.types import Fit, GridSize

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]

GREY = 128
"""What the agnostic image shows where the clothes were."""


@dataclass(frozen=True, kw_only=True)
class SampleArrays:
    """Pictures of one sample: images RGB uint8 ``[H, W, 3]``, masks bool ``[H, W]`` (True = inside).

    ``correspondence`` is float32 ``[H, W, 2]``: y and x on the flat garment in 0..1, NaN where there is no garment.
    """

    person: Image
    garment: Image
    agnostic: Image
    densepose: Image
    garment_mask: Mask
    inpaint_mask: Mask
    warped_garment_mask: Mask
    correspondence: NDArray[np.float32]


@dataclass(frozen=True)
class Window:
    """The part of a picture that fills the whole result, in shares of the picture: it may reach beyond it."""

    top: float
    left: float
    height: float
    width: float

    def carried(self, places: NDArray[np.float32]) -> NDArray[np.float32]:
        """Places ``[..., 2]`` (yx, 0..1) of the picture as places of the result; NaN where they left it.

        >>> Window(0.0, 0.25, 1.0, 0.5).carried(np.array([[0.5, 0.25], [0.5, 0.1]], np.float32)).tolist()
        [[0.5, 0.0], [nan, nan]]
        """
        if self == WHOLE:
            return places
        origin, extent = np.array([self.top, self.left]), np.array([self.height, self.width])
        moved = (places - origin) / extent
        inside = ((moved >= 0.0) & (moved <= 1.0)).all(axis=-1, keepdims=True)
        return np.where(inside, moved, np.nan).astype(np.float32)


WHOLE = Window(0.0, 0.0, 1.0, 1.0)


def window(native: GridSize, size: GridSize, fit: Fit) -> Window:
    """What of a picture of one size is seen in a result of another size.

    >>> window(GridSize(100, 100), GridSize(64, 48), "crop")
    Window(top=0.0, left=0.12, height=1.0, width=0.75)
    >>> window(GridSize(100, 100), GridSize(64, 48), "pad")
    Window(top=-0.1666..., left=0.0, height=1.333..., width=1.0)
    """
    if fit == "crop":
        top, left, height, width = _cut(native, size)
        whole = native
    elif fit == "pad":
        top, left, whole = _margins(native, size)
        top, left, (height, width) = -top, -left, size
    else:
        return WHOLE
    return Window(top / whole.height, left / whole.width, height / whole.height, width / whole.width)


def fit_picture(picture: Image, size: GridSize, fit: Fit, fill: int) -> Image:
    """A picture ``[H, W, 3]`` of any size at another; ``fill`` is the grey value beside a padded one.

    >>> fit_picture(np.zeros((2, 2, 3), np.uint8), GridSize(2, 4), "pad", 255)[0, :, 0].tolist()
    [255, 0, 0, 255]
    """
    return cast(Image, _fitted(picture, size, fit, fill, resize_picture))


def fit_mask(mask: Mask, size: GridSize, fit: Fit) -> Mask:
    """A mask of any size at another; False beside a padded one.

    >>> fit_mask(np.ones((2, 2), np.bool_), GridSize(2, 4), "pad")[0].tolist()
    [False, True, True, False]
    """
    return cast(Mask, _fitted(mask, size, fit, False, resize_mask))


def fit_nearest(array: NDArray[np.float32], size: GridSize, fit: Fit, fill: float) -> NDArray[np.float32]:
    """Values that must not be mixed, at another size.

    >>> fit_nearest(np.array([[1, 2, 3, 4]], np.float32), GridSize(1, 2), "crop", np.nan).tolist()
    [[2.0, 3.0]]
    """
    return cast("NDArray[np.float32]", _fitted(array, size, fit, fill, _resize_nearest))


def local_range(picture: Image) -> NDArray[np.int16]:
    """Largest minus smallest value within 3x3 pixels, per channel: what is even, and what is an edge.

    >>> local_range(np.array([[7, 7, 7, 9]], np.uint8)).tolist()
    [[0, 0, 2, 2]]
    """
    square = np.ones((3, 3), np.uint8)
    return np.asarray(cv2.dilate(picture, square).astype(np.int16) - cv2.erode(picture, square))


def differs(picture: Image, other: NDArray[Any] | int, limit: int) -> Mask:
    """Where any channel of a picture ``[H, W, 3]`` is further than a limit from another picture or a colour.

    >>> differs(np.array([[[100, 100, 100], [100, 100, 105]]], np.uint8), 100, limit=4).tolist()
    [[False, True]]
    """
    return np.asarray((np.abs(picture.astype(np.int16) - other) > limit).any(axis=-1))


def _cut(native: GridSize, size: GridSize) -> tuple[int, int, int, int]:
    """Top, left, height and width of the largest centred part with the aspect of ``size``."""
    height = min(native.height, round(native.width * size.height / size.width))
    width = min(native.width, round(native.height * size.width / size.height))
    return (native.height - height) // 2, (native.width - width) // 2, height, width


def _margins(native: GridSize, size: GridSize) -> tuple[int, int, GridSize]:
    """Top and left margin, and the size of the whole picture between the margins."""
    scale = min(size.height / native.height, size.width / native.width)
    height, width = max(1, round(native.height * scale)), max(1, round(native.width * scale))
    return (size.height - height) // 2, (size.width - width) // 2, GridSize(height, width)


def _fitted(
    array: NDArray[Any], size: GridSize, fit: Fit, fill: float, resize: Callable[[NDArray[Any], GridSize], NDArray[Any]]
) -> NDArray[Any]:
    """What is kept of a picture, resized, with margins of one value around it that are equal on opposite sides."""
    native, inner = GridSize(*array.shape[:2]), size
    if fit == "crop":
        top, left, height, width = _cut(native, size)
        array = array[top : top + height, left : left + width]
    elif fit == "pad":
        top, left, inner = _margins(native, size)
    resized = resize(array, inner)
    if inner == size:
        return resized
    result = np.full((*size, *resized.shape[2:]), fill, resized.dtype)
    result[top : top + inner.height, left : left + inner.width] = resized
    return result


def resize_picture(picture: NDArray[Any], size: GridSize) -> Image:
    """Bilinear as in the authors' code up to a factor of two (there equal to a box mean), area mean beyond it.

    >>> resize_picture(np.array([[[0], [90]]], np.uint8).repeat(3, axis=2), GridSize(1, 1)).tolist()
    [[[45, 45, 45]]]
    """
    if picture.shape[:2] == tuple(size):
        return cast(Image, picture)
    beyond = max(picture.shape[0] / size.height, picture.shape[1] / size.width) > 2.0
    mode = cv2.INTER_AREA if beyond else cv2.INTER_LINEAR
    return cast(Image, cv2.resize(picture, (size.width, size.height), interpolation=mode))


def resize_mask(mask: Mask, size: GridSize) -> Mask:
    """True where at least half of a pixel's area is inside.

    >>> resize_mask(np.array([[True, False, False, False]]), GridSize(1, 2)).tolist()
    [[True, False]]
    """
    if mask.shape == tuple(size):
        return mask
    area = cv2.resize(mask.astype(np.float32), (size.width, size.height), interpolation=cv2.INTER_AREA)
    return np.asarray(area >= 0.5)


def _resize_nearest(array: NDArray[Any], size: GridSize) -> NDArray[Any]:
    """Nearest neighbour, for values that must not be mixed."""
    if array.shape[:2] == tuple(size):
        return array
    return cast("NDArray[Any]", cv2.resize(array, (size.width, size.height), interpolation=cv2.INTER_NEAREST_EXACT))
