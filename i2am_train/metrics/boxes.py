"""Boxes of objects: where an attribution map sees one, and how well two boxes agree (paper section 5.1).

All boxes of one comparison lie in one frame, that of the picture which the map was resized to. Two ways lead from a map
to a box: ``component_box``, which does what the paper says, and ``authors_box``, which does what the last script of the
authors' detection repository does.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from i2am_train.errors import ConfigError
from i2am_train.types import GridSize

METHODS_OF_MAPS = ("i2am", "i2am_inverted", "i2am_authors")
"""The same map read in three ways: the paper's, inverted as the authors show it, and by the authors' script."""
METHOD_LABELS = {
    "daam": "DAAM's softmax",
    "overall": "Overall (whole image)",
    "random": "Random 10–30 %",
    "random_authors": "Random 10–30 %, authors' rule †",
    "i2am": "I²AM",
    "i2am_inverted": "I²AM, inverted map",
    "i2am_authors": "I²AM, authors' code †",
}
"""Methods without a detector, in the paper's order."""

RANDOM_AREA = (0.1, 0.3)
"""Share of the picture that a random box covers: uniform (paper Table 1)."""
RANDOM_ASPECT = (0.5, 2.0)
"""Width of a random box over its height: uniform (the authors' script)."""

AUTHORS_SIZE = 369
"""Pixels of the picture that the authors' script finds boxes in: what matplotlib makes of a map."""
AUTHORS_LEVELS = 256
"""Colours of that picture."""
AUTHORS_PERCENTILE = 65
"""Values above it are white."""
AUTHORS_KERNEL = np.ones((5, 5), np.uint8)
"""Of opening, closing and dilation."""


class Box(NamedTuple):
    """A rectangle in pixels of its picture, from edge to edge: the first pixel is 0 to 1.

    >>> Box(1, 2, 4, 8).area
    18.0
    """

    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        """In pixels.

        >>> Box(0, 0, 4, 2).area
        8.0
        """
        return float(max(0, self.right - self.left) * max(0, self.bottom - self.top))

    def scaled(self, old: GridSize, new: GridSize) -> Box:
        """The same place of a picture that is resized from ``old`` to ``new``, whatever its aspect.

        >>> Box(1, 2, 4, 8).scaled(GridSize(10, 8), GridSize(20, 8))
        Box(left=1.0, top=4.0, right=4.0, bottom=16.0)
        """
        x, y = new.width / old.width, new.height / old.height
        return Box(self.left * x, self.top * y, self.right * x, self.bottom * y)


def whole_box(size: GridSize) -> Box:
    """The whole picture: the paper's row "overall" (Table 1).

    >>> whole_box(GridSize(4, 6))
    Box(left=0, top=0, right=6, bottom=4)
    """
    return Box(0, 0, size.width, size.height)


def box_iou(first: Box, second: Box) -> float:
    """Intersection over union, in [0, 1]; 0 where both are empty.

    >>> box_iou(Box(0, 0, 4, 2), Box(2, 0, 6, 2))
    0.3333333333333333
    """
    shared = Box(
        max(first.left, second.left),
        max(first.top, second.top),
        min(first.right, second.right),
        min(first.bottom, second.bottom),
    ).area
    union = first.area + second.area - shared
    return shared / union if union > 0 else 0.0


def random_box(size: GridSize, generator: np.random.Generator) -> Box:
    """A box of a tenth to three tenths of the picture, of any place inside it.

    The paper's row "random 10~30%": share of the area uniform in ``RANDOM_AREA``, width over height uniform in
    ``RANDOM_ASPECT`` where the picture is a square (both are of the picture's own sides).

    >>> share = random_box(GridSize(10, 20), np.random.default_rng(0)).area / 200
    >>> 0.1 <= share <= 0.3
    True
    """
    area, aspect = generator.uniform(*RANDOM_AREA), generator.uniform(*RANDOM_ASPECT)
    width, height = math.sqrt(area * aspect), math.sqrt(area / aspect)
    left, top = generator.uniform(0, 1 - width), generator.uniform(0, 1 - height)
    unit = Box(left, top, left + width, top + height)
    return unit.scaled(GridSize(1, 1), size)


