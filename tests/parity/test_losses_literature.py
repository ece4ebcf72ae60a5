"""The terms of other papers, and the garment's extent, written index by index from their descriptions."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from i2am_train.losses.attention import Attention, Pictures, attention_on_grids
from i2am_train.losses.literature import atv, entropy, leffa, mass, matches, supervised
from i2am_train.losses.paper import cwg, dcml
from i2am_train.ops.grids import garment_slope, mask_on_grid, matches_on_grid
from i2am_train.ops.rows import log_head_scores, log_reference_mass
from i2am_train.types import GridSize

GENERATED, REFERENCE = GridSize(3, 4), GridSize(5, 2)
SAMPLES, HEADS, WIDTH, SPECIAL = 2, 3, 6, 2
PERSON, GARMENT = GridSize(9, 16), GridSize(15, 8)
"""Sizes of the pictures; cells of 3x4 and 3x4 pixels."""
SCALE = WIDTH**-0.5
Cell = tuple[int, int]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GENERATED_TOKENS = drawn(0, SAMPLES, HEADS, GENERATED.tokens, WIDTH) * 2
KEYS = drawn(1, SAMPLES, HEADS, SPECIAL + REFERENCE.tokens, WIDTH) * 2
WORN = drawn(2, SAMPLES, *PERSON) > -0.3
FLAT = drawn(3, SAMPLES, *GARMENT) > 0.2
PERSONS, GARMENTS = drawn(4, SAMPLES, 3, *PERSON).tanh(), drawn(5, SAMPLES, 3, *GARMENT).tanh()
PLACES = torch.rand(SAMPLES, *PERSON, 2, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
PLACES[drawn(7, SAMPLES, *PERSON) > 0.5] = torch.nan


@pytest.fixture(scope="module")
def on() -> Attention:
    """As a training step makes it, of queries, keys, masks, pictures and places."""
    reference = KEYS[:, :, SPECIAL:]
    logarithms = log_head_scores(GENERATED_TOKENS, reference)
    return attention_on_grids(
        logarithms.exp().mean(dim=1),
        mask_on_grid(WORN, GENERATED),
        GENERATED,
        REFERENCE,
        log_heads=logarithms,
        log_mass=log_reference_mass(GENERATED_TOKENS, KEYS, slice(SPECIAL, None)),
        matches=matches_on_grid(PLACES, WORN, GENERATED, REFERENCE),
        slope=garment_slope(WORN, FLAT, GENERATED, REFERENCE),
        pictures=Pictures(PERSONS, WORN, GARMENTS),
    )


def logits(n: int, h: int, i: int) -> list[float]:
    """Of one patch with all keys, special ones first."""
    query = GENERATED_TOKENS[n, h, i].tolist()
    return [sum(a * b for a, b in zip(query, key, strict=True)) * SCALE for key in KEYS[n, h].tolist()]


def softmax(values: list[float], tau: float = 1.0) -> list[float]:
    exponentials = [math.exp(value / tau) for value in values]
    return [one / sum(exponentials) for one in exponentials]


def head_scores(n: int, h: int, i: int, tau: float = 1.0) -> list[float]:
    return softmax(logits(n, h, i)[SPECIAL:], tau)


def mean_scores(n: int, i: int, tau: float = 1.0) -> list[float]:
    heads = [head_scores(n, h, i, tau) for h in range(HEADS)]
    return [sum(column) / HEADS for column in zip(*heads, strict=True)]


def center(scores: list[float]) -> tuple[float, float]:
    y = sum(a * (j // REFERENCE.width) for j, a in enumerate(scores))
    x = sum(a * (j % REFERENCE.width) for j, a in enumerate(scores))
    return y, x


def inside(n: int) -> list[int]:
    """Cells of which at least half is worn."""
    high, wide = PERSON.height // GENERATED.height, PERSON.width // GENERATED.width
    return [
        i
        for i, (row, column) in enumerate(product(range(GENERATED.height), range(GENERATED.width)))
        if sum(WORN[n, row * high + y, column * wide + x] for y in range(high) for x in range(wide)) * 2 >= high * wide
    ]


def histogram(n: int, i: int) -> list[int]:
    """Of the garment's cells that the pixels of one generated cell are matched with."""
    counts = [0] * REFERENCE.tokens
    for y, x in product(range(PERSON.height), range(PERSON.width)):
        row, column = y * GENERATED.height // PERSON.height, x * GENERATED.width // PERSON.width
        place = PLACES[n, y, x].tolist()
        if row * GENERATED.width + column == i and WORN[n, y, x] and not math.isnan(place[0]):
            counts[int(place[0] * REFERENCE.height) * REFERENCE.width + int(place[1] * REFERENCE.width)] += 1
    return counts


