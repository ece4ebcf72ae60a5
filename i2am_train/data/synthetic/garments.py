"""Flat garments: cut, colours, pattern, letters and logos, drawn on white as a shop would show them.

A garment is drawn twice: as a full-bleed texture (so that sampling near an edge never picks up the white ground)
and as the picture of the flat garment itself. All lengths are in picture heights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from i2am_train.data.pictures import Image
from i2am_train.data.synthetic.meshes import (
    SUBPIXEL_BITS,
    Camera,
    Points,
    Tube,
    clamped,
    ellipse,
    fill,
    fixed_point,
    smoothstep,
)

Colour = NDArray[np.float64]

SHOULDER = 0.150
"""Half-width of the shoulders that cuts are designed for; people are scaled against it."""
ARM = 0.345
"""Length of the arm that sleeves are designed for, shoulder to wrist."""
SHOULDER_DROP = 0.040
"""How far the shoulder tip lies below the neck."""
FILL = (0.80, 0.92)
"""Largest share of the picture's height and width that the flat garment may take."""

SLEEVE_COLUMNS = 5
"""Vertices across a sleeve."""

NECKLINES = ("round", "v", "square", "boat")
SLEEVES = ("none", "short", "long")
PATTERNS = ("plain", "rows", "columns", "checks", "dots", "gradient", "two_rows", "two_columns")
PATTERN_ODDS = (0.16, 0.17, 0.13, 0.12, 0.10, 0.10, 0.12, 0.10)
LOGOS = ("disc", "ring", "star", "heart", "triangle", "square", "diamond", "bar")
LETTERS = "ABCDEFHKLMNPRSTXZ23457"


@dataclass(frozen=True)
class Cut:
    """The shape of a garment before it is placed: origin at the base of the neck, y downwards."""

    sleeves: str
    neckline: str
    neck: float
    neck_drop: float
    shoulder: float
    chest: float
    waist: float
    hem: float
    length: float
    hem_curve: float
    armpit: float
    sleeve_share: float
    sleeve_angle: float
    cuff: float

    def half_width(self, y: Points) -> Points:
        """Half-width at depth ``y``: armhole, then smoothly chest, waist, hem.

        >>> cut = draw_garment(np.random.default_rng(7)).cut
        >>> bool(np.isclose(cut.half_width(np.array([cut.length])), cut.hem)[0])
        True
        """
        waist_y = self.armpit + 0.45 * (self.length - self.armpit)
        armhole = np.interp(y, [SHOULDER_DROP, self.armpit], [self.shoulder, self.chest])
        dent = 0.06 * self.shoulder * np.sin(np.pi * clamped((y - SHOULDER_DROP) / (self.armpit - SHOULDER_DROP)))
        upper = self.chest + (self.waist - self.chest) * smoothstep((y - self.armpit) / (waist_y - self.armpit))
        lower = (self.hem - self.waist) * smoothstep((y - waist_y) / (self.length - waist_y))
        return np.where(y < self.armpit, armhole - dent, upper + lower)

    def top(self, across: Points) -> Points:
        """Upper edge (neckline and shoulder line) over ``across`` in -1..1.

        >>> cut = draw_garment(np.random.default_rng(7)).cut
        >>> bool(np.isclose(cut.top(np.array([1.0]))[0], SHOULDER_DROP))  # the tip of the shoulder
        True
        """
        x = np.abs(across) * self.shoulder
        shoulder_line = SHOULDER_DROP * clamped((x - self.neck) / (self.shoulder - self.neck))
        inside = clamped(x / self.neck)
        shape = {
            "v": 1.0 - inside,
            "round": np.sqrt(np.maximum(1.0 - inside**2, 0.0)),
            "boat": np.sqrt(np.maximum(1.0 - inside**4, 0.0)),
            "square": (inside < 0.999).astype(np.float64),
        }[self.neckline]
        return np.where(x < self.neck, self.neck_drop * shape, shoulder_line)

    def bottom(self, across: Points) -> Points:
        """Hem line, slightly rounded.

        >>> cut = draw_garment(np.random.default_rng(7)).cut
        >>> bool(cut.bottom(np.array([0.0]))[0] == cut.length)
        True
        """
        return self.length - self.hem_curve * across**2


