"""Figures of a diagnosis against loops and numbers worked out by hand."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from i2am_train.metrics.diagnosis import (
    MOST_VIOLATIONS,
    concordance,
    extent_ratio,
    finding,
    order_violations,
    round_trip,
    sink_floor,
    sink_mass,
)
from i2am_train.ops.grids import reference_coordinates
from i2am_train.types import GridSize

GENERATED, REFERENCE = GridSize(4, 3), GridSize(2, 5)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def mask() -> Tensor:
    """Of three samples: some patches, all, none."""
    some = random(1, GENERATED.tokens, seed=5) > -0.5
    return torch.cat([some, torch.ones_like(some), torch.zeros_like(some)])


def violations_by_loops(centers: Tensor, mask: Tensor) -> float:
    wrong = pairs = 0.0
    cells = list(itertools.product(range(GENERATED.height), range(GENERATED.width)))
    for (y, x), (other_y, other_x) in itertools.product(cells, cells):
        first, second = y * GENERATED.width + x, other_y * GENERATED.width + other_x
        if not (mask[first] and mask[second]):
            continue
        for axis, same, earlier in ((1, y == other_y, x < other_x), (0, x == other_x, y < other_y)):
            if same and earlier:
                pairs += 1
                gap = float(centers[second, axis] - centers[first, axis])
                wrong += 1.0 if gap < 0 else 0.5 if gap == 0 else 0.0
    return wrong / pairs if pairs else math.nan


def test_order_violations(mask: Tensor) -> None:
    """Against loops over pairs; order, its mirror image, and one place for all have 0, 1 and a half."""
    centers = (2 * random(3, GENERATED.tokens, 2)).round()  # some are equal
    found = order_violations(centers, mask, GENERATED)
    for row in range(2):
        assert float(found[row]) == pytest.approx(violations_by_loops(centers[row], mask[row]))
    assert math.isnan(found[2])
    own = reference_coordinates(GENERATED)[None]
    for places, expected in ((own, 0.0), (-own, 1.0), (0 * own, 0.5)):
        assert float(order_violations(places, mask[1:2], GENERATED)) == expected


def test_extent_ratio(mask: Tensor) -> None:
    """1 for centres on the garment's own patches; half as wide for half; NaN without a garment or a mask."""
    grid, everything = GridSize(4, 3), torch.ones(1, 12, dtype=torch.bool)
    places = reference_coordinates(grid)[None]
    part = torch.arange(12)[None] % 3 < 2
    assert float(extent_ratio(places, part, part, grid)) == pytest.approx(1.0)
    assert float(extent_ratio(places / 2 + 7, everything, everything, grid)) == pytest.approx(0.5)
    assert math.isnan(extent_ratio(places, everything, ~everything, grid))
    assert math.isnan(extent_ratio(places, ~everything, everything, grid))


def test_round_trip(mask: Tensor) -> None:
    """Against loops; any bijection agrees, one place for all does not, and a single softmax stays in [0, 1]."""
    logits = 3 * random(3, GENERATED.tokens, REFERENCE.tokens)
    there, back = logits.softmax(2), logits.softmax(1)
    found = round_trip(there, back, mask, GENERATED)
    places = reference_coordinates(GENERATED).double()
    for row in range(2):
        inside = mask[row].nonzero().flatten().tolist()
        ends = {}
        for patch in inside:
            end = torch.zeros(2, dtype=torch.float64)
            for at in range(REFERENCE.tokens):
                for home in range(GENERATED.tokens):
                    end += there[row, patch, at].double() * back[row, home, at].double() * places[home]
            ends[patch] = end
        middle = torch.stack([places[patch] for patch in inside]).mean(dim=0)
        along = sum(float((places[patch] - middle) @ ends[patch]) for patch in inside)
        expected = along / sum(float((places[patch] - middle).square().sum()) for patch in inside)
        assert float(found[row]) == pytest.approx(expected, rel=1e-5)
    assert math.isnan(found[2])
    bijection = torch.eye(12)[torch.randperm(12, generator=torch.Generator().manual_seed(0))][None]
    assert float(round_trip(bijection, bijection, mask[:1], GENERATED)) == pytest.approx(1.0)
    everywhere = torch.ones(64, GENERATED.tokens, dtype=torch.bool)
    for strength in (0.1, 1.0, 10.0):
        many = strength * random(64, GENERATED.tokens, REFERENCE.tokens, seed=1)
        values = round_trip(many.softmax(2), many.softmax(1), everywhere, GENERATED)
        assert values.min() > -0.2
        assert values.max() < 1 + 1e-6


def test_concordance(mask: Tensor) -> None:
    """Lin's formula, with variances and means written out; shifted fields do not agree, whatever their correlation."""
    first, second = random(3, 12, 2), random(3, 12, 2, seed=1)
    found = concordance(first, second, mask)
    for row in range(2):
        x, y = first[row][mask[row]].double(), second[row][mask[row]].double()
        covariance = float(((x - x.mean(0)) * (y - y.mean(0))).mean(0).sum())
        spread = float(x.var(0, correction=0).sum() + y.var(0, correction=0).sum())
        apart = float((x.mean(0) - y.mean(0)).square().sum())
        assert float(found[row]) == pytest.approx(2 * covariance / (spread + apart), rel=1e-5)
    assert math.isnan(found[2])
    assert float(concordance(first, first + 100, mask)[0]) < 0.01
    assert abs(float(concordance(first, 1e-4 * second, mask)[0])) < 1e-3


def test_sinks() -> None:
    """The hundredth is at least one token; 200 tokens have two."""
    mass = torch.ones(2, 3, 200)
    mass[:, :, [7, 30]] = 99.0
    torch.testing.assert_close(sink_mass(mass), torch.full((2, 3), 198 / 396))
    assert sink_floor(200) == 0.01
    assert float(sink_mass(torch.ones(20))) == pytest.approx(sink_floor(20)) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("use", "violations", "spread", "proposed", "reasons"),
    [
        (0.02, MOST_VIOLATIONS + 0.01, 1.0, True, 1),
        (0.02, MOST_VIOLATIONS, 1.0, False, 0),
        (0.0199, 0.5, 0.1, False, 2),
        (0.5, 0.0, 0.29, True, 1),
        (0.5, 0.0, 0.3, False, 0),
        (None, 0.5, 0.1, False, 2),
        (0.5, None, None, False, 0),
    ],
)
def test_the_rule(
    use: float | None, violations: float | None, spread: float | None, proposed: bool, reasons: int
) -> None:
    """Used, and out of order or collapsed; at the limits, and where a figure has no value."""
    found = finding(use, violations, spread, least_use=0.02)
    assert found.proposed is proposed
    assert len(found.reasons) == reasons
