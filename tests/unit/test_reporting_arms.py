"""Figures hold the data they were given: artists' arrays are compared, never pixels of text."""

import json
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from PIL import Image

from i2am_train.reporting.figures.arms import (
    ColumnGroup,
    difference_plot,
    mesh,
    metric_curves,
    sample_figure,
    tradeoff_metrics,
    tradeoff_plot,
)
from i2am_train.reporting.figures.canvas import arm_colors, overlay, save_figure
from i2am_train.reporting.figures.sheet import Panel, Section, Sheet, draw_sheet
from i2am_train.results.run_files import Curve, History, SamplePanels
from i2am_train.types import GridSize

SIZE = (16, 12)


def picture(value=200, size=SIZE):
    return np.full((*size, 3), value, np.uint8)


@pytest.fixture
def panels():
    """Two samples on a 3x2 generated grid; the last patch of sample 0 has no known truth."""
    generated, reference = GridSize(3, 2), GridSize(4, 3)
    y, x = np.mgrid[:3, :2]
    target = np.stack([y, x], -1).reshape(1, 6, 2).repeat(2, 0).astype(np.float32)
    target[0, 5] = np.nan
    maps = np.random.default_rng(0).uniform(0, 1, (2, *SIZE)).astype(np.float32)
    return [
        SamplePanels(
            name=name,
            garment_name=f"g{name}",
            layer="up_blocks.1.attentions.1",
            generated_grid=generated,
            reference_grid=reference,
            **dict.fromkeys(("garment", "agnostic", "densepose", "person", "generated"), shown),
            map_generated=heat,
            map_reference=heat,
            centers=truth + 0.25,
            target_centers=truth,
            mask=np.ones(6, bool),
        )
        for name, shown, heat, truth in zip("ab", (picture(100), picture(150)), maps, target, strict=True)
    ]


def test_overlay_leaves_zero_alone_and_grows_with_the_map():
    image = picture(120)
    heat = np.zeros((4, 3))
    heat[0, 0] = 1.0
    laid = overlay(image, heat, alpha=0.5)
    assert laid.dtype == np.uint8
    assert laid.shape == image.shape
    assert (laid[-1, -1] == 120).all()
    brightest = mpl.colormaps["inferno"](1.0)[:3]
    expected = 0.5 * 120 + 0.5 * 255 * np.array(brightest)
    np.testing.assert_allclose(laid[0, 0], expected, atol=1)


@pytest.mark.parametrize("heat", [np.full((3, 2), 1.5), np.zeros(4), np.full((3, 2), np.nan)])
def test_overlay_refuses_maps_that_were_not_normalised(heat):
    with pytest.raises(ValueError, match="cannot be laid over"):
        overlay(picture(), heat)


def test_panels_of_samples_have_the_shape_of_the_picture(panels):
    # No stretched pictures: height over width of every panel is that of the pictures; groups stand further apart.
    figure = sample_figure({"a": panels, "b": panels}, [ColumnGroup.IMAGES, ColumnGroup.CENTERS], width=7.0)
    width, height = figure.get_size_inches()
    boxes = [axes.get_position() for axes in figure.axes]
    assert len(boxes) == 2 * 4
    for box in boxes:
        assert box.height * height / (box.width * width) == pytest.approx(16 / 12)
    within, between = (boxes[right].x0 - boxes[right - 1].x1 for right in (1, 2))
    assert 0 < within < between


def test_sample_figure_has_all_columns_in_order(panels):
    arms = {"baseline": panels, "refined": panels}
    figure = sample_figure(arms, labels={"refined": "ours"})
    titles = [axes.get_title() for axes in figure.axes[:12]]
    assert titles == ["garment", "agnostic", "pose", "truth", *(["baseline", "ours"] * 4)]
    assert [figure.axes[row * 12].get_ylabel() for row in (0, 1)] == ["a", "b"]


