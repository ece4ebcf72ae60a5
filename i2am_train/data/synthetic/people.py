"""People for the embedded data: body measures, pose, hair and colours, and how a garment sits on them.

Lengths are in picture heights, points are ``xy``. "Left" and side -1 always mean the viewer's left.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from i2am_train.data.synthetic.garments import (
    SHOULDER,
    SHOULDER_DROP,
    SLEEVE_COLUMNS,
    Colour,
    Cut,
    Placement,
    armhole,
    flat_sleeve,
    hsv,
)
from i2am_train.data.synthetic.meshes import PartMesh, Points, Tube, ellipse, joined, smoothstep, spread

HAIR_STYLES = ("short", "bob", "long", "bun", "afro", "bald")
SIDES = (-1, 1)
UPPER_ARM_SHARE = 0.52
"""Length of the upper arm in arm lengths."""
SKINS = ((246, 211, 187), (232, 188, 156), (208, 158, 122), (174, 122, 86), (130, 86, 60), (92, 60, 44))
HAIRS = ((28, 24, 26), (58, 38, 28), (96, 62, 38), (150, 100, 56), (206, 166, 100), (122, 50, 30), (150, 150, 152))


@dataclass(frozen=True)
class Arm:
    """Angles from straight down, outwards positive, in radians."""

    upper: float
    fore: float


@dataclass(frozen=True)
class Person:
    """Everything about a person but the garment."""

    center: float
    neck_y: float
    shoulder: float
    torso: float
    lean: float
    turn: float
    tilt: float
    arms: tuple[Arm, Arm]
    arm_length: float
    front_arm: int
    head_shift: float
    hair: str
    hair_colour: Colour
    skin: Colour
    trousers: Colour
    background: tuple[Colour, Colour]
    light: float
    fold_phase: tuple[float, float, float]
    fold_depth: float


def draw_person(rng: np.random.Generator) -> Person:
    """Draw one person at random.

    >>> first, again = (draw_person(np.random.default_rng(7)) for _ in range(2))
    >>> (first.hair, first.arms) == (again.hair, again.arms)
    True
    """
    shoulder = float(rng.uniform(0.145, 0.175))
    skin = np.array(SKINS[rng.integers(len(SKINS))]) * rng.uniform(0.95, 1.03)
    ground = hsv(rng.random(), rng.uniform(0.02, 0.10), rng.uniform(0.80, 0.94))
    light = float(rng.uniform(-1.0, 1.0))
    return Person(
        center=float(rng.uniform(-0.025, 0.025)), neck_y=float(rng.uniform(0.262, 0.285)), shoulder=shoulder,
        torso=float(rng.uniform(1.12, 1.25)), lean=float(np.deg2rad(rng.uniform(-8, 8))),
        turn=float(rng.uniform(-0.45, 0.45)),
        tilt=float(np.deg2rad(rng.uniform(-4, 4))), arms=(_draw_arm(rng), _draw_arm(rng)),
        arm_length=float(rng.uniform(0.95, 1.05)) * 0.41,
        front_arm=int(rng.choice(SIDES)), head_shift=float(rng.uniform(-0.012, 0.012)),
        hair=str(rng.choice(HAIR_STYLES, p=(0.3, 0.2, 0.2, 0.12, 0.1, 0.08))),
        hair_colour=np.array(HAIRS[rng.integers(len(HAIRS))], np.float64), skin=np.clip(skin, 0, 255),
        trousers=hsv(rng.choice([0.61, 0.6, 0.08, 0.0, rng.random()]), rng.uniform(0.05, 0.5), rng.uniform(0.18, 0.55)),
        background=(ground, np.clip(ground * rng.uniform(0.84, 0.95), 0, 255)), light=light,
        fold_phase=(rng.random(), rng.random(), rng.random()), fold_depth=float(rng.uniform(0.03, 0.085)),
    )  # fmt: skip


def _draw_arm(rng: np.random.Generator) -> Arm:
    """One of four gestures: hanging, spread, hand on the hip, forearm across the belly."""
    gesture = rng.choice(("hang", "spread", "hip", "front"), p=(0.40, 0.20, 0.16, 0.24))
    upper, bend = {
        "hang": ((7, 20), (-14, 4)),
        "spread": ((20, 36), (-24, 6)),
        "hip": ((32, 50), (-105, -80)),
        "front": ((8, 24), (-105, -52)),
    }[str(gesture)]
    angle = rng.uniform(*upper)
    return Arm(float(np.deg2rad(angle)), float(np.deg2rad(angle + rng.uniform(*bend))))


@dataclass(frozen=True)
class Body:
    """A person placed in a picture of a given aspect (width / height): torso warp and limbs."""

    person: Person
    aspect: float

    @cached_property
    def arms(self) -> dict[int, Tube]:
        """Both arms by side, from the shoulder joint."""
        return {side: self.arm(side) for side in SIDES}

    @cached_property
    def hands(self) -> dict[int, Points]:
        """Both hands by side, a little beyond the wrist."""
        return {side: self._hand(side) for side in SIDES}

    @cached_property
    def legs(self) -> dict[int, Points]:
        """Both trouser legs by side, from the waist to below the picture."""
        return {side: self._leg(side) for side in SIDES}

    @cached_property
    def base(self) -> Points:
        """Base of the neck.

        >>> person = draw_person(np.random.default_rng(7))
        >>> bool(Body(person, 0.75).base[1] == person.neck_y)
        True
        """
        return np.array([self.aspect / 2 + self.person.center, self.person.neck_y])

    @cached_property
    def scale(self) -> Points:
        """Cut lengths to body lengths, per axis.

        >>> person = draw_person(np.random.default_rng(7))
        >>> bool(Body(person, 0.75).scale[1] == person.torso)
        True
        """
        return np.array([self.person.shoulder / SHOULDER, self.person.torso])

    def carry(self, points: Points) -> Points:
        """Torso coordinates (origin at the neck, upright) into the picture: tilted shoulders, leaning spine.

        >>> body = Body(draw_person(np.random.default_rng(7)), 0.75)
        >>> bool(body.carry(np.array([0.0, 0.3]))[1] > body.base[1])  # below the neck
        True
        """
        x, y = points[..., 0], points[..., 1]
        tilt = self._slopes[0] * (1.0 - smoothstep(y / 0.45))
        sway = self._slopes[1] * (0.42 - y) * smoothstep((0.55 - y) / 0.3 + 0.5)
        return np.asarray(self.base + joined(x + sway, y + x * tilt))

    @cached_property
    def _slopes(self) -> tuple[float, float]:
        """Of the shoulders and of the spine."""
        return float(np.tan(self.person.tilt)), float(np.tan(self.person.lean))

    def turned(self, across: Points) -> Points:
        """Where a point of a cylinder at -1..1 across appears when the torso turns; ends stay in place.

        >>> Body(draw_person(np.random.default_rng(7)), 0.75).turned(np.array([-1.0, 1.0])).round(6).tolist()
        [-1.0, 1.0]
        """
        bend, turn = 0.95, self.person.turn
        low, high = np.sin(-bend + turn), np.sin(bend + turn)
        return np.asarray(2.0 * (np.sin(bend * across + turn) - low) / (high - low) - 1.0)

    def torso_point(self, cut: Cut, across: Points, y: Points) -> Points:
        """A garment point (across its half-width in -1..1, depth ``y`` of the cut) on the person."""
        x = self.turned(across) * cut.half_width(y)
        return self.carry(joined(x, y) * self.scale)

    def shoulder_joint(self, side: int) -> Points:
        """Pivot of an arm."""
        return self.carry(np.array([side * 0.86 * self.person.shoulder, (SHOULDER_DROP + 0.035) * self.person.torso]))

    def arm(self, side: int, root: Points | None = None) -> Tube:
        """An arm from the shoulder joint (or another root) over the elbow to the wrist.

        >>> body = Body(draw_person(np.random.default_rng(7)), 0.75)
        >>> bool(np.allclose(body.arm(1).line[0], body.shoulder_joint(1)))
        True
        """
        pose = self.person.arms[SIDES.index(side)]
        lean = -self.person.lean * 0.5
        joint = self.shoulder_joint(side)
        length = self.person.arm_length
        elbow = joint + UPPER_ARM_SHARE * length * _downwards(side, pose.upper, lean)
        wrist = elbow + (1 - UPPER_ARM_SHARE) * length * _downwards(side, pose.fore, lean)
        return Tube.bent(joint if root is None else root, elbow, wrist, side)

    def _hand(self, side: int) -> Points:
        tube = self.arms[side]
        direction = tube.line[-1] - tube.line[-2]
        return ellipse(tube.line[-1] + 0.026 * direction / np.linalg.norm(direction), 0.031, 0.034)

    @cached_property
    def torso_outline(self) -> Points:
        """The slim body from shoulders to hips."""
        width = self.person.shoulder
        ys = np.array([SHOULDER_DROP, 0.10, 0.17, 0.26, 0.34, 0.42]) * self.person.torso
        xs = np.array([0.93, 0.90, 0.82, 0.74, 0.80, 0.87]) * width
        right = np.stack([xs, ys], axis=-1)
        neck = np.array([[-0.052, -0.002], [0.052, -0.002]])
        return self.carry(np.concatenate([neck, right, right[::-1] * [-1, 1]]))

    def _leg(self, side: int) -> Points:
        width = self.person.shoulder
        inner = np.array([[0.0, 0.29], [0.0, 0.47], [0.10, 0.90]]) * [width, self.person.torso]
        outer = np.array([[0.80, 0.90], [0.93, 0.50], [0.92, 0.42], [0.80, 0.29]]) * [width, self.person.torso]
        return self.carry(np.concatenate([inner, outer]) * [side, 1])

    @cached_property
    def head(self) -> Points:
        """Centre of the head."""
        return self.carry(np.array([self.person.head_shift, -0.122]))

    @cached_property
    def neck(self) -> Points:
        """The neck down to the collar bones."""
        top = self.head + np.array([0.0, 0.03])
        low = self.carry(np.array([[0.036, -0.012], [0.080, 0.032], [0.0, 0.20], [-0.080, 0.032], [-0.036, -0.012]]))
        return np.concatenate([top + [[-0.032, 0.0], [0.032, 0.0]], low])


def _downwards(side: int, angle: float, lean: float) -> Points:
    """Unit vector at an outward angle from straight down."""
    return np.array([side * np.sin(angle) + np.sin(lean), np.cos(angle)])


def torso_mesh(cut: Cut, place: Placement, body: Body) -> PartMesh:
    """The front panel: columns across (neckline corners included), rows down.

    >>> from i2am_train.data.synthetic.garments import draw_garment, place_cut
    >>> cut, person = draw_garment(np.random.default_rng(7)).cut, draw_person(np.random.default_rng(7))
    >>> mesh = torso_mesh(cut, place_cut(cut, 0.75), Body(person, 0.75))
    >>> mesh.source.shape == mesh.target.shape
    True
    """
    corner = cut.neck / cut.shoulder
    inner = [-0.98 * corner, 0.98 * corner]  # beside the corners, for the steps of a square neckline
    across = np.unique(np.concatenate([np.linspace(-1, 1, 15), np.linspace(-corner, corner, 9), inner]))
    down = np.linspace(0.0, 1.0, 13)[:, None]
    y = cut.top(across) + (cut.bottom(across) - cut.top(across)) * down
    wide = np.broadcast_to(across, y.shape)
    source = place(np.stack([wide * cut.half_width(y), y], axis=-1))
    parameters = np.stack([np.broadcast_to(down, y.shape), wide], axis=-1)
    return PartMesh(source, body.torso_point(cut, wide, y), parameters)


def sleeve_mesh(cut: Cut, place: Placement, body: Body, side: int) -> PartMesh:
    """One sleeve; its first row is the armhole that it shares with the torso."""
    along = np.linspace(0.0, 1.0, 13 if cut.sleeves == "long" else 8)
    across = np.linspace(-1.0, 1.0, SLEEVE_COLUMNS)
    seam_y = armhole(cut, side, SLEEVE_COLUMNS)[:, 1]
    seam = body.torso_point(cut, np.full(SLEEVE_COLUMNS, float(side)), seam_y)
    tip, pit = armhole(cut, side, 2)
    root = 0.5 * float(np.linalg.norm(pit - tip))
    half_width = root + (cut.cuff - root) * along**0.8
    flat = _sleeve_grid(flat_sleeve(cut, side), armhole(cut, side, SLEEVE_COLUMNS), along, along, across, half_width)
    worn_width = half_width * np.sqrt(body.scale.prod())
    worn = _sleeve_grid(body.arm(side, seam.mean(axis=0)), seam, along, along * cut.sleeve_share, across, worn_width)
    shape = (len(along), SLEEVE_COLUMNS)
    parameters = np.stack([np.broadcast_to(along[:, None], shape), np.broadcast_to(across, shape)], axis=-1)
    return PartMesh(place(flat), worn, parameters)


def _sleeve_grid(
    tube: Tube, seam: Points, along: Points, fractions: Points, across: Points, half_width: Points
) -> Points:
    """A tube whose first row is bent onto the armhole seam."""
    center, inward = tube.at(fractions)
    round_part = spread(center, inward, across, half_width)
    seam_part = seam[None] + (center - center[0])[:, None]
    reach = 0.55 if fractions[-1] < 0.99 and len(along) < 10 else 0.30
    blend = smoothstep(along / reach)[:, None, None]
    return np.asarray((1.0 - blend) * seam_part + blend * round_part)
