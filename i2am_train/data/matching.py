"""Where pixels of a worn garment lie on the flat one, found in the two pictures: sparse and right, or nothing.

1. *Candidates*: keypoints of the two pictures whose descriptors are each other's nearest, clearly nearer than any at
   another place (Lowe's ratio, in both directions), and alike in angle, scale and colour (SIFT-VTON, arXiv:2605.01296).
2. *Consensus*, for each part of the body alone (a sleeve moves against the torso): the largest set that one similarity
   explains roughly, of similarities through two candidates (RANSAC, with a seed of its own). A few are nothing.
3. *Warp*: a smoothing thin-plate spline through the set. Whatever is far from what the others say of its place (the
   leave-one-out residual) is taken out, the worst first.
4. *Growth*: near a match that stands, the warp says where a keypoint's partner must lie, and only keypoints there
   compete. So stripes and checks, which are ambiguous anywhere else, are found beside a logo that is not.
5. *Density*: a pixel gets the warp's place where matches support it, three of them near and one nearer. All others
   are unknown, never guessed: plain cloth comes out empty.

Lengths are garment lengths, unless a name says pixels: the square root of a garment's area in its own picture. So the
limits below mean the same in a portrait and in a picture of a whole person, and a scale ratio is relative to what the
two areas say. They were chosen on drawn samples other than those that they are tested on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from i2am_train.data.pictures import Image, Mask
from i2am_train.data.poses import DENSE_ARMS, DENSE_HANDS

Points = NDArray[np.float64]
"""Places ``[n, 2]``, y before x."""

WORKING_LENGTH, LARGEST_ZOOM = 384, 6.0
"""Pixels of a garment length at which keypoints are looked for, and how far a small picture is enlarged for it."""
MARGIN = 0.1
"""What is kept around the garment, so that its outline is seen, too."""
MOST_KEYPOINTS, CONTRAST = 1500, 0.015
"""Of a picture, the strongest; SIFT's own limit of contrast is .04, which leaves cloth with few."""
RATIO, NEAR_RATIO = 0.8, 0.9
"""Lowe's, of a descriptor's distance to the next one's at another place: anywhere, and near where it must lie."""
LARGEST_DISTANCE = 350.0
"""Of two SIFT descriptors (their length is 512) near where they must lie."""
OTHER_PLACE = 0.02
"""Keypoints that are nearer to each other have one place."""
LARGEST_TURN, LARGEST_SCALE = 45.0, 2.25
"""Degrees between the angles of a match, and ratio of its scales; as in SIFT-VTON."""
LARGEST_HUE, LARGEST_VALUE, COLOURLESS = 30.0, 0.3, 0.2
"""Differences of hue (degrees) and value (0..1) of a match; the saturation below which there is no hue."""
SLEEVE = 0.06
"""How far beyond an arm its sleeve may reach."""
APART = 0.03
"""Distance of matches that count as two."""
FEWEST = 5
"""Matches of a part that make a warp."""
NARROWEST = 0.03
"""Standard deviation of their places across their main direction: those on a line say nothing of what is beside it."""
ROUGHLY, CLOSELY = 0.12, 0.04
"""Distance from the similarity of a consensus, and from what the other matches say."""
HYPOTHESES = 2000
STIFFNESS = 1e-3
"""Of the thin-plate spline; 0 goes through every match."""
GROWTH, NEAR, ROUNDS = 0.3, 0.06, 4
"""How far from a match others are looked for, how near to the warp's place, and how often."""
NEAREST, THIRD = 0.2, 0.3
"""Distances of the nearest and the third match that support a pixel."""
BLOCK = 8192
"""Pixels that are placed at once, so that memory stays small."""


class Garment(NamedTuple):
    """A garment as a picture shows it."""

    picture: Image
    """RGB ``[H, W, 3]``."""
    mask: Mask
    """``[H, W]``, True on the garment."""

    @property
    def length(self) -> float:
        """Pixels of a garment length.

        >>> Garment(np.zeros((4, 5, 3), np.uint8), np.ones((4, 4), np.bool_)).length
        4.0
        """
        return float(np.sqrt(np.count_nonzero(self.mask)))