def test_center_field_draws_truth_errors_and_centres_in_patch_units(panels):
    figure = sample_figure({"refined": panels}, [ColumnGroup.CENTERS])
    truth, errors, centers = (c for c in figure.axes[0].collections if isinstance(c, LineCollection))
    first_error = errors.get_segments()[0]
    np.testing.assert_allclose(first_error, [[0.25, 0.25], [0.0, 0.0]])  # centre, then truth
    assert len(errors.get_segments()) == 5  # the patch without truth is left out
    shift = np.array(centers.get_segments()) - np.array(truth.get_segments())
    np.testing.assert_allclose(shift, 0.25)
    assert figure.axes[0].get_xlim() == (-0.5, 2.5)
    assert figure.axes[0].get_ylim() == (3.5, -0.5)  # y grows downwards, as in the picture


def test_center_field_puts_x_before_y(panels):
    # Patch 1 of the 3x2 grid is in row 0, column 1: x = 1, y = 0.
    figure = sample_figure({"refined": panels}, [ColumnGroup.CENTERS], colors={"refined": "black"})
    offsets = figure.axes[0].collections[-1].get_offsets()
    np.testing.assert_allclose(offsets[1], [1.25, 0.25])


def test_mesh_has_no_edge_to_unknown_patches_nor_across_a_tear(panels):
    known, edges = mesh(panels[0])
    assert known.tolist() == [0, 1, 2, 3, 4]
    assert sorted(map(tuple, edges.tolist())) == [(0, 1), (0, 2), (1, 3), (2, 3), (2, 4)]
    panels[1].target_centers[5] = (50.0, 50.0)  # a sleeve that lies elsewhere on the garment
    _, torn = mesh(panels[1])
    assert not (torn == 5).any()


def test_mesh_of_a_sample_without_any_truth_is_empty(panels):
    panels[1].target_centers[:] = np.nan
    known, edges = mesh(panels[1])
    assert (known.size, edges.shape) == (0, (0, 2))
    sample_figure({"refined": panels}, [ColumnGroup.CENTERS])


def test_sample_figure_refuses_arms_with_other_samples(panels):
    other = [panels[0], replace(panels[1], name="c")]
    with pytest.raises(ValueError, match="kept different samples"):
        sample_figure({"baseline": panels, "refined": other})
    with pytest.raises(ValueError, match="at least one arm"):
        sample_figure({})


def history(arm, seed, steps, values):
    curve = Curve(np.array(steps), np.array(values, float))
    return History(arm, seed, {"val/ssim": curve})


def test_curves_have_a_thin_line_per_seed_and_a_thick_mean_of_shared_steps():
    histories = [
        history("refined", 0, [0, 10, 20], [1.0, 2.0, 3.0]),
        history("refined", 1, [0, 10], [3.0, 6.0]),
        history("baseline", 0, [0, 10], [0.0, 0.0]),
    ]
    figure = metric_curves(histories, {"val/ssim": "SSIM", "val/fid": "FID"})
    assert len(figure.axes) == 2
    *thin, mean, single = figure.axes[0].lines
    assert [line.get_xdata().tolist() for line in thin] == [[0, 10, 20], [0, 10]]
    assert mean.get_ydata().tolist() == [2.0, 4.0]
    assert mean.get_linewidth() > thin[0].get_linewidth()
    assert mean.get_color() != single.get_color()
    assert not figure.axes[1].lines  # nothing was logged under that name


def test_difference_plot_shows_interval_mean_and_seeds_in_verdict_colours():
    metric = {"digits": 2, "group": "image"}
    results = {
        "metrics": {
            "ssim": {"label": "SSIM", "higher_is_better": True, **metric},
            "fid": {"label": "FID", "higher_is_better": False, **metric},
        },
        "arms": [{"name": "baseline"}, {"name": "refined"}],
        "cells": [
            {"arm": arm, "seed": seed, "metrics": {"ssim": value + seed, "fid": value}}
            for arm, value in (("baseline", 0.0), ("refined", 0.5))
            for seed in (0, 1)
        ],
        "summary": {"refined": {"ssim": {}, "fid": {}}},
        "paired": [
            {"arm": "refined", "against": "baseline", "metric": m, "difference": 0.5, "n": 2}
            | {"low": 0.4, "high": 0.6}
            for m in ("ssim", "fid")
        ],
    }
    figure = difference_plot(results)
    for axes, color in zip(figure.axes, ("#009E73", "#D55E00"), strict=True):
        interval = axes.lines[1]
        assert list(interval.get_xdata()) == [0.4, 0.6]
        assert interval.get_color() == color
        np.testing.assert_allclose(axes.collections[0].get_offsets()[:, 0], [0.5, 0.5])
    assert [axes.get_title("right") for axes in figure.axes] == ["better →", "← better"]


