"""Attention scores and the two column means of an attention matrix, without keeping the matrix.
 For one head, ``logits[n, m] = scale * generated[n] . reference[m]`` with ``N`` generated tokens in
the rows and ``M`` reference tokens in the columns. An attribution map is the mean of one softmax
over the *other* axis (paper eqs. 4-7):

- ``to_generated[n] = mean_m softmax_n(logits)[n, m]``: where the reference goes to, one value per
  generated token;
- ``to_reference[m] = mean_n softmax_m(logits)[n, m]``: where the generated tokens look, one value
  per reference token.
 Both softmaxes share their numerators. `column_means` therefore takes one product and one
exponential per logit and gets all four sums (rows, columns, and both weighted ones) from small
matrix products while a block is still in the cache. That is about eight times faster than two
softmaxes. Heads whose logits do not fit the plain float32 exponential are recognised by their sums
and computed again with the usual subtraction of the maximum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from i2am_train.ops.precision import at_least_float32

DEFAULT_BYTE_BUDGET = 64 * 2**20
"""Scratch memory that `column_means` may use, in bytes. Chosen by us: the aim of issue 2 for a
whole capture."""

_CACHE_BLOCK_BYTES = 4 * 2**20
"""Exponentials worked on at a time on a CPU. Chosen by us: 2-8 MiB measured fastest with 2 MiB of
L2 per core."""

_SMALLEST_SUM, _LARGEST_SUM = 1e-20, 1e30
"""Sums of exponentials within these bounds lost nothing to float32 underflow (1.2e-38) or overflow
(3.4e38)."""


class ColumnMeans(NamedTuple):
    """Both column means of each head; every row of either sums to one."""

    to_generated: Float[Tensor, "batch head generated"]
    to_reference: Float[Tensor, "batch head reference"]


def attention_logits(
    generated: Float[Tensor, "*batch generated channel"],
    reference: Float[Tensor, "*batch reference channel"],
    scale: float | None = None,
) -> Float[Tensor, "*batch generated reference"]:
    """Scaled dot products in float32 (float64 stays float64); ``scale`` defaults to ``channel **
    -0.5``."""
    factor = generated.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(generated.device.type, enabled=False):
        return (at_least_float32(generated) * factor) @ at_least_float32(reference).mT


def head_mean_scores(
    generated: Float[Tensor, "batch head generated channel"],
    reference: Float[Tensor, "batch head reference channel"],
    scale: float | None = None,
) -> Float[Tensor, "batch generated reference"]:
    """Softmax over the reference, averaged over heads, with gradient: what the losses are functions
    of.

    Every row sums to one. Leave special tokens out of ``reference`` beforehand: the softmax is over
    what is given.

    >>> head_mean_scores(torch.zeros(2, 4, 6, 8), torch.zeros(2, 4, 5, 8))[1, 3]
    tensor([0.2000, 0.2000, 0.2000, 0.2000, 0.2000])
    """
    return attention_logits(generated, reference, scale).softmax(dim=-1).mean(dim=1)


class HeadMeanMatrices(NamedTuple):
    """Both softmaxes of the same logits, averaged over heads, as whole matrices."""

    over_reference: Float[Tensor, "batch generated reference"]
    over_generated: Float[Tensor, "batch generated reference"]


@torch.no_grad()
def head_mean_matrices(
    generated: Float[Tensor, "batch head generated channel"],
    reference: Float[Tensor, "batch head reference channel"],
    scale: float | None = None,
) -> HeadMeanMatrices:
    """Head means of the softmax over the reference and of the softmax over the generated tokens.

    Works one head at a time, so that its memory is that of the result and two matrices of one head
    per sample.
    """
    totals: tuple[Tensor, Tensor] | None = None
    heads = generated.shape[1]
    for head in range(heads):
        logits = attention_logits(generated[:, head], reference[:, head], scale)
        scores = logits.softmax(dim=2), logits.softmax(dim=1)
        totals = (
            scores if totals is None else (totals[0].add_(scores[0]), totals[1].add_(scores[1]))
        )
    assert totals is not None, "an attention has at least one head"
    return HeadMeanMatrices(totals[0] / heads, totals[1] / heads)


@torch.no_grad()
def column_means(
    generated: Float[Tensor, "batch head generated channel"],
    reference: Float[Tensor, "batch head reference channel"],
    scale: float | None = None,
    *,
    generated_weights: Float[Tensor, "batch generated"] | None = None,
    byte_budget: int = DEFAULT_BYTE_BUDGET,
) -> ColumnMeans:
    """Both column means of every head (paper eqs. 4-7, averaged over the axis that disappears).

    ``generated_weights`` (one non-negative number per generated token) weighs the mean that makes
    ``to_reference``, e.g. a mask of the region of interest; without it every generated token counts
    the same. All weights zero give zeros. Float32 arithmetic whatever the inputs (float64 stays
    float64); never more scratch than ``byte_budget`` as long as a single row of logits fits it.

    >>> means = column_means(torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 5, 8))
    >>> means.to_generated[0, 0].tolist(), round(float(means.to_reference[1, 2, 0]), 6)
    ([0.25, 0.25, 0.25, 0.25], 0.2)
    """
    batch, heads, rows, channels = generated.shape
    columns = reference.shape[2]
    factor = channels**-0.5 if scale is None else scale
    flat_generated = (at_least_float32(generated) * factor).reshape(batch * heads, rows, channels)
    flat_reference = at_least_float32(reference).reshape(batch * heads, columns, channels)
    weights = _row_weights(generated_weights, flat_generated, heads)
    work = _Work.plan(flat_generated, columns, byte_budget)
    with torch.autocast(generated.device.type, enabled=False):
        to_generated, to_reference = _all_heads(flat_generated, flat_reference, weights, work)
    return ColumnMeans(
        to_generated.view(batch, heads, rows), to_reference.view(batch, heads, columns)
    )


def _row_weights(weights: Tensor | None, generated: Tensor, heads: int) -> Tensor:
    """Weights of the generated tokens that sum to one (or are all zero), one row per flattened
    head."""
    count, rows, _ = generated.shape
    if weights is None:
        return generated.new_full((1, 1), 1 / rows).expand(count, rows)
    total = weights.sum(dim=1, keepdim=True)
    shares = torch.where(total > 0, weights / total, torch.zeros_like(weights))
    return shares.to(generated.dtype).repeat_interleave(heads, dim=0)


@dataclass(frozen=True)
class _Work:
    """How many heads and rows are worked on at a time, and whether a head's exponentials are kept
    for its second sum."""

    heads: int
    rows: int
    keeps_exponentials: bool

    @classmethod
    def plan(cls, generated: Tensor, columns: int, byte_budget: int) -> _Work:
        count, rows, _ = generated.shape
        row_bytes = columns * generated.element_size()
        head_bytes = rows * row_bytes
        keeps = head_bytes <= byte_budget
        on_cpu = generated.device.type == "cpu"
        block_bytes = min(byte_budget, _CACHE_BLOCK_BYTES) if on_cpu else byte_budget
        return cls(
            heads=min(count, max(1, block_bytes // head_bytes)),
            rows=min(rows, max(1, block_bytes // row_bytes)),
            keeps_exponentials=keeps,
        )

    def slices(self, total: int, size: int) -> Iterator[slice]:
        for start in range(0, total, size):
            yield slice(start, min(start + size, total))


def _all_heads(
    generated: Tensor, reference: Tensor, weights: Tensor, work: _Work
) -> tuple[Tensor, Tensor]:
    count, rows, _ = generated.shape
    columns = reference.shape[1]
    to_generated = generated.new_empty(count, rows)
    to_reference = generated.new_empty(count, columns)
    scratch_rows = rows if work.keeps_exponentials else work.rows
    scratch = generated.new_empty(work.heads * scratch_rows * columns)
    for heads in work.slices(count, work.heads):
        group = _Group(generated[heads], reference[heads].mT, scratch, work)
        to_generated[heads], to_reference[heads], exact = group.direct(weights[heads])
        for offset in (~exact).nonzero().flatten().tolist():
            head = heads.start + offset
            single = _Group(generated[head, None], reference[head, None].mT, scratch, work)
            to_generated[head], to_reference[head] = single.stabilised(weights[head, None])
    return to_generated, to_reference


@dataclass(frozen=True)
class _Group:
    """A few heads whose logits are made block by block in a shared scratch buffer."""

    generated: Tensor  # head generated channel
    reference: Tensor  # head channel reference
    scratch: Tensor
    work: _Work

    def direct(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Column means from plain exponentials, and per head whether they can be trusted.

        With ``E = exp(logits)``, ``to_reference = sum_n w[n] / row_sum[n] * E[n]`` and the column
        sums are two rows of one small product per block, ``to_generated = E @ (1 / column_sum) /
        M`` is a second sweep over ``E``.
        """
        count, columns = self.reference.shape[0], self.reference.shape[2]
        sums = self.generated.new_zeros(count, 2, columns)
        row_sums = self.generated.new_empty(self.generated.shape[:2])
        for rows in self._row_blocks():
            block = self._exponentials(rows)
            row_sums[:, rows] = total = block.sum(dim=2)
            factors = torch.stack((weights[:, rows] / total, torch.ones_like(total)), dim=1)
            sums += torch.bmm(factors, block)
        to_reference, column_sums = sums.unbind(dim=1)
        inverse = (1 / (columns * column_sums)).unsqueeze(2)
        to_generated = torch.empty_like(row_sums)
        for rows in self._row_blocks(again=True):
            block = self._exponentials(rows, again=True)
            to_generated[:, rows] = torch.bmm(block, inverse).squeeze(2)
        return to_generated, to_reference, _in_bounds(row_sums) & _in_bounds(column_sums)

    def stabilised(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Column means with the maximum of every row and column subtracted: any logits, two
        exponentials each."""
        columns = self.reference.shape[2]
        to_reference = self.generated.new_zeros(self.reference.shape[0], columns)
        column_lse: Tensor | None = None
        for rows in self._row_blocks(chunked=True):
            logits = self._logits(rows)
            block_lse = logits.logsumexp(dim=1)
            column_lse = block_lse if column_lse is None else torch.logaddexp(column_lse, block_lse)
            scores = logits.softmax(dim=2)
            to_reference += torch.bmm(weights[:, None, rows], scores).squeeze(1)
        assert column_lse is not None, "an attention has at least one generated token"
        to_generated = self.generated.new_empty(self.generated.shape[:2])
        for rows in self._row_blocks(chunked=True):
            scores = self._logits(rows).sub_(column_lse.unsqueeze(1)).exp_()
            to_generated[:, rows] = scores.mean(dim=2)
        return to_generated, to_reference

    def _row_blocks(self, *, again: bool = False, chunked: bool = False) -> Iterator[slice]:
        """Row ranges of the blocks; a second sweep over kept exponentials is one single block."""
        total = self.generated.shape[1]
        whole = again and self.work.keeps_exponentials and not chunked
        return self.work.slices(total, total if whole else self.work.rows)

    def _exponentials(self, rows: slice, *, again: bool = False) -> Tensor:
        block = self._block(rows)
        if again and self.work.keeps_exponentials:
            return block
        return self._product(rows, block).exp_()

    def _logits(self, rows: slice) -> Tensor:
        return self._product(rows, self._block(rows))

    def _block(self, rows: slice) -> Tensor:
        """The scratch of these rows: their own place if exponentials are kept, else the shared
        start."""
        count, columns = self.reference.shape[0], self.reference.shape[2]
        held = self.generated.shape[1] if self.work.keeps_exponentials else self.work.rows
        matrix = self.scratch[: count * held * columns].view(count, held, columns)
        return (
            matrix[:, rows] if self.work.keeps_exponentials else matrix[:, : rows.stop - rows.start]
        )

    def _product(self, rows: slice, out: Tensor) -> Tensor:
        if out.shape[0] == 1:  # a strided single matrix product is faster than a batch of one
            torch.mm(self.generated[0, rows], self.reference[0], out=out[0])
        else:
            torch.bmm(self.generated[:, rows], self.reference, out=out)
        return out


def _in_bounds(sums: Tensor) -> Tensor:
    """Per head: all sums are finite, and far from the ends of float32."""
    return ((sums > _SMALLEST_SUM) & (sums < _LARGEST_SUM)).all(dim=1)
