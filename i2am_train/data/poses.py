"""Where a body is: pose keypoints, DensePose's body parts, and shapes that are drawn from keypoints.

Keypoints are read as VITON-HD and DressCode have them. VITON-HD: OpenPose's ``{"people": [{"pose_keypoints_2d": [x, y,
confidence, ...]}]}``, 25 or 18 joints, pixels of the photograph. DressCode: ``{"keypoints": [[x, y, ...], ...]}``, 18
joints, pixels of a picture of 512 x 384 whatever the photograph's size. Joints that were not seen are 0 or negative.
"Left" is the person's own. Limbs, torso and legs are drawn in units of the body's own size.

DensePose's parts (detectron2's numbering): 1, 2 torso; 3, 4 hands; 5, 6 feet; 7-10 upper legs; 11-14 lower legs; 15-18
upper arms; 19-22 lower arms; 23, 24 head. VITON-HD's ``image-densepose`` shows them in the colours of OpenCV's map
PARULA at label x 255 / 24, on black. DressCode stores the labels themselves. The embedded dataset draws its bodies in
colours of its own, which are read, too.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from i2am_train.data.picture_files import read_values, refuse_what_is_no_file
from i2am_train.data.pictures import Image, Mask, local_range
from i2am_train.errors import DataError
from i2am_train.types import GridSize

Point = NDArray[np.float64]
"""x, y in pixels."""
Joints = dict[str, Point]
"""The joints that were seen."""

# fmt: off
_UPPER = (
    "nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist",
)
_LOWER = ("right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle")
# fmt: on
COCO_18 = (*_UPPER, *_LOWER, "right_eye", "left_eye", "right_ear", "left_ear")
BODY_25 = (*_UPPER, "middle_hip", *_LOWER, "right_eye", "left_eye", "right_ear", "left_ear")
"""The 6 joints of the feet, which follow, are not used."""

DRESS_CODE_SIZE = GridSize(512, 384)
SMALLEST_CONFIDENCE = 0.05
OUTSIDE, SMALLEST_OUTSIDE = 1.02, 0.2
"""Share of the photograph's size beyond which a joint is outside, and share of such joints that is refused."""
REACH, SMALLEST_ON_BODY = 0.03, 0.5
"""Distance (share of the height) at which a joint is still on the body, and share of joints that must be."""


