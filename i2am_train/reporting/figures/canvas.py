"""Where every figure starts: style, colours, a grid of pictures placed to the pixel, and saving.

Figures are ``matplotlib.figure.Figure`` objects on the Agg canvas; nothing goes through pyplot, so
drawing in a training callback leaves no global state behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.typing import RcStyleType
from numpy.typing import ArrayLike, NDArray
from PIL import Image as PillowImage

from i2am_train.files import written

Picture: TypeAlias = NDArray[np.uint8]
"""One picture ``[height, width, 3]``."""

STYLE: RcStyleType = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "i2am_train",  # the same figure is the same file
    "svg.fonttype": "path",
    "pdf.fonttype": 42,  # TrueType; conferences refuse Type 3
}
INK = "#222222"
GREY = "#777777"
START_COLOR = "#404040"
TRUTH_COLOR = "#a0a0a0"

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colours that colour-blind readers can tell apart (Okabe and Ito, 2008), darkest first."""
BETTER, WORSE = OKABE_ITO[2], OKABE_ITO[1]

HEAT = "inferno"
"""Perceptually uniform, and readable for colour-blind people and in grey."""
COLOR_BAR_LEVEL = 0.285
"""Inches from the lower edge of a figure to the middle of its colour bar."""
OVERLAY_ALPHA = 0.88
_ALPHA_POWER = 0.75
"""Opacity grows as value ** 0.75: low values leave the picture visible. Chosen by us, by eye."""


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of this size in inches, on the Agg canvas."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def arm_colors(arms: Iterable[str], start_arm: str = "base") -> dict[str, str]:
    """One colour per arm, the same in every figure; the untrained start is dark grey.

    >>> arm_colors(["base", "baseline"])
    {'base': '#404040', 'baseline': '#0072B2'}
    """
    trained = [arm for arm in arms if arm != start_arm]
    colors = {arm: OKABE_ITO[i % len(OKABE_ITO)] for i, arm in enumerate(trained)}
    return {start_arm: START_COLOR, **colors} if start_arm in arms else colors


def heat_colormap(alpha: float = OVERLAY_ALPHA) -> ListedColormap:
    """Inferno that fades in over a picture: transparent at 0, opacity ``alpha`` at 1."""
    values = np.linspace(0.0, 1.0, 256)
    rgba = colormaps[HEAT](values)
    rgba[:, 3] = alpha * values**_ALPHA_POWER
    return ListedColormap(rgba, name=f"{HEAT}_overlay")


def overlay(image: Picture, heat_map: ArrayLike, alpha: float = OVERLAY_ALPHA) -> Picture:
    """Lay a heat map over a picture.

    Args:
        image: uint8 ``[height, width, 3]``.
        heat_map: ``[h, w]`` in [0, 1], of any size; resized bilinearly to the picture.
        alpha: opacity where the map is 1; where it is 0 the picture is unchanged.

    Raises:
        ValueError: if the map is not two-dimensional or leaves [0, 1].

    >>> picture = np.full((4, 3, 3), 200, np.uint8)
    >>> bool((overlay(picture, np.zeros((2, 2))) == picture).all())
    True
    """
    values = np.asarray(heat_map, dtype=np.float32)
    if values.ndim != 2 or not (values.min() >= 0.0 and values.max() <= 1.0):
        raise ValueError(
            f"A heat map of shape {values.shape} with values {values.min():.3g} to "
            f"{values.max():.3g} cannot be laid over a picture; give [height, width] in [0, 1]."
        )
    height, width = image.shape[:2]
    resized = PillowImage.fromarray(values).resize((width, height), PillowImage.Resampling.BILINEAR)
    rgba = heat_colormap(alpha)(np.clip(np.asarray(resized), 0.0, 1.0))
    weight = rgba[..., 3:]
    mixed = image * (1.0 - weight) + 255.0 * rgba[..., :3] * weight
    return np.asarray(np.round(mixed), dtype=np.uint8)


def faded(image: Picture, strength: float = 0.45, gray: bool = False) -> Picture:
    """The picture mixed with white (0 = unchanged, 1 = white), to draw on."""
    base = image.astype(np.float32)
    if gray:  # ITU-R BT.601 luma
        base = np.repeat((base @ np.array([0.299, 0.587, 0.114], np.float32))[..., None], 3, -1)
    return np.round(base * (1.0 - strength) + 255.0 * strength).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class Margins:
    """Inches around and between the pictures of a grid."""

    left: float = 0.24
    right: float = 0.06
    top: float = 0.3
    bottom: float = 0.06
    gap: float = 0.05
    group_gap: float = 0.2