def blurred(counts: list[int], sigma: float) -> list[float]:
    """With a 3x3 Gaussian; then the sum is 1."""
    spread = [0.0] * len(counts)
    for j, k in product(range(len(counts)), repeat=2):
        (a, b), (c, d) = divmod(j, REFERENCE.width), divmod(k, REFERENCE.width)
        if max(abs(a - c), abs(b - d)) <= 1:
            spread[k] += counts[j] * math.exp(-((a - c) ** 2 + (b - d) ** 2) / (2 * sigma**2))
    return [one / sum(spread) for one in spread]


def test_matches(on: Attention) -> None:
    """Each head's cross-entropy, and that of their mean."""
    for sigma in (0.5, 1.0):
        for n in range(SAMPLES):
            found = {i: blurred(histogram(n, i), sigma) for i in inside(n) if any(histogram(n, i))}
            heads = [
                -sum(t * math.log(a + 1e-8) for t, a in zip(goal, head_scores(n, h, i), strict=True))
                for i, goal in found.items()
                for h in range(HEADS)
            ]
            means = [
                -sum(t * math.log(a + 1e-8) for t, a in zip(goal, mean_scores(n, i), strict=True))
                for i, goal in found.items()
            ]
            assert float(matches(on, sigma=sigma)[n]) == pytest.approx(sum(heads) / len(heads), rel=1e-9)
            mean = matches(on, per_head=False, sigma=sigma)
            assert float(mean[n]) == pytest.approx(sum(means) / len(means), rel=1e-9)


def bilinear(values: dict[Cell, float], y: float, x: float) -> float:
    """Between cells; beyond the outermost ones, these."""
    height, width = max(values)[0] + 1, max(values)[1] + 1
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = min(int(y), height - 1), min(int(x), width - 1)
    down, right = y - top, x - left
    corners = [
        ((top, left), (1 - down) * (1 - right)),
        ((top, min(left + 1, width - 1)), (1 - down) * right),
        ((min(top + 1, height - 1), left), down * (1 - right)),
        ((min(top + 1, height - 1), min(left + 1, width - 1)), down * right),
    ]
    return sum(values[cell] * share for cell, share in corners)


def test_leffa(on: Attention) -> None:
    """Softened scores, their centres at the picture's size, the garment sampled there."""
    for n in range(SAMPLES):
        centers = {divmod(i, GENERATED.width): center(mean_scores(n, i, tau=2.0)) for i in range(GENERATED.tokens)}
        flow = [{cell: value[axis] for cell, value in centers.items()} for axis in (0, 1)]
        colours = [
            {(y, x): float(GARMENTS[n, c, y, x]) for y, x in product(range(GARMENT.height), range(GARMENT.width))}
            for c in range(3)
        ]
        errors = []
        for y, x in WORN[n].nonzero().tolist():
            at = [(p + 0.5) * g / s - 0.5 for p, g, s in zip((y, x), GENERATED, PERSON, strict=True)]
            cells = [bilinear(field, *at) for field in flow]
            pixels = [(v + 0.5) * s / g - 0.5 for v, g, s in zip(cells, REFERENCE, GARMENT, strict=True)]
            errors += [(bilinear(colours[c], *pixels) - float(PERSONS[n, c, y, x])) ** 2 for c in range(3)]
        assert float(leffa(on)[n]) == pytest.approx(sum(errors) / len(errors), rel=1e-9)


def test_entropy(on: Attention) -> None:
    """Of the mean over heads, as a share of log N."""
    for n in range(SAMPLES):
        each = [-sum(a * math.log(a) for a in mean_scores(n, i)) / math.log(REFERENCE.tokens) for i in inside(n)]
        assert float(entropy(on)[n]) == pytest.approx(sum(each) / len(each), rel=1e-6)  # the floor of the scores
        raised = [max(one, 0.7) for one in each]
        assert float(entropy(on, floor=0.7)[n]) == pytest.approx(sum(raised) / len(raised), rel=1e-6)
        assert min(each) < 0.7 < max(each)


def test_mass(on: Attention) -> None:
    """The share of the keys that are no special tokens."""
    for n in range(SAMPLES):
        shares = [sum(sum(softmax(logits(n, h, i))[SPECIAL:]) for h in range(HEADS)) / HEADS for i in range(12)]
        within = [-math.log(shares[i]) for i in inside(n)]
        beyond = [shares[i] for i in range(12) if i not in inside(n)]
        expected = sum(within) / len(within) + sum(beyond) / len(beyond)
        assert float(mass(on)[n]) == pytest.approx(expected, rel=1e-9)


