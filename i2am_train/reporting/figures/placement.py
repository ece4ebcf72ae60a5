"""Where the grids of tokens lie on the pictures that figures show, which all have the generated one's aspect."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from i2am_train.data.pictures import Mask, window
from i2am_train.evaluation.explanation import FITS, SHOWN_AT_MOST, TO_GENERATED, TO_REFERENCE, WHITE, Explanation
from i2am_train.ops.images import on_picture
from i2am_train.reporting.figures.canvas import Picture
from i2am_train.reporting.figures.sheet import Box
from i2am_train.types import Canvas, Direction, GridSize

FINE = 256
"""Fractions of a grid's cell to which positions are rounded."""


@dataclass(frozen=True, slots=True)
class Placement:
    """How a grid of tokens covers a picture that is drawn in a frame of another aspect.

    The picture (height and width in pixels) was fitted to the model's canvas as ``canvas`` says; it
    lies in the middle of ``frame``, which is at least as large, with borders around it.
    """

    picture: GridSize
    frame: GridSize
    canvas: Canvas

    def heat(self, values: NDArray[np.floating]) -> NDArray[np.float32]:
        """A map on the canvas as one on the frame; zero beside the canvas and the picture."""
        placed = on_picture(torch.from_numpy(np.ascontiguousarray(values)), self.picture, self.canvas)
        return np.asarray(framed(placed.numpy(), self.frame, 0), np.float32)

    def box(self, box: Box, grid: GridSize) -> Box:
        """A rectangle in fractions of the canvas as one in fractions of the frame."""
        (top, left), (bottom, right) = (
            self.spot(y, x, grid) for y, x in ((box.top, box.left), (box.top + box.height, box.left + box.width))
        )
        return replace(box, top=top, left=left, height=bottom - top, width=right - left)

    def spot(self, y: float, x: float, grid: GridSize) -> tuple[float, float]:
        """A place in fractions of the canvas (of the aspect of ``grid``) in fractions of the frame.

        >>> Placement(GridSize(40, 40), GridSize(80, 40), Canvas.STRETCH).spot(1.0, 0.5, GridSize(4, 4))
        (0.75, 0.5)
        """
        fine = GridSize(grid.height * FINE, grid.width * FINE)
        seen = window(self.picture, fine, FITS[self.canvas])
        inside = (seen.top + y * seen.height, seen.left + x * seen.width)
        return tuple(  # type: ignore[return-value]
            (place * size + (outer - size) // 2) / outer
            for place, size, outer in zip(inside, self.picture, self.frame, strict=True)
        )


def framed(array: NDArray[np.generic], frame: GridSize, fill: int) -> NDArray[np.generic]:
    """An array ``[height, width, ...]`` in the middle of a frame that is at least as large."""
    height, width = array.shape[:2]
    result = np.full((*frame, *array.shape[2:]), fill, array.dtype)
    top, left = (frame.height - height) // 2, (frame.width - width) // 2
    result[top : top + height, left : left + width] = array
    return result


def frame_of(picture: GridSize, aspect: GridSize) -> GridSize:
    """The smallest frame around a picture that has the proportions of another size.

    >>> frame_of(GridSize(40, 40), GridSize(64, 32))
    GridSize(height=80, width=40)
    """
    return GridSize(
        max(picture.height, round(picture.width * aspect.height / aspect.width)),
        max(picture.width, round(picture.height * aspect.width / aspect.height)),
    )


def placement(explanation: Explanation, direction: Direction) -> Placement | None:
    """Where the grids of a direction lie on its drawn picture; None: they cover it."""
    if direction is TO_GENERATED or explanation.covers_pictures:
        return None
    picture, frame = _sizes(explanation)
    return Placement(picture, frame, explanation.maps.store.canvas)


def drawn_picture(explanation: Explanation, direction: Direction) -> Picture:
    """The generated picture, or the reference, in a white frame of the same aspect where it has another one."""
    picture = explanation.picture(direction)
    if placement(explanation, direction) is None:
        return picture
    return cast(Picture, _in_frame(explanation, picture, WHITE))


def drawn_mask(explanation: Explanation, direction: Direction) -> Mask | None:
    """The region that a map of the direction should fill, on the drawn picture."""
    mask = explanation.mask(direction)
    if mask is None or placement(explanation, direction) is None:
        return mask
    return cast(Mask, _in_frame(explanation, mask, 0))


def _in_frame(explanation: Explanation, array: NDArray[Any], fill: int) -> NDArray[Any]:
    return framed(_reduced(array), _sizes(explanation)[1], fill)


def _sizes(explanation: Explanation) -> tuple[GridSize, GridSize]:
    """Of the reference as it is drawn, and of its frame."""
    picture = GridSize(*_reduced(explanation.picture(TO_REFERENCE)).shape[:2])
    return picture, frame_of(picture, explanation.size)


def _reduced(array: NDArray[Any]) -> NDArray[Any]:
    """Every n-th pixel, so that the longer side fits."""
    step = -(-max(array.shape[:2]) // SHOWN_AT_MOST)
    return array[::step, ::step]
