"""Triangle meshes that carry the flat garment onto a person, and their exact inverse.

A garment part is a grid of vertices with two positions: on the flat garment (source) and on the person (target).
Painting the target triangles into a label map, in drawing order, settles which part is in front at every pixel; the
affine map of a pixel's triangle then gives its position on the flat garment, exactly.

Points are ``xy`` (OpenCV's order) in units of the picture's height, y downwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Labels = NDArray[np.int32]

FIRST_TRIANGLE_LABEL = 64
"""Labels below this one are plain colours (skin, hair, ...), the others are garment triangles."""

SUBPIXEL_BITS = 5
"""Fixed-point digits of OpenCV's drawing functions."""

EDGES = np.array([-1.0, 1.0])
"""Both edges of a limb, in half-widths across it."""

MINIMUM_AREA = 1e-9
"""Triangles smaller than this (squared picture heights) have no inverse and are not painted."""


@dataclass(frozen=True)
class Camera:
    """How a picture looks at the scene: points in picture heights to pixels, and back.

    A point ``p`` lands at ``(p - origin) * pixels``; ``pixels`` are those of one picture height of the scene.
    """

    pixels: float
    origin: tuple[float, float] = (0.0, 0.0)

    @cached_property
    def _origin(self) -> Points:
        return np.array(self.origin)

    def project(self, points: Points) -> Points:
        """Pixel coordinates of scene points; pixel (0, 0) covers 0..1.

        >>> Camera(100, (0.5, 0.0)).project(np.array([0.75, 0.5])).tolist()
        [25.0, 50.0]
        """
        return np.asarray((points - self._origin) * self.pixels, np.float64)

    def scene(self, size: tuple[int, int]) -> tuple[Points, Points]:
        """Scene x ``[width]`` and y ``[height]`` of the pixel centres of a picture (height, width).

        >>> x, y = Camera(2).scene((2, 1))
        >>> x.tolist(), y.tolist()
        ([0.25], [0.25, 0.75])
        """
        height, width = size
        x = (np.arange(width, dtype=np.float64) + 0.5) / self.pixels + self.origin[0]
        y = (np.arange(height, dtype=np.float64) + 0.5) / self.pixels + self.origin[1]
        return x, y


@dataclass(frozen=True)
class PartMesh:
    """One garment part as a grid of vertices.

    Attributes:
        source: ``[rows, columns, 2]`` positions on the flat garment.
        target: ``[rows, columns, 2]`` positions on the person.
        parameters: ``[rows, columns, 2]`` along and across the part (across is -1..1), for shading.
    """

    source: Points
    target: Points
    parameters: Points

    def triangles(self) -> tuple[Points, Points]:
        """Target corners ``[triangles, 3, 2]`` and attributes ``[triangles, 3, 4]`` (source x, y, along, across)."""
        attributes = np.concatenate([self.source, self.parameters], axis=-1)
        return _split_quads(self.target), _split_quads(attributes)

    def outline(self) -> Points:
        """The border of the part on the flat garment, as a closed polygon ``[points, 2]``."""
        return border(self.source)


def joined(x: Points, y: Points) -> Points:
    """Points from their coordinates, ``[..., 2]``; for small arrays much faster than :func:`numpy.stack`.

    >>> joined(np.array([1.0, 2.0]), np.array([3.0, 4.0])).tolist()
    [[1.0, 3.0], [2.0, 4.0]]
    """
    points = np.empty((*x.shape, 2))
    points[..., 0], points[..., 1] = x, y
    return points


def border(grid: Points) -> Points:
    """Walk once around a ``[rows, columns, 2]`` grid of points.

    >>> grid = np.arange(6.0).reshape(3, 2, 1)
    >>> border(grid)[:, 0].tolist()
    [0.0, 1.0, 3.0, 5.0, 4.0, 2.0]
    """
    return np.concatenate([grid[0], grid[1:, -1], grid[-1, -2::-1], grid[-2:0:-1, 0]])


def _split_quads(grid: Points) -> Points:
    """Cut each cell of a vertex grid into two triangles, row by row."""
    a, b, c, d = grid[:-1, :-1], grid[:-1, 1:], grid[1:, :-1], grid[1:, 1:]
    corners = np.stack([a, b, c, b, d, c], axis=-2)
    return corners.reshape(-1, 3, grid.shape[-1])


