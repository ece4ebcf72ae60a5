"""Masks of flat garments photographed on a plain background.

The background's colour is a smooth field (light falls off towards corners) fitted to the picture's border. Two floods
from the border are compared. The *generous* one passes everything that is nearly the background's colour: shadows
count as background, and it leaks into white garments where their outline is bright. The *careful* one passes only what
the border's own noise explains, and no passage narrower than a seam. Holes that the border does not reach (inside a
neckline, between straps) belong to the garment.

Where both agree and the generous mask's outline is clear, it is the answer, else the careful one. Either is judged:

- a mask must not be a line around nothing, which is what remains of a white garment that a flood has entered;
- places like the background behind a narrow passage need walls of some contrast, or nobody can tell what they are;
- what lies outside must be plain;
- where the floods disagree, the careful mask needs an outline of its own.

What fails is refused: a mask that is wrong in silence teaches a model wrong garments.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from i2am_train.data.pictures import Image, Mask, resize_mask
from i2am_train.errors import DataError
from i2am_train.types import GridSize

LARGEST_SIDE = 1024
"""Larger pictures are judged at this length of the longer side."""
BORDER = 0.02
"""Width of the border that the background's colour is read from, as a share of the picture's shorter side."""
PLAIN_DISTANCE = 20.0
"""Largest distance (CIE Lab) of a border pixel from the border's median that counts as plain."""
PLAIN_SHARE = 0.7
"""Share of the border that must be plain: a garment may touch it here and there."""
SMALLEST_SHARE, LARGEST_SHARE = 0.02, 0.95
"""Share of the picture that a garment covers."""
SMALLEST_PIECE = 0.02
"""Pieces smaller than this share of the largest one are specks."""

GENEROUS, GENEROUS_MARGIN = 4.0, 2.0
"""Distance from the background's colour that the generous flood passes: the border's 95th percentile plus a margin."""
CAREFUL, CAREFUL_MARGIN = 1.0, 0.5
"""Likewise of the careful flood: about what an eye can tell apart."""
SEAM = 0.008
"""Radius of the widest passage that the careful flood does not take, as a share of the shorter side."""
HALO, HALO_SHARE = 16, 0.08
"""Pixels around an edge that JPEG spoils (its largest block), at most this share of the shorter side."""
EDGE = 0.3
"""Share of the contrast nearby below which a pixel at the outline may be halo."""

# The judgement. Chosen by us on 58 shop photographs and the drawings of tests/support/flat_drawings.py.
AGREEMENT = 0.95
"""Intersection over union from which the two masks agree."""
CLEAR, LARGEST_UNCLEAR = 3.0, 0.03
"""An outline is clear where its contrast exceeds the generous limit by this; the share that may be unclear."""
FAINT, LARGEST_FAINT = 2.0, 0.3
"""An outline is faint where its contrast exceeds the careful limit by less than this; the share that may be faint."""
THIN, PALE, LARGEST_PALE, LARGEST_THIN = 0.02, 14.0, 0.05, 0.4
"""Half the width (share of the shorter side) and the contrast of lines; how much of a mask pale or any lines may be."""
SMALLEST_POCKET = 0.005
"""Share of the mask from which a place like the background inside it counts."""
WALL, LARGEST_UNDECIDED = 14.0, 0.07
"""Contrast of walls that decides that a pocket is background, and the share of the mask that may stay undecided."""
LARGEST_ROOMS = 0.35
"""Share of the mask that such pockets may have: between stripes of a garment they would have more."""
LARGEST_TRIM = 0.08
"""Share of a careful mask that may have been taken for halo: pale stripes that end at the outline look like it."""
REMNANT, LARGEST_REMNANTS = 0.4, 0.05
"""Smoothed distance beyond the border's own that shows something beside the mask; how much of the mask's size."""


