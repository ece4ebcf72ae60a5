"""Drawn people in drawn garments, with the exact correspondence between the two.

Every sample is a function of (seed, index) alone. The garment texture is carried onto the person by triangle
meshes; the same meshes, inverted, say for each person pixel where it lies on the flat garment, so the ground truth
is exact and not estimated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from i2am_train.data.parsing import VITON_HD, LabelMap
from i2am_train.data.pictures import GREY, Image, Mask, SampleArrays
from i2am_train.data.poses import EMBEDDED_COLOURS, Joints
from i2am_train.data.synthetic.garments import draw_garment, place_cut, silhouette, texture, trim
from i2am_train.data.synthetic.meshes import FIRST_TRIANGLE_LABEL, Camera, Labels, MeshPainter, ellipse, fill
from i2am_train.data.synthetic.people import SIDES, UPPER_ARM_SHARE, Body, draw_person, sleeve_mesh, torso_mesh
from i2am_train.types import GridSize

ZOOM = 1.4
"""How much closer the camera is than the scene's units say, so that the garment fills the picture as in VITON-HD."""

SKY = 0.075
"""Scene height that lies above the picture."""

OVERSAMPLING = 3
"""Odd, so that one of the fine pixels lies exactly at the centre of a picture pixel."""

SKIN, TROUSERS, TROUSERS_SHADE, HAIR, EYE, LIPS, HAND = range(1, 8)
"""Labels of plain colours; 0 is the background, garment triangles start at 64."""
NECK = 8

POSE_PARTS = {
    "torso": 2, "head": 23, "upper_arm_left": 16, "upper_arm_right": 15, "lower_arm_left": 20, "lower_arm_right": 19,
    "hand_left": 3, "hand_right": 4, "leg_left": 9, "leg_right": 10,
}  # fmt: skip
"""DensePose's parts; its left is the person's, the names here are the viewer's."""


Region = tuple[slice, slice]
"""Rows and columns of a rectangle."""


def _lookup(values: Mapping[int, tuple[int, ...] | int]) -> Image:
    """A table of 256 entries, zero but for these."""
    table = np.zeros((256, *np.shape(next(iter(values.values())))), np.uint8)
    for label, value in values.items():
        table[label] = value
    return table


POSE_PALETTE = _lookup(EMBEDDED_COLOURS)
PARSED = _lookup(
    {
        label: VITON_HD.names.index(name)
        for label, name in {
            NECK: "neck", TROUSERS: "pants", TROUSERS_SHADE: "pants", HAIR: "hair", EYE: "face", LIPS: "face",
            FIRST_TRIANGLE_LABEL: "upper_clothes",
        }.items()
    }
)  # fmt: skip
"""Label of a human-parsing map for each kind; skin needs its place, too."""
KEPT = _lookup({HAND: 255})
KEPT_ABOVE_CHIN = _lookup(dict.fromkeys((SKIN, HAIR, EYE, LIPS), 255))
"""Never inpainted: hands, and face and hair as far as they lie above the chin."""


@dataclass(frozen=True, kw_only=True)
class SyntheticSample(SampleArrays):
    """A drawn sample with the file stems that it gets."""

    name: str
    garment_name: str


def sample_name(index: int) -> str:
    """File stem of a sample.

    >>> sample_name(17)
    '00017_00'
    """
    return f"{index:05d}_00"


def render_sample(
    seed: int, index: int, size: GridSize, shading: bool = True, garment: int | None = None
) -> SyntheticSample:
    """Person ``index`` in their own garment, or in another one: also the truth of an unpaired try-on.

    ``shading=False`` leaves out light and folds.

    >>> sample = render_sample(seed=0, index=3, size=GridSize(64, 48))
    >>> bool((np.isnan(sample.correspondence[..., 0]) == ~sample.warped_garment_mask).all())
    True
    """
    worn = index if garment is None else garment
    return _Rendering(seed, index, worn, size, shading).sample(sample_name(index), sample_name(worn))


