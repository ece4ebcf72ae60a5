"""Matches of a worn and a flat garment: against the truth of drawn data, and on cases whose answer is known."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.interpolate import RBFInterpolator

from i2am_train.data.matching import (
    CLOSELY,
    STIFFNESS,
    THIRD,
    Garment,
    Keypoints,
    Matched,
    Source,
    ThinPlate,
    consensus,
    matched,
    sift_source,
)
from i2am_train.data.pictures import Image
from i2am_train.data.poses import EMBEDDED_COLOURS
from i2am_train.data.synthetic.garments import draw_garment
from i2am_train.data.synthetic.rendering import POSE_PARTS, SyntheticSample, render_sample
from i2am_train.types import GridSize

SIZE = GridSize(128, 96)
SEED = 11
"""Another than the one that the limits were chosen with."""


def body_parts(drawn: SyntheticSample) -> NDArray[np.uint8]:
    labels = np.zeros(SIZE, np.uint8)
    for part, colour in EMBEDDED_COLOURS.items():
        labels[(drawn.densepose == np.array(colour)).all(axis=-1)] = part
    return labels


def found(drawn: SyntheticSample, *, parts: bool = True) -> Matched:
    worn, flat = Garment(drawn.person, drawn.warped_garment_mask), Garment(drawn.garment, drawn.garment_mask)
    return matched(worn, flat, [sift_source(worn, flat)], body_parts(drawn) if parts else None)


def pixels_off(result: Matched, drawn: SyntheticSample) -> NDArray[np.float32]:
    return np.linalg.norm((result.correspondence - drawn.correspondence) * SIZE, axis=-1)


def of_pattern(pattern: str, logos: bool, count: int) -> list[SyntheticSample]:
    """The first drawn samples of a pattern, with or without something printed on it."""
    samples: list[SyntheticSample] = []
    index = 0
    while len(samples) < count:
        garment = draw_garment(np.random.default_rng([SEED, index, 1]))
        if garment.pattern == pattern and bool(garment.logos) == logos:
            samples.append(render_sample(SEED, index, SIZE))
        index += 1
    return samples


# -- drawn data, whose truth is exact ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["plain", "gradient", "two_rows"])
def test_cloth_that_shows_nothing_comes_out_empty(pattern: str) -> None:
    for drawn in of_pattern(pattern, logos=False, count=3):
        result = found(drawn)
        assert len(result.matches) == 0
        assert np.isnan(result.correspondence).all()
        assert not result.confidence.any()


@pytest.mark.parametrize(
    ("pattern", "logos", "covered"),
    [("checks", False, 0.25), ("checks", True, 0.2), ("columns", True, 0.2), ("two_columns", True, 0.12)],
)
def test_what_is_found_on_drawn_cloth_is_right(pattern: str, logos: bool, covered: float) -> None:
    """Some of the four are empty."""
    known, worn, off = 0, 0, []
    for drawn in of_pattern(pattern, logos, count=4):
        result = found(drawn)
        distance = pixels_off(result, drawn)
        off.append(distance[~np.isnan(distance)])
        known, worn = known + len(off[-1]), worn + np.count_nonzero(drawn.warped_garment_mask)
        assert not (~np.isnan(result.correspondence[..., 0]) & ~drawn.warped_garment_mask).any()
    errors = np.concatenate(off)
    assert known / worn > covered
    assert np.median(errors) < 0.8
    assert np.mean(errors > 3) < 0.05


def test_confidence_foretells_the_error() -> None:
    off, confidence = [], []
    for drawn in of_pattern("checks", logos=False, count=3):
        result = found(drawn)
        distance = pixels_off(result, drawn)
        off.append(distance[~np.isnan(distance)])
        confidence.append(result.confidence[~np.isnan(distance)])
    errors, sure = np.concatenate(off), np.concatenate(confidence) > 0.5
    assert sure.mean() > 0.2
    assert np.median(errors[sure]) < 0.75 * np.median(errors[~sure])
    assert np.mean(errors[sure] > 3) < 0.75 * np.mean(errors[~sure] > 3)


def test_a_sleeve_is_not_carried_along_by_the_torso() -> None:
    """Without body parts the torso's warp reaches into the arms, which move otherwise."""
    (drawn,) = of_pattern("checks", logos=False, count=1)
    names = [f"{half}_arm_{side}" for half in ("upper", "lower") for side in ("left", "right")]
    arms = np.isin(body_parts(drawn), [POSE_PARTS[name] for name in names])
    with_parts, without = (~np.isnan(found(drawn, parts=parts).correspondence[..., 0]) for parts in (True, False))
    assert np.count_nonzero(without & arms) > 100
    assert np.count_nonzero(with_parts & arms) == 0