def garment_mask(picture: Image) -> Mask:
    """The garment of a flat photograph ``[H, W, 3]``.

    Raises:
        DataError: the background is not plain, nothing (or nearly everything) is the garment, or the garment cannot be
            told from the background.

    >>> shop = np.full((64, 48, 3), 255, np.uint8)
    >>> shop[16:48, 12:36] = 40
    >>> garment_mask(shop)[32, [0, 24]].tolist()
    [False, True]
    """
    size = GridSize(*picture.shape[:2])
    floods = _Floods.of(_reduced(picture, size))
    mask = floods.mask
    share = float(mask.mean())
    if not SMALLEST_SHARE <= share <= LARGEST_SHARE:
        what = "the garment is empty" if share < SMALLEST_SHARE else "no background is left"
        raise DataError(
            f"{what}: the mask covers {share:.0%} of the picture, expected {SMALLEST_SHARE:.0%} to "
            f"{LARGEST_SHARE:.0%}. The garment may have the background's colour; bring a mask of your own."
        )
    doubt = floods.doubt(mask)
    if doubt is not None:
        raise DataError(
            f"the garment cannot be told from the background: {doubt}. Photograph it on another colour, or bring a "
            "mask of your own."
        )
    return resize_mask(mask, size)


def _reduced(picture: Image, size: GridSize) -> Image:
    """A picture of bounded size: the rules' lengths are shares of it."""
    scale = LARGEST_SIDE / max(size)
    if scale >= 1.0:
        return picture
    width, height = (max(1, round(length * scale)) for length in (size.width, size.height))
    return np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