def render_annotations(seed: int, index: int, size: GridSize) -> tuple[LabelMap, Joints]:
    """What a human parser and a pose estimator would say about person ``index``: exact, as the drawing knows it.

    The parsing map has the labels of :data:`~i2am_train.data.parsing.VITON_HD`; its upper_clothes are exactly
    the sample's ``warped_garment_mask``.

    >>> parsed, joints = render_annotations(seed=0, index=3, size=GridSize(64, 48))
    >>> parsed.shape, joints["nose"].shape
    ((64, 48), (2,))
    """
    rendering = _Rendering(seed, index, index, size, shading=False)
    return rendering.parsing(), rendering.joints()


class _Rendering:
    """The drawing of one sample, at :data:`OVERSAMPLING` times its size."""

    def __init__(self, seed: int, person_index: int, garment_index: int, size: GridSize, shading: bool) -> None:
        person = draw_person(np.random.default_rng([seed, person_index, 0]))
        garment = draw_garment(np.random.default_rng([seed, garment_index, 1]))
        self.size, self.shading = size, shading
        self.fine = (size.height * OVERSAMPLING, size.width * OVERSAMPLING)
        self.pixels = self.fine[0]
        self.aspect = size.width / size.height
        self.camera = Camera(ZOOM * self.pixels, ((1 - 1 / ZOOM) * self.aspect / 2, SKY))
        self.person, self.garment = person, garment
        self.body = Body(person, self.aspect)
        self.place = place_cut(garment.cut, self.aspect)
        self.torso = torso_mesh(garment.cut, self.place, self.body)
        sides = () if garment.cut.sleeves == "none" else SIDES
        self.sleeves = {side: sleeve_mesh(garment.cut, self.place, self.body, side) for side in sides}

    def sample(self, name: str, garment_name: str) -> SyntheticSample:
        fabric = self._fabric()
        flat, garment_mask = self._flat_picture(fabric)
        labels, painter = self._labels()
        kinds = np.minimum(labels, FIRST_TRIANGLE_LABEL).astype(np.uint8)
        person = self._person_picture(kinds, painter, fabric)
        correspondence = self._correspondence(labels, painter)
        inpaint = self._inpaint_mask(kinds)
        agnostic = person.copy()
        agnostic[inpaint] = GREY
        return SyntheticSample(
            name=name, garment_name=garment_name, person=person, garment=flat, agnostic=agnostic,
            densepose=self._densepose(), garment_mask=garment_mask, inpaint_mask=inpaint,
            warped_garment_mask=~np.isnan(correspondence[..., 0]), correspondence=correspondence,
        )  # fmt: skip

    # The flat garment

    def _fabric(self) -> Image:
        """Full-bleed texture with collar, cuffs and hem."""
        outlines = [mesh.outline() for mesh in self.sleeves.values()]
        fabric = texture(self.garment, self.place, outlines, self.fine)
        colour = self.garment.trim_colour
        source = self.torso.source
        neck = np.abs(self.torso.parameters[0, :, 1]) <= self.garment.cut.neck / self.garment.cut.shoulder + 1e-6
        trim(fabric, source[0, neck], colour, 0.032)
        trim(fabric, source[-1], 0.82 * self.garment.colours[0], 0.014)
        for mesh in self.sleeves.values():
            trim(fabric, mesh.source[-1], colour, 0.030)
        return fabric

    def _flat_picture(self, fabric: Image) -> tuple[Image, Mask]:
        """The garment on white and its mask, at picture size."""
        parts = [self.torso.outline(), *(mesh.outline() for mesh in self.sleeves.values())]
        inside = silhouette(parts, self.fine)
        picture = cv2.copyTo(fabric, inside, np.full_like(fabric, 255))
        return self._reduced(cast(Image, picture)), self._reduced(inside) >= GREY

    def _reduced(self, picture: NDArray[np.uint8]) -> Image:
        """Area average of a fine picture."""
        return cast(Image, cv2.resize(picture, (self.size.width, self.size.height), interpolation=cv2.INTER_AREA))

    # The person

    def _labels(self) -> tuple[Labels, MeshPainter]:
        """What is visible at each fine pixel, painted from back to front."""
        labels: Labels = np.zeros(self.fine, np.int32)
        painter = MeshPainter(labels, self.camera)
        self._paint_back_hair(labels)
        fill(labels, self.body.torso_outline, SKIN, self.camera)
        fill(labels, self.body.legs[-1], TROUSERS, self.camera)
        fill(labels, self.body.legs[1], TROUSERS_SHADE, self.camera)
        fill(labels, self.body.neck, NECK, self.camera)
        sleeveless = not self.sleeves
        if sleeveless:
            for side in SIDES:
                self._paint_arm(labels, side, 0.0, 0.62)
        painter.paint(self.torso)
        self._paint_head(labels)
        for side in (-self.person.front_arm, self.person.front_arm):
            # Under a sleeve no skin is painted: it would show where torso and sleeve do not overlap.
            bare = 0.5 if sleeveless else 0.92 * self.garment.cut.sleeve_share
            self._paint_arm(labels, side, bare, 1.0)
            if side in self.sleeves:
                painter.paint(self.sleeves[side])
            fill(labels, self.body.hands[side], HAND, self.camera)
        return labels, painter

    def _paint_arm(self, labels: Labels, side: int, start: float, stop: float) -> None:
        """Bare skin of one arm between two shares of its length, with round ends."""
        tube = self.body.arms[side]
        widths = (0.040, 0.024)
        fill(labels, tube.outline(start, stop, widths), SKIN, self.camera)
        ends = np.array([start, stop])
        centers, _ = tube.at(ends)
        for center, radius in zip(centers, np.interp(ends, [0.0, 1.0], widths), strict=True):
            fill(labels, ellipse(center, radius, radius), SKIN, self.camera)

    def _paint_back_hair(self, labels: Labels) -> None:
        """Hair behind the neck and shoulders."""
        head = self.body.head
        style = self.person.hair
        if style == "afro":
            fill(labels, ellipse(head - [0, 0.025], 0.098, 0.092), HAIR, self.camera)
        elif style == "bun":
            fill(labels, ellipse(head - [0, 0.088], 0.030, 0.028), HAIR, self.camera)
        elif style in ("bob", "long"):
            low = 0.085 if style == "bob" else 0.20
            fill(labels, ellipse(head - [0, 0.008], 0.068, 0.078), HAIR, self.camera)
            sides = np.array([[-0.068, -0.01], [0.068, -0.01], [0.074, low], [-0.074, low]])
            fill(labels, head + sides, HAIR, self.camera)

    def _paint_head(self, labels: Labels) -> None:
        """Face, hair line and features."""
        head, camera = self.body.head, self.camera
        fill(labels, ellipse(head, 0.049, 0.066), SKIN, camera)
        if self.person.hair != "bald":
            cap = ellipse(head - [0, 0.010], 0.054, 0.064)
            crown = cap[cap[:, 1] < head[1] - 0.022]
            fringe = head + np.array([[0.046, -0.020], [0.015, -0.040], [-0.030, -0.032], [-0.048, -0.012]])
            order = np.argsort(np.arctan2(crown[:, 1] - head[1], crown[:, 0] - head[0]))
            fill(labels, np.concatenate([crown[order], fringe]), HAIR, camera)
        gaze = head + np.array([0.35 * 0.02 * self.person.turn, 0.0])
        for side in SIDES:
            fill(labels, ellipse(gaze + [side * 0.018, 0.004], 0.0058, 0.0062, 12), EYE, camera)
        fill(labels, ellipse(gaze + [0, 0.036], 0.0145, 0.0045, 16), LIPS, camera)

    def _person_picture(self, kinds: Image, painter: MeshPainter, fabric: Image) -> Image:
        """The person ``[H, W, 3]``; ``kinds`` are the labels with all garment triangles as one."""
        pixels = np.flatnonzero(kinds == FIRST_TRIANGLE_LABEL)
        attributes = painter.attributes(pixels)
        fine = self._plain_colours(kinds)
        colours = _sample_texture(fabric, attributes[:, :2], self.pixels)
        for channel in range(3):  # twice as fast as whole colours at once
            fine.reshape(-1, 3)[pixels, channel] = colours[:, channel]
        if self.shading:
            folds = self._folds(attributes[:, 2], attributes[:, 3])
            self._shade(fine, kinds, pixels, folds)
        return self._reduced(fine)

    def _correspondence(self, labels: Labels, painter: MeshPainter) -> NDArray[np.float32]:
        """Place on the flat garment ``[H, W, 2]`` of the fine pixel at the centre of each pixel."""
        first = OVERSAMPLING // 2
        centers = labels[first::OVERSAMPLING, first::OVERSAMPLING]
        rows, columns = np.nonzero(centers >= FIRST_TRIANGLE_LABEL)
        fine_rows, fine_columns = rows * OVERSAMPLING + first, columns * OVERSAMPLING + first
        attributes = painter.attributes(fine_rows * self.fine[1] + fine_columns)
        field = np.full((*self.size, 2), np.nan, np.float32)
        field[rows, columns, 0] = attributes[:, 1]
        field[rows, columns, 1] = attributes[:, 0] / self.aspect
        return np.clip(field, 0.0, 1.0)

    def _plain_colours(self, kinds: Image) -> Image:
        """Colours of everything but the garment, over a soft background."""
        person = self.person
        palette = np.zeros((256, 3), np.uint8)
        lips = 0.55 * person.skin + 0.45 * np.array([176.0, 60.0, 66.0])
        colours = {
            SKIN: person.skin, HAND: 0.98 * person.skin, NECK: 0.88 * person.skin, TROUSERS: person.trousers,
            TROUSERS_SHADE: 0.90 * person.trousers, HAIR: person.hair_colour, EYE: np.array([40.0, 32.0, 32.0]),
            LIPS: lips,
        }  # fmt: skip
        for label, colour in colours.items():
            palette[label] = np.clip(colour, 0, 255)
        return cast(Image, cv2.copyTo(_looked_up(palette, kinds), kinds, self._background()))

    def _background(self) -> Image:
        """A plain wall: lighter above, a little darker away from the light."""
        first, second = self.person.background
        down = np.linspace(0, 1, self.fine[0])[:, None]
        sideways = 1.0 + np.linspace(-0.5, 0.5, self.fine[1]) * 0.06 * self.person.light
        middle = first * (1 - down) + second * down
        # at most 0.94 x 255 x 1.03; channels one by one, as numpy is slow over a last axis of three
        channels = [(column[:, None] * sideways).astype(np.uint8) for column in middle.T]
        return cast(Image, cv2.merge(channels))

    def _shade(self, fine: Image, kinds: Image, pixels: NDArray[np.intp], folds: NDArray[np.float32]) -> None:
        """Multiply light, folds and soft shadows of the arms onto the picture, in place."""
        shade = np.ones(self.fine, np.float32)
        shade.reshape(-1)[pixels] = folds
        part = _bounds(kinds, 1)  # nothing else changes
        shade, solid = shade[part], np.minimum(kinds[part], 1)
        edge = np.asarray(cv2.distanceTransform(solid, cv2.DIST_L2, 3), np.float32)
        edge *= np.float32(1.0 / (0.03 * self.camera.pixels))
        np.minimum(edge, np.float32(1.0), out=edge)
        edge *= np.float32(0.16)
        edge += np.float32(0.84)
        shade *= edge
        shade *= self._arm_shadow(part)
        colours = fine[part].astype(np.float32)
        colours *= cv2.merge([shade] * 3)
        fine[part] = cv2.copyTo(cv2.convertScaleAbs(colours), solid, fine[part].copy())

    def _folds(self, along: NDArray[np.float32], across: NDArray[np.float32]) -> NDArray[np.float32]:
        """Brightness of fabric from its place along and across a part: round form, side light, folds."""
        a, b, c = self.person.fold_phase
        turn = np.float32(2 * np.pi)
        folds = np.sin(turn * (1.1 * across + 1.3 * along + a)) + np.sin(turn * (0.9 * along - 1.7 * across + b))
        drape = np.sin(turn * (1.5 * across + 0.3 * along + c)) * along
        round_form = 1.05 - 0.17 * across * across + 0.07 * self.person.light * across
        return np.asarray(round_form + 0.5 * self.person.fold_depth * (folds + drape), np.float32)

    def _arm_shadow(self, part: Region) -> NDArray[np.float32]:
        """Soft darkening of the torso beside arms that lie in front of it, in a part of the picture."""
        arms = np.zeros(self.fine, np.uint8)
        for side in SIDES:
            fill(arms, self.body.arms[side].outline(0.15, 1.0, (0.05, 0.036)), 255, self.camera)
        sigma = 0.014 * self.camera.pixels
        near = _bounds(arms, math.ceil(3 * sigma) + 2)  # as far as OpenCV's kernel reaches
        shadow = np.zeros_like(arms)
        shadow[near] = cv2.GaussianBlur(arms[near], (0, 0), sigma)
        beside = shadow[part] & ~arms[part]
        return np.float32(1.0) - beside.astype(np.float32) * np.float32(0.30 / 255)

    # What the model is told about the person

    def _inpaint_mask(self, kinds: Image) -> Mask:
        """Where any garment could be: a generous torso and both arms, without face, hair above it, and hands."""
        region = np.zeros(self.fine, np.uint8)
        fill(region, self._largest_torso(), 255, self.camera)
        for side in SIDES:
            tube = self.body.arms[side]
            fill(region, tube.outline(0.0, 1.0, (0.088, 0.064)), 255, self.camera)
            joints, _ = tube.at(np.array([0.0, 0.52, 1.0]))
            for joint, radius in zip(joints, (0.086, 0.074, 0.062), strict=True):
                fill(region, ellipse(joint, radius, radius), 255, self.camera)
        chin = self.camera.project(self.body.head + [0.0, 0.075])[1]
        region[_looked_up(KEPT, kinds) > 0] = 0
        above = slice(0, max(0, math.ceil(chin)))
        region[above][_looked_up(KEPT_ABOVE_CHIN, kinds[above]) > 0] = 0
        return self._reduced(region) >= GREY

    def _largest_torso(self) -> NDArray[np.float64]:
        """A torso region that holds every cut on this body, so that it tells nothing about the garment."""
        width, length = self.person.shoulder, self.person.torso
        ys = np.array([-0.005, 0.03, 0.10, 0.25, 0.40, 0.545]) * length
        xs = np.array([0.72, 1.10, 1.14, 1.16, 1.24, 1.32]) * width
        right = np.stack([xs, ys], axis=-1)
        return self.body.carry(np.concatenate([right, right[::-1] * [-1, 1]]))

    def _densepose(self) -> Image:
        """Coloured body parts on black, drawn from the body alone."""
        canvas = np.zeros(self.fine, np.uint8)

        def part(name: str, polygon: NDArray[np.float64]) -> None:
            fill(canvas, polygon, POSE_PARTS[name], self.camera)

        body = self.body
        for side, word in zip(SIDES, ("left", "right"), strict=True):
            part(f"leg_{word}", body.legs[side])
        part("torso", body.torso_outline)
        part("head", body.neck[:3])
        part("head", ellipse(body.head, 0.049, 0.066))
        part("head", body.head + np.array([[-0.026, 0.03], [0.026, 0.03], [0.026, 0.105], [-0.026, 0.105]]))
        for side in (-self.person.front_arm, self.person.front_arm):
            word = "left" if side < 0 else "right"
            part(f"upper_arm_{word}", body.arms[side].outline(0.0, 0.54, (0.040, 0.024)))
            part(f"lower_arm_{word}", body.arms[side].outline(0.52, 1.0, (0.040, 0.024)))
            part(f"hand_{word}", body.hands[side])
        return self._reduced(_looked_up(POSE_PALETTE, canvas))

    # What parsers and pose estimators would say

    def parsing(self) -> LabelMap:
        """Human-parsing map ``[H, W]``: the visible part at the centre of each pixel."""
        labels, _ = self._labels()
        first = OVERSAMPLING // 2
        centers = labels[first::OVERSAMPLING, first::OVERSAMPLING]
        skin = self._skin_parts()[first::OVERSAMPLING, first::OVERSAMPLING]
        kinds = np.minimum(centers, FIRST_TRIANGLE_LABEL).astype(np.uint8)
        bare = np.isin(kinds, (SKIN, HAND))
        return np.where(bare, skin, _looked_up(PARSED, kinds)).astype(np.uint8)

    def _skin_parts(self) -> Image:
        """Whose skin a fine pixel would show: of the neck where nothing else is."""
        canvas = np.full(self.fine, VITON_HD.names.index("neck"), np.uint8)
        fill(canvas, ellipse(self.body.head, 0.055, 0.070), VITON_HD.names.index("face"), self.camera)
        for side in (-self.person.front_arm, self.person.front_arm):
            arm = VITON_HD.names.index("right_arm" if side < 0 else "left_arm")
            fill(canvas, self.body.arms[side].outline(0.0, 1.0, (0.046, 0.030)), arm, self.camera)
            joint = self.body.shoulder_joint(side)
            fill(canvas, ellipse(joint, 0.046, 0.046), arm, self.camera)
            fill(canvas, self.body.hands[side], arm, self.camera)
        return canvas

    def joints(self) -> Joints:
        """Keypoints in pixels of the picture; those outside are left out. The viewer's left is the person's right."""
        body = self.body
        width, length = self.person.shoulder, self.person.torso
        points = {"nose": body.head + [0.0, 0.016], "neck": body.carry(np.array([0.0, 0.04]))}
        for side, word in zip(SIDES, ("right", "left"), strict=True):
            centers, _ = body.arms[side].at(np.array([0.0, UPPER_ARM_SHARE, 1.0]))
            hip = body.carry(np.array([side * 0.55 * width, 0.42 * length]))
            names = (f"{word}_shoulder", f"{word}_elbow", f"{word}_wrist", f"{word}_hip")
            points |= dict(zip(names, (*centers, hip), strict=True))
        seen = {name: self.camera.project(point) / OVERSAMPLING for name, point in points.items()}
        return {
            name: point
            for name, point in seen.items()
            if 0 <= point[0] < self.size.width and 0 <= point[1] < self.size.height
        }


