"""Both column means of attention matrices on a CUDA device, by two Triton kernels that keep no logit.

Needs Triton, so that `i2am_train.ops.attention` imports it when the first CUDA tensor comes. A program has a tile of
generated (or of reference) tokens of one head and streams over all tokens of the other picture, as FlashAttention does:

1. `_sums_kernel`: the largest logit ``m`` of each row and of each column, and the sum ``l`` of ``exp(logit - m)``;
2. `_means_kernel`: the logits again; ``to_reference[c] = sum_r w[r] exp(s[r, c] - m[r]) / l[r]``, and ``to_generated``
   with rows and columns exchanged.

Maximum and sum are kept apart, and not as one log-sum-exp, whose rounding would be a relative error of the scores (1e-5
for logits of 200). Every result is written by one program in one order (no atomics): the same bits at every run.
Products of float32 inputs are taken in float32 (``ieee``, no TF32); everything else is float32, too. The memory beside
the results is four numbers for each token and head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

LARGEST_HEAD = 256
"""Channels of a head that fit the tiles below."""
_LARGEST_TILE, _TILE_NUMBERS = {2: 64, 4: 32}, {2: 8192, 4: 2048}
"""Tokens, and tokens times channels, of a tile, by the bytes of a number. Chosen by us without a card at hand: of
16-bit inputs three tiles are in 48 KiB of shared memory, which every card has, and 64 x 64 logits are what one
instruction of an H100 multiplies; products of float32 are unrolled by the compiler, so that large tiles take minutes
to compile."""
_UNSPECIALISED = ["rows", "columns", "heads", "sharing", "row_tiles", "scale"]
"""Numbers whose divisibility makes no other kernel, so that few are compiled."""


@triton.jit
def _load(first_token, start, count, token_stride, channel_stride, channels, tile: tl.constexpr, width: tl.constexpr):
    """A tile of tokens ``[tile, width]``; zeros beyond the last token and the last channel."""
    token, channel = start + tl.arange(0, tile)[:, None], tl.arange(0, width)[None, :]
    inside = (token < count) & (channel < channels)
    return tl.load(first_token + token * token_stride + channel * channel_stride, mask=inside, other=0.0)


@triton.jit
def _sums(
    own, other, top_of, total_of, start, own_count, other_count, scale,
    own_token, own_channel, other_token, other_channel, channels, tile: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Largest logit and sum of exponentials of a tile of own tokens, over all others."""
    mine = _load(own, start, own_count, own_token, own_channel, channels, tile, width)
    top = tl.full((tile,), float("-inf"), tl.float32)
    total = tl.zeros((tile,), tl.float32)
    for first in range(0, other_count, tile):
        theirs = _load(other, first, other_count, other_token, other_channel, channels, tile, width)
        logits = tl.dot(mine, tl.trans(theirs), input_precision="ieee") * scale
        logits = tl.where((first + tl.arange(0, tile) < other_count)[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        top = higher
    at = start + tl.arange(0, tile)
    tl.store(top_of + at, top, mask=at < own_count)
    tl.store(total_of + at, total, mask=at < own_count)


@triton.jit
def _means(
    own, other, mean_of, top_of, total_of, weights, start, own_count, other_count, scale,
    own_token, own_channel, other_token, other_channel, channels,
    weighted: tl.constexpr, tile: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Weighted sum over all others of their softmax over own tokens, for a tile of own tokens."""
    mine = _load(own, start, own_count, own_token, own_channel, channels, tile, width)
    mean = tl.zeros((tile,), tl.float32)
    for first in range(0, other_count, tile):
        theirs = _load(other, first, other_count, other_token, other_channel, channels, tile, width)
        at = first + tl.arange(0, tile)
        inside = at < other_count
        if weighted:
            share = tl.load(weights + at, mask=inside, other=0.0)
        else:
            share = tl.where(inside, 1.0 / other_count, 0.0)
        share = share / tl.load(total_of + at, mask=inside, other=1.0)
        top = tl.load(top_of + at, mask=inside, other=0.0)
        logits = tl.dot(mine, tl.trans(theirs), input_precision="ieee") * scale
        mean += tl.sum(tl.exp(logits - top[None, :]) * share[None, :], 1)
    at = start + tl.arange(0, tile)
    tl.store(mean_of + at, mean, mask=at < own_count)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _sums_kernel(
    generated, reference, row_top, row_total, column_top, column_total,
    rows, columns, heads, sharing, channels, scale,
    generated_batch, generated_head, generated_token, generated_channel,
    reference_batch, reference_head, reference_token, reference_channel,
    row_tiles, tile: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    index, flat = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = flat // heads, flat % heads
    generated += batch * generated_batch + head * generated_head
    reference += batch * reference_batch + head // sharing * reference_head
    if index < row_tiles:
        _sums(
            generated, reference, row_top + flat * rows, row_total + flat * rows, index * tile, rows, columns, scale,
            generated_token, generated_channel, reference_token, reference_channel, channels, tile, width,
        )  # fmt: skip
    else:
        _sums(
            reference, generated, column_top + flat * columns, column_total + flat * columns,
            (index - row_tiles) * tile, columns, rows, scale,
            reference_token, reference_channel, generated_token, generated_channel, channels, tile, width,
        )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _means_kernel(
    generated, reference, row_top, row_total, column_top, column_total, weights, to_generated, to_reference,
    rows, columns, heads, sharing, channels, scale,
    generated_batch, generated_head, generated_token, generated_channel,
    reference_batch, reference_head, reference_token, reference_channel,
    row_tiles, weighted: tl.constexpr, tile: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    index, flat = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = flat // heads, flat % heads
    generated += batch * generated_batch + head * generated_head
    reference += batch * reference_batch + head // sharing * reference_head
    if index < row_tiles:
        _means(
            generated, reference, to_generated + flat * rows, column_top + flat * columns,
            column_total + flat * columns, weights, index * tile, rows, columns, scale,
            generated_token, generated_channel, reference_token, reference_channel, channels, False, tile, width,
        )  # fmt: skip
    else:
        _means(
            reference, generated, to_reference + flat * columns, row_top + flat * rows, row_total + flat * rows,
            weights + batch * rows, (index - row_tiles) * tile, columns, rows, scale,
            reference_token, reference_channel, generated_token, generated_channel, channels, weighted, tile, width,
        )  # fmt: skip


def launch(kernel: Any, grid: tuple[int, int], *arguments: Any, device: torch.device, **constants: Any) -> None:
    """Starts a kernel on a device, and waits for nothing. The one place that does, for tests to stand in."""
    with torch.cuda.device(device):
        kernel[grid](*arguments, **constants, num_warps=4, num_stages=2)


class _Problem:
    """What both kernels are told of queries and keys."""

    def __init__(self, generated: Tensor, reference: Tensor, scale: float) -> None:
        self.generated, self.reference = generated, reference
        batch, heads, self.rows, channels = generated.shape
        self.columns = reference.shape[2]
        self.flat_heads = batch * heads
        sharing = heads // reference.shape[1]
        self.width = max(16, triton.next_power_of_2(channels))
        size = generated.element_size()
        self.tile = max(16, min(_LARGEST_TILE[size], _TILE_NUMBERS[size] // self.width))
        self.row_tiles = triton.cdiv(self.rows, self.tile)
        self._numbers = (self.rows, self.columns, heads, sharing, channels, scale)

    def empty(self, tokens: int, *first: int) -> Tensor:
        return self.generated.new_empty(*first, self.flat_heads, tokens, dtype=torch.float32)

    def launch(self, kernel: Any, *tensors: Tensor, rows_only: bool = False, **constants: Any) -> None:
        tiles = self.row_tiles + (0 if rows_only else triton.cdiv(self.columns, self.tile))
        launch(
            kernel, (tiles, self.flat_heads), self.generated, self.reference, *tensors, *self._numbers,
            *self.generated.stride(), *self.reference.stride(), self.row_tiles,
            device=self.generated.device, **constants, tile=self.tile, width=self.width,
        )  # fmt: skip


def column_means(
    generated: Float[Tensor, "batch head generated channel"],
    reference: Float[Tensor, "batch key_head reference channel"],
    scale: float,
    weights: Float[Tensor, "batch generated"] | None,
) -> tuple[Float[Tensor, "batch head generated"], Float[Tensor, "batch head reference"]]:
    """``to_generated`` and ``to_reference`` of `i2am_train.ops.attention.column_means`, which checks what may be given.

    ``weights`` are shares: they sum to one in each sample, or are all zero. Any strides.
    """
    batch, heads, rows, _ = generated.shape
    given = _Problem(generated, reference, scale)
    row_top, row_total = given.empty(rows, 2)
    column_top, column_total = given.empty(given.columns, 2)
    to_generated, to_reference = given.empty(rows), given.empty(given.columns)
    sums = (row_top, row_total, column_top, column_total)
    given.launch(_sums_kernel, *sums)
    shares = row_top if weights is None else weights.float().contiguous()  # a pointer is wanted anyway
    given.launch(_means_kernel, *sums, shares, to_generated, to_reference, weighted=weights is not None)
    return to_generated.view(batch, heads, rows), to_reference.view(batch, heads, given.columns)


def row_logsumexp(
    generated: Float[Tensor, "batch head generated channel"],
    reference: Float[Tensor, "batch key_head reference channel"],
    scale: float,
) -> Float[Tensor, "batch head generated"]:
    """Logarithm of the sum of exponentials of every row of logits."""
    given = _Problem(generated, reference, scale)
    top, total = given.empty(given.rows, 2)
    given.launch(_sums_kernel, top, total, top, total, rows_only=True)
    lse: Tensor = top + total.log()
    return lse.view(generated.shape[:3])
