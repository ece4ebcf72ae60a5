"""Shapes of a body drawn from its keypoints: limbs, torso and legs, in units of the body's own size."""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

from i2am_train.data.arrays import Mask
from i2am_train.data.derive.keypoints import Joints, Point
from i2am_train.errors import DataError
from i2am_train.types import GridSize

SIDES = ("right", "left")
SMALLEST_TURNED = 0.5
"""Shoulder distance of a person seen from the side, as a share of neck to hips: what limbs are measured by then."""

HAND_REACH = 0.6
"""Length of a hand from the wrist, in units."""

Canvas = NDArray[np.uint8]


def require(joints: Joints, names: tuple[str, ...]) -> None:
    """Refuse a body without some joints.

    Raises:
        DataError: names the joints that were not seen.
    """
    missing = [name for name in names if name not in joints]
    if missing:
        raise DataError(
            f"keypoints are missing: {', '.join(missing)} (seen: {', '.join(joints)}). Take another photograph or "
            "pose estimator, or use pose=densepose or pose=none."
        )


def body_unit(joints: Joints) -> float:
    """The body's size in pixels: the distance of the shoulders, seen from the front.

    Raises:
        DataError: a shoulder was not seen.
    """
    require(joints, ("right_shoulder", "left_shoulder"))
    wide = float(np.linalg.norm(joints["right_shoulder"] - joints["left_shoulder"]))
    hips = [joints[f"{side}_hip"] for side in SIDES if f"{side}_hip" in joints]
    if not hips:
        return wide
    length = np.linalg.norm(np.mean(hips, axis=0) - shoulders_middle(joints))
    return max(wide, SMALLEST_TURNED * float(length))


def shoulders_middle(joints: Joints) -> Point:
    """The point between the shoulders."""
    return np.asarray((joints["right_shoulder"] + joints["left_shoulder"]) / 2)


def chain(joints: Joints, side: str, names: tuple[str, ...]) -> list[Point]:
    """The joints of a limb that were seen, from the trunk outwards."""
    return [joints[f"{side}_{name}"] for name in names if f"{side}_{name}" in joints]


def draw_limb(canvas: Canvas, points: list[Point], width: float, value: int) -> None:
    """A thick line with round ends through points, in place."""
    for first, second in pairwise(points):
        cv2.line(canvas, _whole(first), _whole(second), value, max(1, round(width)))
    for point in points:
        cv2.circle(canvas, _whole(point), max(1, round(width / 2)), value, -1)


def draw_hull(canvas: Canvas, points: list[Point], value: int) -> None:
    """The convex hull of points, filled, in place."""
    hull = cv2.convexHull(np.rint(np.stack(points)).astype(np.int32))
    cv2.fillPoly(canvas, [hull], value)


def torso_corners(joints: Joints, wider: float, longer: float) -> list[Point]:
    """Shoulders and hips of a generous torso.

    Args:
        joints: the body; both shoulders are needed. Hips that were not seen hang 1.5 units below the shoulders.
        wider: how far corners lie outside the joints, in units.
        longer: how far hips are moved down, in units.
    """
    unit = body_unit(joints)
    middle = shoulders_middle(joints)
    hips = [joints[f"{side}_hip"] for side in SIDES if f"{side}_hip" in joints]
    low = np.mean(hips, axis=0) if len(hips) == 2 else middle + [0.0, 1.5 * unit]
    down = (low - middle) / max(1.0, float(np.linalg.norm(low - middle)))
    across = np.array(
        [-down[1], down[0]]
    )  # to the picture's left, where a person facing us has the right side
    half = unit * (0.5 + wider)
    top, bottom = middle - 0.1 * unit * down, low + longer * unit * down
    return [
        top + half * across,
        bottom + half * across,
        bottom - half * across,
        top - half * across,
    ]


def hands_of(joints: Joints, arms: dict[str, Mask]) -> Mask:
    """The pixels of bare arms that lie beyond their own wrist and within reach of it.

    Args:
        joints: the body; both shoulders are needed.
        arms: bare arm by side.
    """
    hands = np.zeros_like(arms["left"])
    reach = HAND_REACH * body_unit(joints)
    for side in SIDES:
        points = chain(joints, side, ("elbow", "wrist"))
        if len(points) < 2:
            continue
        elbow, wrist = points
        direction = (wrist - elbow) / max(1.0, float(np.linalg.norm(wrist - elbow)))
        rows, columns = np.nonzero(arms[side])
        offset = np.stack([columns, rows], axis=-1) - wrist
        hand = (offset @ direction > 0) & (np.linalg.norm(offset, axis=-1) < reach)
        hands[rows[hand], columns[hand]] = True
    return hands


def drawn_parts(joints: Joints, size: GridSize) -> Canvas:
    """DensePose's part labels of a slim body drawn from keypoints: a stand-in where DensePose was not run.

    It shows the pose and nothing of the clothes. Parts in front cover those behind in a fixed order.

    Raises:
        DataError: a shoulder was not seen.
    """
    unit = body_unit(joints)
    canvas = np.zeros(size, np.uint8)
    for side, upper, lower in (("right", 9, 13), ("left", 10, 14)):
        _draw_two(canvas, chain(joints, side, ("hip", "knee", "ankle")), 0.34 * unit, upper, lower)
    draw_hull(canvas, torso_corners(joints, -0.05, 0.0), 2)
    for side, upper, lower in (("left", 15, 19), ("right", 16, 20)):
        points = chain(joints, side, ("shoulder", "elbow", "wrist"))
        _draw_two(canvas, points, 0.24 * unit, upper, lower)
        if len(points) == 3:
            _, elbow, wrist = points
            draw_limb(
                canvas, [wrist + 0.3 * (wrist - elbow)], 0.22 * unit, 3 if side == "right" else 4
            )
    if "nose" in joints:
        radii = (round(0.22 * unit), round(0.32 * unit))
        draw_limb(canvas, [joints["nose"], shoulders_middle(joints)], 0.25 * unit, 23)
        cv2.ellipse(canvas, _whole(joints["nose"] - [0.0, 0.05 * unit]), radii, 0, 0, 360, 23, -1)
    return canvas


def _draw_two(canvas: Canvas, points: list[Point], width: float, upper: int, lower: int) -> None:
    """Upper and lower half of a limb, as far as it was seen."""
    if len(points) >= 2:
        draw_limb(canvas, points[:2], width, upper)
    if len(points) == 3:
        draw_limb(canvas, points[1:], width, lower)


def _whole(point: Point) -> tuple[int, int]:
    x, y = np.rint(point).astype(int).tolist()
    return x, y