@dataclass(frozen=True, slots=True)
class ImageGrid:
    """Axes for pictures of one shape; ``axes[row][column]`` fill their panels exactly."""

    figure: Figure
    axes: tuple[tuple[Axes, ...], ...]
    groups: tuple[range, ...]
    margins: Margins

    @property
    def height(self) -> float:
        """Height of the figure in inches."""
        return float(self.figure.get_figheight())

    @property
    def panels(self) -> list[Axes]:
        """All axes, row by row."""
        return [axes for row in self.axes for axes in row]

    def column_titles(self, titles: Sequence[str]) -> None:
        """Write one title over each column."""
        for axes, title in zip(self.axes[0], titles, strict=True):
            axes.set_title(plain_text(title), fontsize=8.5, pad=4, color=INK)

    def row_titles(self, titles: Sequence[str]) -> None:
        """Write one small upright title left of each row."""
        for axes, title in zip(self.axes, titles, strict=True):
            axes[0].set_ylabel(plain_text(title), fontsize=7, color=GREY, labelpad=3)

    def group_titles(self, titles: Sequence[str]) -> None:
        """Write a heading with a rule over each group of columns."""
        for group, title in zip(self.groups, titles, strict=True):
            left = self.axes[0][group[0]].get_position()
            right = self.axes[0][group[-1]].get_position()
            y = left.y1 + 0.27 / self.height
            self.figure.add_artist(Line2D([left.x0, right.x1], [y, y], color=GREY, linewidth=0.6))
            center = (left.x0 + right.x1) / 2
            self.figure.text(center, y + 0.05 / self.height, title, ha="center", fontsize=9.5, weight="bold")

    def color_bar(self, mappable: ScalarMappable, label: str, width: float = 1.8) -> Axes:
        """A horizontal colour bar below the pictures, at the right; needs a bottom margin."""
        return add_color_bar(self.figure, mappable, label, width, self.margins.right, size=8)


def add_color_bar(
    figure: Figure, mappable: ScalarMappable, label: str, width: float, right: float = 0.04, size: float = 6.5
) -> Axes:
    """A horizontal colour bar in the lowest 0.4 inches of a figure, at the right.

    Args:
        figure: with room there.
        mappable: the scale.
        label: stands left of the bar.
        width: of the bar, in inches.
        right: margin, in inches.
        size: of the label, in points.
    """
    inches, height = (float(value) for value in figure.get_size_inches())
    left = (inches - right - 0.1 - width) / inches  # room for the last number
    bar_axes = figure.add_axes((left, 0.24 / height, width / inches, 0.09 / height))
    bar = figure.colorbar(mappable, cax=bar_axes, orientation="horizontal")
    bar.outline.set_visible(False)
    bar_axes.tick_params(length=2, pad=1, labelsize=size - 1)
    at = (left - 0.08 / inches, COLOR_BAR_LEVEL / height)
    figure.text(*at, label, ha="right", va="center", fontsize=size)
    return bar_axes


def image_grid(
    rows: int, group_sizes: Sequence[int], aspect: float, width: float, margins: Margins | None = None
) -> ImageGrid:
    """Lay out ``rows`` x ``sum(group_sizes)`` panels of height ``aspect`` times their width.

    Args:
        rows: number of rows.
        group_sizes: columns per group; groups stand further apart than columns.
        aspect: height of a picture over its width.
        width: of the whole figure, in inches; the height follows.
        margins: space around and between the panels.
    """
    m = margins or Margins()
    columns = sum(group_sizes)
    gaps = m.gap * (columns - len(group_sizes)) + m.group_gap * (len(group_sizes) - 1)
    panel_width = (width - m.left - m.right - gaps) / columns
    panel_height = panel_width * aspect
    height = m.top + rows * panel_height + (rows - 1) * m.gap + m.bottom
    figure = new_figure(width, height)
    lefts = _column_offsets(group_sizes, panel_width, m)
    bottoms = [height - m.top - (r + 1) * panel_height - r * m.gap for r in range(rows)]
    size = (panel_width / width, panel_height / height)
    axes = tuple(
        tuple(add_bare_axes(figure, (left / width, bottom / height, *size)) for left in lefts) for bottom in bottoms
    )
    return ImageGrid(figure, axes, _ranges(group_sizes), m)


