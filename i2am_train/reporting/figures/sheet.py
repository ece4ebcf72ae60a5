"""A figure as data, and the one function that draws it.

A ``Sheet`` says what is shown where: sections of rows of panels, each a picture with, if wanted, a
heat map over it, the outline of a mask, patches and points. The figures of the paper are functions
that return sheets (``maps``, ``paper``), so that what they show can be checked
without looking at pixels, and all of them look alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import chain
from textwrap import wrap
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch, Rectangle
from numpy.typing import NDArray

from i2am_train.reporting.figures.canvas import (
    COLOR_BAR_LEVEL,
    INK,
    OKABE_ITO,
    STYLE,
    Picture,
    add_bare_axes,
    add_color_bar,
    add_group_title,
    column_lefts,
    draw_outline,
    new_figure,
    show_heat,
)

_TEXT_WIDTH = 5.5
"""Inches; the width of a text column in the ICLR style, which the paper is set in."""
_MAX_PANEL_WIDTH = 1.1
"""Inches; a figure of few columns gets narrower instead of its pictures larger."""
_MIN_WIDTH = 3.25
"""Inches; room for the colour bar and its label."""
_MAX_HEIGHT = 8.6
"""Inches; a page of the ICLR style less a caption. Figures of many rows get smaller pictures."""

_EDGE, _GAP, _GROUP_GAP = 0.04, 0.04, 0.14
LINE = 0.118
"""Inches; a line of words beside pictures."""
_SECTION_TITLE, _SECTION_GAP, _GROUP_TITLE, _FOOTER = 0.21, 0.1, 0.2, 0.44
_LEGEND_LINE, _SCALE_WIDTH, _HANDLE, _CHARACTER = 0.17, 2.7, 0.3, 0.055
"""Of the footer, in inches: a line, colour bar with label, the sign of an entry, a character."""
_TITLE_SIZE, _SMALL_SIZE = 7.0, 6.5


_WARNING = OKABE_ITO[1]


class MarkKind(StrEnum):
    """What a point on a map says."""

    PEAK = "strongest patch"
    TRUTH = "true place"


@dataclass(frozen=True, slots=True)
class Mark:
    """A point ``y, x`` in fractions of the picture's height and width."""

    y: float
    x: float
    kind: MarkKind


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in fractions of the picture's height and width, such as one patch of a grid."""

    top: float
    left: float
    height: float
    width: float
    color: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One place of a figure.

    ``heat`` lies in [0, 1] and may be of any size; it is laid over a pale grey ``picture``.
    ``outline`` is a mask of the picture's size. ``title`` stands above and ``note`` below; ``frame``
    is a colour that tells which box a map belongs to. With ``arrow`` an arrow leads from the first
    box to the first mark of the next panel.
    """

    picture: Picture
    heat: NDArray[np.floating] | None = None
    outline: NDArray[np.bool_] | None = None
    boxes: tuple[Box, ...] = ()
    marks: tuple[Mark, ...] = ()
    title: str = ""
    note: str = ""
    frame: str | None = None
    arrow: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Rows of panels under one heading.

    ``groups`` are the numbers of columns that stand close together, ``group_titles`` what stands
    over them; without groups all columns are one. A row may be shorter than the others.
    """

    rows: tuple[tuple[Panel, ...], ...]
    title: str = ""
    row_titles: tuple[str, ...] = ()
    groups: tuple[int, ...] = ()
    group_titles: tuple[str, ...] = ()

    @property
    def column_groups(self) -> tuple[int, ...]:
        """The numbers of columns by group.

        >>> Section(rows=((Panel(picture=np.zeros((2, 2, 3), np.uint8)),) * 3,)).column_groups
        (3,)
        """
        return self.groups or (max(len(row) for row in self.rows),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """A whole figure: its sections from top to bottom, and the caption that a paper would print.

    ``warnings`` stand above all else, for what a reader must know before trusting the maps.
    """

    sections: tuple[Section, ...]
    caption: str
    scale: str = "each map scaled to [0, 1]"
    warnings: tuple[str, ...] = ()

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All panels in the order of reading."""
        rows = chain.from_iterable(section.rows for section in self.sections)
        return tuple(chain.from_iterable(rows))


def titled_once(rows: Sequence[Sequence[Panel]]) -> tuple[tuple[Panel, ...], ...]:
    """Rows of the same columns: titles stand over the first one only."""
    first, *others = (tuple(row) for row in rows)
    return (first, *(tuple(replace(panel, title="") for panel in row) for row in others))


def one_section(rows: Sequence[Sequence[Panel]], caption: str, **section: Any) -> Sheet:
    """A figure of one section, whose columns have their titles over the first row; ``section``: its other fields.

    >>> panel = Panel(picture=np.zeros((2, 2, 3), np.uint8), title="map")
    >>> [one.title for one in one_section([[panel], [panel]], "Twice.", row_titles=("a", "b")).panels]
    ['map', '']
    """
    return Sheet(sections=(Section(rows=titled_once(rows), **section),), caption=caption)


@mpl.rc_context(STYLE)
def draw_sheet(sheet: Sheet, width: float = _TEXT_WIDTH) -> Figure:
    """Draw a sheet.

    Args:
        sheet: all pictures must have one aspect ratio.
        width: inches, at most; a figure of few columns is narrower.

    Raises:
        ValueError: if there is no panel, or the pictures differ in their aspect ratio.

    >>> panel = Panel(picture=np.zeros((4, 3, 3), np.uint8), title="garment")
    >>> figure = draw_sheet(Sheet(sections=(Section(rows=((panel, panel),)),), caption="Twice the same."))
    >>> [axes.get_title() for axes in figure.axes]
    ['garment', 'garment']
    """
    aspect = _aspect(sheet.panels)
    panel_width = min(_MAX_PANEL_WIDTH, *(_width_of_panels(section, width) for section in sheet.sections))
    rows = sum(len(section.rows) for section in sheet.sections)
    words = sum(_words_height(section) for section in sheet.sections)
    words += _SECTION_GAP * (len(sheet.sections) - 1) + _EDGE
    warnings = LINE * len(warning_lines(sheet.warnings, _MIN_WIDTH))
    panel_width = min(panel_width, (_MAX_HEIGHT - words - warnings - _FOOTER) / rows / aspect)
    width = max(_MIN_WIDTH, *(_content_width(s, panel_width) for s in sheet.sections))
    lines = warning_lines(sheet.warnings, width)
    height = words + rows * panel_width * aspect + _footer_height(sheet, width) + LINE * len(lines)
    pen = _Pen(new_figure(width, height), width, height, panel_width, panel_width * aspect)
    top = write_warnings(pen.figure, lines)
    for section in sheet.sections:
        top = pen.section(section, top) + _SECTION_GAP
    pen.footer(sheet)
    return pen.figure


def warning_lines(warnings: Sequence[str], width: float) -> list[str]:
    """Warnings, broken to a figure's width in inches.

    >>> warning_lines(["not functional: one token"], width=1.0)
    ['not functional:', 'one token']
    """
    characters = int((width - 2 * _EDGE) / _CHARACTER)
    return [line for warning in warnings for line in wrap(warning, characters)]


def write_warnings(figure: Figure, lines: Sequence[str]) -> float:
    """Write lines at the top of a figure and return where they end, in inches from its top.

    >>> round(write_warnings(new_figure(2.0, 1.0), ["not functional:", "one token"]), 3)
    0.276
    """
    if not lines:
        return _EDGE
    width, height = figure.get_size_inches()
    figure.text(
        _EDGE / width, 1 - _EDGE / height, "\n".join(lines), va="top", fontsize=_SMALL_SIZE,
        weight="bold", color=_WARNING, linespacing=1.1,
    )  # fmt: skip
    return _EDGE + LINE * len(lines)


def _aspect(panels: Sequence[Panel]) -> float:
    shapes = {panel.picture.shape[:2] for panel in panels}
    ratios = {height / width for height, width in shapes}
    if len(ratios) != 1:
        found = ", ".join(f"{height}x{width}" for height, width in sorted(shapes)) or "none"
        raise ValueError(f"The pictures of a figure must have one aspect ratio; found {found}.")
    return float(ratios.pop())


def _footer_height(sheet: Sheet, width: float) -> float:
    """One line for legend and colour bar, or two where they do not fit beside each other."""
    texts = [str(handle.get_label()) for handle in _legend(sheet.panels)]
    legend = sum(_HANDLE + _CHARACTER * len(text) for text in texts)
    return _FOOTER + (_LEGEND_LINE if legend + _SCALE_WIDTH > width else 0.0)


def _left(section: Section) -> float:
    lines = _lines(section.row_titles)
    return _EDGE + 0.05 + LINE * lines if lines else _EDGE


def _gaps(section: Section) -> float:
    groups = section.column_groups
    return _GAP * (sum(groups) - len(groups)) + _GROUP_GAP * (len(groups) - 1)


def _width_of_panels(section: Section, width: float) -> float:
    room = width - _left(section) - _EDGE - _gaps(section)
    return room / sum(section.column_groups)


def _content_width(section: Section, panel_width: float) -> float:
    columns = sum(section.column_groups)
    return _left(section) + columns * panel_width + _gaps(section) + _EDGE


def _lines(texts: Iterable[str]) -> int:
    return max((text.count("\n") + 1 for text in texts if text), default=0)


def _words(texts: Iterable[str]) -> float:
    """Height of what stands over or under the panels of a row."""
    lines = _lines(texts)
    return lines * LINE + (0.04 if lines else 0.0)


def _head(row: Sequence[Panel]) -> float:
    return _words(panel.title for panel in row)


def _foot(row: Sequence[Panel]) -> float:
    return _words(panel.note for panel in row)


def _words_height(section: Section) -> float:
    """Height of a section less that of its pictures."""
    titles = sum(_head(row) + _foot(row) for row in section.rows)
    titles += (_SECTION_TITLE if section.title else 0.0) + (_GROUP_TITLE if section.group_titles else 0.0)
    return titles + _GAP * (len(section.rows) - 1)


@dataclass(frozen=True, slots=True)
class _Pen:
    """Draws on a figure whose measures are known; lengths in inches from the upper left corner."""

    figure: Figure
    width: float
    height: float
    panel_width: float
    panel_height: float

    def section(self, section: Section, top: float) -> float:
        """Draw a section and return where it ends."""
        if section.title:
            at = ((_left(section)) / self.width, self._up(top + 0.02))
            self.figure.text(*at, section.title, va="top", fontsize=7.5, weight="bold", color=INK)
            top += _SECTION_TITLE
        lefts = column_lefts(section.column_groups, _left(section), self.panel_width, _GAP, _GROUP_GAP)
        if section.group_titles:
            self._group_titles(section, lefts, top)
            top += _GROUP_TITLE
        for index, row in enumerate(section.rows):
            top += _head(row)
            axes = [self._draw_panel(panel, left, top) for panel, left in zip(row, lefts, strict=False)]
            if section.row_titles:
                axes[0].set_ylabel(section.row_titles[index], fontsize=_SMALL_SIZE, color=INK, labelpad=2.5)
            self._arrows(row, axes)
            top += self.panel_height + _foot(row) + _GAP
        return top - _GAP

    def footer(self, sheet: Sheet) -> None:
        """Colour bar at the right, meaning of lines and points at the left."""
        if any(panel.heat is not None for panel in sheet.panels):
            add_color_bar(self.figure, sheet.scale, min(1.2, 0.25 * self.width))
        handles = list(_legend(sheet.panels))
        if not handles:
            return
        level = COLOR_BAR_LEVEL + _footer_height(sheet, self.width) - _FOOTER
        self.figure.legend(
            handles=handles, loc="center left", bbox_to_anchor=(0.0, level / self.height),
            ncols=len(handles), fontsize=_SMALL_SIZE, handlelength=1.2, columnspacing=1.0,
            handletextpad=0.5, borderaxespad=0.0, borderpad=0.5,
        )  # fmt: skip

    def _up(self, inches: float) -> float:
        """From inches below the upper edge to a fraction of the height."""
        return 1.0 - inches / self.height

    def _group_titles(self, section: Section, lefts: Sequence[float], top: float) -> None:
        y, first = self._up(top + _GROUP_TITLE - 0.05), 0
        for size, title in zip(section.column_groups, section.group_titles, strict=True):
            ends = (lefts[first] / self.width, (lefts[first + size - 1] + self.panel_width) / self.width)
            first += size
            if title:
                add_group_title(self.figure, ends, y, title, above=0.03, fontsize=7.5, linewidth=0.5, color=INK)

    def _draw_panel(self, panel: Panel, left: float, top: float) -> Axes:
        bottom = self._up(top + self.panel_height)
        size = (self.panel_width / self.width, self.panel_height / self.height)
        axes = add_bare_axes(self.figure, (left / self.width, bottom, *size))
        if panel.heat is None:
            axes.imshow(panel.picture, interpolation="lanczos", aspect="auto")
        else:
            show_heat(axes, panel.heat, panel.picture)
        if panel.outline is not None:
            draw_outline(axes, panel.outline)
        height, width = panel.picture.shape[:2]
        if panel.frame is not None:
            for spine in axes.spines.values():
                spine.set(color=panel.frame, linewidth=0.9)
        for box in panel.boxes:
            _draw_box(axes, box, height, width)
        for mark in panel.marks:
            _draw_mark(axes, mark, height, width)
        axes.set_title(panel.title, fontsize=_TITLE_SIZE, pad=2.5, color=INK, linespacing=1.05)
        axes.set_xlabel(panel.note, fontsize=_SMALL_SIZE, labelpad=2.5, color=INK)
        return axes

    def _arrows(self, row: Sequence[Panel], axes: Sequence[Axes]) -> None:
        for index, panel in enumerate(row[:-1]):
            following = row[index + 1]
            if not (panel.arrow and panel.boxes and following.marks):
                continue
            box, mark = panel.boxes[0], following.marks[0]
            start = (box.left + box.width, 1 - box.top - box.height / 2)
            arrow = ConnectionPatch(
                start, (mark.x, 1 - mark.y), coordsA="axes fraction", coordsB="axes fraction",
                axesA=axes[index], axesB=axes[index + 1], arrowstyle="-|>", mutation_scale=6,
                shrinkB=2.5, color=box.color, linewidth=0.9,
            )  # fmt: skip
            self.figure.add_artist(arrow)


def _draw_box(axes: Axes, box: Box, height: int, width: int) -> None:
    corner = (box.left * width - 0.5, box.top * height - 0.5)
    size = (box.width * width, box.height * height)
    for color, line_width in (("white", 2.0), (box.color, 1.1)):
        edge = Rectangle(corner, *size, fill=False, edgecolor=color, linewidth=line_width)
        edge.set_clip_on(False)  # a patch at the picture's edge is drawn whole
        axes.add_patch(edge)


_MARK_STYLE = {MarkKind.PEAK: ("o", 3.6, OKABE_ITO[1]), MarkKind.TRUTH: ("X", 4.2, OKABE_ITO[5])}
"""Marker, size in points and colour."""


def _mark_line(kind: MarkKind, x: float, y: float, label: str = "") -> Line2D:
    marker, size, color = _MARK_STYLE[kind]
    return Line2D(
        [x], [y], linestyle="none", marker=marker, markersize=size, markerfacecolor=color,
        markeredgecolor="white", markeredgewidth=0.5, label=label, zorder=4,
    )  # fmt: skip


def _draw_mark(axes: Axes, mark: Mark, height: int, width: int) -> None:
    axes.add_line(_mark_line(mark.kind, mark.x * width - 0.5, mark.y * height - 0.5))


def _legend(panels: Sequence[Panel]) -> Iterator[Line2D]:
    if any(panel.outline is not None for panel in panels):
        yield Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (3, 1.5)), label="mask")
    kinds = {mark.kind for panel in panels for mark in panel.marks}
    for kind in MarkKind:
        if kind in kinds:
            yield _mark_line(kind, np.nan, np.nan, kind.value)