class MeshPainter:
    """Paints parts into a label map in drawing order and inverts them afterwards.

    A pixel (row, column) of the map stands for the scene point that the camera sees at its centre.
    """

    def __init__(self, labels: Labels, camera: Camera) -> None:
        self.labels = labels
        self.camera = camera
        self._scene = camera.scene(labels.shape)
        self._inverses: list[NDArray[np.float64]] = []
        self._next_label = FIRST_TRIANGLE_LABEL

    def paint(self, part: PartMesh) -> None:
        """Paint one part over what is there."""
        target, attributes = part.triangles()
        edges = target[:, 1:] - target[:, :1]
        area = np.abs(edges[:, 0, 0] * edges[:, 1, 1] - edges[:, 0, 1] * edges[:, 1, 0])
        keep = area > MINIMUM_AREA
        target, attributes = target[keep], attributes[keep]
        self._inverses.append(_affine_inverses(target, attributes))
        for label, triangle in enumerate(fixed_point(target, self.camera), start=self._next_label):
            cv2.fillConvexPoly(self.labels, triangle, label, cv2.LINE_8, SUBPIXEL_BITS)
        self._next_label += len(target)

    def attributes(self, pixels: NDArray[np.intp]) -> NDArray[np.float32]:
        """Source x, source y, along, across ``[pixels, 4]`` of garment pixels (positions in the flat label map)."""
        inverse = np.concatenate(self._inverses).astype(np.float32)
        by_x, by_y, constant = (np.ascontiguousarray(inverse[:, part]) for part in range(3))
        # Four equal columns: multiplying rows of four is much faster than broadcasting a single column.
        x, y = (np.repeat(at.astype(np.float32)[:, None], 4, 1) for at in self._scene)
        triangle = self.labels.reshape(-1)[pixels].astype(np.intp) - FIRST_TRIANGLE_LABEL
        rows, columns = np.divmod(pixels.astype(np.int32), np.int32(self.labels.shape[1]))
        result = np.take(by_x, triangle, axis=0)
        result *= np.take(x, columns, axis=0)
        vertical = np.take(by_y, triangle, axis=0)
        vertical *= np.take(y, rows, axis=0)
        result += vertical
        result += np.take(constant, triangle, axis=0)
        return result


def _affine_inverses(target: Points, attributes: Points) -> NDArray[np.float64]:
    """Matrices ``[triangles, 3, 4]`` that take (x, y, 1) of a target point to its attributes."""
    ones = np.ones((*target.shape[:2], 1))
    return np.linalg.solve(np.concatenate([target, ones], axis=-1), attributes)


def fixed_point(points: Points, camera: Camera) -> NDArray[np.int32]:
    """Scene points as OpenCV's fixed-point pixel coordinates (pixel centres are whole numbers).

    >>> fixed_point(np.array([0.5, 0.25]), Camera(10)).tolist()  # 32nds of a pixel, from the centre of the first
    [144, 64]
    """
    scaled = (camera.project(points) - 0.5) * (1 << SUBPIXEL_BITS)
    return np.rint(np.minimum(np.maximum(scaled, -1e6), 1e6)).astype(np.int32)


def fill(labels: NDArray[np.uint8] | Labels, polygon: Points, value: int, camera: Camera) -> None:
    """Fill one polygon of any shape.

    >>> canvas = np.zeros((3, 3), np.uint8)
    >>> fill(canvas, np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.4], [0.0, 0.4]]), 9, Camera(3))
    >>> canvas[:, 1].tolist()
    [9, 9, 0]
    """
    cv2.fillPoly(labels, [fixed_point(polygon, camera)], value, cv2.LINE_8, SUBPIXEL_BITS)


def ellipse(center: Points, radius_x: float, radius_y: float, points: int = 40) -> Points:
    """An ellipse as a polygon ``[points, 2]``.

    >>> ellipse(np.array([0.5, 0.5]), 0.2, 0.1, points=4).round(6).tolist()
    [[0.7, 0.5], [0.5, 0.6], [0.3, 0.5], [0.5, 0.4]]
    """
    return np.asarray(center + _circle(points) * (radius_x, radius_y))


@lru_cache(maxsize=8)
def _circle(points: int) -> Points:
    """The unit circle as a polygon ``[points, 2]``; shared, so not to be changed."""
    angle = np.linspace(0.0, 2.0 * np.pi, points, endpoint=False)
    return joined(np.cos(angle), np.sin(angle))