# -- pictures whose answer is known ------------------------------------------------------------------------------------


def cloth(seed: int = 0) -> Image:
    """A cloth with a print all over, 160x120."""
    noise = np.random.default_rng(seed).integers(0, 256, (40, 30, 3), np.uint8)
    return cv2.resize(noise, (120, 160), interpolation=cv2.INTER_CUBIC)  # type: ignore[return-value]


def cut(picture: Image) -> Garment:
    mask = np.zeros((160, 120), np.bool_)
    mask[20:140, 20:100] = True
    return Garment(np.where(mask[..., None], picture, np.uint8(255)), mask)


def of(worn: Garment, flat: Garment) -> Matched:
    return matched(worn, flat, [sift_source(worn, flat)])


def test_a_turned_and_smaller_print_is_found_to_a_third_of_a_pixel() -> None:
    flat = cut(cloth())
    turn = cv2.getRotationMatrix2D((60.0, 80.0), 20.0, 0.7)
    mask = cv2.warpAffine(flat.mask.astype(np.uint8), turn, (120, 160)) > 0
    worn = Garment(np.where(mask[..., None], cv2.warpAffine(flat.picture, turn, (120, 160)), np.uint8(90)), mask)
    result = of(worn, flat)
    rows, columns = np.nonzero(mask)
    back = cv2.invertAffineTransform(turn)
    true = np.stack([columns, rows], axis=-1) @ back[:, :2].T + back[:, 2]  # OpenCV's pixel centres are whole numbers
    off = np.linalg.norm(result.correspondence[mask] * [160, 120] - (true[:, ::-1] + 0.5), axis=-1)
    assert np.mean(~np.isnan(off)) > 0.95
    assert np.nanquantile(off, 0.99) < 0.33
    worn_at, flat_at = result.matches.worn[:, ::-1] - 0.5, result.matches.flat[:, ::-1] - 0.5
    assert np.abs(worn_at @ back[:, :2].T + back[:, 2] - flat_at).max() < 0.33 / 0.7 + 1.0  # matches are in pixels
    assert ((result.matches.confidence > 0.1) & (result.matches.confidence <= 1)).all()


@pytest.mark.parametrize(
    "other",
    [cloth(seed=1), cloth()[:, ::-1], cv2.rotate(cloth(), cv2.ROTATE_180), np.full((160, 120, 3), 120, np.uint8)],
    ids=["another print", "mirrored", "upside down", "plain"],
)
def test_what_is_not_the_same_cloth_is_not_matched(other: Image) -> None:
    result = of(cut(other), cut(cloth()))
    assert len(result.matches) == 0
    assert np.isnan(result.correspondence).all()


def test_the_same_print_in_another_colour_is_another_cloth() -> None:
    grey = cv2.cvtColor(cloth(), cv2.COLOR_RGB2GRAY)[..., None]
    red, blue = (cut((grey * np.array(share)).astype(np.uint8)) for share in ((1.0, 0.3, 0.3), (0.3, 0.5, 1.0)))
    assert np.mean(~np.isnan(of(red, red).correspondence[red.mask])) > 0.95
    assert len(of(red, blue).matches) == 0


def test_nothing_is_found_where_there_is_no_garment() -> None:
    nowhere = Garment(cloth(), np.zeros((160, 120), np.bool_))
    for worn, flat in ((nowhere, cut(cloth())), (cut(cloth()), nowhere), (nowhere, nowhere)):
        result = of(worn, flat)
        assert result.correspondence.shape == (160, 120, 2)
        assert np.isnan(result.correspondence).all()


# -- places whose partners are known -----------------------------------------------------------------------------------

WHOLE = Garment(np.full((100, 100, 3), 90, np.uint8), np.ones((100, 100), np.bool_))
"""One garment length is 100 pixels."""


def told_apart(places: NDArray[np.float64]) -> Keypoints:
    """Keypoints that are unlike all but their own partner."""
    count = len(places)
    colour = np.tile(np.float32([0.0, 0.0, 0.4]), (count, 1))
    return Keypoints(places, np.full(count, 0.1), np.zeros(count), colour, np.eye(count, 20, dtype=np.float32))


