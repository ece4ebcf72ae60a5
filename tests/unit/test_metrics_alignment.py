"""Alignment of attention between two pictures of the same: constructed attention with a known answer."""

import math

import pytest
import torch

from i2am_train.attention import AttributionMaps, AttributionStore, LayerRecord
from i2am_train.metrics.alignment import alignment, layer_alignment
from i2am_train.types import GridSize

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