@dataclass(frozen=True)
class Tube:
    """A limb: a bent centre line with a half-width along it.

    ``side`` is -1 for the viewer's left limb and +1 for the right one; ``across`` = -1 is its outer edge.
    """

    line: Points
    side: int

    @classmethod
    def bent(cls, root: Points, joint: Points, end: Points, side: int, roundness: float = 0.35) -> Tube:
        """A limb from root to end with a rounded bend at the joint.

        >>> tube = Tube.bent(np.array([0.0, 0.0]), np.array([0.0, 0.5]), np.array([0.5, 0.5]), side=1)
        >>> tube.line[[0, -1]].tolist()
        [[0.0, 0.0], [0.5, 0.5]]
        """
        before, after = joint + roundness * (root - joint), joint + roundness * (end - joint)
        t = np.linspace(0.0, 1.0, 9)[:, None]
        curve = (1 - t) ** 2 * before + 2 * t * (1 - t) * joint + t**2 * after
        return cls(np.concatenate([root[None], curve, end[None]]), side)

    @cached_property
    def _frame(self) -> tuple[Points, Points, Points]:
        """Length up to each point of the line; line and slope there ``[points, 4]``; their change per length."""
        steps = np.linalg.norm(np.diff(self.line, axis=0), axis=1)
        length = np.concatenate([[0.0], np.cumsum(steps)])
        values = np.concatenate([self.line, np.gradient(self.line, length, axis=0)], axis=1)
        rates = np.zeros_like(values)  # the end has none: nothing lies beyond it
        rates[:-1] = np.diff(values, axis=0) / np.diff(length)[:, None]
        return length, values, rates

    def at(self, fractions: Points) -> tuple[Points, Points]:
        """Centre points and unit vectors towards the inner edge, at fractions of the length.

        >>> tube = Tube(np.array([[0.0, 0.0], [0.0, 1.0]]), side=1)
        >>> center, inward = tube.at(np.array([0.5]))
        >>> center.tolist(), (inward + 0.0).tolist()
        ([[0.0, 0.5]], [[-1.0, 0.0]])
        """
        length, values, rates = self._frame
        where = fractions * length[-1]
        piece = np.searchsorted(length, where, side="right") - 1
        both = rates[piece] * (where - length[piece])[:, None] + values[piece]
        center, slope_x, slope_y = both[:, :2], both[:, 2], both[:, 3]
        norm = np.sqrt(slope_x * slope_x + slope_y * slope_y)
        return center, -self.side * joined(slope_y / norm, -(slope_x / norm))

    def outline(self, start: float, stop: float, widths: tuple[float, float]) -> Points:
        """The tapered piece between two fractions as a polygon.

        >>> Tube(np.array([[0.0, 0.0], [0.0, 1.0]]), side=1).outline(0.0, 1.0, (0.1, 0.2)).shape
        (28, 2)
        """
        fractions, half_width = _taper(start, stop, widths)
        return border(spread(*self.at(fractions), EDGES, half_width))


@lru_cache(maxsize=256)
def _taper(start: float, stop: float, widths: tuple[float, float]) -> tuple[Points, Points]:
    """Fractions of a limb's length and half-widths there; shared, so not to be changed."""
    fractions = np.linspace(start, stop, 14)
    return fractions, np.interp(fractions, [0.0, 1.0], widths)


def spread(center: Points, inward: Points, across: Points, half_width: Points) -> Points:
    """Points ``[centers, across, 2]`` beside each centre, at ``across`` half-widths from it.

    >>> center, inward, edges = np.zeros((1, 2)), np.array([[1.0, 0.0]]), np.array([-1.0, 1.0])
    >>> spread(center, inward, edges, half_width=np.array([0.1])).tolist()
    [[[-0.1, 0.0], [0.1, 0.0]]]
    """
    return np.asarray(center[:, None] + inward[:, None] * (across[None, :, None] * half_width[:, None, None]))


def clamped(value: Points) -> Points:
    """Limited to 0..1; for small arrays much faster than :func:`numpy.clip`.

    >>> clamped(np.array([-1.0, 0.5, 2.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    return np.minimum(np.maximum(value, 0.0), 1.0)


def smoothstep(value: Points) -> Points:
    """Cubic ramp from 0 to 1, clamped.

    >>> float(smoothstep(np.float64(0.5)))
    0.5
    """
    t = clamped(value)
    return t * t * (3.0 - 2.0 * t)