@dataclass(frozen=True)
class Logo:
    """A shape or a letter on the chest, off-centre; ``place`` is (across, share of the length)."""

    kind: str
    place: tuple[float, float]
    size: float
    colour: Colour


@dataclass(frozen=True)
class Garment:
    """A cut with its colours and pattern."""

    cut: Cut
    pattern: str
    colours: tuple[Colour, Colour]
    period: float
    phase: float
    sleeve_colour: Colour | None
    trim_colour: Colour
    logos: tuple[Logo, ...]


def draw_garment(rng: np.random.Generator) -> Garment:
    """Draw one garment at random.

    >>> first, again = (draw_garment(np.random.default_rng(7)) for _ in range(2))
    >>> first.cut == again.cut
    True
    """
    cut = _draw_cut(rng)
    main = _draw_colour(rng)
    second = _contrasting(rng, main)
    pattern = str(rng.choice(PATTERNS, p=PATTERN_ODDS))
    busy = pattern in ("rows", "columns", "checks", "dots")
    logo_count = int(rng.random() < (0.25 if busy else 0.6)) + int(not busy and rng.random() < 0.15)
    logos = tuple(_draw_logo(rng, (main, second), order) for order in range(logo_count))
    sleeve_colour = second if cut.sleeves != "none" and rng.random() < 0.18 else None
    trim = second if rng.random() < 0.45 else 0.72 * main
    period = float(rng.uniform(0.085, 0.17))
    return Garment(cut, pattern, (main, second), period, float(rng.random()), sleeve_colour, trim, logos)


def _draw_cut(rng: np.random.Generator) -> Cut:
    """Draw cut, sleeves and neckline."""
    sleeves = str(rng.choice(SLEEVES, p=(0.2, 0.45, 0.35)))
    neckline = str(rng.choice(NECKLINES, p=(0.4, 0.25, 0.17, 0.18)))
    fit = str(rng.choice(("fitted", "boxy", "flared"), p=(0.4, 0.35, 0.25)))
    waist, hem = {"fitted": (0.80, 0.92), "boxy": (0.97, 0.99), "flared": (0.86, 1.16)}[fit]
    if sleeves == "long":
        hem = min(hem, 1.02)  # a wider hem would run into the flat sleeves
    shoulder = SHOULDER * float(rng.uniform(0.96, 1.04)) * (1.05 if fit == "boxy" else 1.0)
    chest = shoulder * float(rng.uniform(0.90, 0.97))
    wide = {"round": (0.40, 0.50), "v": (0.38, 0.50), "square": (0.42, 0.54), "boat": (0.58, 0.70)}[neckline]
    deep = {"round": (0.045, 0.075), "v": (0.09, 0.15), "square": (0.055, 0.095), "boat": (0.022, 0.036)}[neckline]
    share = {"none": 0.0, "short": rng.uniform(0.32, 0.46), "long": rng.uniform(0.86, 0.97)}[sleeves]
    angles = (21, 27) if sleeves == "long" else (28, 48)
    cuffs = (0.036, 0.048) if sleeves == "long" else (0.052, 0.066)
    return Cut(  # the order of the draws below is part of the dataset
        sleeves=sleeves, neckline=neckline, neck=shoulder * float(rng.uniform(*wide)),
        neck_drop=float(rng.uniform(*deep)),
        shoulder=shoulder, chest=chest, waist=shoulder * (waist + float(rng.uniform(-0.04, 0.04))),
        hem=shoulder * (hem + float(rng.uniform(-0.04, 0.05))), length=float(rng.uniform(0.35, 0.47)),
        hem_curve=float(rng.uniform(-0.004, 0.022)), armpit=SHOULDER_DROP + float(rng.uniform(0.095, 0.115)),
        sleeve_share=float(share), sleeve_angle=float(np.deg2rad(rng.uniform(*angles))),
        cuff=float(rng.uniform(*cuffs)),
    )  # fmt: skip


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """An RGB colour in 0..255 from hue, saturation and value in 0..1.

    >>> hsv(0.0, 1.0, 1.0).tolist(), hsv(0.5, 0.0, 0.2).tolist()
    ([255.0, 0.0, 0.0], [51.0, 51.0, 51.0])
    """
    sector = np.array([5.0, 3.0, 1.0]) + hue * 6.0
    ramp = np.clip(np.minimum(sector % 6.0, 4.0 - sector % 6.0), 0.0, 1.0)
    return 255.0 * value * (1.0 - saturation * ramp)


