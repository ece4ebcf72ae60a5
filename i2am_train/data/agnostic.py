"""What a try-on model must not see: the region to paint, and the photograph with that region grey.

The rules, for a garment of a category. Lengths are in *units*, the distance of the shoulders.

**The worn garment** (``gt_cloth_warped_mask``): the pixels with a label of the category. Upper body: upper_clothes,
coat, dress; lower body: skirt, pants; dresses: dress.

**The region to paint** (``agnostic-mask``) is the union of

- the worn garment, grown by 0.1 units;
- bare arms (legs) and the bare neck of the parsing map;
- where any other garment of the category could be, from the body alone, so that the region does not tell the
  garment's outline. From keypoints: upper bodies get a torso a quarter unit wider than the shoulders on each side and
  0.35 units longer than to the hips, a neck 0.5 units wide, and arms 0.6 units wide from shoulder to wrist; lower
  bodies get the convex hull of hips, knees and ankles with legs 0.6 units wide; dresses get both, as far as it is in
  the picture. From DensePose: torso and arms (legs), grown by 0.15 units. Without either (``pose=none``): the bare
  limbs, grown likewise; such a region follows the garment's outline, which lets a model guess lengths, and hands are
  painted as well;

without what is kept:

- face, hat, glasses and hair above the chin, which is the lowest row of the face; in maps without a neck (ATR's labels
  count it as face) at most half-way from the nose to the neck of the keypoints;
- hands: bare arm beyond its wrist (keypoints) or in DensePose's hands; for lower bodies both arms; shoes, bags, gloves;
- clothes and legs that do not belong to the category, but only against the growth of the worn garment.

**The agnostic picture** (``agnostic-v3.2``) is the photograph with 128 inside the region.

HR-VITON's rules are of the same kind, but keep all lower clothes: there the trousers' edge tells the hem of the top.

**Where somebody else made the agnostic picture** (distributions of VITON-HD hold such pictures and no masks), a mask by
our own rule beside it would show the model clothes, or hide what the picture shows. So the region is read off the
picture: what it has in one grey where the photograph has something else. Where the photograph has that grey, too (a
grey garment or wall), nothing tells; small places of the kind inside the region are filled, large ones refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from i2am_train.data.parsing import ARMS, HEAD, HELD, LEGS, LOWER_CLOTHES, SHOES, WORN, LabelMap, LabelSet
from i2am_train.data.pictures import GREY, Image, Mask, differs, local_range
from i2am_train.data.poses import (
    DENSE_ARMS,
    DENSE_HANDS,
    DENSE_LEGS,
    DENSE_TORSO,
    SIDES,
    Joints,
    body_unit,
    chain,
    draw_hull,
    draw_limb,
    hands_of,
    require,
    shoulders_middle,
    torso_corners,
)
from i2am_train.errors import DataError
from i2am_train.types import Category

GARMENT_GROWTH = 0.1
BODY_GROWTH = 0.15
ARM_WIDTH, LEG_WIDTH, NECK_WIDTH = 0.6, 0.6, 0.5
TORSO_WIDER, TORSO_LONGER = 0.25, 0.35
OTHER_CLOTHES: dict[Category, frozenset[str]] = {
    "upper_body": LOWER_CLOTHES | LEGS,
    "lower_body": frozenset({"upper_clothes", "coat", "dress"}),
    "dresses": frozenset(),
}
"""Labels that the growth of the worn garment stops at."""

Pose = Joints | NDArray[np.uint8] | None
"""Keypoints, DensePose's part labels, or nothing."""


@dataclass(frozen=True)
class PersonMasks:
    """What is derived from one photograph."""

    worn: Mask
    region: Mask

    def agnostic(self, photograph: Image) -> Image:
        """The photograph with the region to paint in grey.

        >>> masks = PersonMasks(worn=np.array([[False, True]]), region=np.array([[False, True]]))
        >>> masks.agnostic(np.zeros((1, 2, 3), np.uint8))[0, :, 0].tolist()
        [0, 128]
        """
        return np.where(self.region[..., None], np.uint8(GREY), photograph)


def person_masks(labels: LabelMap, names: LabelSet, category: Category, pose: Pose) -> PersonMasks:
    """Worn garment and region to paint of a person, by this module's rules.

    Raises:
        DataError: no pixel has a label of the category, or the pose lacks what the category needs.

    >>> from i2am_train.data.parsing import VITON_HD
    >>> labels = np.array([[0, 0, 0, 0, 0, 5]] * 2, np.uint8)  # 5 is upper_clothes
    >>> person_masks(labels, VITON_HD, "upper_body", None).region[0].tolist()
    [False, False, False, False, True, True]
    """
    worn = names.inside(labels, WORN[category])
    if not worn.any():
        raise DataError(
            f"the garment is empty: no pixel is {' or '.join(sorted(WORN[category]))} (found: {names.found(labels)}). "
            "Check the category, or leave the picture out."
        )
    body, unit = _body(labels, names, category, pose)
    others = names.inside(labels, OTHER_CLOTHES[category])
    region = (_grown(worn, GARMENT_GROWTH * unit) & ~others) | body
    return PersonMasks(worn, (region | worn) & ~_kept(labels, names, category, pose))


