"""Scores of attention: IMACS; exact targets on the grid, errors, spread, entropy, the collapse warning, alignment."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from i2am_train.attention import AttributionMaps, AttributionStore, LayerRecord
from i2am_train.errors import ConfigError, DataError
from i2am_train.losses.attention import attention_centers
from i2am_train.metrics.attention import (
    alignment,
    attention_entropy,
    center_spread,
    collapse_warning,
    correspondence_error,
    imacs,
    layer_alignment,
    pck,
    spread_ratio,
    target_on_grid,
)
from i2am_train.ops.grids import aligned_coordinates, reference_coordinates
from i2am_train.types import GridSize


@pytest.fixture
def maps() -> Tensor:
    return torch.rand(4, 5, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def masks() -> Tensor:
    inside = torch.rand(4, 5, 3, generator=torch.Generator().manual_seed(1)) > 0.5
    inside[2] = False
    return inside


def test_bounds_are_reached() -> None:
    """1 for a map that is its mask, -penalty for the opposite."""
    mask = torch.zeros(2, 4, 3, dtype=torch.bool)
    mask[:, 1:3, :2] = True
    assert imacs(mask.float(), mask, penalty=3.0).tolist() == [1.0, 1.0]
    assert imacs((~mask).float(), mask, penalty=3.0).tolist() == [-3.0, -3.0]


def test_an_empty_mask_has_no_score_and_a_full_one_no_outside(maps: Tensor) -> None:
    """NaN where the score is undefined; the mean of the map where there is no outside."""
    mask = torch.ones(4, 5, 3, dtype=torch.bool)
    mask[1] = False
    scores = imacs(maps, mask)
    assert scores.isnan().tolist() == [False, True, False, False]
    torch.testing.assert_close(scores[0], maps[0].mean())


def test_several_penalties_equal_one_at_a_time(maps: Tensor, masks: Tensor) -> None:
    """One pass over the map gives every row."""
    rows = imacs(maps, masks, (0.0, 3.0, 10.0))
    assert rows.shape == (3, 4)
    for row, penalty in zip(rows, (0.0, 3.0, 10.0), strict=True):
        torch.testing.assert_close(row, imacs(maps, masks, penalty), equal_nan=True)


@pytest.mark.parametrize("scale", [255.0, -1.0, float("nan")])
def test_a_map_that_is_not_normalised_is_refused(maps: Tensor, masks: Tensor, scale: float) -> None:
    """A picture in bytes, a negative map and NaN are found before they give a number."""
    with pytest.raises(DataError, match=r"maps in \[0, 1\]"):
        imacs(maps * scale, masks)


@pytest.mark.parametrize("penalty", [-1.0, float("nan"), ()])
def test_impossible_penalties_are_refused(maps: Tensor, masks: Tensor, penalty: float) -> None:
    """Negative, NaN and none at all."""
    with pytest.raises(ConfigError, match="at least 0"):
        imacs(maps, masks, penalty=penalty)


IMAGE, GENERATED, REFERENCE = GridSize(32, 24), GridSize(8, 6), GridSize(16, 12)


def identity_correspondence() -> Tensor:
    """Every pixel shows the garment's pixel at the same place."""
    places = reference_coordinates(IMAGE).reshape(1, *IMAGE, 2) + 0.5
    return (places / torch.tensor(IMAGE)).expand(2, -1, -1, -1)


def everywhere() -> Tensor:
    return torch.ones(2, *IMAGE, dtype=torch.bool)


def test_identity_correspondence_gives_the_known_coordinates() -> None:
    """A generated cell covers 2x2 reference patches: its target is the corner between them."""
    target = target_on_grid(identity_correspondence(), everywhere(), GENERATED, REFERENCE)
    torch.testing.assert_close(target[1], aligned_coordinates(GENERATED, REFERENCE))
    assert target[1, 0].tolist() == pytest.approx([0.5, 0.5], abs=1e-6)
    same = target_on_grid(identity_correspondence(), everywhere(), REFERENCE, REFERENCE)
    torch.testing.assert_close(same[0], reference_coordinates(REFERENCE), rtol=0.0, atol=1e-5)