def read_keypoints(path: Path, size: GridSize) -> Joints:
    """The joints of the person in a photograph of a size; of several people, the most certain one.

    Raises:
        DataError: the file is missing, broken, of another format, or shows nobody.
    """
    try:
        refuse_what_is_no_file(path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing: keypoints are needed for every person.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable JSON ({error}). Make it again.") from error
    table = _table(content, path, size)
    _refuse_other_scale(table, path, size)
    names = BODY_25 if len(table) == 25 else COCO_18
    joints = {name: row for name, row in zip(names, table, strict=False) if row[0] > 1 and row[1] > 1}
    if not joints:
        raise DataError(f"{path} shows nobody: no joint was seen. Make it again, or use pose=none.")
    return joints


def require_on_body(joints: Joints, body: Mask, head: Mask, path: Path) -> None:
    """Refuse joints of another person or size.

    Args:
        joints: in pixels of the photograph.
        body: where the person is, ``[H, W]``, in the photograph's size.
        head: where face and hair are.
        path: of the keypoints, for messages.

    Raises:
        DataError: most joints lie beside the body, or the nose beside the head.
    """
    on_body = sum(_is_on(joint, body) for joint in joints.values())
    nose_off = "nose" in joints and head.any() and not _is_on(joints["nose"], head)
    if not body.any() or (on_body >= SMALLEST_ON_BODY * len(joints) and not nose_off):
        return
    lowest = max(float(joint[1]) for joint in joints.values())
    what = f"{len(joints) - on_body} of {len(joints)} joints" + (", the nose," if nose_off else "")
    raise DataError(
        f"{path} has {what} beside the person of the parsing map: joints reach down to row {lowest:.0f}, and the "
        f"person to row {np.flatnonzero(body.any(axis=1))[-1]} of {body.shape[0]}. They are of another size or person; "
        "make them again from this photograph."
    )


def _is_on(joint: Point, mask: Mask) -> bool:
    """Whether a mask is near a joint."""
    reach = max(1, round(REACH * mask.shape[0]))
    column, row = np.rint(joint).astype(int)
    rows, columns = (slice(max(0, place - reach), max(0, place + reach + 1)) for place in (row, column))
    return bool(mask[rows, columns].any())


def _refuse_other_scale(table: NDArray[np.float64], path: Path, size: GridSize) -> None:
    seen = table[(table > 0).all(axis=1)]
    if len(seen) and seen.max() <= 1.0:
        raise DataError(
            f"{path} holds places from 0 to 1; expected pixels of the photograph ({size}, height x width). Multiply "
            "them by its width and height, or make them again."
        )
    beyond = (seen > [OUTSIDE * size.width, OUTSIDE * size.height]).any(axis=1)
    if beyond.sum() > SMALLEST_OUTSIDE * len(seen):
        right, low = seen.max(axis=0)
        raise DataError(
            f"{path} has {beyond.sum()} of {len(seen)} joints outside of the photograph (up to column {right:.0f}, row "
            f"{low:.0f}; it is {size}, height x width): they are of another size. Make them again from this photograph."
        )


def openpose_json(joints: Joints) -> str:
    """Joints as OpenPose writes them, 25 of them.

    >>> openpose_json({"nose": np.array([3.0, 4.0])})[48:90]
    '"pose_keypoints_2d": [3.0, 4.0, 1.0, 0.0, '
    """
    values: list[float] = []
    for name in BODY_25:
        seen = name in joints
        values += [*np.round(joints[name], 2).tolist(), 1.0] if seen else [0.0, 0.0, 0.0]
    values += [0.0] * (75 - len(values))
    people = [{"person_id": [-1], "pose_keypoints_2d": values}]
    return json.dumps({"version": 1.3, "people": people})


def _table(content: Any, path: Path, size: GridSize) -> NDArray[np.float64]:
    """x and y of every joint in pixels of the photograph, one row each; zero where it was not seen."""
    try:
        if "keypoints" in content:
            table = np.asarray([row[:2] for row in content["keypoints"]], np.float64).reshape(18, 2)
            return table * [size.width / DRESS_CODE_SIZE.width, size.height / DRESS_CODE_SIZE.height]
        people = [np.asarray(person["pose_keypoints_2d"], np.float64).reshape(-1, 3) for person in content["people"]]
        if any(len(person) not in (18, 25) for person in people):
            raise ValueError("neither 18 nor 25 joints")
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{path} is in another format; expected OpenPose's people[].pose_keypoints_2d with 25 or 18 joints, or "
            "DressCode's 18 keypoints."
        ) from None
    if not people:
        raise DataError(f"{path} shows nobody: people is empty. Make it again, or use pose=none.")
    best = max(people, key=lambda person: float(person[:, 2].sum()))
    return np.where(best[:, 2:] >= SMALLEST_CONFIDENCE, best[:, :2], 0.0)


SIDES = ("right", "left")
SMALLEST_TURNED = 0.5
"""Shoulder distance of a person seen from the side, as a share of neck to hips: what limbs are measured by then."""

HAND_REACH = 0.6
"""Length of a hand from the wrist, in units."""

Canvas = NDArray[np.uint8]


