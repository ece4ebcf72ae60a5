"""The losses of a large layer, whose matrices are not kept, are those of a small one."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from i2am_train.attention.hooks import AttentionInputs
from i2am_train.errors import CaptureError
from i2am_train.losses.attention import Attention, Pictures, attention_of_tokens
from i2am_train.losses.literature import atv, entropy, leffa, mass, matches, supervised
from i2am_train.losses.objective import NEEDS, Objective, Term
from i2am_train.losses.paper import VARIANTS, cwg, dcml, tv
from i2am_train.ops.grids import matches_on_grid
from i2am_train.ops.rows import log_reference_mass
from i2am_train.types import GridSize
from tests.support.attentions import drawn_tokens
from tests.support.live_bytes import LiveBytes

GENERATED, REFERENCE = GridSize(5, 4), GridSize(7, 3)
SAMPLES, HEADS, CHANNELS = 3, 2, 6
FLOAT64_ROW = SAMPLES * HEADS * REFERENCE.tokens * 8
PARTLY_EMPTY_DROPPED = torch.ones(SAMPLES, GENERATED.tokens, dtype=torch.bool)
PARTLY_EMPTY_DROPPED[0, ::3] = False
PARTLY_EMPTY_DROPPED[1] = False

TERMS: dict[str, Callable[[Attention], Tensor]] = {
    "dcml": dcml,
    "extent": partial(dcml, force="extent"),
    "tv": tv,
    "cwg": cwg,
    "cwg of the authors": VARIANTS["authors_v1"].cwg,
    "cwg as printed": VARIANTS["paper"].cwg,
    "cwg with a floor": partial(cwg, entropy_floor=0.6),
    "cwg past the centres": partial(cwg, detach_centers=True),
    "supervised": supervised,
    "matches": matches,
    "matches of the mean": partial(matches, per_head=False),
    "leffa": leffa,
    "entropy": entropy,
    "entropy with a floor": partial(entropy, floor=0.7),
    "mass": mass,
    "atv": atv,
    "of one's own": lambda attention: (
        attention.scores.square().where(attention.mask[..., None, None], 0.0).sum((1, 2, 3, 4))
    ),
}


def queries_and_keys(dtype: torch.dtype, generated: int = GENERATED.tokens, reference: int = REFERENCE.tokens) -> Any:
    return AttentionInputs(*drawn_tokens(SAMPLES, HEADS, (generated, reference), CHANNELS, 1.5, dtype), None)


def attended(tokens: AttentionInputs, block_bytes: int | None, **changes: Any) -> Attention:
    """All parts of an attention, of which queries and keys have a gradient."""
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> Tensor:
        return torch.rand(SAMPLES, *shape, generator=generator, dtype=torch.float64)

    places, target = numbers(20, 16, 2), numbers(GENERATED.tokens, 2) * torch.tensor(REFERENCE) - 0.5
    places[:, :, :3] = target[:, 4] = torch.nan
    worn = numbers(20, 16) > 0.2
    worn[1] = False
    parts: dict[str, Any] = {
        "target": target,
        "matches": partial(matches_on_grid, places, worn, GENERATED, REFERENCE),
        "log_heads": True,
        "log_mass": log_reference_mass(*(tokens.generated, tokens.reference), slice(2, None)),
        "slope": (0.5 + numbers(2)).to(tokens.generated),
        "pictures": Pictures(numbers(3, 20, 16), worn, numbers(3, 14, 9)),
        "conditioned": torch.tensor([True, True, False]),
    } | changes
    mask = parts.pop("mask", PARTLY_EMPTY_DROPPED)
    return attention_of_tokens(tokens, mask, GENERATED, REFERENCE, block_bytes=block_bytes, **parts)


def value_and_gradients(term: Callable[[Attention], Tensor], dtype: torch.dtype, block_bytes: int | None) -> Any:
    tokens = queries_and_keys(dtype)
    value = term(attended(tokens, block_bytes))
    return value, *torch.autograd.grad(value.sum(), (tokens.generated, tokens.reference))


@pytest.mark.parametrize("name", TERMS)
def test_every_term_is_that_of_the_matrix(name: str) -> None:
    """Value and gradients, in float64, in blocks of 3 (the last of 2) and of single patches; nothing is NaN."""
    expected = value_and_gradients(TERMS[name], torch.float64, None)
    assert all(one.isfinite().all() for one in expected)
    assert expected[0][0] != 0
    assert expected[0][1:].tolist() == [0.0, 0.0]
    assert expected[2].abs().max() > 0
    for patches in (3, 1):
        found = value_and_gradients(TERMS[name], torch.float64, patches * FLOAT64_ROW)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", TERMS)
def test_float32(name: str) -> None:
    """To its rounding: 1e-5 of the largest."""
    expected = value_and_gradients(TERMS[name], torch.float32, None)
    found = value_and_gradients(TERMS[name], torch.float32, 3 * FLOAT64_ROW // 2)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype is torch.float32
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_several_layers_at_once() -> None:
    """An objective over a layer with its matrix and one without; each has its own gradient."""
    objective = Objective(
        terms={
            "dcml": Term(0.3, dcml),
            "cwg": Term(0.7, cwg, timesteps=(0, 500)),
            "atv": Term(0.2, atv, ("log_heads",)),
        },
        layers={2: 1.0, 5: 0.5},
    )
    found = []
    for sizes in ((None, None), (None, 3 * FLOAT64_ROW), (2 * FLOAT64_ROW, 3 * FLOAT64_ROW)):
        layers = [queries_and_keys(torch.float64) for _ in sizes]
        attention = dict(zip((2, 5), map(attended, layers, sizes), strict=True))
        total, logged = objective(attention, torch.tensor([499, 3, 700]))
        gradients = torch.autograd.grad(
            total, [each for tokens in layers for each in (tokens.generated, tokens.reference)]
        )
        found.append((total, *logged.values(), *gradients))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found[2], found[0], rtol=1e-12, atol=1e-13)


def test_matrices_that_are_read() -> None:
    """They are on the grids as usual, kept once made, and hidden from terms that do not need them."""
    tokens = queries_and_keys(torch.float64)
    whole, on = attended(tokens, None), attended(tokens, 3 * FLOAT64_ROW)
    for name in ("scores", "log_heads", "matches"):
        torch.testing.assert_close(getattr(on, name), getattr(whole, name))
        assert getattr(on._replace(slope=None), name) is getattr(on, name)
    assert on.reference_grid == whole.reference_grid == REFERENCE
    hidden = on._replace(**dict.fromkeys(NEEDS))
    assert hidden.log_heads is hidden.matches is None
    with pytest.raises(CaptureError, match="needs log_heads, which this Attention does not have"):
        atv(hidden)
    mixed = on._replace(matches=whole.matches)
    torch.testing.assert_close(matches(mixed), matches(whole))


def test_each_patch_at_its_own_place() -> None:
    """By hand: centres are the patches' places, one step apart, all mass is in them, and rewards are the mean gap."""
    tokens = AttentionInputs(*[100.0 * torch.eye(20).expand(SAMPLES, 1, 20, 20)] * 2, 1.0)
    on = attention_of_tokens(
        tokens, torch.ones(SAMPLES, 20).bool(), GENERATED, GENERATED, log_heads=True, block_bytes=3 * SAMPLES * 80
    )
    y, x = torch.meshgrid(torch.arange(5.0), torch.arange(4.0), indexing="ij")
    torch.testing.assert_close(on.centers[1], torch.stack((y, x), dim=-1))
    right, down = 5 * (3 * 1 + 2 * 2 + 1 * 3), 4 * (4 * 1 + 3 * 2 + 2 * 3 + 1 * 4)
    pairs = 5 * 6 + 4 * 10
    for value, expected in ((cwg(on), -1.0), (entropy(on), 0.0), (tv(on), 1.0), (atv(on), 1.0)):
        torch.testing.assert_close(value, torch.full((SAMPLES,), expected))
    torch.testing.assert_close(dcml(on), torch.full((SAMPLES,), -(right + down) / pairs))