def test_a_pixel_is_known_where_three_matches_are_near_and_one_nearer() -> None:
    places = np.array([[0.4, 0.4], [0.4, 0.5], [0.5, 0.4], [0.5, 0.5], [0.45, 0.35]])
    result = matched(WHOLE, WHOLE, [Source(told_apart(places), told_apart(places + [0.0, 0.2]))])
    pixels = np.argwhere(np.ones((100, 100))) / 100 + 0.005
    distances = np.sort(np.linalg.norm(pixels[:, None] - places, axis=-1), axis=1)
    supported = ((distances[:, 0] < 0.2) & (distances[:, 2] < 0.3)).reshape(100, 100)
    inside = (pixels[:, 1] + 0.2 < 1).reshape(100, 100)
    known = ~np.isnan(result.correspondence[..., 0])
    assert np.array_equal(known, supported & inside)
    assert 1000 < np.count_nonzero(known) < 5000
    expected = (pixels + [0.0, 0.2]).reshape(100, 100, 2)
    assert np.allclose(result.correspondence[known], expected[known], atol=1e-6)
    confidence = (1 - distances[:, 2] / THIRD).reshape(100, 100)
    assert np.allclose(result.confidence, np.where(known, confidence, 0), atol=1e-6)
    assert np.allclose(result.matches.worn, 100 * places)
    assert np.allclose(result.matches.confidence, 1.0)


def test_four_matches_and_matches_on_a_line_are_nothing() -> None:
    few = np.array([[0.4, 0.4], [0.4, 0.5], [0.5, 0.4], [0.5, 0.5], [0.45, 0.35]])
    line = np.linspace([0.2, 0.2], [0.8, 0.8], 8)
    for places, count in ((few, 5), (few[:4], 0), (line, 0)):
        assert len(matched(WHOLE, WHOLE, [Source(told_apart(places), told_apart(places))]).matches) == count


def test_what_the_others_contradict_is_left_out() -> None:
    places = np.argwhere(np.ones((4, 4))) / 10 + 0.3
    moved = places.copy()
    moved[5] += [0.0, 0.09]  # within the consensus, not within what its neighbours say
    result = matched(WHOLE, WHOLE, [Source(told_apart(places), told_apart(moved))])
    assert np.allclose(result.matches.flat / 100, np.delete(moved, 5, axis=0))


def test_parts_of_the_body_move_on_their_own() -> None:
    places = np.argwhere(np.ones((4, 5))) / 10 + [0.3, 0.15]
    moved = places + np.where(places[:, 1:] < 0.3, [0.0, 0.3], [0.0, 0.0])
    source = Source(told_apart(places), told_apart(moved))
    labels = np.full((100, 100), 1, np.uint8)
    labels[:, :33] = POSE_PARTS["upper_arm_left"]
    labels[:, 25:36] = 0  # unseen, and so of the nearest part, an arm's as far as a sleeve is wide
    apart = matched(WHOLE, WHOLE, [source], labels)
    assert len(apart.matches) == 20
    assert np.allclose(apart.correspondence[40, [20, 32, 34, 50]], [[0.405, x] for x in (0.505, 0.625, 0.345, 0.505)])
    assert len(matched(WHOLE, WHOLE, [source]).matches) < 20


def test_consensus_takes_what_one_similarity_explains() -> None:
    rng = np.random.default_rng(0)
    worn = rng.random((60, 2))
    turned = worn @ np.array([[0.8, 0.3], [-0.3, 0.8]]) + 0.1
    turned[40:] = rng.random((20, 2)) + 2.0
    assert np.array_equal(consensus(worn, turned), np.arange(40))
    assert len(consensus(worn, worn @ np.array([[0.0, 1.0], [-1.0, 0.0]]))) < 10  # a quarter turn is too much
    assert len(consensus(worn[:1], worn[:1])) == 0


# -- the spline --------------------------------------------------------------------------------------------------------


def test_the_spline_is_scipys() -> None:
    rng = np.random.default_rng(1)
    worn, flat, places = rng.random((12, 2)), rng.random((12, 2)), rng.random((30, 2))
    theirs = RBFInterpolator(worn, flat, kernel="thin_plate_spline", smoothing=STIFFNESS / 2)(places)
    assert np.allclose(ThinPlate(worn, flat)(places), theirs, atol=1e-9)  # r^2 log r^2 is twice their kernel


def test_left_out_is_the_distance_from_the_spline_of_the_others() -> None:
    rng = np.random.default_rng(2)
    worn = rng.random((9, 2))
    flat = worn + 0.1 * rng.random((9, 2))
    for index, distance in enumerate(ThinPlate(worn, flat).left_out):
        others = np.arange(9) != index
        expected = ThinPlate(worn[others], flat[others])(worn[[index]])[0]
        assert distance == pytest.approx(np.linalg.norm(expected - flat[index]), rel=1e-6)


def test_the_spline_keeps_what_is_affine() -> None:
    worn = np.random.default_rng(3).random((7, 2))
    flat = worn @ np.array([[1.2, 0.1], [-0.2, 0.8]]) + [0.3, -0.1]
    spline = ThinPlate(worn, flat)
    assert spline.left_out.max() < 1e-9 < CLOSELY
    assert np.allclose(spline(np.array([[3.0, 2.0]])), [[3.5, 1.8]])