def require(joints: Joints, names: tuple[str, ...]) -> None:
    """Refuse a body of which some joints were not seen.

    >>> require({"nose": np.array([3.0, 4.0])}, ("nose", "neck"))
    Traceback (most recent call last):
    i2am_train.errors.DataError: keypoints are missing: neck (seen: nose). ...
    """
    missing = [name for name in names if name not in joints]
    if missing:
        raise DataError(
            f"keypoints are missing: {', '.join(missing)} (seen: {', '.join(joints)}). Take another photograph or "
            "pose estimator, or use pose=densepose or pose=none."
        )


def body_unit(joints: Joints) -> float:
    """The body's size in pixels: the distance of the shoulders, which must have been seen, from the front.

    >>> joints = {"right_shoulder": np.array([10.0, 5.0]), "left_shoulder": np.array([14.0, 5.0])}
    >>> body_unit(joints)
    4.0
    """
    require(joints, ("right_shoulder", "left_shoulder"))
    wide = float(np.linalg.norm(joints["right_shoulder"] - joints["left_shoulder"]))
    hips = [joints[f"{side}_hip"] for side in SIDES if f"{side}_hip" in joints]
    if not hips:
        return wide
    length = np.linalg.norm(np.mean(hips, axis=0) - shoulders_middle(joints))
    return max(wide, SMALLEST_TURNED * float(length))


def shoulders_middle(joints: Joints) -> Point:
    """The point between the shoulders.

    >>> joints = {"right_shoulder": np.array([10.0, 5.0]), "left_shoulder": np.array([14.0, 5.0])}
    >>> shoulders_middle(joints).tolist()
    [12.0, 5.0]
    """
    return np.asarray((joints["right_shoulder"] + joints["left_shoulder"]) / 2)


def chain(joints: Joints, side: str, names: tuple[str, ...]) -> list[Point]:
    """The joints of a limb that were seen, from the trunk outwards.

    >>> joints = {"left_hip": np.array([3.0, 5.0]), "left_ankle": np.array([3.0, 9.0])}
    >>> [point.tolist() for point in chain(joints, "left", ("hip", "knee", "ankle"))]
    [[3.0, 5.0], [3.0, 9.0]]
    """
    return [joints[f"{side}_{name}"] for name in names if f"{side}_{name}" in joints]


def draw_limb(canvas: Canvas, points: list[Point], width: float, value: int) -> None:
    """A thick line with round ends through points, in place.

    >>> canvas = np.zeros((3, 6), np.uint8)
    >>> draw_limb(canvas, [np.array([1.0, 1.0]), np.array([4.0, 1.0])], width=1.0, value=7)
    >>> canvas[1].tolist()
    [7, 7, 7, 7, 7, 7]
    """
    for first, second in pairwise(points):
        cv2.line(canvas, _whole(first), _whole(second), value, max(1, round(width)))
    for point in points:
        cv2.circle(canvas, _whole(point), max(1, round(width / 2)), value, -1)


def draw_hull(canvas: Canvas, points: list[Point], value: int) -> None:
    """The convex hull of points, filled, in place.

    >>> canvas = np.zeros((3, 3), np.uint8)
    >>> draw_hull(canvas, [np.array(point, float) for point in ((0, 0), (2, 0), (0, 2))], value=1)
    >>> canvas.tolist()
    [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    """
    hull = cv2.convexHull(np.rint(np.stack(points)).astype(np.int32))
    cv2.fillPoly(canvas, [hull], value)


def torso_corners(joints: Joints, wider: float, longer: float) -> list[Point]:
    """Shoulders and hips of a generous torso.

    Args:
        joints: the body; both shoulders are needed. Hips that were not seen hang 1.5 units below the shoulders.
        wider: how far corners lie outside the joints, in units.
        longer: how far hips are moved down, in units.

    >>> joints = {"right_shoulder": np.array([10.0, 5.0]), "left_shoulder": np.array([14.0, 5.0])}
    >>> [corner.tolist() for corner in torso_corners(joints, wider=0.0, longer=0.0)]
    [[10.0, 4.6], [10.0, 11.0], [14.0, 11.0], [14.0, 4.6]]
    """
    unit = body_unit(joints)
    middle = shoulders_middle(joints)
    hips = [joints[f"{side}_hip"] for side in SIDES if f"{side}_hip" in joints]
    low = np.mean(hips, axis=0) if len(hips) == 2 else middle + [0.0, 1.5 * unit]
    down = (low - middle) / max(1.0, float(np.linalg.norm(low - middle)))
    across = np.array([-down[1], down[0]])  # to the picture's left, where a person facing us has the right side
    half = unit * (0.5 + wider)
    top, bottom = middle - 0.1 * unit * down, low + longer * unit * down
    return [top + half * across, bottom + half * across, bottom - half * across, top - half * across]