def _draw_colour(rng: np.random.Generator) -> Colour:
    """A fabric colour that stands out from white; one in six is neutral."""
    if rng.random() < 1 / 6:
        return hsv(rng.uniform(0.05, 0.65), rng.uniform(0.02, 0.18), rng.choice([0.16, 0.3, 0.5, 0.78]))
    return hsv(rng.random(), rng.uniform(0.5, 0.92), rng.uniform(0.42, 0.94))


def _contrasting(rng: np.random.Generator, other: Colour) -> Colour:
    """A colour, sometimes near white, that is far from ``other`` in the Lab space."""
    candidates = [_draw_colour(rng) for _ in range(7)] + [hsv(rng.random(), 0.06, 0.95)]
    distances = _lab_distance(candidates, [other])[:, 0]
    far = np.flatnonzero(distances > 45.0)
    return candidates[int(rng.choice(far))] if len(far) else candidates[int(distances.argmax())]


def _lab_distance(first: list[Colour], second: list[Colour]) -> Points:
    """Perceived differences ``[first, second]`` of colours (CIE76)."""
    both = np.stack([*first, *second]).astype(np.float32)[None] / np.float32(255.0)
    lab = cv2.cvtColor(both, cv2.COLOR_RGB2LAB)[0].astype(np.float64)
    return cast(Points, np.linalg.norm(lab[: len(first), None] - lab[None, len(first) :], axis=-1))


def _draw_logo(rng: np.random.Generator, ground: tuple[Colour, Colour], order: int) -> Logo:
    """A letter or a shape whose colour differs from both fabric colours."""
    candidates = [_draw_colour(rng) for _ in range(6)] + [hsv(0.0, 0.0, 0.97), hsv(0.0, 0.0, 0.08)]
    contrast = _lab_distance(candidates, list(ground)).min(axis=1)
    kind = str(rng.choice(list(LETTERS))) if rng.random() < 0.45 else str(rng.choice(LOGOS))
    side = float(rng.choice((-1, 1)))
    down = rng.uniform(0.34, 0.48) if order == 0 else rng.uniform(0.60, 0.76)
    place = (side * float(rng.uniform(0.12, 0.5)), float(down))
    return Logo(kind, place, float(rng.uniform(0.075, 0.125)), candidates[int(np.argmax(contrast))])


@dataclass(frozen=True)
class Placement:
    """Uniform scale and shift that fit a cut into the picture."""

    scale: float
    origin: Points

    def __call__(self, points: Points) -> Points:
        """Points of the cut as points of the picture."""
        return self.origin + self.scale * points


def flat_sleeve(cut: Cut, side: int) -> Tube:
    """The centre line of a flat sleeve, hanging straight outwards.

    >>> cut = draw_garment(np.random.default_rng(7)).cut
    >>> left, right = flat_sleeve(cut, -1), flat_sleeve(cut, 1)
    >>> bool(np.allclose(left.line * [-1, 1], right.line))
    True
    """
    tip, pit = armhole(cut, side)[[0, -1]]
    root = 0.5 * (tip + pit)
    direction = np.array([side * np.sin(cut.sleeve_angle), np.cos(cut.sleeve_angle)])
    length = cut.sleeve_share * ARM
    return Tube(np.stack([root, root + 0.5 * length * direction, root + length * direction]), side)


@lru_cache(maxsize=16)  # six calls per garment draw two seams; shared, so not to be changed
def armhole(cut: Cut, side: int, points: int = 9) -> Points:
    """The seam that torso and sleeve share, from shoulder tip to armpit.

    >>> cut = draw_garment(np.random.default_rng(7)).cut
    >>> bool(armhole(cut, side=-1, points=2)[1, 1] == cut.armpit)
    True
    """
    y = np.linspace(SHOULDER_DROP, cut.armpit, points)
    return np.stack([side * cut.half_width(y), y], axis=-1)


