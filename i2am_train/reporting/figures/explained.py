"""What figures ask of an explained sample, whichever model it is of; and where a grid lies on a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from i2am_train.attention.maps import AttributionMaps, HeatMap
from i2am_train.data.pictures import fit_mask, fit_picture, window
from i2am_train.ops.images import on_picture
from i2am_train.reporting.figures.canvas import Picture
from i2am_train.reporting.figures.sheet import Box
from i2am_train.types import Canvas, Direction, Fit, GridSize, LayerWeighting

Mask = NDArray[np.bool_]
GridCell = tuple[int, int]
"""Row and column of a patch on a grid."""
TO_REFERENCE = Direction.GENERATED_TO_REFERENCE
WHITE = 255
FINE = 256
"""Parts of a grid's cell to which places are rounded."""
SHOWN_AT_MOST = 512
"""Pixels of a reference's longer side in figures and on the page; a photograph's own would be slow."""
_FITS: dict[Canvas, Fit] = {
    Canvas.STRETCH: "stretch",
    Canvas.CENTRE_CROP: "crop",
    Canvas.LETTERBOX: "pad",
}


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
        placed = on_picture(
            torch.from_numpy(np.ascontiguousarray(values)), self.picture, self.canvas
        )
        return np.asarray(framed(placed.numpy(), self.frame, 0), np.float32)

    def box(self, box: Box, grid: GridSize) -> Box:
        """A rectangle in fractions of the canvas as one in fractions of the frame."""
        (top, left), (bottom, right) = (
            self.spot(y, x, grid)
            for y, x in ((box.top, box.left), (box.top + box.height, box.left + box.width))
        )
        return replace(box, top=top, left=left, height=bottom - top, width=right - left)

    def spot(self, y: float, x: float, grid: GridSize) -> tuple[float, float]:
        """A place in fractions of the canvas (of the aspect of ``grid``) in fractions of the frame.

        >>> Placement(GridSize(40, 40), GridSize(80, 40), Canvas.STRETCH).spot(1.0, 0.5, GridSize(4, 4))
        (0.75, 0.5)
        """
        fine = GridSize(grid.height * FINE, grid.width * FINE)
        seen = window(self.picture, fine, _FITS[self.canvas])
        inside = (seen.top + y * seen.height, seen.left + x * seen.width)
        return tuple(  # type: ignore[return-value]
            (place * size + (outer - size) // 2) / outer
            for place, size, outer in zip(inside, self.picture, self.frame, strict=True)
        )


def array(heat_map: HeatMap) -> NDArray[np.float32]:
    """Values of the one sample of a heat map: ``[*axes, height, width]``."""
    return np.asarray(heat_map.values[0].cpu().numpy())


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


class Drawn(Protocol):
    """An explained sample, as far as the figures by layer, time, head and patch need it."""

    @property
    def name(self) -> str:
        """Of the sample."""
        ...

    @property
    def model(self) -> str:
        """How captions call the model."""
        ...

    @property
    def layer(self) -> str:
        """The layer that patches are counted on."""
        ...

    @property
    def maps(self) -> AttributionMaps:
        """The capture."""
        ...

    @property
    def weighting(self) -> LayerWeighting:
        """How layers are summed."""
        ...

    @property
    def time_groups(self) -> int:
        """Number of time groups."""
        ...

    @property
    def generated_patches(self) -> Sequence[GridCell]:
        """Cells that specific-reference maps are drawn of."""
        ...

    @property
    def reference_patches(self) -> Sequence[GridCell]:
        """Cells that reverse specific-reference maps are drawn of."""
        ...

    @property
    def reference_word(self) -> str:
        """What captions call the reference."""
        ...

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Those that have maps."""
        ...

    def grid(self, direction: Direction) -> GridSize:
        """Grid of the layer's generated or reference patches."""
        ...

    def picture(self, direction: Direction) -> Picture:
        """What maps of a direction are drawn on; all pictures have one aspect."""
        ...

    def outline(self, direction: Direction) -> Mask | None:
        """The region that a map of the direction should fill."""
        ...

    def placement(self, direction: Direction) -> Placement | None:
        """Where the grids of a direction lie on its picture; None: they cover it."""
        ...

    def true_places(self, grid: GridSize, reference_grid: GridSize) -> NDArray[np.float32]:
        """True place of each cell of a generated grid, ``[generated, 2]``; NaN where unknown."""
        ...


def seen_picture(picture: Picture, maps: AttributionMaps) -> Picture:
    """What a model saw of the reference, as far as its maps know: the whole canvas, borders white."""
    size, fit = _canvas(GridSize(*picture.shape[:2]), maps)
    return fit_picture(picture, size, fit, WHITE)


def seen_mask(mask: Mask, maps: AttributionMaps) -> Mask:
    """A mask of the reference on the same canvas."""
    size, fit = _canvas(GridSize(*mask.shape), maps)
    return fit_mask(mask, size, fit)


def _canvas(picture: GridSize, maps: AttributionMaps) -> tuple[GridSize, Fit]:
    """Size in which the canvas is shown, and how the picture was fitted to it."""
    fit = _FITS[maps.store.canvas]
    if TO_REFERENCE not in maps.store.directions or fit == "stretch":
        aspect, fit = picture, "stretch"
    else:
        aspect = max(record.grid(TO_REFERENCE) for record in maps.store.layers)
    factor = min(SHOWN_AT_MOST, max(picture)) / max(aspect)
    return GridSize(round(aspect.height * factor), round(aspect.width * factor)), fit