def _column_offsets(sizes: Sequence[int], panel_width: float, margins: Margins) -> list[float]:
    offsets, left = [], margins.left
    for size in sizes:
        for _ in range(size):
            offsets.append(left)
            left += panel_width + margins.gap
        left += margins.group_gap - margins.gap
    return offsets


def _ranges(sizes: Sequence[int]) -> tuple[range, ...]:
    ends = np.cumsum(sizes)
    return tuple(range(int(end) - size, int(end)) for end, size in zip(ends, sizes, strict=True))


def add_bare_axes(figure: Figure, box: tuple[float, float, float, float]) -> Axes:
    """Axes for a picture, without ticks: left, bottom, width, height in fractions of the figure."""
    axes = figure.add_axes(box)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(visible=True, color="#dddddd", linewidth=0.5)
    return axes


def show_picture(axes: Axes, picture: Picture, interpolation: str = "lanczos") -> None:
    """Draw a picture so that it fills its panel."""
    axes.imshow(picture, interpolation=interpolation, aspect="auto")


def show_heat(
    axes: Axes, heat_map: ArrayLike, underlay: Picture | None, limits: tuple[float, float] = (0.0, 1.0)
) -> None:
    """Draw a heat map, over a pale grey copy of ``underlay`` if one is given.

    The map may be of any size; it is stretched over the panel.
    """
    values = np.asarray(heat_map, dtype=np.float64)
    norm = Normalize(*limits)
    if underlay is None:
        axes.imshow(values, cmap=HEAT, norm=norm, interpolation="nearest", aspect="auto")
        return
    height, width = underlay.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(faded(underlay, gray=True), interpolation="lanczos", aspect="auto", extent=extent)
    axes.imshow(values, cmap=heat_colormap(), norm=norm, interpolation="bilinear", aspect="auto", extent=extent)


def draw_outline(axes: Axes, mask: NDArray[np.bool_]) -> None:
    """Draw the border of a mask ``[height, width]`` over its picture, seen on dark and on light.

    The mask is taken as surrounded by nothing, so that its border is closed at the picture's edge.
    """
    if not mask.any():
        return
    padded = np.pad(mask.astype(np.float64), 1)
    y, x = (np.arange(size) - 1.0 for size in padded.shape)
    axes.set_autoscale_on(False)
    for color, width, style in (("white", 1.3, "solid"), (INK, 0.65, (0, (3, 1.5)))):
        axes.contour(x, y, padded, [0.5], colors=[color], linewidths=width, linestyles=[style])


def heat_scale(limits: tuple[float, float] = (0.0, 1.0), over_picture: bool = True) -> ScalarMappable:
    """What a colour bar of ``show_heat`` shows."""
    colors = heat_colormap() if over_picture else colormaps[HEAT]
    return ScalarMappable(Normalize(*limits), colors)


def plain_text(text: str) -> str:
    r"""A user's text for a figure: matplotlib sets what stands between two dollar signs as a formula.

    A legend would leave out what begins with an underscore; as a formula of one sign it stays.

    >>> plain_text("$5 or $6"), plain_text("_new")
    ('\\$5 or \\$6', '$\\_$new')
    """
    text = text.replace("$", r"\$")
    return r"$\_$" + text[1:] if text.startswith("_") else text


def save_figure(figure: Figure, path: Path, dpi: int = 160, description: str = "") -> Path:
    """Write a figure as PNG, SVG or PDF, by the suffix of ``path``; all or nothing.

    The file says what wrote it and, in ``description``, from what; it carries no date, so the same
    figure gives the same bytes.
    """
    path = Path(path)
    file_format = path.suffix.lower().lstrip(".")
    with written(path) as unfinished, mpl.rc_context(STYLE):
        metadata = _metadata(file_format, description)
        figure.savefig(unfinished, format=file_format, dpi=dpi, metadata=metadata)
    return path


def _metadata(file_format: str, description: str) -> Mapping[str, Any]:
    by_format: dict[str, dict[str, Any]] = {
        "png": {"Software": "i2am_train", "Description": description or None},
        "svg": {"Creator": "i2am_train", "Date": None, "Description": description or None},
        "pdf": {"Creator": "i2am_train", "CreationDate": None, "Subject": description or None},
    }
    if file_format not in by_format:
        known = ", ".join(f".{name}" for name in by_format)
        raise ValueError(f"Cannot save a figure as {file_format!r}; use one of {known}.")
    return by_format[file_format]