def place_cut(cut: Cut, aspect: float) -> Placement:
    """Centre the garment and let it fill the picture as far as :data:`FILL` allows.

    >>> cut = draw_garment(np.random.default_rng(7)).cut
    >>> float(place_cut(cut, aspect=0.75).origin[0])  # the middle of the picture, in its heights
    0.375
    """
    half = max(cut.shoulder, cut.hem, cut.chest)
    low = cut.length
    if cut.sleeves != "none":
        tube = flat_sleeve(cut, 1)
        spread = cut.cuff * np.array([np.cos(cut.sleeve_angle), np.sin(cut.sleeve_angle)])
        half = max(half, tube.line[-1, 0] + spread[0])
        low = max(low, tube.line[-1, 1] + spread[1])
    scale = min(FILL[0] / low, FILL[1] * aspect / (2.0 * half))
    return Placement(float(scale), np.array([aspect / 2.0, 0.5 - scale * low / 2.0]))


def texture(garment: Garment, place: Placement, sleeves: list[Points], size: tuple[int, int]) -> Image:
    """Full-bleed fabric ``[height, width, 3]``: pattern, sleeve colour, trims and logos."""
    height = size[0]
    share = _pattern(garment, place, size)
    first, second = (colour.tolist() for colour in garment.colours)
    channels = [cv2.convertScaleAbs(share, None, b - a, a) for a, b in zip(first, second, strict=True)]
    canvas = cast(Image, cv2.merge(channels))
    for outline in sleeves:
        if garment.sleeve_colour is not None:
            fixed = fixed_point(outline, Camera(height))
            cv2.fillPoly(canvas, [fixed], _scalar(garment.sleeve_colour), cv2.LINE_AA, SUBPIXEL_BITS)
            bleed = outline[SLEEVE_COLUMNS - 1 :]  # everywhere but over the armhole
            trim(canvas, bleed, garment.sleeve_colour, 0.03)
    for logo in garment.logos:
        _draw_logo_on(canvas, logo, garment.cut, place)
    return canvas


def _scalar(colour: Colour) -> tuple[float, float, float]:
    """A colour as OpenCV wants it."""
    return (float(colour[0]), float(colour[1]), float(colour[2]))


def _pattern(garment: Garment, place: Placement, size: tuple[int, int]) -> NDArray[np.float32]:
    """Share of the second colour in 0..1, ``[height, width]``, with edges one pixel soft."""
    height, width = size
    y = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None]
    x = ((np.arange(width, dtype=np.float32) + 0.5) / height)[None, :] - np.float32(place.origin[0])
    top, length = place.origin[1], place.scale * garment.cut.length
    soft = 0.7 * height
    wave_y = (y - top) / garment.period + garment.phase
    wave_x = x / garment.period + 0.25
    half = 0.25 * garment.period

    def stripe(wave: NDArray[Any]) -> NDArray[Any]:
        distance = np.abs(wave - np.rint(wave)) * garment.period - half
        return np.asarray(np.clip(0.5 - distance * soft, 0.0, 1.0), np.float32)

    down = (y - top) / length
    kind = garment.pattern
    if kind == "rows":
        field = stripe(wave_y)
    elif kind == "columns":
        field = stripe(wave_x)
    elif kind == "checks":
        field = 0.5 * (stripe(wave_y) + stripe(wave_x))
    elif kind == "dots":
        shift = 0.5 * (np.floor(wave_y) % 2)
        dx, dy = wave_x + shift, wave_y
        dx, dy = dx - np.floor(dx) - 0.5, dy - np.floor(dy) - 0.5
        field = np.clip(0.5 - (np.hypot(dx, dy) - 0.30) * garment.period * soft, 0.0, 1.0)
    elif kind == "gradient":
        tilt = (garment.phase - 0.5) * 2.0
        field = np.clip(0.5 + (down - 0.5) * 1.15 + tilt * x * 1.4, 0.0, 1.0)
    elif kind == "two_rows":
        field = np.clip(0.5 + (y - top - length * (0.42 + 0.25 * garment.phase)) * soft, 0.0, 1.0)
    elif kind == "two_columns":
        field = np.clip(0.5 + (x - 0.05 * (garment.phase - 0.5)) * soft, 0.0, 1.0)
    else:
        field = np.zeros((1, 1), np.float32)
    return np.broadcast_to(field, (height, width)).astype(np.float32)


