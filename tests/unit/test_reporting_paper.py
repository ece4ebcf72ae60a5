"""The figures of explained samples show the right arrays under the right words in the right order.

What is compared are sheets, which is what the drawing draws (test_reporting_sheet.py).
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from i2am_train.attention import AttributionMaps, AttributionStore, LayerRecord
from i2am_train.attention.recipe import PAPER_LAYERS
from i2am_train.errors import CaptureError
from i2am_train.evaluation.explanation import Explanation, write_explanation
from i2am_train.files import read_json
from i2am_train.metrics.attention import alignment_table
from i2am_train.reporting.figures.maps import (
    alignment_plot,
    alignment_sheet,
    generation_flow,
    layer_maps,
    overview,
    reverse_across_layers,
    specific_across_layers,
    specific_reference,
    time_and_head_maps,
    two_axis_maps,
)
from i2am_train.reporting.figures.panels import layers_of, same_patch, specific_panels
from i2am_train.reporting.figures.paper import (
    PAPER_FIGURES,
    PlannedFigure,
    daam_direction,
    daam_map,
    figures_of,
    guidance_effect,
    plan,
    refinement,
    scores_under_maps,
)
from i2am_train.reporting.figures.sheet import MarkKind, draw_sheet
from i2am_train.reporting.report_files import plan_figures
from i2am_train.types import Direction, GridSize, LayerWeighting

TO_GENERATED = Direction.REFERENCE_TO_GENERATED


@pytest.fixture
def sample(make_explained):
    return make_explained()


def scaled(values):
    """Min-max to [0, 1]."""
    return (values - values.min()) / (values.max() - values.min())


def titles(row):
    return [panel.title for panel in row]


def with_layer(sample, layer, **changes):
    """The sample with other attention in one layer."""
    layers = tuple(
        replace(record, **changes) if record.layer == layer else record for record in sample.maps.store.layers
    )
    store = replace(sample.maps.store, layers=layers)
    return replace(sample, maps=replace(sample.maps, store=store))


def one_hot(*shape_and_places):
    *shape, places = shape_and_places
    values = torch.zeros(*shape)
    for index, place in enumerate(places):
        values[..., index, place] = 1.0
    return values


# ---- levels --------------------------------------------------------------------------------------


def test_layer_maps_are_means_over_steps_and_heads_in_the_model_s_order(sample):
    (section,) = layer_maps(sample, [8, 2]).sections
    generated, reference = section.rows
    assert titles(generated) == ["", "layer 2\n4x3", "layer 8\n16x12"]
    assert np.array_equal(generated[0].picture, sample.images["generated"])
    assert np.array_equal(reference[0].picture, sample.images["garment"])
    record = sample.maps.store.layer(8)  # on the finest grid: nothing is resized
    expected = record.to_generated[0].numpy().mean((0, 1)).reshape(16, 12)
    np.testing.assert_allclose(generated[2].heat, scaled(expected), atol=1e-5)
    expected = sample.maps.store.layer(2).to_reference[0].numpy().mean((0, 1)).reshape(6, 5)
    np.testing.assert_allclose(reference[1].heat, scaled(expected), atol=1e-5)
    assert np.array_equal(generated[1].outline, sample.masks["inpaint"])
    assert np.array_equal(reference[1].outline, sample.masks["garment"])
    assert len(layer_maps(sample).sections[0].rows[0]) == 1 + 9


def test_layers_that_were_not_captured_are_left_out_or_an_error(sample):
    some = sample.maps.select([2, 5])
    assert layers_of(some, [8, 5]) == [PAPER_LAYERS[4]]
    with pytest.raises(CaptureError, match=r"None of the layers 8 was captured.*attentions\.1 \(2\)"):
        layers_of(some, [8])


def test_time_groups_and_heads_are_where_their_titles_say(sample):
    # Layer 9 alone, two heads: the attention sits at place 10 in the first half, at 20 in the second;
    # on the garment head 0 sits at 3 and head 1 at 7.
    layer = PAPER_LAYERS[8]
    to_generated = one_hot(1, 4, 192, [10, 10, 20, 20])[:, :, None].repeat(1, 1, 2, 1)
    to_reference = one_hot(1, 2, 30, [3, 7])[:, None].repeat(1, 4, 1, 1)
    sample = with_layer(sample, layer, to_generated=to_generated, to_reference=to_reference)
    sample = replace(sample, maps=sample.maps.select([9]))
    (section,) = time_and_head_maps(sample).sections
    generated, reference = section.rows
    assert section.group_titles == ("(a) by timestep", "(b) layer 9, 2 heads")
    assert titles(generated) == ["", "999–750", "500–250", "", "head 1", "head 2"]
    assert [panel.heat.argmax() for panel in generated[1:3]] == [10, 20]
    assert [panel.heat.argmax() for panel in reference[4:]] == [3, 7]
    assert titles(reference) == [""] * 6


def test_blocks_of_heads_stand_beside_each_other_where_they_fit(sample):
    sections = time_and_head_maps(sample).sections
    assert [section.groups for section in sections] == [(3, 5), (4, 3)]
    assert [title for section in sections for title in section.group_titles] == [
        "(a) by timestep",
        "(b) layers 1–3, 4 heads",
        "(c) layers 4–6, 3 heads",
        "(d) layers 7–9, 2 heads",
    ]


def test_two_axes_are_resolution_by_time_and_by_head(sample):
    generated, reference = two_axis_maps(sample).sections
    assert generated.row_titles == ("4x3", "8x6", "16x12")
    assert titles(generated.rows[0]) == ["999–750", "500–250", "head 1", "head 2", "head 3"]
    assert [len(row) for row in generated.rows] == [5, 5, 4]  # the finest layers have two heads
    records = [sample.maps.store.layer(layer) for layer in (7, 8, 9)]
    by_head = np.mean([r.to_generated[0].numpy().mean(0) for r in records], axis=0)
    by_time = np.mean([r.to_generated[0, 2:].numpy().mean((0, 1)) for r in records], axis=0)
    finest = generated.rows[2]
    np.testing.assert_allclose(finest[1].heat, scaled(by_time).reshape(16, 12), atol=1e-5)
    np.testing.assert_allclose(finest[3].heat, scaled(by_head[1]).reshape(16, 12), atol=1e-5)
    records = [sample.maps.store.layer(layer) for layer in (1, 2, 3)]
    by_head = np.mean([r.to_reference[0].numpy().mean(0) for r in records], axis=0)
    np.testing.assert_allclose(reference.rows[0][2].heat, scaled(by_head[0]).reshape(6, 5), atol=1e-5)


def test_the_overview_shows_every_kind_of_map(sample):
    unified, heads, times, looks = overview(sample).sections
    assert titles(unified.rows[0]) == ["garment", "person", "generated", "$M_g$", "$M_r$"]
    np.testing.assert_array_equal(unified.rows[0][3].heat, sample.unified(TO_GENERATED))
    assert titles(heads.rows[0]) == ["head 1", "head 2", "head 3", "head 4"]
    assert titles(times.rows[0]) == ["999–750", "500–250"]
    patches, *maps = looks.rows[0]
    assert len(patches.boxes) == len(maps) == 4
    assert [box.color for box in patches.boxes] == [panel.frame for panel in maps]


# ---- patches -------------------------------------------------------------------------------------


def looking(sample, layer, places):
    """Each generated patch of a layer looks at one reference patch."""
    scores = one_hot(1, sample.maps.store.layer(layer).generated_grid.tokens, 30, places)
    return with_layer(sample, PAPER_LAYERS[layer - 1], scores_over_reference=scores, scores_over_generated=scores)


def test_a_patch_shows_where_it_looks_and_where_it_should(sample):
    sample = looking(sample, 2, [(7 * index + 3) % 30 for index in range(12)])
    (panel,) = specific_panels(sample, [(1, 1)])  # patch 4 looks at 31 % 30 = 1: row 0, column 1
    assert panel.heat.argmax() == 1
    assert panel.heat.sum() == pytest.approx(1.0)
    peak, truth = panel.marks
    assert (peak.kind, peak.y, peak.x) == (MarkKind.PEAK, 0.5 / 6, 1.5 / 5)
    assert truth.kind is MarkKind.TRUTH
    assert (truth.y, truth.x) == pytest.approx((1.5 / 4, 1.5 / 3))  # the identity, see conftest
    (without,) = specific_panels(replace(sample, correspondence=None), [(1, 1)])
    assert [mark.kind for mark in without.marks] == [MarkKind.PEAK]


def test_pairs_join_a_boxed_patch_with_its_map(sample):
    (section,) = specific_reference(sample).sections
    assert [len(row) for row in section.rows] == [6, 2]
    boxed = [row[column] for row in section.rows for column in range(0, len(row), 2)]
    maps = [row[column] for row in section.rows for column in range(1, len(row), 2)]
    assert [(panel.boxes[0].top, panel.boxes[0].left) for panel in boxed] == [
        (y / 4, x / 3) for y, x in sample.generated_patches
    ]
    assert all(panel.arrow for panel in boxed)
    for panel, (y, x) in zip(maps, sample.generated_patches, strict=True):
        scores = sample.maps.scores(2)[0, y * 3 + x].numpy().reshape(6, 5)
        np.testing.assert_allclose(panel.heat, scaled(scores), atol=1e-5)


def test_across_layers_the_same_patch_is_shown(sample):
    (section,) = specific_across_layers(sample, [8, 2]).sections
    assert section.row_titles == tuple(f"patch {y}, {x}" for y, x in sample.generated_patches)
    assert titles(section.rows[0]) == ["", "layer 2\n4x3", "layer 8\n16x12"]
    for row, (y, x) in zip(section.rows, sample.generated_patches, strict=True):
        fine = sample.maps.scores(8)[0, (4 * y + 2) * 12 + 4 * x + 2].numpy().reshape(6, 5)
        np.testing.assert_allclose(row[2].heat, scaled(fine), atol=1e-5)
        assert row[0].boxes[0].top == y / 4
    assert same_patch((5, 7), GridSize(16, 12), GridSize(4, 3)) == (1, 1)


def test_reverse_maps_are_columns_on_the_generated_image(sample):
    (section,) = reverse_across_layers(sample, [5]).sections
    for row, (y, x) in zip(section.rows, sample.reference_patches, strict=True):
        column = sample.maps.scores(5, over="generated")[0, :, y * 5 + x].numpy().reshape(8, 6)
        np.testing.assert_allclose(row[1].heat, scaled(column), atol=1e-5)
        assert np.array_equal(row[1].picture, sample.images["generated"])
        assert np.array_equal(row[0].picture, sample.images["garment"])
        assert (row[0].boxes[0].top, row[0].boxes[0].left) == (y / 6, x / 5)


def test_the_flow_follows_the_time_groups(sample):
    (section,) = generation_flow(sample).sections
    assert section.row_titles == ("$t$ = 999–750", "$t$ = 500–250")
    assert section.group_titles == ("what is used", "what is made", "patches, layer 2, all steps")
    for group, row in enumerate(section.rows):
        assert np.array_equal(row[1].picture, sample.clean[group].picture)
        assert row[1].heat is None
        steps = slice(2 * group, 2 * group + 2)
        heads = [r.to_reference[0, steps].mean(0).sum(0) for r in sample.maps.store.layers]
        expected = torch.stack(heads).sum(0).numpy().reshape(6, 5)
        np.testing.assert_allclose(row[0].heat, scaled(expected), atol=1e-5)
        assert np.array_equal(row[2].picture, sample.images["generated"])
        assert row[3].boxes[0].color == row[4].frame
    assert section.rows[0][3].boxes != section.rows[1][3].boxes


# ---- comparisons ---------------------------------------------------------------------------------


def test_scores_stand_under_the_maps_that_they_are_computed_from(sample, make_explained):
    other = make_explained(1, name="00002_00", scores={"imacs_g": None, "imacs_r": 0.125})
    (section,) = scores_under_maps([sample, other]).sections
    assert section.row_titles == ("00001_00", "00002_00")
    assert titles(section.rows[0]) == ["garment", "generated", "$M_g$ above 0.4", "$M_r$ above 0.4"]
    notes = [[panel.note for panel in row[2:]] for row in section.rows]
    assert notes == [["IMACS$_g$ −0.250", "IMACS$_r$ 0.500"], ["IMACS$_g$ –", "IMACS$_r$ 0.125"]]
    heat = section.rows[1][2].heat
    np.testing.assert_array_equal(heat, other.unified(TO_GENERATED, thresholded=True))
    assert not ((heat > 0) & (heat <= 0.4)).any()


def test_rows_say_model_and_guidance_where_they_differ(sample):
    other = replace(sample, model="refined", origin={**sample.origin, "guidance": 1.0})
    (section,) = scores_under_maps([sample, other]).sections
    assert section.row_titles == ("00001_00\ntiny, guidance 2", "00001_00\nrefined, no guidance")


def test_refinement_shows_the_same_patches_by_each_model(sample, make_explained):
    other = make_explained(1, model="refined", checkpoint="runs/refined/model")
    (section,) = refinement([sample, other]).sections
    assert section.row_titles == ("tiny", "refined")
    assert titles(section.rows[0])[1:] == ["generated", "$M_g$", "$M_r$", "patch $i$", "patch $j$"]
    assert [row[0].note for row in section.rows] == ["garment", "person"]
    for row, model in zip(section.rows, (sample, other), strict=True):
        assert np.array_equal(row[1].picture, model.images["generated"])
        for panel, (y, x) in zip(row[4:], sample.generated_patches[:2], strict=True):
            scores = model.maps.scores(2)[0, y * 3 + x].numpy().reshape(6, 5)
            np.testing.assert_allclose(panel.heat, scaled(scores), atol=1e-5)
    assert section.rows[0][1].boxes == section.rows[1][1].boxes


def test_guidance_starts_without_it(sample, make_explained):
    without = make_explained(1, guidance=1.0)
    (section,) = guidance_effect([sample, without], [5]).sections
    assert section.row_titles == ("no guidance", "guidance 2")
    for row, one in zip(section.rows, (without, sample), strict=True):
        assert np.array_equal(row[0].picture, one.images["generated"])
        np.testing.assert_array_equal(row[2].heat, one.unified(TO_GENERATED))
    assert section.rows[0][2].note == "IMACS$_g$\n−0.250"


def test_daam_s_direction_is_constant_and_stretched_it_is_noise(sample):
    values = daam_map(sample)
    np.testing.assert_allclose(values, 1 / 30, rtol=1e-6)
    (section,) = daam_direction(sample).sections
    generated, ours, daam, stretched = section.rows[0]
    assert generated.heat is None
    expected = sample.maps.unified(TO_GENERATED).normalised().values[0].numpy()
    np.testing.assert_allclose(ours.heat, expected, atol=1e-6)
    assert not daam.heat.any()
    assert daam.note == "0.03333 to 0.03333"
    assert (stretched.heat.min(), stretched.heat.max()) == (0.0, 1.0)


# ---- which figures -------------------------------------------------------------------------------


def test_the_plan_compares_what_differs_in_one_thing(make_explained):
    samples = [
        make_explained(),
        make_explained(checkpoint="runs/refined/model"),
        make_explained(guidance=1.0),
        make_explained(guidance=1.0, checkpoint="runs/refined/model", data="other data"),
        make_explained(name="00002_00", guidance=5.0, paired=False),
    ]
    planned, left_out = plan(samples)
    groups = {name: [one.group for one in planned if one.name == name] for name in PAPER_FIGURES}
    assert groups["refinement"] == [(0, 1)]
    assert groups["guidance"] == [(0, 2)]
    assert groups["unpaired"] == [(4,)]
    assert groups["scores"] == [(0, 1, 2, 3, 4)]
    assert groups["layers"] == [(0,), (1,), (2,), (3,), (4,)]
    assert left_out == {}


def test_the_plan_says_what_is_missing(sample):
    only = with_layer(sample, PAPER_LAYERS[0], scores_over_reference=None)
    planned, left_out = plan([only])
    assert set(left_out) == {
        "specific_layers", "reverse_layers", "refinement", "guidance", "daam", "unpaired",
    }  # fmt: skip
    assert "matrix_layers=null" in left_out["daam"]
    assert {one.name for one in planned} == set(PAPER_FIGURES) - set(left_out)
    planned, left_out = plan([sample], ["scores", "guidance"])
    assert planned == [PlannedFigure("scores", (0,))]
    assert list(left_out) == ["guidance"]


@pytest.mark.parametrize("name", PAPER_FIGURES)
def test_no_word_is_cut_off_or_covers_another(name, make_explained):
    """Every figure with all nine layers: each text lies on the page, titles of a row stay apart."""
    samples = [
        make_explained(paired=False, model="baseline"),
        make_explained(1, checkpoint="x", paired=False, model="refined"),
        make_explained(2, guidance=1.0),
    ]
    planned, _ = plan(samples, [name])
    figure = draw_sheet(planned[0].sheet(samples))
    renderer = figure.canvas.get_renderer()
    width, height = figure.bbox.width, figure.bbox.height
    words = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    words += [label for axes in figure.axes for label in axes.get_xticklabels()]
    words += [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    figure.draw_without_rendering()
    extents = [text.get_window_extent(renderer) for text in words if text.get_text()]
    for box in extents:
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= width
        assert box.y1 <= height
    for index, box in enumerate(extents):
        assert not any(box.overlaps(other) for other in extents[:index])
    assert figure.get_figwidth() <= 5.5 + 1e-6
    assert figure.get_figheight() <= 9.0


def test_files_of_folders_with_the_same_name_stay_apart(make_explained, write_explained_run, tmp_path):
    folders = [
        write_explained_run(make_explained(), tmp_path / "baseline" / "sample"),
        write_explained_run(make_explained(checkpoint="runs/refined/model"), tmp_path / "sample"),
        write_explained_run(make_explained(name="00002_00"), tmp_path / "other"),
    ]
    planned = plan_figures(folders, ["daam", "refinement", "scores"], ["a", "b", "c"])
    index, _ = planned.write(tmp_path / "report", ["png"], 50)
    files = [file for entry in index["figures"] for file in entry["files"]]
    assert files == [
        "figures/daam-sample-1.png",
        "figures/daam-sample-2.png",
        "figures/daam-other.png",
        "figures/refinement-00001_00.png",
        "figures/scores.png",
    ]
    assert all((tmp_path / "report" / file).is_file() for file in files)
    refined = index["figures"][3]
    assert refined["inputs"] == ["sample-1", "sample-2"]
    assert "00001_00 by a and b" in refined["caption"]
    assert index["inputs"]["sample-2"]["folder"] == str(tmp_path / "sample")


GRID = GridSize(4, 3)  # its diagonal is 5


def record(name: str, rows_down: int) -> LayerRecord:
    """Every patch looks so many rows below itself, around the edge; two heads, three steps."""
    even = torch.full((1, 3, 2, GRID.tokens), 1 / GRID.tokens)
    cells = torch.arange(GRID.tokens).view(GRID).roll(-rows_down, dims=0).flatten()
    scores = torch.eye(GRID.tokens)[cells][None]
    vectors = (even, even.clone())  # tensors of a file share no memory
    return LayerRecord(name, GRID, GRID, *vectors, scores_over_reference=scores, scores_over_generated=scores.clone())


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
def test_only_of_models_whose_reference_is_the_same_picture(recipe: str, aligned: bool, tmp_path: Path) -> None:
    """Elsewhere a patch has no place of its own on the reference, so nothing is said of it."""
    sample = explained(recipe)
    assert ("alignment" in figures_of(sample)) == aligned
    write_explanation(tmp_path, sample)
    assert (read_json(tmp_path / "scores.json")["alignment"] is not None) == aligned