def component_box(values: Float[Tensor, "height width"], delta: float) -> Box | None:
    """Extents of the largest connected region whose values exceed ``delta``; None where none does.

    A map that is the same everywhere points nowhere: its box is the whole picture, as the paper counts DAAM's uniform
    maps. Pixels that touch at a corner are connected. Of regions of equal size the first from the top counts.

    Args:
        values: min-max normalised to [0, 1], at the size of the frame that the box lies in.
        delta: threshold in [0, 1).

    Raises:
        ConfigError: for another threshold.

    >>> component_box(torch.tensor([[0.9, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 1.0]]), 0.4)
    Box(left=2, top=1, right=4, bottom=2)
    """
    if not 0 <= delta < 1:
        raise ConfigError(f"delta is {delta}; it must be at least 0 and below 1 (the paper's: 0.4).")
    if values.min() == values.max():
        return whole_box(GridSize(*values.shape))
    return _largest_component(values > delta)


def _largest_component(mask: Bool[Tensor, "height width"]) -> Box | None:
    """Extents of the largest connected region of a mask; None where it is empty.

    >>> _largest_component(torch.tensor([[True, False, True, True]]))
    Box(left=2, top=0, right=4, bottom=1)
    """
    labels, count = ndimage.label(mask.cpu().numpy(), structure=np.ones((3, 3)))
    if count == 0:
        return None
    largest = int(np.bincount(labels.ravel())[1:].argmax()) + 1
    rows, columns = ndimage.find_objects(labels, max_label=largest)[-1]
    return Box(columns.start, rows.start, columns.stop, rows.stop)


def authors_box(values: Float[Tensor, "height width"], delta: float, size: GridSize) -> Box | None:
    """The box that the authors' last script finds (``cal_bbox_region_rect.py``); None without a contour.

    Their map is inverted, ``1 - m``, and thresholded, then saved as a picture of 369x369 pixels in 256 colours. The
    script turns the pixels above the 65th percentile white, opens, closes and dilates them, and takes the bounding
    rectangle of the contour that holds most white pixels. It compares this box with one in another frame; here it is
    brought to the frame of ``size``.

    Args:
        values: the map on its own grid, min-max normalised to [0, 1], not inverted.
        delta: threshold, which hardly matters here: a percentile follows.
        size: of the picture that the box shall lie in.

    >>> values = torch.ones(8, 6)
    >>> values[2:6, 1:4] = 0.0  # inverted, the largest
    >>> authors_box(values, 0.4, GridSize(369, 369))
    Box(left=60.0, top=90.0, right=248.0, bottom=279.0)
    """
    inverted = 1 - values
    picture = saved_picture(torch.where(inverted > delta, inverted, 0.0).cpu().numpy())
    white = (picture > np.percentile(picture, AUTHORS_PERCENTILE)).astype(np.uint8)
    for operation in (cv2.MORPH_OPEN, cv2.MORPH_CLOSE, cv2.MORPH_DILATE):
        white = np.asarray(cv2.morphologyEx(white, operation, AUTHORS_KERNEL), np.uint8)
    contours, _ = cv2.findContours(white, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return None
    left, top, width, height = max(
        (cv2.boundingRect(contour) for contour in contours),
        key=lambda place: int(white[place[1] :, place[0] :][: place[3], : place[2]].sum()),
    )
    box = Box(left, top, left + width, top + height)
    return box.scaled(GridSize(AUTHORS_SIZE, AUTHORS_SIZE), size)


def saved_picture(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A map as the authors' script reads it from the picture that matplotlib saves: uint8 ``[369, 369]``.

    Nearest neighbours, and the map's range in 256 colours.

    >>> saved_picture(np.array([[2.0, 3.0]], np.float32))[0, [0, -1]].tolist()
    [0, 255]
    """
    spread = values - values.min()
    levels = spread / max(float(spread.max()), 1e-12) * AUTHORS_LEVELS
    colours = np.minimum(levels, AUTHORS_LEVELS - 1).astype(np.uint8)
    return np.asarray(cv2.resize(colours, (AUTHORS_SIZE, AUTHORS_SIZE), interpolation=cv2.INTER_NEAREST_EXACT))