def _looked_up(table: Image, labels: Image) -> Image:
    """Table rows at labels: ``[H, W]`` for a table ``[256]``, ``[H, W, 3]`` for one ``[256, 3]``."""
    if table.ndim == 1:
        return cast(Image, cv2.LUT(labels, table))
    return cast(Image, cv2.merge([cv2.LUT(labels, channel.copy()) for channel in table.T]))


def _bounds(picture: Image, margin: int) -> Region:
    """Rows and columns of the smallest rectangle around all non-zero pixels, with a margin."""
    x, y, width, height = cv2.boundingRect(picture)
    return (slice(max(0, y - margin), y + height + margin), slice(max(0, x - margin), x + width + margin))


def _sample_texture(fabric: Image, points: NDArray[np.float32], pixels: int) -> Image:
    """Bilinear colours ``[pixels, 3]`` of the fabric at points in picture heights."""
    row_length = 16_384  # OpenCV's maps are limited to 32767 per side
    rows = -(-len(points) // row_length)
    where = np.zeros((rows * row_length, 2), np.float32)
    where[: len(points)] = points * pixels - 0.5
    sampled = cv2.remap(
        fabric, where.reshape(rows, row_length, 2), None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )  # type: ignore[call-overload]
    return cast(Image, sampled.reshape(-1, 3)[: len(points)])