def test_atv(on: Attention) -> None:
    """Neighbours to the right and below, each head by itself."""
    for n in range(SAMPLES):
        cells = {divmod(i, GENERATED.width): i for i in inside(n)}
        pairs = [(a, b) for a, b in product(cells, repeat=2) if (b[0] - a[0], b[1] - a[1]) in ((0, 1), (1, 0))]
        total = 0.0
        for h in range(HEADS):
            centers = {cell: center(head_scores(n, h, i)) for cell, i in cells.items()}
            total += sum(abs(p - q) for a, b in pairs for p, q in zip(centers[a], centers[b], strict=True))
        assert float(atv(on)[n]) == pytest.approx(total / HEADS / len(pairs), rel=1e-9)
        assert float(atv(on, norm="sum")[n]) == pytest.approx(total / HEADS, rel=1e-9)


def slope(n: int) -> list[float]:
    """Standard deviations of the masks' pixels, in cells of their grids."""
    found = []
    for axis in (0, 1):
        flat, worn = (np.std(mask[n].nonzero()[:, axis].numpy()) for mask in (FLAT, WORN))
        found.append(float(flat / GARMENT[axis] * REFERENCE[axis] / (worn / PERSON[axis] * GENERATED[axis])))
    return found


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_order_up_to_the_extent(on: Attention, share: float) -> None:
    """`extent` and `capped`, pair by pair."""
    for n in range(SAMPLES):
        cells = {divmod(i, GENERATED.width): center(mean_scores(n, i)) for i in inside(n)}
        extent, capped = [], []
        for (a, b), (c, d) in product(cells, repeat=2):
            if (axis := 1 if a == c and d > b else 0 if b == d and c > a else None) is None:
                continue
            gap = cells[c, d][axis] - cells[a, b][axis]
            enough = share * slope(n)[axis] * (c - a + d - b)
            extent.append(abs(enough - gap))
            capped.append(-min(max(0.0, gap), enough))
        assert float(dcml(on, force="extent", margin=share)[n]) == pytest.approx(sum(extent) / len(extent), rel=1e-6)
        assert float(dcml(on, force="capped", margin=share)[n]) == pytest.approx(sum(capped) / len(capped), rel=1e-6)


def test_supervised_is_what_it_was() -> None:
    """To the bit, in float32: its formula as it stood before it shared its mean with others."""
    logits = torch.randn(2, GENERATED.tokens, REFERENCE.tokens, generator=torch.Generator().manual_seed(9))
    target = torch.rand(2, GENERATED.tokens, 2, generator=torch.Generator().manual_seed(10)) * 2
    target[:, 5] = torch.nan
    on = attention_on_grids(logits.softmax(-1), mask_on_grid(WORN, GENERATED), GENERATED, REFERENCE, target=target)
    assert on.target is not None
    valid = on.mask & on.target.isfinite().all(dim=-1)
    y, x = torch.where(valid[..., None], on.target, 0.0).unbind(dim=-1)
    squared = (y[..., None] - torch.arange(5.0)).square()[..., :, None] + (x[..., None] - torch.arange(2.0)).square()[
        ..., None, :
    ]
    goal = torch.softmax(-squared.flatten(3) / 2, dim=-1)
    surprise = torch.where(valid, -(goal * on.scores.flatten(3).clamp(min=1e-8).log()).sum(dim=-1), 0.0)
    expected = surprise.flatten(1).sum(dim=1) / valid.flatten(1).sum(dim=1).clamp(min=1)
    assert torch.equal(supervised(on), expected)


def test_the_floor_of_cwg_changes_no_value(on: Attention) -> None:
    """It takes the gradient of the patches below it, and of no others."""
    scores = on.scores.clone().requires_grad_()
    free = on._replace(scores=scores)
    each = -(on.scores * on.scores.log()).sum(dim=(3, 4)) / math.log(REFERENCE.tokens)
    floor = float(each[on.mask].median())
    assert torch.equal(cwg(free, entropy_floor=floor), cwg(on))
    (with_floor,) = torch.autograd.grad(cwg(free, entropy_floor=floor).sum(), scores)
    (without,) = torch.autograd.grad(cwg(free).sum(), scores)
    below = each < floor
    assert (below & on.mask).any()
    assert torch.equal(with_floor[below], torch.zeros_like(with_floor[below]))
    assert torch.equal(with_floor[~below], without[~below])