def test_one_hot_attention_at_the_identity_has_no_error() -> None:
    """The centre of reference patch k and the target of the cell above it are the same number."""
    target = target_on_grid(identity_correspondence(), everywhere(), REFERENCE, REFERENCE)
    scores = torch.eye(REFERENCE.tokens).expand(2, -1, -1)
    error = correspondence_error(attention_centers(scores.unflatten(-1, REFERENCE)), target)
    torch.testing.assert_close(error, torch.zeros(2), rtol=0.0, atol=1e-5)


def test_cells_less_than_half_on_the_garment_have_no_target() -> None:
    """The mean of a kept cell is over its garment pixels only."""
    mask = torch.zeros(2, *IMAGE, dtype=torch.bool)
    mask[0, :2, :4] = True  # the upper half of the first 4x4 cell
    mask[1, :1, :4] = True  # a quarter
    target = target_on_grid(identity_correspondence(), mask, GENERATED, REFERENCE)
    assert target[0, 0].tolist() == pytest.approx([0.0, 0.5], abs=1e-6)
    assert target[0, 1:].isnan().all()
    assert target[1].isnan().all()


def test_unknown_pixels_are_left_out_of_the_mean() -> None:
    """NaN on the garment does not spread; a cell without a known pixel has no target."""
    known = identity_correspondence().clone()
    known[:, 2:4, :4] = torch.nan  # lower half of the first cell
    known[:, :4, 4:8] = torch.nan  # all of the second
    target = target_on_grid(known, everywhere(), GENERATED, REFERENCE)
    assert target[0, 0].tolist() == pytest.approx([0.0, 0.5], abs=1e-6)
    assert target[0, 1].isnan().all()
    assert target[0, 2:].isfinite().all()


def test_samples_without_any_target_have_no_value() -> None:
    """NaN, so that the average can skip them, and never 0."""
    centers = torch.rand(2, 6, 2)
    nowhere = torch.full((2, 6, 2), torch.nan)
    outside = torch.zeros(2, 6, dtype=torch.bool)
    scores = torch.rand(2, 6, 5).softmax(-1)
    for values in (
        correspondence_error(centers, nowhere),
        pck(centers, nowhere),
        spread_ratio(centers, nowhere),
        center_spread(centers, outside),
        attention_entropy(scores, outside),
    ):
        assert values.isnan().all()


def test_pck_counts_the_border() -> None:
    """A distance of exactly the radius is a hit."""
    target = torch.zeros(2, 2, 2)
    centers = torch.tensor([[[0.0, 1.0], [0.0, 2.0]], [[3.0, 0.0], [0.0, 4.0]]])
    assert pck(centers, target, radius=1.0).tolist() == [0.5, 0.0]
    assert pck(centers, target, radius=3.0).tolist() == [1.0, 0.5]


def test_spread_is_the_root_of_the_summed_variances() -> None:
    """Against torch's population variance; the ratio is that to the truth's spread."""
    centers = torch.rand(2, 7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inside = torch.ones(2, 7, dtype=torch.bool)
    expected = centers.var(dim=1, correction=0).sum(dim=-1).sqrt()
    torch.testing.assert_close(center_spread(centers, inside), expected)
    ratio = spread_ratio(centers * 0.25, centers)
    torch.testing.assert_close(ratio, torch.full((2,), 0.25, dtype=torch.float64))
    assert spread_ratio(centers, torch.ones(2, 7, 2)).isnan().all()


def test_entropy_bounds() -> None:
    """Uniform is 1 (log of the tokens in nats), one-hot 0, and a single token 0."""
    inside = torch.ones(2, 4, dtype=torch.bool)
    uniform = torch.full((2, 4, 6), 1 / 6)
    torch.testing.assert_close(attention_entropy(uniform, inside), torch.ones(2))
    nats = attention_entropy(uniform, inside, normalised=False)
    torch.testing.assert_close(nats, torch.full((2,), math.log(6)))
    one_hot = torch.eye(6)[:4].expand(2, -1, -1)
    assert attention_entropy(one_hot, inside).tolist() == [0.0, 0.0]
    assert attention_entropy(torch.ones(2, 4, 1), inside).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("ratio", "entropy", "words"),
    [
        (0.0, 0.05, "collapsed to one place"),
        (0.2, 0.7, "collapsed towards the middle"),
        (0.1, 0.99, "almost uniform"),
        (None, 0.99, "almost uniform"),
    ],
)
def test_collapse_is_named(ratio: float | None, entropy: float, words: str) -> None:
    """One sharp point, everything in the middle, and no preference at all."""
    warning = collapse_warning(ratio, entropy)
    assert warning is not None
    assert words in warning