def tradeoff_results(arms=("base", "baseline", "refined"), truth=()):
    metrics = {
        "correspondence_error": {"group": "attention", "higher_is_better": False, "label": "Error", "unit": "patches"},
        "ssim": {"group": "image", "higher_is_better": True, "label": "SSIM"},
        "fid": {"group": "image", "higher_is_better": False, "label": "FID"},
    }
    return {
        "metrics": metrics,
        "arms": [
            {"name": arm, "losses": {"terms": {"supervised": {"weight": 1.0}}} if arm in truth else {}} for arm in arms
        ],
        "cells": [
            {
                "arm": arm,
                "seed": seed,
                "metrics": {"correspondence_error": n + seed, "ssim": 0.5 * n, "fid": 10.0 * seed},
            }
            for n, arm in enumerate(arms)
            for seed in (0, 1)
        ],
        "summary": {"base": dict.fromkeys(metrics)},
        "paired": [],
    }


def test_tradeoff_has_a_point_for_each_run_and_each_arms_mean_and_better_is_right_and_up():
    figure = tradeoff_plot(tradeoff_results(truth=("refined",)))
    ssim, fid = figure.axes
    runs, mean, *_ = ssim.collections[2:]  # of the second arm
    np.testing.assert_allclose(runs.get_offsets(), [(1, 0.5), (2, 0.5)])
    np.testing.assert_allclose(mean.get_offsets(), [(1.5, 0.5)])
    assert [axes.xaxis.get_inverted() for axes in (ssim, fid)] == [True, True]  # a smaller error is to the right
    assert [axes.yaxis.get_inverted() for axes in (ssim, fid)] == [False, True]
    assert ssim.get_xlabel() == "error (patches)"
    filled, hollow = (ssim.collections[2 * n + 1].get_facecolor()[0] for n in (1, 2))
    assert tuple(hollow[:3]) == (1, 1, 1) != tuple(filled[:3])


def test_arms_of_a_tradeoff_look_different_when_colours_repeat():
    names = [f"arm{n}" for n in range(13)]
    figure = tradeoff_plot({**tradeoff_results(names), "summary": tradeoff_results()["summary"]})
    looks = {
        (tuple(one.get_edgecolor()[0]), one.get_paths()[0].vertices.tobytes())
        for one in figure.axes[0].collections[1 : 2 * len(names) : 2]
    }
    assert len(looks) == len(names)


def test_a_study_without_truth_has_no_tradeoff():
    results = tradeoff_results()
    del results["summary"]["base"]["correspondence_error"]
    assert tradeoff_metrics(results) == {}


def test_arms_have_different_colours_and_the_same_in_every_subset():
    colors = arm_colors(["base", "baseline", "refined", "supervised"])
    assert len(set(colors.values())) == 4
    assert arm_colors(["baseline", "refined"])["refined"] == colors["refined"]


def small_figure():
    """A new figure with one map."""
    panel = Panel(picture=picture(), heat=np.eye(3))
    return draw_sheet(Sheet(sections=(Section(rows=((panel,),)),), caption=""))


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_saved_figure_is_whole_reproducible_and_says_what_wrote_it(tmp_path, suffix):
    first = save_figure(small_figure(), tmp_path / "deep" / f"map{suffix}", 50, "from tiny")
    content = first.read_bytes()
    assert b"i2am_train" in content
    assert b"from tiny" in content
    assert save_figure(small_figure(), first, 50, "from tiny").read_bytes() == content
    assert [path.name for path in first.parent.iterdir()] == [f"map{suffix}"]
    if suffix == ".png":
        with Image.open(first) as image:
            assert image.size[0] > 50


def test_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"use one of \.png"):
        save_figure(small_figure(), tmp_path / "map.bmp")


def test_drawing_leaves_global_style_alone():
    before = json.dumps({k: str(v) for k, v in mpl.rcParams.items()})
    small_figure()
    assert json.dumps({k: str(v) for k, v in mpl.rcParams.items()}) == before
