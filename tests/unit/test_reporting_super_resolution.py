"""The figures of alignment say what a constructed attention does, layer by layer."""

import numpy as np
import pytest
import torch

from i2am_train.attention import AttributionMaps, AttributionStore, LayerRecord
from i2am_train.evaluation.explanation import Explanation
from i2am_train.metrics.attention import alignment_table
from i2am_train.reporting.figures.maps import alignment_plot, alignment_sheet
from i2am_train.reporting.figures.paper import figures_of
from i2am_train.types import GridSize, LayerWeighting

GRID = GridSize(4, 3)  # its diagonal is 5


def record(name: str, rows_down: int) -> LayerRecord:
    """Every patch looks so many rows below itself, around the edge; two heads, three steps."""
    even = torch.full((1, 3, 2, GRID.tokens), 1 / GRID.tokens)
    cells = torch.arange(GRID.tokens).view(GRID).roll(-rows_down, dims=0).flatten()
    scores = torch.eye(GRID.tokens)[cells][None]
    return LayerRecord(name, GRID, GRID, even, even, scores_over_reference=scores, scores_over_generated=scores)


def explained(recipe: str = "pasd", partial: str | None = None) -> Explanation:
    """One layer that is aligned, one that is a row off."""
    layers = (record("up_blocks.0.x.0", 0), record("up_blocks.0.x.1", 1))
    picture = np.full((40, 30, 3), 90, np.uint8)
    return Explanation(
        name="sample", model="model", layer="up_blocks.0.x.0",
        images={"generated": picture, "reference": picture[::2, ::2]},
        maps=AttributionMaps(AttributionStore(layers, (9, 5, 1), recipe, partial)),
        generated_patches=((1, 2), (3, 0)), reference_patches=((0, 0),), delta=0.4,
        weighting=LayerWeighting.PAPER, time_groups=3,
    )  # fmt: skip


def test_sheet_shows_distance_and_own_place() -> None:
    """Rows are patches: 0 % where aligned, 1 of 5 one row off, 3 of 5 from the last row to the first."""
    rows = alignment_sheet(explained()).sections[0].rows
    assert [[panel.note for panel in row[1:]] for row in rows] == [["0 %", "20 %"], ["0 %", "60 %"]]
    for row, (y, x) in zip(rows, ((1, 2), (3, 0)), strict=True):
        for panel in row:
            assert (panel.boxes[0].top, panel.boxes[0].left) == pytest.approx((y / 4, x / 3))
    mark = rows[0][2].marks[0]
    assert (mark.y, mark.x) == pytest.approx((2.5 / 4, 2.5 / 3), abs=0.03)  # of 20x15 pixels


def test_table_and_plot_agree() -> None:
    """The mean over patches: three rows are 1 off, one is 3 off."""
    maps = explained().maps
    table = alignment_table(maps)
    assert [row["distance"] for row in table] == pytest.approx([0, 1.5])
    assert [row["within_one"] for row in table] == pytest.approx([1, 0.75])
    lines = alignment_plot(maps).axes[0].lines
    assert list(lines[0].get_ydata()) == pytest.approx([0, 30])
    assert list(lines[1].get_ydata()) == pytest.approx([100 * row["even"] for row in table])


def test_every_figure_says_what_its_maps_lack() -> None:
    """Broken to lines, above all else, the plot too, whose axes keep their size."""
    ways = "features of the low-resolution picture are also added to the skip connections"
    drawn = figures_of(explained(partial=ways))
    assert {"alignment", "alignment_layers", "unified", "reverse_specific"} < set(drawn)
    for figure in drawn.values():
        assert f"partial: {ways}" in [text.get_text().replace("\n", " ") for text in figure.texts]
    unmarked = alignment_plot(explained().maps)
    sizes = [axes.get_window_extent().height for axes in (drawn["alignment_layers"].axes[0], unmarked.axes[0])]
    assert sizes[0] == pytest.approx(sizes[1])
    assert not unmarked.texts


@pytest.mark.parametrize(("recipe", "aligned"), [("pasd", True), ("paint_by_example", False)])
def test_only_of_models_whose_reference_is_the_same_picture(recipe: str, aligned: bool) -> None:
    """Elsewhere a patch has no place of its own on the reference, so nothing is said of it."""
    sample = explained(recipe)
    assert ("alignment" in figures_of(sample)) == aligned
    assert (sample.description()["alignment"] is not None) == aligned