def hands_of(joints: Joints, arms: dict[str, Mask]) -> Mask:
    """The pixels of bare arms that lie beyond their own wrist and within reach of it.

    Args:
        joints: the body; both shoulders are needed.
        arms: bare arm by side.

    >>> joints = {"right_shoulder": np.array([0.0, 0.0]), "left_shoulder": np.array([4.0, 0.0])}
    >>> joints |= {"left_elbow": np.array([5.0, 0.0]), "left_wrist": np.array([7.0, 0.0])}
    >>> hands_of(joints, {"right": np.zeros((1, 12), bool), "left": np.ones((1, 12), bool)})[0].nonzero()[0].tolist()
    [8, 9]
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

    It shows the pose and nothing of the clothes. Parts in front cover those behind in a fixed order. Both shoulders
    are needed.

    >>> joints = {"right_shoulder": np.array([10.0, 5.0]), "left_shoulder": np.array([14.0, 5.0])}
    >>> int(drawn_parts(joints, GridSize(12, 20))[8, 12])  # the torso
    2
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
            draw_limb(canvas, [wrist + 0.3 * (wrist - elbow)], 0.22 * unit, 3 if side == "right" else 4)
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


DENSE_TORSO, DENSE_HANDS, DENSE_LEGS, DENSE_ARMS = (1, 2), (3, 4), tuple(range(7, 15)), tuple(range(15, 23))
"""Numbers of DensePose's parts."""
_PARTS = 24

SURE = 40
"""Largest distance of a colour from a part's colour, in RGB: beyond it, it is no DensePose colour."""
GRID_BITS, CELL_BITS = 5, 3
"""Colours are looked up with the upper 5 of their 8 bits."""
SMALLEST_BODY = 0.005
"""Share of a pose picture that a body covers."""
LARGEST_UNSURE_SHARE = 0.1
"""Share of coloured pixels, edges left out, that may be far from every part's colour."""


def _palette() -> Image:
    """RGB of the labels 0...24."""
    levels = (np.arange(_PARTS + 1) * 255 / _PARTS).astype(np.uint8)
    shown = cv2.applyColorMap(levels[:, None], cv2.COLORMAP_PARULA)
    colours = np.array(shown[:, 0, ::-1], np.uint8)
    colours[0] = 0
    return colours


PALETTE = _palette()
# fmt: off
EMBEDDED_COLOURS = {
    2: (48, 96, 232), 23: (232, 228, 64), 16: (232, 80, 48), 15: (48, 208, 80), 20: (248, 168, 48), 19: (112, 240, 208),
    3: (248, 144, 208), 4: (250, 170, 220), 9: (152, 48, 208), 10: (72, 152, 152),
}
# fmt: on
"""RGB by part of the embedded dataset's pose pictures, which are drawn and not DensePose's."""
_EMBEDDED_PALETTE = np.zeros_like(PALETTE)  # parts that are not drawn have the colour of no part
_EMBEDDED_PALETTE[[*EMBEDDED_COLOURS]] = [*EMBEDDED_COLOURS.values()]
PALETTES = (PALETTE, _EMBEDDED_PALETTE)
"""Whose colours are read: one picture has those of one."""


