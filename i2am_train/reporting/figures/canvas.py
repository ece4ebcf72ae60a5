"""Where every figure starts: style, colours, a grid of pictures placed to the pixel, and saving.

Figures are ``matplotlib.figure.Figure`` objects on the Agg canvas; nothing goes through pyplot, so
drawing in a training callback leaves no global state behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
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
_START_COLOR = "#404040"
TRUTH_COLOR = "#a0a0a0"

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colours that colour-blind readers can tell apart (Okabe and Ito, 2008), darkest first."""
BETTER, WORSE = OKABE_ITO[2], OKABE_ITO[1]

_HEAT = "inferno"
"""Perceptually uniform, and readable for colour-blind people and in grey."""
COLOR_BAR_LEVEL = 0.285
"""Inches from the lower edge of a figure to the middle of its colour bar."""
_OVERLAY_ALPHA = 0.88
_ALPHA_POWER = 0.75
"""Opacity grows as value ** 0.75: low values leave the picture visible. Chosen by us, by eye."""


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of this size in inches, on the Agg canvas.

    >>> new_figure(2.0, 1.5).get_size_inches().tolist()
    [2.0, 1.5]
    """
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
    return {start_arm: _START_COLOR, **colors} if start_arm in arms else colors


def heat_colormap(alpha: float = _OVERLAY_ALPHA) -> ListedColormap:
    """Inferno that fades in over a picture: transparent at 0, opacity ``alpha`` at 1.

    >>> heat_colormap(0.5)([0.0, 1.0])[:, 3].tolist()
    [0.0, 0.5]
    """
    values = np.linspace(0.0, 1.0, 256)
    rgba = colormaps[_HEAT](values)
    rgba[:, 3] = alpha * values**_ALPHA_POWER
    return ListedColormap(rgba, name=f"{_HEAT}_overlay")


def overlay(image: Picture, heat_map: ArrayLike, alpha: float = _OVERLAY_ALPHA) -> Picture:
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
    """The picture mixed with white (0 = unchanged, 1 = white), to draw on.

    >>> faded(np.full((1, 1, 3), 55, np.uint8), strength=0.5).tolist()
    [[[155, 155, 155]]]
    """
    base = image.astype(np.float32)
    if gray:  # ITU-R BT.601 luma
        base = np.repeat((base @ np.array([0.299, 0.587, 0.114], np.float32))[..., None], 3, -1)
    return np.round(base * (1.0 - strength) + 255.0 * strength).astype(np.uint8)


def add_color_bar(figure: Figure, label: str, width: float, right: float = 0.04, size: float = 6.5) -> None:
    """The scale of ``show_heat`` as a horizontal colour bar in the lowest 0.4 inches of a figure, at the right.

    Its ``label`` stands left of it; ``width`` and the margin at its ``right`` are in inches, ``size`` in points.
    """
    inches, height = (float(value) for value in figure.get_size_inches())
    left = (inches - right - 0.1 - width) / inches  # room for the last number
    bar_axes = figure.add_axes((left, 0.24 / height, width / inches, 0.09 / height))
    scale = ScalarMappable(Normalize(0.0, 1.0), heat_colormap())
    bar = figure.colorbar(scale, cax=bar_axes, orientation="horizontal")
    bar.outline.set_visible(False)
    bar_axes.tick_params(length=2, pad=1, labelsize=size - 1)
    at = (left - 0.08 / inches, COLOR_BAR_LEVEL / height)
    figure.text(*at, label, ha="right", va="center", fontsize=size)


def column_lefts(groups: Sequence[int], left: float, width: float, gap: float, group_gap: float) -> list[float]:
    """Left edges of columns of pictures of one ``width``, in inches; ``groups`` of columns stand further apart.

    >>> column_lefts([2, 1], left=0.0, width=1.0, gap=0.5, group_gap=2.0)
    [0.0, 1.5, 4.5]
    """
    lefts = []
    for columns in groups:
        for _ in range(columns):
            lefts.append(left)
            left += width + gap
        left += group_gap - gap
    return lefts


def add_group_title(
    figure: Figure, ends: tuple[float, float], y: float, title: str, above: float, linewidth: float, **text: Any
) -> None:
    """A heading with a rule under it over a group of columns.

    ``ends`` and ``y`` of the rule are in fractions of the figure, its ``linewidth`` in points; the heading stands
    ``above`` it by so many inches. ``text``: properties of the heading, as matplotlib has them.
    """
    figure.add_artist(Line2D(ends, [y, y], color=GREY, linewidth=linewidth))
    figure.text(sum(ends) / 2, y + above / figure.get_figheight(), title, ha="center", **text)


def add_bare_axes(figure: Figure, box: tuple[float, float, float, float]) -> Axes:
    """Axes for a picture, without ticks: left, bottom, width, height in fractions of the figure.

    >>> add_bare_axes(new_figure(2.0, 1.0), (0.0, 0.0, 0.5, 1.0)).get_xticks().tolist()
    []
    """
    axes = figure.add_axes(box)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(visible=True, color="#dddddd", linewidth=0.5)
    return axes


def show_heat(axes: Axes, heat_map: ArrayLike, underlay: Picture) -> None:
    """Draw a heat map in [0, 1], of any size, over a pale grey copy of a picture; it is stretched over the panel.

    >>> axes = add_bare_axes(new_figure(1.0, 1.0), (0.0, 0.0, 1.0, 1.0))
    >>> show_heat(axes, np.eye(2), np.zeros((8, 6, 3), np.uint8))
    >>> [image.get_array().shape for image in axes.images]
    [(8, 6, 3), (2, 2)]
    """
    height, width = underlay.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(faded(underlay, gray=True), interpolation="lanczos", aspect="auto", extent=extent)
    axes.imshow(
        np.asarray(heat_map, dtype=np.float64), cmap=heat_colormap(), norm=Normalize(0.0, 1.0),
        interpolation="bilinear", aspect="auto", extent=extent,
    )  # fmt: skip


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


def plain_text(text: str) -> str:
    r"""A user's text for a figure: matplotlib sets what stands between two dollar signs as a formula.

    A legend would leave out what begins with an underscore; as a formula of one sign it stays.

    >>> plain_text("$5 or $6"), plain_text("_new")
    ('\\$5 or \\$6', '$\\_$new')
    """
    text = text.replace("$", r"\$")
    return r"$\_$" + text[1:] if text.startswith("_") else text


def with_index(label: str) -> str:
    """A label with its index set low, for matplotlib.

    >>> with_index("IMACS_g")
    'IMACS$_g$'
    """
    return re.sub(r"_(\w)\b", r"$_\1$", label)


def save_figure(figure: Figure, path: Path, dpi: int = 160, description: str = "") -> Path:
    """Write a figure as PNG, SVG or PDF, by the suffix of ``path``; all or nothing.

    The file says what wrote it and, in ``description``, from what; it carries no date, so the same
    figure gives the same bytes.

    >>> save_figure(new_figure(1.0, 1.0), Path("map.bmp"))
    Traceback (most recent call last):
    ValueError: Cannot save a figure as 'bmp'; use one of .png, .svg, .pdf.
    """
    path = Path(path)
    file_format = path.suffix.lower().lstrip(".")
    metadata: dict[str, dict[str, Any]] = {
        "png": {"Software": "i2am_train", "Description": description or None},
        "svg": {"Creator": "i2am_train", "Date": None, "Description": description or None},
        "pdf": {"Creator": "i2am_train", "CreationDate": None, "Subject": description or None},
    }
    if file_format not in metadata:
        known = ", ".join(f".{name}" for name in metadata)
        raise ValueError(f"Cannot save a figure as {file_format!r}; use one of {known}.")
    with written(path) as unfinished, mpl.rc_context(STYLE):
        figure.savefig(unfinished, format=file_format, dpi=dpi, metadata=metadata[file_format])
    return path