@dataclass(frozen=True)
class Keypoints:
    """Places of a picture that can be told from others."""

    place: Points
    size: NDArray[np.float64]
    """Diameters ``[n]``."""
    angle: NDArray[np.float64]
    """Degrees ``[n]``."""
    colour: NDArray[np.float32]
    """Hue 0..360, saturation and value 0..1 of the garment around each, ``[n, 3]``."""
    descriptor: NDArray[np.float32]
    """``[n, numbers]``; alike where their Euclidean distance is small."""

    def __len__(self) -> int:
        return len(self.place)

    def of(self, index: NDArray[Any]) -> Keypoints:
        """Some of them."""
        return Keypoints(*(values[index] for values in vars(self).values()))


@dataclass(frozen=True)
class Matches:
    """Places that show the same piece of cloth."""

    worn: Points
    flat: Points
    confidence: NDArray[np.float64]
    """``[n]`` in 0..1: 1 minus the ratio of the match's distance to the next one's."""

    def __len__(self) -> int:
        return len(self.worn)

    def of(self, index: NDArray[Any]) -> Matches:
        """Some of them."""
        return Matches(self.worn[index], self.flat[index], self.confidence[index])

    def spread(self) -> Matches:
        """Those that are :data:`APART` on the worn garment, the first of those that are not.

        >>> close = Matches(np.array([[0.0, 0.0], [0.01, 0.0], [0.1, 0.0]]), np.zeros((3, 2)), np.ones(3))
        >>> close.spread().worn.tolist()
        [[0.0, 0.0], [0.1, 0.0]]
        """
        kept: list[int] = []
        for index, place in enumerate(self.worn):
            if not kept or np.hypot(*(self.worn[kept] - place).T).min() > APART:
                kept.append(index)
        return self.of(np.array(kept, np.intp))


@dataclass(frozen=True)
class Source:
    """Keypoints of one kind in both pictures, and what makes two of them candidates."""

    worn: Keypoints
    flat: Keypoints
    ratio: float = RATIO
    """Lowe's, anywhere; 1: each other's nearest."""
    near_ratio: float = NEAR_RATIO
    largest_distance: float = LARGEST_DISTANCE


class Matched(NamedTuple):
    """What was found of a sample."""

    correspondence: NDArray[np.float32]
    """``[H, W, 2]`` of the worn picture: place on the flat picture (yx, 0..1), NaN where it is not known."""
    confidence: NDArray[np.float32]
    """``[H, W]``: 1 where three matches lie at the pixel itself, falling to 0 where the third is :data:`THIRD` away; 0
    where nothing is known."""
    matches: Matches
    """Those that the warps go through, in pixels of their pictures."""


def sift_keypoints(garment: Garment) -> Keypoints:
    """SIFT keypoints (Lowe 2004) of a garment, looked for at a size where garments are equally large.

    >>> len(sift_keypoints(Garment(np.full((64, 48, 3), 90, np.uint8), np.ones((64, 48), np.bool_))))
    0
    """
    length = garment.length
    if not length:
        return _keypoints([], Garment(garment.picture[:1, :1], garment.mask[:1, :1]), np.zeros((0, 128)), 1.0)
    zoom = min(LARGEST_ZOOM, WORKING_LENGTH / length)
    corner, part = _around(garment)
    size = round(part.mask.shape[1] * zoom), round(part.mask.shape[0] * zoom)
    enlarged = cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC
    picture = cast(Image, cv2.resize(part.picture, size, interpolation=enlarged))
    inside = cv2.resize(part.mask.astype(np.uint8) * 255, size, interpolation=cv2.INTER_LINEAR)
    sift = cv2.SIFT_create(nfeatures=MOST_KEYPOINTS, contrastThreshold=CONTRAST)  # type: ignore[attr-defined]
    found, descriptors = sift.detectAndCompute(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), inside)
    keypoints = _keypoints(found, Garment(picture, inside >= 128), descriptors, zoom * length)
    return Keypoints(**vars(keypoints) | {"place": keypoints.place + np.array(corner) / length})


def _around(garment: Garment) -> tuple[tuple[int, int], Garment]:
    """Upper left corner and content of the garment's box with a margin."""
    rows, columns = np.nonzero(garment.mask)
    margin = int(MARGIN * garment.length) + 2
    top, left = max(0, rows.min() - margin), max(0, columns.min() - margin)
    box = slice(top, rows.max() + margin + 1), slice(left, columns.max() + margin + 1)
    return (int(top), int(left)), Garment(garment.picture[box], garment.mask[box])


