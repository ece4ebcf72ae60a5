"""A sheet is drawn as it says: arrays, outlines, boxes, points and words, in their places."""

import numpy as np
import pytest
from matplotlib.contour import QuadContourSet
from matplotlib.patches import ConnectionPatch, Rectangle

from i2am_train.reporting.figures.sheet import Box, Mark, MarkKind, Panel, Section, Sheet, draw_sheet

PICTURE = np.full((8, 6, 3), 120, np.uint8)


def drawn(*rows, **options):
    section = Section(rows=rows, **options)
    return draw_sheet(Sheet(sections=(section,), caption=""))


def panels(figure):
    """Axes of the panels; the colour bar has ticks."""
    return [axes for axes in figure.axes if not len(axes.get_yticks())]


def test_a_map_lies_over_its_picture_with_its_values():
    heat = np.arange(6.0).reshape(3, 2) / 5
    figure = drawn((Panel(picture=PICTURE), Panel(picture=PICTURE, heat=heat, title="t", note="n")))
    plain, mapped, _ = figure.axes
    np.testing.assert_array_equal(plain.images[0].get_array(), PICTURE)
    assert len(plain.images) == 1
    np.testing.assert_array_equal(mapped.images[1].get_array(), heat)
    assert (mapped.images[1].norm.vmin, mapped.images[1].norm.vmax) == (0.0, 1.0)
    assert (mapped.get_title(), mapped.get_xlabel()) == ("t", "n")


def test_rows_columns_and_words_are_in_order():
    first = tuple(Panel(picture=PICTURE, title=text) for text in "abc")
    second = (Panel(picture=PICTURE, title="d"),)  # a row may be shorter
    figure = drawn(first, second, row_titles=("p", "q"), groups=(1, 2), group_titles=("one", "two"), title="T")
    axes = panels(figure)
    assert [one.get_title() for one in axes] == list("abcd")
    assert [axes[0].get_ylabel(), axes[3].get_ylabel()] == ["p", "q"]
    assert [text.get_text() for text in figure.texts] == ["T", "one", "two"]
    boxes = [one.get_position() for one in axes]
    assert boxes[0].x1 < boxes[1].x0 < boxes[1].x1 < boxes[2].x0
    assert boxes[2].x0 - boxes[1].x1 < boxes[1].x0 - boxes[0].x1  # groups stand further apart
    assert boxes[3].x0 == pytest.approx(boxes[0].x0)
    assert boxes[3].y1 < boxes[0].y0


def test_cells_have_the_shape_of_the_picture():
    figure = drawn((Panel(picture=PICTURE),) * 9)
    width, height = figure.get_size_inches()
    assert width <= 5.5
    for axes in panels(figure):
        box = axes.get_position()
        assert box.height * height / (box.width * width) == pytest.approx(8 / 6)


def test_boxes_and_points_are_in_fractions_of_the_picture():
    box = Box(top=0.25, left=0.5, height=0.125, width=1 / 3, color="#D55E00")
    marks = (Mark(0.75, 0.5, MarkKind.PEAK), Mark(0.25, 1 / 6, MarkKind.TRUTH))
    figure = drawn((Panel(picture=PICTURE, boxes=(box,), marks=marks),))
    axes = figure.axes[0]
    patch = [p for p in axes.patches if isinstance(p, Rectangle)][-1]
    assert patch.get_xy() == pytest.approx((2.5, 1.5))  # pixel centres are whole numbers
    assert (patch.get_width(), patch.get_height()) == pytest.approx((2.0, 1.0))
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines]
    np.testing.assert_allclose(points, [(2.5, 5.5), (0.5, 1.5)])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["strongest patch", "true place"]


def test_the_outline_follows_the_mask_and_is_closed_at_the_edge():
    mask = np.zeros((8, 6), bool)
    mask[2:8, 1:4] = True  # touches the lower edge
    figure = drawn((Panel(picture=PICTURE, outline=mask),))
    contour = next(c for c in figure.axes[0].collections if isinstance(c, QuadContourSet))
    (path,) = contour.get_paths()
    assert path.vertices.min(axis=0) == pytest.approx((0.5, 1.5))
    assert path.vertices.max(axis=0) == pytest.approx((3.5, 7.5))
    assert figure.axes[0].get_xlim() == (-0.5, 5.5)
    empty = drawn((Panel(picture=PICTURE, outline=~mask & mask),))
    assert not empty.axes[0].collections


def test_an_arrow_leads_from_the_box_to_the_point():
    box = Box(0.0, 0.0, 0.25, 0.5, "#0072B2")
    start = Panel(picture=PICTURE, boxes=(box,), arrow=True)
    end = Panel(picture=PICTURE, marks=(Mark(0.75, 0.5, MarkKind.PEAK),))
    figure = drawn((start, end, start))  # the last arrow leads nowhere and is left out
    (arrow,) = (artist for artist in figure.artists if isinstance(artist, ConnectionPatch))
    assert arrow.xy1 == pytest.approx((0.5, 0.875))
    assert arrow.xy2 == pytest.approx((0.5, 0.25))
    assert (arrow.axesA, arrow.axesB) == tuple(figure.axes[:2])


def test_pictures_of_several_shapes_are_refused():
    other = np.zeros((5, 6, 3), np.uint8)
    with pytest.raises(ValueError, match="one aspect ratio; found 5x6, 8x6"):
        drawn((Panel(picture=PICTURE), Panel(picture=other)))