@pytest.mark.parametrize(("ratio", "entropy"), [(1.03, 0.3), (0.55, 0.6), (None, 0.05), (float("nan"), 0.05)])
def test_healthy_attention_gives_no_warning(ratio: float | None, entropy: float) -> None:
    """The healthy arms of trial trainings; sharp attention of unknown spread is no collapse."""
    assert collapse_warning(ratio, entropy) is None


GRID = GridSize(4, 3)
BATCH = 2


def looking(by: int) -> torch.Tensor:
    """Every patch looks ``by`` rows below itself, around the edge."""
    cells = torch.arange(GRID.tokens).view(GRID).roll(-by, dims=0).flatten()
    return torch.eye(GRID.tokens)[cells].expand(BATCH, -1, -1)


def test_identity_is_perfectly_aligned() -> None:
    """A patch that looks at itself is at distance 0, with all of its attention within any radius."""
    result = alignment(looking(0), GRID, GRID, radius=0.0)
    assert result.distance.tolist() == result.relative.tolist() == [0, 0]
    assert result.within.tolist() == [1, 1]


def test_a_shift_is_its_distance() -> None:
    """One row down: distance 1 for three rows, 3 for the last one, which looks at the first."""
    result = alignment(looking(1), GRID, GRID)
    assert result.distance.tolist() == pytest.approx([1.5, 1.5])
    assert result.relative.tolist() == pytest.approx([1.5 / 5, 1.5 / 5])  # the diagonal is 5
    assert result.within.tolist() == pytest.approx([0.75, 0.75])


def test_even_attention_is_not_aligned() -> None:
    """Uniform attention has the mean distance of two random cells, although its centre is in the middle."""
    even = torch.full((BATCH, GRID.tokens, GRID.tokens), 1 / GRID.tokens)
    places = [(y, x) for y in range(4) for x in range(3)]
    mean = sum(math.dist(a, b) for a in places for b in places) / len(places) ** 2
    assert alignment(even, GRID, GRID).distance.tolist() == pytest.approx([mean, mean])


def test_grids_of_different_fineness() -> None:
    """The same misplacement by an eighth of the picture is the same relative number on both grids."""
    fine, coarse = GridSize(8, 6), GridSize(4, 3)
    rows = torch.arange(fine.tokens).view(fine)
    own = torch.stack([rows[2 * y, 2 * x] for y in range(4) for x in range(3)])  # a corner of each 2x2
    on_fine = torch.eye(fine.tokens)[own].expand(BATCH, -1, -1)
    result = alignment(on_fine, coarse, fine)
    assert result.distance.tolist() == pytest.approx([math.sqrt(0.5)] * BATCH)
    assert result.relative.tolist() == pytest.approx([math.sqrt(0.5) / 10] * BATCH)


def test_layers_that_kept_their_matrix() -> None:
    """One entry per layer with a matrix, in the order of the layers; others are left out."""

    def record(name: str, scores: torch.Tensor | None) -> LayerRecord:
        even = torch.full((BATCH, 1, 2, GRID.tokens), 1 / GRID.tokens)
        return LayerRecord(name, GRID, GRID, even, even, scores_over_reference=scores)

    layers = (record("b", looking(1)), record("none", None), record("a", looking(0)))
    found = layer_alignment(AttributionMaps(AttributionStore(layers, (None,))))
    assert list(found) == ["b", "a"]
    assert [float(one.distance[0]) for one in found.values()] == pytest.approx([1.5, 0])
