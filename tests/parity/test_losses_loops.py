"""The vectorised losses against equations 15-21 written as loops, index by index."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from i2am_train.losses.base import LossVariant
from i2am_train.losses.center_weighted import center_weighted
from i2am_train.losses.centers import attention_centers
from i2am_train.losses.distance_centering import dcml
from i2am_train.losses.total_variation import total_variation
from i2am_train.types import GridSize

GENERATED, REFERENCE = GridSize(3, 4), GridSize(5, 2)
PAPER = LossVariant.PAPER_WITHOUT_FACTOR
Field = dict[tuple[int, int], tuple[float, float]]


def sample() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shape = (2, GENERATED.tokens, REFERENCE.tokens)
    scores = torch.randn(shape, generator=generator, dtype=torch.float64).softmax(-1)
    return scores, torch.rand(2, GENERATED.tokens, generator=generator) > 0.25


def loop_centers(scores: Tensor) -> Field:
    """Equation 15 without its factor, for one sample; indices from 1 as printed."""
    field = {}
    for i in range(GENERATED.height):
        for j in range(GENERATED.width):
            row = scores[i * GENERATED.width + j].tolist()
            y = sum(a * (n // REFERENCE.width + 1) for n, a in enumerate(row))
            x = sum(a * (n % REFERENCE.width + 1) for n, a in enumerate(row))
            field[i, j] = (y, x)
    return field


def inside(mask: Tensor) -> set[tuple[int, int]]:
    return {divmod(n, GENERATED.width) for n in mask.nonzero().flatten().tolist()}


def loop_dcml(field: Field, cells: set[tuple[int, int]]) -> float:
    """Equations 16-18, x on component 1 and y on component 0."""
    total = 0.0
    for i, j in cells:
        total += sum(
            max(0.0, field[i, j][1] - field[r, c][1]) for r, c in cells if r == i and c > j
        )
        total += sum(
            max(0.0, field[i, j][0] - field[r, c][0]) for r, c in cells if c == j and r > i
        )
    return total


def loop_tv(field: Field, cells: set[tuple[int, int]]) -> float:
    """Equation 19 with forward differences."""
    total = 0.0
    for i, j in cells:
        for neighbour in ((i + 1, j), (i, j + 1)):
            if neighbour in cells:
                total += math.dist(field[i, j], field[neighbour]) ** 2
    return total


def loop_cwg(field: Field, cells: set[tuple[int, int]], scores: Tensor) -> float:
    """Equations 20 and 21 with sigma 1."""
    total = 0.0
    for i, j in cells:
        for n, a in enumerate(scores[i * GENERATED.width + j].tolist()):
            place = (n // REFERENCE.width + 1, n % REFERENCE.width + 1)
            total += math.exp(-(math.dist(field[i, j], place) ** 2) / 2) * a
    return -total / (GENERATED.tokens * REFERENCE.tokens)


def test_the_papers_equations_as_loops() -> None:
    """Centres, DCML, TV and CWG of a masked, non-square example."""
    scores, mask = sample()
    centers = attention_centers(scores, REFERENCE, PAPER)
    values = (
        dcml(centers, mask, GENERATED, PAPER),
        total_variation(centers, mask, GENERATED, PAPER),
        center_weighted(scores, centers, mask, REFERENCE, PAPER),
    )
    for n in range(2):
        field, cells = loop_centers(scores[n]), inside(mask[n])
        expected = (
            loop_dcml(field, cells),
            loop_tv(field, cells),
            loop_cwg(field, cells, scores[n]),
        )
        actual = torch.stack([value[n] for value in values])
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))
