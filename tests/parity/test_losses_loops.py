"""The vectorised losses against equations 15-21, and the authors' batch means, written index by index."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from i2am_train.losses.attention import attention_on_grids
from i2am_train.losses.paper import VARIANTS
from i2am_train.types import GridSize, LossVariant

GENERATED, REFERENCE = GridSize(3, 4), GridSize(5, 2)
PAPER = LossVariant.PAPER_WITHOUT_FACTOR
Field = dict[tuple[int, int], tuple[float, float]]


def sample() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shape = (2, GENERATED.tokens, REFERENCE.tokens)
    scores = torch.randn(shape, generator=generator, dtype=torch.float64).softmax(-1)
    return scores, torch.rand(2, GENERATED.tokens, generator=generator) > 0.25


def values_of(scores: Tensor, mask: Tensor, variant: LossVariant) -> list[Tensor]:
    reading = VARIANTS[variant]
    attention = attention_on_grids(scores, mask, GENERATED, REFERENCE, centers=reading.centers)
    return [term(attention) for term in (reading.dcml, reading.tv, reading.cwg)]


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
        total += sum(max(0.0, field[i, j][1] - field[r, c][1]) for r, c in cells if r == i and c > j)
        total += sum(max(0.0, field[i, j][0] - field[r, c][0]) for r, c in cells if c == j and r > i)
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
    values = values_of(scores, mask, PAPER)
    for n in range(2):
        field, cells = loop_centers(scores[n]), inside(mask[n])
        expected = (loop_dcml(field, cells), loop_tv(field, cells), loop_cwg(field, cells, scores[n]))
        actual = torch.stack([value[n] for value in values])
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def authors_batch(scores: Tensor, mask: Tensor, variant: LossVariant) -> tuple[float, ...]:
    """DCML, TV and CWG of a whole batch as the authors' two versions average them."""
    first = variant is LossVariant.AUTHORS_V1
    power, width = (1, 0.5) if first else (2, 1.0)
    order = down = right = near = 0.0
    for n in range(len(scores)):
        field = {at: (y - 1, x - 1) for at, (y, x) in loop_centers(scores[n]).items()}
        cells = inside(mask[n])
        for i, j in cells:
            y, x = field[i, j]
            order += sum(max(0.0, field[r, c][1] - x) for r, c in cells if r == i and c > j)
            order += sum(max(0.0, field[r, c][0] - y) for r, c in cells if c == j and r > i)
            for axis, below in enumerate(((i + 1, j), (i, j + 1))):
                if below in cells:
                    change = sum(abs(a - b) ** power for a, b in zip(field[below], (y, x), strict=True))
                    down, right = (down + change, right) if axis == 0 else (down, right + change)
            for k, a in enumerate(scores[n, i * GENERATED.width + j].tolist()):
                distance = math.dist((y, x), divmod(k, REFERENCE.width))
                near += math.exp(-distance / (2 * width**2)) * a
    samples, (height, wide) = len(scores), GENERATED
    slots = samples * GENERATED.tokens * REFERENCE.tokens
    return (
        -order / (samples * GENERATED.tokens**2),
        down / (samples * (height - 1) * wide * 2) + right / (samples * height * (wide - 1) * 2),
        -near / (int(mask.sum()) if first else slots),
    )


@pytest.mark.parametrize("variant", [LossVariant.AUTHORS_V1, LossVariant.AUTHORS_V2])
def test_the_authors_average_over_whole_batches(variant: LossVariant) -> None:
    """The mean of the samples' values is the authors' value of the batch, with masks of different sizes."""
    scores, mask = sample()
    mask[1, 2:] = False
    means = torch.stack([value.mean() for value in values_of(scores, mask, variant)])
    expected = torch.tensor(authors_batch(scores, mask, variant), dtype=torch.float64)
    torch.testing.assert_close(means, expected, rtol=0.0, atol=1e-12)
