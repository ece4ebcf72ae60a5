"""Functions of rows: the same in blocks as of the whole matrix, at a bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from i2am_train.ops import rows
from i2am_train.ops.attention import attention_logits
from i2am_train.ops.rows import head_mean_scores, keeps_matrix, log_reference_mass, map_rows
from tests.support.attentions import drawn_tokens
from tests.support.live_bytes import LiveBytes

SAMPLES, HEADS, ROWS, TOKENS, CHANNELS = 2, 3, 11, 7, 5
ROW_BYTES = SAMPLES * HEADS * TOKENS * 8


def tokens(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return drawn_tokens(SAMPLES, HEADS, (ROWS, TOKENS), CHANNELS, 2, dtype)


def sharpness(logits: Tensor, _: slice) -> Tensor:
    """Of the mean over heads, which does not decompose."""
    return logits.softmax(dim=-1).mean(dim=1).square().sum(dim=-1)


@pytest.mark.parametrize(("block_bytes", "sizes"), [(1, [1] * 11), (3 * ROW_BYTES, [3, 3, 3, 2]), (10**6, [11])])
def test_blocks_are_of_one_size_and_bounded(block_bytes: int, sizes: list[int]) -> None:
    """The last may be smaller; one row is computed where none would fit."""
    seen = []

    def count(logits: Tensor, block: slice) -> Tensor:
        seen.append(logits.shape[2])
        assert block.stop - block.start == logits.shape[2]
        return logits[:, 0, :, 0]

    generated, reference = tokens()
    found = map_rows(count, generated, reference, 0.5, block_bytes=block_bytes)
    assert seen == sizes
    assert torch.equal(found, attention_logits(generated, reference, 0.5)[:, 0, :, 0])


@pytest.mark.parametrize("block_bytes", [1, 4 * ROW_BYTES, 10**6])
def test_gradients_are_those_of_the_matrix(block_bytes: int) -> None:
    """At queries, keys and a tensor of which the function picks its rows; twice, if the graph is kept."""
    generated, reference = tokens()
    weights = torch.rand(SAMPLES, ROWS, dtype=torch.float64, requires_grad=True)
    expected = sharpness(attention_logits(generated, reference), slice(None)) * weights.exp()
    gradients = torch.autograd.grad(expected.square().sum(), (generated, reference, weights))

    def weighted(logits: Tensor, block: slice) -> Tensor:
        return sharpness(logits, block) * weights[:, block].exp()

    found = map_rows(weighted, generated, reference, block_bytes=block_bytes)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    for _ in range(2):
        again = torch.autograd.grad(found.square().sum(), (generated, reference, weights), retain_graph=True)
        torch.testing.assert_close(again, gradients, rtol=1e-12, atol=1e-13)
    found.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        found.sum().backward()


def test_gradients_of_gradients() -> None:
    """By finite differences of the gradient."""
    generated, reference = tokens()

    def value(queries: Tensor, keys: Tensor) -> Tensor:
        return map_rows(sharpness, queries, keys, block_bytes=4 * ROW_BYTES)

    assert torch.autograd.gradgradcheck(value, (generated, reference), fast_mode=True)


def test_half_precision_is_computed_in_float32() -> None:
    """Also under autocast, and in the second computation; gradients come back in the tokens' format."""
    generated, reference = tokens(torch.bfloat16)
    expected = sharpness(attention_logits(generated.float(), reference.float()), slice(None))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = map_rows(sharpness, generated, reference, block_bytes=2 * ROW_BYTES)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected)
    own = torch.autograd.grad(found.sum(), (generated, reference))
    plain = torch.autograd.grad(expected.sum(), (generated, reference))
    for one, other in zip(own, plain, strict=True):
        assert one.dtype is torch.bfloat16
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


def test_without_a_gradient() -> None:
    """Nothing is kept for a backward that will not come."""
    with torch.no_grad():
        assert not map_rows(sharpness, *tokens(), block_bytes=ROW_BYTES).requires_grad


def test_scores_and_mass_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the matrices of heads would be large, they are not kept; results are the same."""
    generated, reference = tokens()
    assert keeps_matrix(generated, reference)

    def results() -> list[Tensor]:
        scores = head_mean_scores(generated, reference)
        mass = log_reference_mass(generated, reference, slice(2, None))
        return [scores, mass, *torch.autograd.grad(scores.square().sum() + mass.sum(), (generated, reference))]

    whole = results()
    monkeypatch.setattr(rows, "MATRIX_BYTES", 0)
    monkeypatch.setattr(rows, "BLOCK_BYTES", 2 * ROW_BYTES)
    assert not keeps_matrix(generated, reference)
    torch.testing.assert_close(results(), whole, rtol=1e-12, atol=1e-13)


def test_the_size_of_a_sample_decides_and_not_that_of_the_batch() -> None:
    """So that a sample is computed alike in every batch."""

    def kept(batch: int, heads: int, generated: int, reference: int, dtype: Any = torch.float32) -> bool:
        made = (torch.empty(batch, heads, count, 1, dtype=dtype, device="meta") for count in (generated, reference))
        return keeps_matrix(*made)

    assert kept(1, 8, 192, 1036)
    assert kept(64, 8, 192, 1036, torch.bfloat16)
    assert kept(1, 4, 1024, 1024)  # 16 MiB
    assert not kept(1, 4, 1025, 1024)
    assert not kept(1, 4, 1024, 1024, torch.float64)


def test_memory_grows_with_the_tokens_and_not_with_their_pairs() -> None:
    """Most bytes alive at once, forward and backward: four times for four times the tokens, 16 times with a matrix."""

    def peak(count: int, block_bytes: int) -> int:
        generated, reference = (torch.randn(1, 4, count, 8).requires_grad_() for _ in range(2))
        with LiveBytes() as live:
            map_rows(sharpness, generated, reference, block_bytes=block_bytes).sum().backward()
        return live.peak

    block = 64 * 2**10
    small, large = peak(128, block), peak(512, block)
    assert large < 4.5 * small
    assert large < 8 * block + 20 * 512 * 4 * 8 * 4
    assert peak(512, 2**30) > 12 * peak(128, 2**30)