def _body(labels: LabelMap, names: LabelSet, category: Category, pose: Pose) -> tuple[Mask, float]:
    """Where a garment of the category could be, and the unit of length in pixels."""
    upper, lower = category != "lower_body", category != "upper_body"
    limbs = (ARMS | {"neck"} if upper else frozenset()) | (LEGS if lower else frozenset())
    bare = names.inside(labels, limbs)
    if isinstance(pose, dict):
        chin = _chin(labels, names, pose)
        drawn = _drawn_body(pose, labels.shape, chin, upper, lower)
        return bare | drawn, _unit(pose, category)
    if pose is not None:
        parts = (*DENSE_TORSO, *DENSE_ARMS) if upper else ()
        parts = (*parts, *DENSE_LEGS) if lower else parts
        dense, unit = _dense_body(pose, parts, lower)
        return bare | dense, unit
    columns = np.flatnonzero(names.inside(labels, WORN[category]).any(axis=0))
    unit = 0.6 * float(columns[-1] - columns[0] + 1)
    return _grown(bare, BODY_GROWTH * unit), unit


def _unit(joints: Joints, category: Category) -> float:
    """Shoulder distance; of legs alone, twice the distance of the hips."""
    if category == "lower_body" and not {"right_shoulder", "left_shoulder"} <= set(joints):
        require(joints, ("right_hip", "left_hip"))
        return 2.0 * float(np.linalg.norm(joints["right_hip"] - joints["left_hip"]))
    return body_unit(joints)


def _drawn_body(joints: Joints, shape: tuple[int, ...], chin: int, upper: bool, lower: bool) -> Mask:
    """Torso, neck below the chin and arms, and hips and legs, drawn from keypoints."""
    canvas = np.zeros(shape, np.uint8)
    if upper:
        unit = body_unit(joints)
        draw_hull(canvas, torso_corners(joints, TORSO_WIDER, TORSO_LONGER), 1)
        if "nose" in joints:
            neck = np.zeros_like(canvas)
            draw_limb(neck, [shoulders_middle(joints), joints["nose"]], NECK_WIDTH * unit, 1)
            canvas[chin:] |= neck[chin:]
        for side in SIDES:
            points = chain(joints, side, ("shoulder", "elbow", "wrist"))
            draw_limb(canvas, points, ARM_WIDTH * unit, 1)
    if lower and not upper:
        require(joints, ("right_hip", "left_hip"))
    if lower:
        unit = _unit(joints, "lower_body")
        legs = np.zeros(shape, np.uint8)
        for side in SIDES:
            points = chain(joints, side, ("hip", "knee", "ankle"))
            draw_limb(legs, points, LEG_WIDTH * unit, 1)
        canvas |= _hull(legs > 0).astype(np.uint8)
    return canvas > 0


def _dense_body(pose: NDArray[np.uint8], parts: tuple[int, ...], lower: bool) -> tuple[Mask, float]:
    """Body parts, grown; legs with what is between them."""
    torso = np.isin(pose, DENSE_TORSO)
    if not torso.any():
        raise DataError("DensePose shows no torso. Leave the picture out, or use pose=keypoints.")
    unit = float(np.median(torso.sum(axis=1)[torso.any(axis=1)]))
    body = np.isin(pose, parts)
    if lower:
        body |= _hull(np.isin(pose, DENSE_LEGS))
    return _grown(body, BODY_GROWTH * unit), unit


def _kept(labels: LabelMap, names: LabelSet, category: Category, pose: Pose) -> Mask:
    """What is never painted."""
    above = np.arange(labels.shape[0])[:, None] <= _chin(labels, names, pose)
    kept = names.inside(labels, HEAD | {"hair"}) & above
    kept |= names.inside(labels, SHOES | HELD)
    if category == "lower_body":
        return kept | names.inside(labels, ARMS)
    if isinstance(pose, dict):
        sides = {side: names.inside(labels, {f"{side}_arm"}) for side in SIDES}
        return kept | hands_of(pose, sides)
    if pose is not None:
        return kept | (names.inside(labels, ARMS) & np.isin(pose, DENSE_HANDS))
    return kept


def _chin(labels: LabelMap, names: LabelSet, pose: Pose) -> int:
    """The row of the chin; without a face, below the picture."""
    rows = np.flatnonzero(names.inside(labels, {"face"}).any(axis=1))
    chin = int(rows[-1]) if len(rows) else labels.shape[0]
    no_neck = not names.inside(labels, {"neck"}).any()
    if no_neck and isinstance(pose, dict) and {"nose", "neck"} <= set(pose):
        return min(chin, round(float(pose["nose"][1] + pose["neck"][1]) / 2))
    return chin