def densepose_picture(labels: NDArray[np.uint8]) -> Image:
    """Labels ``[H, W]`` as RGB ``[H, W, 3]``.

    >>> densepose_picture(np.array([[0, 2, 24]], np.uint8)).shape
    (1, 3, 3)
    """
    return PALETTE[labels]


def read_pose_picture(path: Path) -> Image:
    """The body parts in colours ``[H, W, 3]``, from a picture or from labels.

    Raises:
        DataError: the file is broken, or grey and no label map.
    """
    picture = _values(path)
    return densepose_picture(picture) if picture.ndim == 2 else picture


def read_parts(path: Path) -> NDArray[np.uint8]:
    """The labels ``[H, W]`` of a picture in DensePose's colours, or of a label map.

    Raises:
        DataError: the file is broken, or many of its colours are far from all of DensePose's.
    """
    picture = _values(path)
    if picture.ndim == 2:
        return picture
    labels, unsure = _explained(picture, picture.max(axis=-1) > SURE)
    if unsure > LARGEST_UNSURE_SHARE:
        raise DataError(
            f"{path} is not in DensePose's colours ({unsure:.0%} of its body is none of "
            "them); expected detectron2's dp_segm on black (OpenCV's PARULA), or labels 0...24. Use pose=keypoints."
        )
    return labels


def _values(path: Path) -> NDArray[Any]:
    """Labels ``[H, W]`` of a grey picture, checked; RGB of another, black where it is transparent."""
    values = read_values(path, palette=False)
    if values.ndim == 2 and (values.dtype != np.uint8 or values.max() > _PARTS):
        raise DataError(
            f"{path} holds values up to {values.max()}; expected DensePose's labels 0...{_PARTS}, or a picture in "
            "colours."
        )
    return values


def pose_picture_fault(picture: Image) -> str | None:
    """Why a pose picture ``[H, W, 3]``, maybe reduced, shows no body in DensePose's colours; None if it does.

    >>> pose_picture_fault(np.zeros((8, 6, 3), np.uint8))
    'shows nobody: 100% of it is black'
    """
    if not np.ptp(picture, axis=-1).any() and 0 < picture.max() <= _PARTS:
        return None  # labels
    foreground = picture.max(axis=-1) > SURE
    if foreground.mean() < SMALLEST_BODY:
        return f"shows nobody: {1 - foreground.mean():.0%} of it is black"
    _, unsure = _explained(picture, foreground)
    if unsure > LARGEST_UNSURE_SHARE:
        return f"is not in DensePose's colours: {unsure:.0%} of its body is none of them"
    return None


def _explained(picture: Image, body: Mask) -> tuple[NDArray[np.uint8], float]:
    """Labels by the palette that explains a body best, and the share of it that is far from all of its colours.

    Edges are left out: they are blurred, by JPEG and where a picture was reduced.
    """
    body = body & (local_range(picture).max(axis=-1) <= SURE)
    cells = (picture >> CELL_BITS).astype(np.int32)
    index = (cells[..., 0] << 2 * GRID_BITS) | (cells[..., 1] << GRID_BITS) | cells[..., 2]
    found = []
    for palette in range(len(PALETTES)):
        nearest, distances = _nearest(palette)
        unsure = float((body & (distances[index] > SURE)).sum() / max(1, body.sum()))
        found.append((unsure, palette, nearest))
    unsure, _, nearest = min(found, key=lambda entry: entry[:2])
    return np.asarray(nearest[index]), unsure


@cache
def _nearest(palette: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The nearest label and its distance for every cell of a coarse grid of colours: much faster than every pixel."""
    levels = np.arange(1 << GRID_BITS, dtype=np.float32) * (1 << CELL_BITS) + (1 << CELL_BITS) / 2
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    distances = np.linalg.norm(colours - PALETTES[palette].astype(np.float32), axis=-1)
    return distances.argmin(axis=1).astype(np.uint8), distances.min(axis=1)