@dataclass(frozen=True)
class _Floods:
    """The two masks of a picture, and how an answer is judged."""

    distance: NDArray[np.float32]
    """From the background's colour, CIE Lab."""
    border: Mask
    noise: float
    """95th percentile of the border's distances."""

    @classmethod
    def of(cls, picture: Image) -> _Floods:
        """Measure a picture; one whose background is not plain is refused."""
        shares = picture.astype(np.float32) / np.float32(255)
        lab = np.asarray(cv2.cvtColor(shares, cv2.COLOR_RGB2LAB), np.float32)
        border = _border(GridSize(*lab.shape[:2]))
        colours = lab[border]
        plain = np.linalg.norm(colours - np.median(colours, axis=0), axis=-1) <= PLAIN_DISTANCE
        if plain.mean() < PLAIN_SHARE:
            raise DataError(
                f"the background is not plain: {plain.mean():.0%} of the picture's border has one colour, "
                f"{PLAIN_SHARE:.0%} is needed. Photograph the garment on a plain background, or bring a mask of your "
                "own."
            )
        away = np.linalg.norm(lab - _background(lab, border, plain), axis=-1)
        noise = float(np.percentile(away[border][plain], 95))
        return cls(away.astype(np.float32), border, noise)

    @property
    def side(self) -> int:
        """The shorter side in pixels."""
        return int(min(self.distance.shape))

    @property
    def halo(self) -> int:
        """How far JPEG spoils the surroundings of an edge, in pixels."""
        return max(1, min(HALO, round(HALO_SHARE * self.side)))

    @property
    def careful_limit(self) -> float:
        """What the careful flood passes."""
        return max(CAREFUL, self.noise + CAREFUL_MARGIN)

    @property
    def generous_limit(self) -> float:
        """What the generous flood passes."""
        return max(GENEROUS, self.noise + GENEROUS_MARGIN)

    @cached_property
    def contrast(self) -> NDArray[np.float32]:
        """The largest distance nearby."""
        near = np.ones((2 * self.halo + 1, 2 * self.halo + 1), np.uint8)
        return np.asarray(cv2.dilate(self.distance, near), np.float32)

    # -- the two masks ---------------------------------------------------------------------------------------------

    @cached_property
    def mask(self) -> Mask:
        """The answer, before it is judged."""
        unclear = self._outline_below(self.generous, self.generous_limit + CLEAR)
        clear = self.agreement >= AGREEMENT and unclear <= LARGEST_UNCLEAR
        return self.generous if clear else self.careful

    @cached_property
    def agreement(self) -> float:
        """Intersection over union of the two masks."""
        union = float((self.careful | self.generous).sum())
        return float((self.careful & self.generous).sum()) / max(1.0, union)

    @cached_property
    def generous(self) -> Mask:
        """What the generous flood leaves."""
        return _without_specks(_sharpened(~self._generously_reached, self.distance))

    @cached_property
    def _generously_reached(self) -> Mask:
        return _reached(self.distance <= self.generous_limit, self.border)

    @cached_property
    def careful(self) -> Mask:
        """What the careful flood leaves, without pockets of background and without the halo."""
        kept = self.sealed & ~self.rooms
        trimmed = _sharpened(self._trimmed(kept), self.distance)
        radius = SEAM * self.side / 2
        smooth = _grown(_inner(trimmed, radius), radius) & trimmed
        return _without_specks(smooth | (trimmed & self.generous))  # a strap is thin, but no halo

    @cached_property
    def alike(self) -> Mask:
        """What the border's noise explains, grains of noise included."""
        other = self.distance > self.careful_limit
        return ~_large_pieces(other, (SEAM * self.side) ** 2)

    @cached_property
    def sealed(self) -> Mask:
        """What a flood leaves that takes no narrow passage."""
        radius = SEAM * self.side
        wide = _reached(_inner(self.alike, radius), self.border)
        return ~(_grown(wide, radius) & self.alike)

    @cached_property
    def pockets(self) -> list[Mask]:
        """Places like the background that the generous flood reaches and the careful one does not."""
        narrow = self.sealed & self.alike & self._generously_reached
        count, pieces, statistics, _ = cv2.connectedComponentsWithStats(narrow.astype(np.uint8))
        areas = statistics[:, cv2.CC_STAT_AREA]
        smallest = SMALLEST_POCKET * float(self.sealed.sum())
        return [np.asarray(pieces == n) for n in range(1, count) if areas[n] >= smallest]

    @cached_property
    def rooms(self) -> Mask:
        """Pockets that are background: between a sleeve and the body, or between legs."""
        rooms = np.zeros_like(self.border)
        for pocket in self.pockets:
            rooms |= pocket & self._is_walled(pocket)
        return rooms

    def _is_walled(self, pocket: Mask) -> bool:
        wall = _grown(pocket, 3.0) & ~pocket & ~self.alike
        return bool(wall.any()) and float(np.percentile(self.contrast[wall], 10)) >= WALL

    def _trimmed(self, mask: Mask) -> Mask:
        """Without what is pale beside its outline, as far from outside as a halo is wide."""
        limit = np.minimum(EDGE * self.contrast, self.generous_limit)
        pale = np.asarray((self.distance < limit) | ~mask).astype(np.uint8)
        cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
        outside = (~mask).astype(np.uint8)
        for _ in range(self.halo):
            outside = np.asarray(cv2.dilate(outside, cross), np.uint8) & pale
        return np.asarray(outside == 0)

    # -- the judgement ---------------------------------------------------------------------------------------------

    def doubt(self, mask: Mask) -> str | None:
        """Why a mask cannot be trusted, or None."""
        area = float(mask.sum())
        lines = mask & ~_grown(_inner(mask, THIN * self.side), THIN * self.side)
        pale = float((lines & (self.contrast < PALE)).sum()) / area
        if pale > LARGEST_PALE or lines.sum() > LARGEST_THIN * area:
            return f"{max(pale, lines.sum() / area):.0%} of the mask is a thin line around the background's colour"
        open_places = mask & self.sealed & _reached(self.alike, self.border)
        undecided = float(open_places.sum()) / area
        if undecided > LARGEST_UNDECIDED:
            return f"{undecided:.0%} of the mask has the background's colour and an opening to it"
        rooms = float((self.rooms & ~mask).sum()) / area
        if rooms > LARGEST_ROOMS:
            return f"places between its parts, {rooms:.0%} of its size, have the background's colour"
        remnants = self._remnants(mask) / area
        if remnants > LARGEST_REMNANTS:
            return f"something pale, {remnants:.0%} of the mask's size, lies beside the mask"
        trimmed = float((self.sealed & ~self.rooms & ~mask).sum()) / area
        if mask is self.careful and trimmed > LARGEST_TRIM:
            return f"{trimmed:.0%} of its size, at its outline, is as pale as what JPEG leaves around an edge"
        faint = self._outline_below(mask, self.careful_limit + FAINT)
        if self.agreement < AGREEMENT and faint > LARGEST_FAINT:
            return f"{faint:.0%} of its outline is hardly darker or brighter than the background"
        return None

    def _outline_below(self, mask: Mask, contrast: float) -> float:
        """Share of an outline with less than a contrast; of an empty mask, all."""
        outline = mask & ~_inner(mask, 1.0)
        return float((self.contrast[outline] < contrast).mean()) if outline.any() else 1.0

    def _remnants(self, mask: Mask) -> float:
        """How many pixels outside differ from the background when noise is averaged away."""
        width = max(3, round(0.03 * self.side))
        outside = ~_grown(mask, self.halo + width)
        if not (outside & self.border).any():
            return 0.0
        weight = cv2.blur(outside.astype(np.float32), (width, width))
        total = cv2.blur(np.where(outside, self.distance, np.float32(0)), (width, width))
        smooth = total / np.maximum(weight, np.float32(1e-6))
        usual = float(np.percentile(smooth[self.border & outside], 99))
        return float((outside & (smooth > usual + REMNANT)).sum())