@pytest.mark.parametrize("name", ["cwg", "entropy", "supervised", "dcml"])
def test_scores_that_are_no_numbers_stay_so(name: str) -> None:
    """Of the sample that has them; the training's guard then names it. A dropped sample has none."""
    tokens = queries_and_keys(torch.float64)
    with torch.no_grad():
        tokens.generated[0, 1, 7, 2] = tokens.generated[2, 1, 7, 2] = torch.nan
    mask = torch.ones(SAMPLES, GENERATED.tokens, dtype=torch.bool)
    values = [TERMS[name](attended(tokens, size, mask=mask)) for size in (None, 3 * FLOAT64_ROW)]
    for value in values:
        assert value.isnan().tolist() == [True, False, False]
    torch.testing.assert_close(*values, equal_nan=True)


def test_what_does_not_fit_is_refused() -> None:
    """Masks of other sizes, values that are not those of the patches, functions that give something else."""
    tokens = queries_and_keys(torch.float64)
    for size in (None, 3 * FLOAT64_ROW):
        for shape in ([3, 12], [1, 20]):
            with pytest.raises(CaptureError, match=re.escape(f"shape {shape}, and the attention 3 samples of 20")):
                attended(tokens, size, mask=torch.ones(shape).bool(), conditioned=None)
        with pytest.raises(CaptureError, match="21 reference tokens, but a reference grid of 2x3 has 6"):
            attention_of_tokens(tokens, PARTLY_EMPTY_DROPPED, GENERATED, GridSize(2, 3), block_bytes=size)
        on = attended(tokens, size)
        with pytest.raises(CaptureError, match=r"shape \[3, 20, 1\]; expected \[3, 5, 4, '...'\]"):
            on.by_patch(lambda scores, values: scores.sum((-2, -1)) * values, torch.ones(SAMPLES, 20, 1))
        with pytest.raises(CaptureError, match=r"gave the shape \[7, 3\]; expected \[3, (5, 4|3), '...'\]"):
            on.by_patch(lambda scores: scores.flatten(0, -3).sum(dim=0))


def test_memory_grows_with_the_tokens_and_not_with_their_pairs() -> None:
    """Of all terms but `matches`' and `supervised`'s data, forward and backward: bytes alive at once are four times as
    many for four times the patches of both grids, and 16 times with matrices."""
    names = ["dcml", "tv", "cwg with a floor", "entropy", "atv", "supervised", "mass"]

    def peak(side: int, block_bytes: int | None) -> int:
        grid = GridSize(side, 2 * side // 3)
        tokens = queries_and_keys(torch.float32, grid.tokens, grid.tokens)
        everywhere = torch.ones(SAMPLES, grid.tokens, dtype=torch.bool)
        with LiveBytes() as live:
            on = attention_of_tokens(
                tokens,
                everywhere,
                grid,
                grid,
                log_heads=True,
                target=torch.ones(SAMPLES, grid.tokens, 2),
                log_mass=torch.zeros(SAMPLES, grid.tokens),
                block_bytes=block_bytes,
            )
            torch.stack([TERMS[name](on).sum() for name in names]).sum().backward()
        return live.peak

    block = 64 * 2**10
    small, large = peak(12, block), peak(24, block)
    assert large < 5 * small
    assert peak(24, 2**30) > 12 * peak(12, 2**30)