def _grown(mask: Mask, radius: float) -> Mask:
    """Everything within a distance of a mask."""
    outside = (~mask).astype(np.uint8)
    if outside.all():
        return mask
    distance = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.asarray(distance <= max(1.0, radius))


def _hull(mask: Mask) -> Mask:
    """The convex hull of a mask."""
    rows, columns = np.nonzero(mask)
    hull = np.zeros(mask.shape, np.uint8)
    if len(rows):
        draw_hull(hull, list(np.stack([columns, rows], axis=-1).astype(np.float64)), 1)
    return hull > 0


CHANGED = 24
"""Difference from the photograph, in any channel, that JPEG does not make: there the grey is read."""
TOLD = 8
"""Difference from the photograph by which a grey place is told from it."""
FLAT = 4
"""Distance from the grey, and range within 3x3 pixels, of what was painted: photographs are not that even."""
NEAR = 12
"""Largest distance from the grey in any channel: JPEG's noise."""
NEUTRAL = 8
"""Largest spread between the channels of a grey."""
PAINTED_SHARE = 0.9
"""Share of what was changed that has the one grey; the rest is blurred edges."""
SMALLEST, LARGEST = 0.01, 0.9
"""Share of the picture that a region to paint covers."""
LARGEST_DOUBT = 0.1
"""Share of the region where the photograph may be as grey as the agnostic picture."""
CLOSED = 0.01
"""Width of gaps and specks in the grey, as a share of the picture's height: blocks of JPEG."""


def grey_region(agnostic: Image, photograph: Image, path: Path) -> Mask:
    """Where an agnostic picture ``[H, W, 3]`` is grey and its photograph is not.

    Args:
        agnostic: the picture.
        photograph: of the same person and size.
        path: of the agnostic picture, for messages.

    Raises:
        DataError: the two differ in more than one grey, or the grey cannot be told from the photograph.

    >>> photograph, agnostic = np.zeros((64, 48, 3), np.uint8), np.zeros((64, 48, 3), np.uint8)
    >>> agnostic[16:48, 12:36] = 128
    >>> grey_region(agnostic, photograph, Path("agnostic.png"))[32, [0, 24]].tolist()
    [False, True]
    """
    if agnostic.shape != photograph.shape:
        found, expected = ("x".join(map(str, one.shape[:2])) for one in (agnostic, photograph))
        raise _unreadable(path, f"it is {found} (height x width), and the photograph is {expected}")
    changed = differs(agnostic, photograph, CHANGED)
    share = float(changed.mean())
    if share < SMALLEST:
        raise _unreadable(path, f"it differs from the photograph in {share:.1%} of its pixels")
    grey = np.median(agnostic[changed], axis=0)
    near = ~differs(agnostic, grey, NEAR)
    painted = float(near[_inner(changed)].mean()) if _inner(changed).any() else 0.0
    if np.ptp(grey) > NEUTRAL or painted < PAINTED_SHARE:
        colour = tuple(int(level) for level in grey)
        raise _unreadable(path, f"{painted:.0%} of what differs from the photograph is {colour}")
    painted_over = _is_flat(agnostic, grey) & ~_is_flat(photograph, grey)
    region = _smooth(near & (differs(agnostic, photograph, TOLD) | painted_over))
    alike = near & ~region
    doubtful = alike & _touching(alike, region)
    if doubtful.sum() > LARGEST_DOUBT * region.sum():
        raise _unreadable(
            path, f"beside its region the photograph is as grey as it ({doubtful.mean():.0%} of the picture)"
        )
    if not SMALLEST <= region.mean() <= LARGEST:
        raise _unreadable(path, f"its grey covers {region.mean():.0%} of the picture")
    return region


def _unreadable(path: Path, why: str) -> DataError:
    return DataError(
        f"The region to paint cannot be read off the agnostic picture {path}: {why}. A mask by another rule would not "
        "fit it. Bring a mask of your own, or delete the agnostic picture (or use overwrite=true) to have both made "
        "anew."
    )


def _is_flat(picture: Image, grey: NDArray[Any]) -> Mask:
    """Where a picture is evenly of a grey."""
    return np.asarray(~differs(picture, grey, FLAT) & (local_range(picture).max(axis=-1) <= FLAT))


def _inner(mask: Mask) -> Mask:
    """Without the outermost pixels, which are blurred."""
    return cv2.erode(mask.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0


def _smooth(mask: Mask) -> Mask:
    """Without the gaps and specks of JPEG, and with what the region encloses."""
    width = 2 * max(1, round(CLOSED * mask.shape[0] / 2)) + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), *(4 * (width,)), cv2.BORDER_REPLICATE)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, disc)
    opened = cv2.morphologyEx(closed, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    return opened[width:-width, width:-width] > 0


def _touching(pieces: Mask, region: Mask) -> Mask:
    """The pieces that touch a region."""
    _, numbers = cv2.connectedComponents((pieces | region).astype(np.uint8), connectivity=8)
    touching = np.unique(numbers[region])
    return np.asarray(np.isin(numbers, touching))