def trim(canvas: Image, line: Points, colour: Colour, thickness: float) -> None:
    """Draw a band of fabric along a line: collar, cuff or hem."""
    height = canvas.shape[0]
    width_px = max(1, round(thickness * height))
    fixed = fixed_point(line, Camera(height))
    cv2.polylines(canvas, [fixed], False, _scalar(colour), width_px, cv2.LINE_AA, SUBPIXEL_BITS)


def _draw_logo_on(canvas: Image, logo: Logo, cut: Cut, place: Placement) -> None:
    """Print one logo on the fabric."""
    y = logo.place[1] * cut.length
    center = place(np.array([logo.place[0] * float(cut.half_width(np.array(y))), y]))
    if len(logo.kind) == 1:
        _draw_letter(canvas, logo, center)
        return
    height = canvas.shape[0]
    radius = 0.5 * logo.size
    fixed = fixed_point(center + radius * _logo_shape(logo.kind), Camera(height))
    if logo.kind == "ring":
        thick = max(1, round(0.35 * radius * height))
        cv2.polylines(canvas, [fixed], True, _scalar(logo.colour), thick, cv2.LINE_AA, SUBPIXEL_BITS)
    else:
        cv2.fillPoly(canvas, [fixed], _scalar(logo.colour), cv2.LINE_AA, SUBPIXEL_BITS)


def _logo_shape(kind: str) -> Points:
    """A logo as a polygon within the unit square around 0."""
    angle = np.linspace(0.0, 2.0 * np.pi, 48, endpoint=False)
    if kind == "star":
        turn = np.linspace(0.0, 2.0 * np.pi, 10, endpoint=False)
        radius = np.where(np.arange(10) % 2, 0.45, 1.1)
        return np.stack([radius * np.sin(turn), -radius * np.cos(turn)], axis=-1)
    if kind == "heart":
        x = 16 * np.sin(angle) ** 3
        y = -(13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle))
        return np.stack([x, y], axis=-1) / 16.0
    corners = {
        "triangle": [(0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)],
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "diamond": [(0.0, -1.15), (0.9, 0.0), (0.0, 1.15), (-0.9, 0.0)],
        "bar": [(-1.2, -0.5), (1.2, -0.5), (1.2, 0.5), (-1.2, 0.5)],
    }
    return np.array(corners[kind]) if kind in corners else ellipse(np.zeros(2), 1.0, 1.0)


def _draw_letter(canvas: Image, logo: Logo, center: Points) -> None:
    """Print a bold letter, centred."""
    height = canvas.shape[0]
    pixels = 1.25 * logo.size * height
    scale = pixels / 21.0  # Hershey capitals are 21 units high
    thick = max(1, round(0.17 * pixels))
    (text_width, text_height), _ = cv2.getTextSize(logo.kind, cv2.FONT_HERSHEY_SIMPLEX, scale, thick)
    corner = (round(center[0] * height - text_width / 2), round(center[1] * height + text_height / 2))
    cv2.putText(canvas, logo.kind, corner, cv2.FONT_HERSHEY_SIMPLEX, scale, _scalar(logo.colour), thick, cv2.LINE_AA)


def silhouette(parts: list[Points], size: tuple[int, int]) -> Image:
    """Mask 0 or 255 ``[height, width]`` of the union of polygons.

    >>> square = np.array([[0.0, 0.0], [0.5, 0.0], [0.5, 1.0], [0.0, 1.0]])
    >>> silhouette([square], (4, 4))[0].tolist()
    [255, 255, 255, 0]
    """
    mask = np.zeros(size, np.uint8)
    for outline in parts:
        fill(mask, outline, 255, Camera(size[0]))
    return mask