def _keypoints(found: Sequence[Any], at: Garment, descriptors: NDArray[Any] | None, length: float) -> Keypoints:
    """OpenCV's keypoints of a picture in units of a length; pixel (0, 0) covers 0..1."""
    pixels = np.array([one.pt[::-1] for one in found], np.float64).reshape(-1, 2) + 0.5
    size = np.array([one.size for one in found], np.float64)
    angle = np.array([one.angle for one in found], np.float64)
    if descriptors is None:
        descriptors = np.zeros((0, 128))
    return Keypoints(pixels / length, size / length, angle, colours(at, pixels, size), descriptors.astype(np.float32))


def colours(garment: Garment, pixels: Points, size: NDArray[np.float64]) -> NDArray[np.float32]:
    """Mean hue, saturation and value ``[n, 3]`` of the garment in squares of twice a size around places in pixels."""
    means = np.zeros((1, len(pixels), 3), np.float32)
    for index, ((y, x), half) in enumerate(zip(pixels, np.maximum(2.0, size), strict=True)):
        rows = slice(max(0, int(y - half)), int(y + half) + 1)
        columns = slice(max(0, int(x - half)), int(x + half) + 1)
        piece, inside = garment.picture[rows, columns], garment.mask[rows, columns]
        means[0, index] = piece[inside].mean(axis=0) if inside.any() else piece.mean(axis=(0, 1))
    return np.asarray(cv2.cvtColor(means / 255, cv2.COLOR_RGB2HSV)[0]) if len(pixels) else means[0]


def matched(worn: Garment, flat: Garment, sources: Sequence[Source], parts: NDArray[np.uint8] | None = None) -> Matched:
    """The correspondence of a worn and a flat garment, as far as their pictures show it.

    Args:
        worn: the garment on the person.
        flat: the same garment alone.
        sources: keypoints of one kind or several.
        parts: DensePose's labels ``[H, W]`` of the worn picture; None: the garment moves as one.
    """
    size = worn.mask.shape
    correspondence, confidence = np.full((*size, 2), np.nan, np.float32), np.zeros(size, np.float32)
    part_of = _parts(parts, worn)
    found = []
    for part in np.unique(part_of):
        pairs = _of_part([_alike(source, part_of == part, worn.length) for source in sources])
        if pairs is None:
            continue
        where = worn.mask & (part_of == part)
        pixels = np.argwhere(where).astype(np.float64) + 0.5
        places, support = _densely(pairs, pixels / worn.length)
        shares = places * flat.length / flat.mask.shape
        known = (support > 0) & _inside(flat.mask, shares)
        correspondence[where] = np.where(known[:, None], shares, np.nan)
        confidence[where] = np.where(known, support, 0.0)
        found.append(pairs)
    every = _together([NONE, *found])
    pixels_of = Matches(every.worn * worn.length, every.flat * flat.length, every.confidence)
    return Matched(correspondence, confidence, pixels_of)


NONE = Matches(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0))


def sift_source(worn: Garment, flat: Garment) -> Source:
    """SIFT keypoints of both."""
    return Source(sift_keypoints(worn), sift_keypoints(flat))


def _parts(labels: NDArray[np.uint8] | None, worn: Garment) -> NDArray[np.intp]:
    """What moves as one: 0 torso, head and legs, 1 left arm, 2 right arm; loose cloth goes with the nearest.

    Arms are taken :data:`SLEEVE` wider than DensePose sees them: sleeves are.
    """
    if labels is None or not labels.any():
        return np.zeros(worn.mask.shape, np.intp)
    right_hand, left_hand = DENSE_HANDS
    left, right = [left_hand, *DENSE_ARMS[::2]], [right_hand, *DENSE_ARMS[1::2]]
    body = _distance_to((labels > 0) & ~np.isin(labels, [*left, *right]))
    arms = [_distance_to(np.isin(labels, part)) for part in (left, right)]
    return np.asarray(np.argmin([body + SLEEVE * worn.length, *arms], axis=0))


def _distance_to(part: Mask) -> NDArray[np.float32]:
    """Pixels to the nearest pixel of a part; all far where there is none."""
    if not part.any():
        return np.full(part.shape, np.inf, np.float32)
    return np.asarray(cv2.distanceTransform((~part).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5))


# -- candidates --------------------------------------------------------------------------------------------------------


