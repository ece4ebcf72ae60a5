"""Triangle meshes that carry the flat garment onto a person, and their exact inverse.

A garment part is a grid of vertices with two positions: on the flat garment (source) and on the person (target).
Painting the target triangles into a label map, in drawing order, settles which part is in front at every pixel; the
affine map of a pixel's triangle then gives its position on the flat garment, exactly.

Points are ``xy`` (OpenCV's order) in units of the picture's height, y downwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Labels = NDArray[np.int32]

FIRST_TRIANGLE_LABEL = 64
"""Labels below this one are plain colours (skin, hair, ...), the others are garment triangles."""

SUBPIXEL_BITS = 5
"""Fixed-point digits of OpenCV's drawing functions."""

MINIMUM_AREA = 1e-9
"""Triangles smaller than this (squared picture heights) have no inverse and are not painted."""


@dataclass(frozen=True)
class Camera:
    """How a picture looks at the scene: points in picture heights to pixels, and back.

    A point ``p`` lands at ``(p - origin) * pixels``; ``pixels`` are those of one picture height of the scene.
    """

    pixels: float
    origin: tuple[float, float] = (0.0, 0.0)

    def project(self, points: Points) -> Points:
        """Pixel coordinates of scene points; pixel (0, 0) covers 0..1."""
        return np.asarray((points - np.array(self.origin)) * self.pixels, np.float64)

    def scene(self, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> tuple[Points, Points]:
        """Scene x and y of pixel centres."""
        x = (columns.astype(np.float64) + 0.5) / self.pixels + self.origin[0]
        y = (rows.astype(np.float64) + 0.5) / self.pixels + self.origin[1]
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


def border(grid: Points) -> Points:
    """Walk once around a ``[rows, columns, 2]`` grid of points."""
    return np.concatenate([grid[0], grid[1:, -1], grid[-1, -2::-1], grid[-2:0:-1, 0]])


def _split_quads(grid: Points) -> Points:
    """Cut each cell of a vertex grid into two triangles, row by row."""
    a, b, c, d = grid[:-1, :-1], grid[:-1, 1:], grid[1:, :-1], grid[1:, 1:]
    pairs = np.stack([np.stack([a, b, c], axis=-2), np.stack([b, d, c], axis=-2)], axis=2)
    return pairs.reshape(-1, 3, grid.shape[-1])


class MeshPainter:
    """Paints parts into a label map in drawing order and inverts them afterwards.

    A pixel (row, column) of the map stands for the scene point that the camera sees at its centre.
    """

    def __init__(self, labels: Labels, camera: Camera) -> None:
        self.labels = labels
        self.camera = camera
        self._inverses: list[NDArray[np.float64]] = []
        self._next_label = FIRST_TRIANGLE_LABEL

    def paint(self, part: PartMesh) -> tuple[int, int]:
        """Paint one part over what is there; returns its range of labels (first, one past the last)."""
        target, attributes = part.triangles()
        edges = target[:, 1:] - target[:, :1]
        area = np.abs(edges[:, 0, 0] * edges[:, 1, 1] - edges[:, 0, 1] * edges[:, 1, 0])
        keep = area > MINIMUM_AREA
        target, attributes = target[keep], attributes[keep]
        first = self._next_label
        self._inverses.append(_affine_inverses(target, attributes))
        self._next_label += len(target)
        corners = fixed_point(target, self.camera)
        for label, triangle in enumerate(corners, start=first):
            cv2.fillConvexPoly(self.labels, triangle, label, cv2.LINE_8, SUBPIXEL_BITS)
        return first, self._next_label

    def attributes(self, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> NDArray[np.float32]:
        """Source x, source y, along, across ``[pixels, 4]`` of garment pixels."""
        inverse = np.concatenate(self._inverses).astype(np.float32)
        triangle = self.labels[rows, columns] - FIRST_TRIANGLE_LABEL
        x, y = (values.astype(np.float32)[:, None] for values in self.camera.scene(rows, columns))
        by_x, by_y, constant = (np.take(inverse[:, part], triangle, axis=0) for part in range(3))
        return by_x * x + by_y * y + constant


def _affine_inverses(target: Points, attributes: Points) -> NDArray[np.float64]:
    """Matrices ``[triangles, 3, 4]`` that take (x, y, 1) of a target point to its attributes."""
    ones = np.ones((*target.shape[:2], 1))
    return np.linalg.solve(np.concatenate([target, ones], axis=-1), attributes)


def fixed_point(points: Points, camera: Camera) -> NDArray[np.int32]:
    """Scene points as OpenCV's fixed-point pixel coordinates (pixel centres are whole numbers)."""
    scaled = (camera.project(points) - 0.5) * (1 << SUBPIXEL_BITS)
    return np.rint(np.clip(scaled, -1e6, 1e6)).astype(np.int32)


def fill(labels: NDArray[np.uint8] | Labels, polygon: Points, value: int, camera: Camera) -> None:
    """Fill one polygon of any shape."""
    cv2.fillPoly(labels, [fixed_point(polygon, camera)], value, cv2.LINE_8, SUBPIXEL_BITS)


def ellipse(center: Points, radius_x: float, radius_y: float, points: int = 40) -> Points:
    """An ellipse as a polygon ``[points, 2]``."""
    angle = np.linspace(0.0, 2.0 * np.pi, points, endpoint=False)
    return center + np.stack([radius_x * np.cos(angle), radius_y * np.sin(angle)], axis=-1)


@dataclass(frozen=True)
class Tube:
    """A limb: a bent centre line with a half-width along it.

    ``side`` is -1 for the viewer's left limb and +1 for the right one; ``across`` = -1 is its outer edge.
    """

    line: Points
    side: int

    @classmethod
    def bent(
        cls, root: Points, joint: Points, end: Points, side: int, roundness: float = 0.35
    ) -> Tube:
        """A limb from root to end with a rounded bend at the joint."""
        before, after = joint + roundness * (root - joint), joint + roundness * (end - joint)
        t = np.linspace(0.0, 1.0, 9)[:, None]
        curve = (1 - t) ** 2 * before + 2 * t * (1 - t) * joint + t**2 * after
        return cls(np.concatenate([root[None], curve, end[None]]), side)

    @cached_property
    def _frame(self) -> tuple[Points, Points]:
        """Length up to each point of the line, and the slope there."""
        steps = np.linalg.norm(np.diff(self.line, axis=0), axis=1)
        length = np.concatenate([[0.0], np.cumsum(steps)])
        return length, np.gradient(self.line, length, axis=0)

    def at(self, fractions: Points) -> tuple[Points, Points]:
        """Centre points and unit vectors towards the inner edge, at fractions of the length."""
        length, slopes = self._frame
        where = fractions * length[-1]
        center = np.stack(
            [np.interp(where, length, self.line[:, axis]) for axis in (0, 1)], axis=-1
        )
        slope = np.stack([np.interp(where, length, slopes[:, axis]) for axis in (0, 1)], axis=-1)
        slope /= np.linalg.norm(slope, axis=-1, keepdims=True)
        inward = -self.side * np.stack([slope[:, 1], -slope[:, 0]], axis=-1)
        return center, inward

    def grid(self, fractions: Points, across: Points, half_width: Points) -> Points:
        """Points ``[fractions, across, 2]`` of the tube."""
        center, inward = self.at(fractions)
        return center[:, None] + inward[:, None] * (
            across[None, :, None] * half_width[:, None, None]
        )

    def outline(self, start: float, stop: float, widths: tuple[float, float]) -> Points:
        """The tapered piece between two fractions as a polygon."""
        fractions = np.linspace(start, stop, 14)
        half_width = np.interp(fractions, [0.0, 1.0], widths)
        return border(self.grid(fractions, np.array([-1.0, 1.0]), half_width))


def smoothstep(value: Points) -> Points:
    """Cubic ramp from 0 to 1, clamped.

    >>> float(smoothstep(np.float64(0.5)))
    0.5
    """
    t = np.clip(value, 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)
