"""Boxes from maps: by hand, and with both readings of the paper."""

from pathlib import Path

import numpy as np
import pytest
import torch

from i2am_train.errors import ConfigError
from i2am_train.metrics.boxes import Box, authors_box, box_iou, component_box, random_box, saved_picture, whole_box
from i2am_train.types import GridSize

FRAME = GridSize(40, 60)


def block(height: int, width: int, rows: slice, columns: slice, value: float = 1.0) -> torch.Tensor:
    """A map of zeros with one block."""
    values = torch.zeros(height, width)
    values[rows, columns] = value
    return values


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (Box(2, 1, 8, 5), 1.0),
        (Box(8, 1, 9, 5), 0.0),  # they touch at an edge
        (Box(2, 1, 5, 5), 0.5),
        (Box(5, 3, 11, 7), 6 / 42),  # shared 3x2 of 24 + 24 - 6
        (Box(4, 2, 6, 4), 4 / 24),  # inside
        (Box(20, 20, 20, 20), 0.0),
    ],
)
def test_iou_by_hand(other: Box, expected: float) -> None:
    """Counted on squared paper; the order of the two does not matter."""
    box = Box(2, 1, 8, 5)
    assert box_iou(box, other) == pytest.approx(expected)
    assert box_iou(other, box) == box_iou(box, other)


def test_iou_does_not_depend_on_the_frame() -> None:
    """Pictures may be resized, with another aspect, too."""
    first, second = Box(2, 1, 8, 5), Box(5, 3, 11, 7)
    old, new = GridSize(10, 12), GridSize(64, 48)
    assert box_iou(first.scaled(old, new), second.scaled(old, new)) == pytest.approx(6 / 42)


def test_the_largest_region_counts() -> None:
    """Two regions above the threshold: the one of more pixels, not the one of the higher peak."""
    values = block(6, 9, slice(0, 2), slice(0, 2)) + block(6, 9, slice(3, 6), slice(4, 8), 0.5)
    assert component_box(values, 0.4) == Box(4, 3, 8, 6)
    assert component_box(values, 0.5) == Box(0, 0, 2, 2)  # strictly greater


def test_corners_connect() -> None:
    """Pixels that touch at a corner are one region."""
    values = torch.zeros(5, 7)
    values[[1, 2, 3], [2, 3, 4]] = 1.0
    values[0, 6] = 1.0
    assert component_box(values, 0.4) == Box(2, 1, 5, 4)


def test_a_uniform_map_is_the_whole_picture_and_no_region_is_none() -> None:
    """DAAM's constant map leaves out nothing; a threshold that nothing exceeds finds nothing."""
    for value in (0.0, 1.0):
        assert component_box(torch.full((4, 7), value), 0.4) == whole_box(GridSize(4, 7))
    assert component_box(block(4, 7, slice(1, 2), slice(1, 3), 0.3), 0.4) is None


def test_an_impossible_threshold_is_refused() -> None:
    """Which values are possible is said."""
    with pytest.raises(ConfigError, match=r"delta is 1\.0; .* below 1"):
        component_box(torch.zeros(2, 3), 1.0)


def test_random_boxes_are_what_the_paper_says() -> None:
    """Inside the picture, a tenth to three tenths of it, half to twice as wide as high, from the seed alone."""
    boxes = [random_box(FRAME, np.random.default_rng(seed)) for seed in range(300)]
    shares = np.array([box.area / FRAME.tokens for box in boxes])
    aspects = np.array([(b.right - b.left) / FRAME.width / ((b.bottom - b.top) / FRAME.height) for b in boxes])
    assert all(b.left >= 0 and b.top >= 0 for b in boxes)
    assert all(b.right <= FRAME.width and b.bottom <= FRAME.height for b in boxes)
    assert 0.1 <= shares.min() < 0.11
    assert 0.29 < shares.max() <= 0.3 + 1e-9
    assert 0.5 - 1e-9 <= aspects.min() < 0.55
    assert 1.9 < aspects.max() <= 2 + 1e-9
    assert random_box(FRAME, np.random.default_rng(5)) == boxes[5]


def test_the_authors_script_reads_the_inverted_map_and_gives_it_in_our_frame() -> None:
    """Low values of the single token's map are the object; a cell of 64 is 369/64 pixels and a dilation wide."""
    values = 1 - block(64, 64, slice(16, 32), slice(8, 40))
    box = authors_box(values, 0.4, GridSize(512, 256))
    assert box is not None
    expected = Box(8, 16, 40, 32).scaled(GridSize(64, 64), GridSize(512, 256))
    tolerance = 3 * 512 / 369
    assert np.allclose(box, expected, atol=tolerance)
    assert box.area > expected.area  # dilated
    assert component_box(values, 0.4) == Box(0, 0, 64, 64)


def test_the_saved_picture_is_matplotlib_s(tmp_path: Path) -> None:
    """Size and levels of a map that went through matplotlib's jet and a PNG, decoded by the nearest colour."""
    import cv2
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from scipy.spatial import KDTree

    values = np.random.default_rng(0).random((64, 64), np.float32)
    values[values <= 0.4] = 0
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(values, cmap="jet")
    axes.axis("off")
    figure.savefig(tmp_path / "map.png", bbox_inches="tight", pad_inches=0)
    saved = cv2.imread(str(tmp_path / "map.png"))[..., ::-1].astype(int)
    colours = (colormaps["jet"](np.arange(256))[:, :3] * 255).round().astype(int)
    _, decoded = KDTree(colours).query(saved)
    assert saved.shape[:2] == (369, 369)
    difference = np.abs(decoded - saved_picture(values).astype(int))
    assert (difference <= 1).mean() > 0.9  # the picture's edges are no whole pixels: cells are shifted by less than one


def test_the_authors_box_hardly_depends_on_delta() -> None:
    """A percentile follows the threshold: why their Table 3 is flat."""
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    values = 1 - torch.exp(-((y - 20) ** 2 + (x - 30) ** 2) / 600)
    boxes = {authors_box(values, delta, FRAME) for delta in (0.2, 0.3, 0.4)}
    assert len(boxes) == 1
    assert len({component_box(1 - values, delta) for delta in (0.2, 0.3, 0.4)}) == 3


def test_the_authors_script_finds_no_contour_in_a_uniform_map() -> None:
    """Such samples were dropped from their mean."""
    assert authors_box(torch.zeros(8, 12), 0.4, FRAME) is None