class _Candidates(NamedTuple):
    """Keypoints of a part, all of the flat garment, their descriptors' distances, and which can be the same."""

    source: Source
    worn: Keypoints
    distance: NDArray[np.float32]
    alike: Mask

    def paired(self, of: NDArray[np.intp], allowed: Mask | np.bool_, ratio: float) -> Matches:
        """Those of some worn keypoints that are each other's nearest among what is allowed, and by a ratio."""
        flat = self.source.flat
        distance = np.where(allowed, self.distance[of], np.inf)
        if not distance.size:
            return NONE
        rows, nearest, back = np.arange(len(of)), distance.argmin(axis=1), distance.argmin(axis=0)
        place = self.worn.place[of]
        elsewhere = _apart(flat.place[nearest], flat.place) > OTHER_PLACE
        others = np.where(elsewhere, distance, np.inf).min(axis=1)
        elsewhere = _apart(place, place[back]) > OTHER_PLACE
        others = np.minimum(others, np.where(elsewhere, distance, np.inf).min(axis=0)[nearest])
        best = distance[rows, nearest]
        with np.errstate(invalid="ignore"):
            share = best / others  # NaN where nothing was allowed
            good = (back[nearest] == rows) & (share < ratio if ratio < 1 else best < np.inf)
        good &= self.alike[of, nearest]
        pairs = Matches(place[good], flat.place[nearest[good]], 1.0 - np.minimum(share[good], 1.0))
        return pairs.of(np.argsort(-pairs.confidence, kind="stable"))


def _alike(source: Source, part: Mask, length: float) -> _Candidates:
    """The keypoints of a part beside all of the flat garment."""
    rows, columns = np.minimum((source.worn.place * length).astype(np.intp), np.array(part.shape) - 1).T
    worn, flat = source.worn.of(part[rows, columns]), source.flat
    turned = np.abs((worn.angle[:, None] - flat.angle + 180.0) % 360.0 - 180.0) <= LARGEST_TURN
    scale = worn.size[:, None] / flat.size
    one, other = worn.colour[:, None], flat.colour
    hue = np.abs((one[..., 0] - other[..., 0] + 180.0) % 360.0 - 180.0) <= LARGEST_HUE
    hue |= np.minimum(one[..., 1], other[..., 1]) < COLOURLESS
    value = np.abs(one[..., 2] - other[..., 2]) <= LARGEST_VALUE
    alike = turned & (np.maximum(scale, 1.0 / scale) <= LARGEST_SCALE) & hue & value
    return _Candidates(source, worn, _apart(worn.descriptor, flat.descriptor).astype(np.float32), alike)


