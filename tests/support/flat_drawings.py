"""Drawn shop photographs of flat garments that are hard to tell from their background, with their true masks.

Holes inside a garment (a neckline, lace) belong to it, as :mod:`i2am_train.data.flat_garments` has it.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np

from i2am_train.types import GridSize

SIZE = GridSize(512, 384)

# Outlines in shares of the picture's width and height.
# fmt: off
SHAPES = {
    "shirt": [[(.33, .15), (.45, .20), (.55, .20), (.67, .15), (.88, .32), (.78, .42), (.70, .36), (.70, .85),
               (.30, .85), (.30, .36), (.22, .42), (.12, .32)]],
    "long sleeves": [[(.36, .15), (.45, .19), (.55, .19), (.64, .15), (.80, .30), (.88, .78), (.80, .80), (.70, .42),
                      (.68, .85), (.32, .85), (.30, .42), (.20, .80), (.12, .78), (.20, .30)]],
    "hanging sleeves": [[(.36, .15), (.45, .19), (.55, .19), (.64, .15), (.82, .30), (.84, .60), (.72, .84),
                         (.685, .81), (.76, .58), (.69, .40), (.66, .86), (.34, .86), (.31, .40), (.24, .58),
                         (.315, .81), (.28, .84), (.16, .60), (.18, .30)]],
    "trousers": [[(.34, .08), (.66, .08), (.74, .92), (.58, .92), (.50, .35), (.42, .92), (.26, .92)]],
    "tight trousers": [[(.34, .08), (.66, .08), (.70, .92), (.512, .92), (.50, .35), (.488, .92), (.30, .92)]],
    "dress": [[(.40, .08), (.60, .08), (.58, .40), (.78, .92), (.22, .92), (.42, .40)]],
    "strap top": [[(.32, .12), (.36, .12), (.40, .36), (.60, .36), (.64, .12), (.68, .12), (.72, .80), (.28, .80)]],
    "pair": [[(.25, .15), (.75, .15), (.70, .40), (.30, .40)], [(.30, .60), (.70, .60), (.55, .85), (.45, .85)]],
    "wide": [[(.0, .20), (1.0, .20), (1.0, .40), (.75, .42), (.74, .90), (.26, .90), (.25, .42), (.0, .40)]],
    "to the edge": [[(.30, .10), (.70, .10), (.78, 1.0), (.22, 1.0)]],
}
# fmt: on


@dataclass(frozen=True)
class Flat:
    """How a flat garment is drawn. Colours are RGB or grey; lengths are shares of the picture's height."""

    shape: str = "shirt"
    back: float | tuple[float, float, float] = 246.0
    cloth: float | tuple[float, float, float] = 252.0
    seam: float = 24.0
    """How much darker the garment is at its outline."""
    seam_width: float = 0.012
    gap: float = 0.0
    """Radius of a piece of the outline that is as bright as the inside."""
    gap_at: tuple[float, float] = (0.70, 0.62)
    """Where, as x and y."""
    print: bool = True
    folds: float = 0.0
    """Shading inside, in grey levels."""
    stripes: float = 0.0
    """Period of dark stripes across."""
    lace: float = 0.0
    """Period of holes."""
    shadow: float = 0.0
    """Darkness of a soft shadow below and right of the garment."""
    slope: float = 0.0
    """How much darker the background is at the lower right corner than at the upper left."""
    vignette: float = 0.0
    noise: float = 0.7
    quality: int = 92
    frame: float = 0.0
    """How much darker a rectangle around the garment is: pasted pictures have one."""

    def draw(self, size: GridSize = SIZE, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The picture after JPEG, uint8 ``[H, W, 3]``, and the true mask."""
        height, width = size
        y, x = np.mgrid[:height, :width].astype(np.float32)
        truth = np.zeros(size, np.uint8)
        for outline in SHAPES[self.shape]:
            points = np.rint(np.array(outline) * [width - 1, height - 1]).astype(np.int32)
            cv2.fillPoly(truth, [points], 1)
        inside = truth > 0
        back, cloth = (np.array(np.broadcast_to(c, 3), np.float32) for c in (self.back, self.cloth))
        ground = back - self.slope * ((x / width + y / height) / 2)[..., None]
        ground = ground - self.vignette * ((x / width - 0.5) ** 2 + (y / height - 0.5) ** 2)[..., None]
        if self.frame:
            rows, columns = np.nonzero(inside)
            margin = round(0.02 * height)
            ground[rows.min() - margin : rows.max() + margin, columns.min() - margin : columns.max() + margin] -= (
                self.frame
            )
        ground = ground - self._shadow(truth, height)[..., None]
        distance = cv2.distanceTransform(cv2.copyMakeBorder(truth, 1, 1, 1, 1, cv2.BORDER_REPLICATE), cv2.DIST_L2, 5)
        depth = distance[1:-1, 1:-1] / (self.seam_width * height)
        seam = self.seam * np.clip(1 - depth, 0, 1)
        if self.gap:
            column, row = self.gap_at
            away = ((x - column * width) ** 2 + (y - row * height) ** 2) / (self.gap * height) ** 2
            seam = seam * (1 - np.exp(-away))
        folds = self.folds * (0.5 + 0.5 * np.sin(x / width * 23 + 3 * np.sin(y / height * 5)))
        fabric = cloth - (seam + folds)[..., None]
        if self.stripes:
            fabric[(y / height) % self.stripes < 0.4 * self.stripes] = (40, 40, 60)
        if self.print:
            round_print = (y - 0.5 * height) ** 2 + (x - 0.5 * width) ** 2 < (0.07 * height) ** 2
            fabric[round_print] = (180, 30, 60)
        shown = inside.copy()
        if self.lace:
            period = self.lace * height
            hole = ((x % period) - period / 2) ** 2 + ((y % period) - period / 2) ** 2 < (0.3 * period) ** 2
            shown &= ~(hole & (cv2.erode(truth, np.ones((9, 9), np.uint8)) > 0))
        soft = cv2.GaussianBlur(shown.astype(np.float32), (0, 0), 0.6)[..., None]
        picture = soft * fabric + (1 - soft) * ground
        picture += np.random.default_rng(seed).normal(0, self.noise, picture.shape)
        pixels = picture.clip(0, 255).astype(np.uint8)[..., ::-1]
        _, content = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, self.quality])
        return cv2.imdecode(content, 1)[..., ::-1].copy(), inside

    def _shadow(self, truth: np.ndarray, height: int) -> np.ndarray:
        moved = np.roll(truth.astype(np.float32), (round(0.012 * height), round(0.008 * height)), (0, 1))
        return self.shadow * cv2.GaussianBlur(moved, (0, 0), 0.008 * height)


WHITE = Flat()
BRIGHT = Flat(back=255, cloth=254)
GREY = Flat(cloth=200, seam=30)
DARK = Flat(cloth=(30, 34, 52), seam=10)

EASY = {
    "grey shirt": GREY,
    "dark shirt": DARK,
    "dark trousers": replace(DARK, shape="trousers"),
    "dark long sleeves": replace(DARK, shape="long sleeves"),
    "dark hanging sleeves": replace(DARK, shape="hanging sleeves"),
    "dark dress on grey": replace(DARK, shape="dress", back=210),
    "red straps": replace(DARK, shape="strap top", cloth=(190, 30, 40)),
    "blue pair": replace(DARK, shape="pair", cloth=(40, 60, 190), print=False),
    "white on blue": replace(WHITE, back=(90, 120, 200)),
    "white on dark": replace(WHITE, back=40),
    "dark on a slope": replace(DARK, slope=14),
    "dark with a vignette": replace(DARK, vignette=14),
    "dark, noisy": replace(DARK, noise=9.0),
    "grey in bad JPEG": replace(GREY, quality=70),
    "dark, no noise": replace(DARK, noise=0.0),
    "dark, with a shadow": replace(DARK, shadow=20),
    "dark stripes": replace(GREY, stripes=0.06),
}
"""What any rule must get right."""

HARD = {
    "white, whole outline": WHITE,
    **{f"white, gap {gap}": replace(WHITE, gap=gap) for gap in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)},
    **{
        f"white, gap 0.03 at the {place}": replace(WHITE, gap=0.03, gap_at=at)
        for place, at in {"hem": (0.5, 0.85), "shoulder": (0.78, 0.24), "armpit": (0.30, 0.36)}.items()
    },
    "white, big gap at the hem": replace(WHITE, gap=0.15, gap_at=(0.5, 0.85)),
    "bright, whole outline": BRIGHT,
    **{f"bright, gap {gap}": replace(BRIGHT, gap=gap) for gap in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)},
    "bright, big gap at the hem": replace(BRIGHT, gap=0.2, gap_at=(0.5, 0.85)),
    "bright, no outline": replace(BRIGHT, cloth=253, seam=0),
    "bright, dark outline": replace(BRIGHT, seam=40, gap=0.05),
    "bright, black outline": replace(BRIGHT, seam=120, gap=0.05),
    "bright, black outline, no print": replace(BRIGHT, seam=120, gap=0.05, print=False),
    "bright, black wide outline": replace(BRIGHT, seam=120, seam_width=0.03, gap=0.06),
    "bright, no print": replace(BRIGHT, gap=0.05, print=False),
    "bright, exact": replace(BRIGHT, cloth=255, noise=0.0, gap=0.05),
    "bright, exact, wide gap": replace(BRIGHT, cloth=255, noise=0.0, gap=0.25),
    "white, no outline": replace(WHITE, seam=0),
    "white, weak outline": replace(WHITE, seam=8),
    "white, soft outline": replace(WHITE, seam_width=0.04),
    "white, soft outline with a gap": replace(WHITE, seam_width=0.04, gap=0.05),
    "white with folds": replace(WHITE, folds=10, gap=0.05),
    "bright with folds": replace(BRIGHT, folds=8, gap=0.05),
    "white, noisy": replace(WHITE, noise=4.0, gap=0.02),
    "white, bad JPEG": replace(WHITE, quality=60, gap=0.02),
    "white on a slope": replace(WHITE, slope=14),
    "white on a slope, gap": replace(WHITE, slope=14, gap=0.05),
    "white in a vignette": replace(WHITE, vignette=20, gap=0.05),
    "white, shadow": replace(WHITE, shadow=12),
    "white, shadow, gap": replace(WHITE, shadow=12, gap=0.05),
    "grey, deep shadow": replace(GREY, shadow=50),
    "white long sleeves": replace(WHITE, shape="long sleeves", gap=0.03),
    "white hanging sleeves": replace(WHITE, shape="hanging sleeves", gap=0.02),
    "bright hanging sleeves": replace(BRIGHT, shape="hanging sleeves"),
    "white trousers": replace(WHITE, shape="trousers", gap=0.03, gap_at=(0.73, 0.8)),
    "white tight trousers": replace(WHITE, shape="tight trousers"),
    "bright trousers": replace(BRIGHT, shape="trousers", gap=0.03, gap_at=(0.72, 0.8)),
    "white straps": replace(WHITE, shape="strap top", gap=0.03, gap_at=(0.5, 0.8)),
    "white dress": replace(WHITE, shape="dress", gap=0.04, gap_at=(0.77, 0.9)),
    "bright dress": replace(BRIGHT, shape="dress", gap=0.08, gap_at=(0.5, 0.92)),
    "white pair": replace(WHITE, shape="pair", gap=0.03, gap_at=(0.5, 0.15), print=False),
    "bright pair": replace(BRIGHT, shape="pair", gap=0.05, gap_at=(0.5, 0.15), print=False),
    "white stripes": replace(WHITE, stripes=0.08),
    "bright stripes": replace(BRIGHT, stripes=0.08, seam=4),
    "bright wide stripes": replace(BRIGHT, stripes=0.3, seam=6),
    "grey lace": replace(GREY, lace=0.06),
    "white lace": replace(WHITE, lace=0.06),
    "dark to the border": replace(DARK, shape="to the edge"),
    "white to the border": replace(WHITE, shape="to the edge", gap=0.03, gap_at=(0.5, 0.10)),
    "dark across": replace(DARK, shape="wide"),
    "white across": replace(WHITE, shape="wide"),
    "cream on white": replace(WHITE, back=255, cloth=(252, 248, 238), seam=8, gap=0.05),
    "cream on cream": replace(WHITE, back=(240, 234, 222), cloth=(246, 240, 228), gap=0.05),
    "dark in a frame": replace(DARK, frame=5, noise=0.0),
    "white in a frame": replace(WHITE, frame=4),
}
"""Where a rule may be right or refuse."""