def _border(size: GridSize) -> Mask:
    """The outermost pixels."""
    border = np.ones(size, np.bool_)
    edge = max(1, round(BORDER * min(size)))
    border[edge:-edge, edge:-edge] = False
    return border


def _background(lab: NDArray[np.float32], border: Mask, plain: Mask) -> NDArray[np.float32]:
    """A quadratic colour field ``[H, W, 3]`` through the border's plain pixels; outliers are left out in turn."""
    across, down = (np.linspace(-1, 1, border.shape[axis], dtype=np.float32) for axis in (1, 0))
    x, y = np.meshgrid(across, down)
    terms = np.stack([np.ones_like(x), x, x * x, y, y * y, x * y], axis=-1)
    at_border, colours, kept = terms[border], lab[border], plain
    for _ in range(4):
        field, *_ = np.linalg.lstsq(at_border[kept], colours[kept], rcond=None)
        rest = np.linalg.norm(colours - at_border @ field, axis=-1)
        kept = plain & (rest <= max(2.0, 3.0 * float(np.median(rest[plain]))))
    return np.asarray(terms @ field, np.float32)


def _reached(alike: Mask, start: Mask) -> Mask:
    """What a start reaches through pixels that are alike."""
    count, pieces = cv2.connectedComponents(alike.astype(np.uint8), connectivity=4)
    outside = np.zeros(count, np.bool_)
    outside[pieces[start & alike]] = True
    return np.asarray(outside[pieces])


def _inner(mask: Mask, radius: float) -> Mask:
    """Further than a radius from everything outside the mask; the picture's edge is not outside."""
    if mask.all():
        return mask
    distance = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)
    return np.asarray(distance > radius)


def _grown(mask: Mask, radius: float) -> Mask:
    """Within a radius of a mask."""
    return ~_inner(~mask, radius)


def _sharpened(mask: Mask, distance: NDArray[np.float32]) -> Mask:
    """The outermost two pixels, only where they are more garment than background: edges are blurred."""
    near = np.ones((5, 5), np.uint8)
    inner = cv2.erode(mask.astype(np.uint8), near, borderValue=1) > 0
    half = distance >= 0.5 * cv2.dilate(distance, near)
    return np.asarray(inner | (mask & half))


def _without_specks(mask: Mask) -> Mask:
    """Only pieces of some size beside the largest one."""
    if not mask.any():
        return mask
    _, _, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    return _large_pieces(mask, SMALLEST_PIECE * float(statistics[1:, cv2.CC_STAT_AREA].max()))


def _large_pieces(mask: Mask, smallest: float) -> Mask:
    """Pieces of some area."""
    _, pieces, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    large = statistics[:, cv2.CC_STAT_AREA] >= smallest
    large[0] = False
    return np.asarray(large[pieces])