def _apart(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """Euclidean distances ``[n, m]``."""
    return np.sqrt(_squares(one, other))


def _squares(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    one, other = one.astype(np.float64), other.astype(np.float64)
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1) - 2.0 * one @ other.T
    return np.asarray(np.maximum(squares, 0.0))


def _of_part(candidates: Sequence[_Candidates]) -> Matches | None:
    """The matches of a part that agree; None where they are too few."""
    pairs = _joined([one.paired(np.arange(len(one.worn)), np.True_, one.source.ratio) for one in candidates])
    pairs = pairs.of(consensus(pairs.worn, pairs.flat))
    fitted = _agreeing(pairs)
    for _ in range(ROUNDS if fitted else 0):
        assert fitted is not None, "the loop is left otherwise"
        grown = _agreeing(_joined([fitted, *(_near(one, fitted) for one in candidates)]))
        if grown is None or len(grown) <= len(fitted):
            break
        fitted = grown
    return fitted


def _joined(some: Sequence[Matches]) -> Matches:
    """One after the other, without those that are too near to one before them."""
    return _together(some).spread()


def _together(some: Sequence[Matches]) -> Matches:
    return Matches(*(np.concatenate([getattr(one, name) for one in some]) for name in vars(NONE)))


def _near(candidates: _Candidates, fitted: Matches) -> Matches:
    """Matches around those that stand, of keypoints near to where the warp puts them."""
    place = candidates.worn.place
    around = np.flatnonzero(_apart(place, fitted.worn).min(axis=1) < GROWTH)
    expected = ThinPlate(fitted.worn, fitted.flat)(place[around])
    allowed = _apart(expected, candidates.source.flat.place) < NEAR
    allowed &= candidates.alike[around] & (candidates.distance[around] < candidates.source.largest_distance)
    return candidates.paired(around, allowed, candidates.source.near_ratio)


# -- what agrees -------------------------------------------------------------------------------------------------------


def consensus(worn: Points, flat: Points) -> NDArray[np.intp]:
    """Which matches the best similarity through two of them explains, to :data:`ROUGHLY`.

    >>> grid = np.argwhere(np.ones((3, 3))) / 10.0
    >>> moved = grid + 0.2
    >>> moved[4] += 0.5
    >>> consensus(grid, moved).tolist()
    [0, 1, 2, 3, 5, 6, 7, 8]
    """
    nothing = np.zeros(0, np.intp)
    here, there = (places[:, 1] + 1j * places[:, 0] for places in (worn, flat))
    first, second = np.triu_indices(len(here), 1)
    if len(first) > HYPOTHESES:
        drawn = np.random.default_rng(0).choice(len(first), HYPOTHESES, replace=False)
        first, second = first[drawn], second[drawn]
    between = here[first] - here[second]
    apart = np.abs(between) > APART
    first, second, between = first[apart], second[apart], between[apart]
    turn = (there[first] - there[second]) / between
    scale = np.abs(turn)
    likely = np.abs(np.degrees(np.angle(turn))) <= LARGEST_TURN
    likely &= (scale <= LARGEST_SCALE) & (scale >= 1 / LARGEST_SCALE)
    first, turn = first[likely], turn[likely]
    if not len(first):
        return nothing
    residual = np.abs(turn[:, None] * (here - here[first][:, None]) + there[first][:, None] - there)
    score = np.maximum(0.0, 1.0 - (residual / ROUGHLY) ** 2).sum(axis=1)
    return np.flatnonzero(residual[score.argmax()] <= ROUGHLY)


class ThinPlate:
    """A smoothing thin-plate spline through matches (Wahba 1990): the smoothest warp that is near to all of them.

    Attributes:
        left_out: distance ``[n]`` of each match from the spline through the others (Rippa's formula, 1999).
    """

    def __init__(self, worn: Points, flat: Points, stiffness: float = STIFFNESS) -> None:
        count = len(worn)
        system = np.zeros((count + 3, count + 3))
        system[:count, :count] = _plate(worn, worn) + stiffness * np.eye(count)
        system[:count, count:] = _affine(worn)
        system[count:, :count] = system[:count, count:].T
        inverse = np.linalg.inv(system)
        self._worn, self._weights = worn, inverse[:, :count] @ flat
        self.left_out = np.hypot(*self._weights[:count].T) / np.abs(np.diag(inverse)[:count])

    def __call__(self, places: Points) -> Points:
        """Where places ``[n, 2]`` of the worn garment lie on the flat one."""
        count = len(self._worn)
        return np.asarray(_plate(places, self._worn) @ self._weights[:count] + _affine(places) @ self._weights[count:])


def _plate(one: Points, other: Points) -> NDArray[np.float64]:
    """The thin plate's kernel, r^2 log r^2."""
    squares = _squares(one, other)
    return np.asarray(squares * np.log(np.maximum(squares, 1e-300)))


def _affine(places: Points) -> NDArray[np.float64]:
    return np.concatenate([np.ones((len(places), 1)), places], axis=1)


def _agreeing(pairs: Matches) -> Matches | None:
    """Without those that the others contradict; None where too few are left, or all lie on a line."""
    while len(pairs) >= FEWEST and _breadth(pairs.worn) > NARROWEST:
        left_out = ThinPlate(pairs.worn, pairs.flat).left_out
        if left_out.max() <= CLOSELY:
            return pairs
        pairs = pairs.of(np.delete(np.arange(len(pairs)), left_out.argmax()))
    return None


def _breadth(places: Points) -> float:
    """Standard deviation of places across their main direction."""
    return float(np.sqrt(max(0.0, np.linalg.eigvalsh(np.cov(places.T, bias=True))[0])))


def _densely(pairs: Matches, places: Points) -> tuple[Points, NDArray[np.float64]]:
    """Where places lie on the flat garment, and the confidence in each, 0 where matches do not support it."""
    warp = ThinPlate(pairs.worn, pairs.flat)
    result, confidence = np.full((len(places), 2), np.nan), np.zeros(len(places))
    for start in range(0, len(places), BLOCK):
        some = places[start : start + BLOCK]
        nearest, _, third = np.partition(_apart(some, pairs.worn), (0, 1, 2), axis=1)[:, :3].T
        supported = start + np.flatnonzero((nearest < NEAREST) & (third < THIRD))
        result[supported] = warp(places[supported])
        confidence[supported] = 1.0 - third[supported - start] / THIRD
    return result, confidence


def _inside(mask: Mask, shares: Points) -> Mask:
    """Whether places (0..1) lie on a garment."""
    within = np.asarray(((shares >= 0.0) & (shares < 1.0)).all(axis=1))
    rows, columns = (np.where(within[:, None], shares, 0.0) * mask.shape).astype(np.intp).T
    return np.asarray(within & mask[rows, columns])
