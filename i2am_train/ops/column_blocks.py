"""Both column means of attention matrices by torch's own operations, block by block: the way of the CPU, and what the
kernels of `i2am_train.ops.column_kernels` must equal.

Both softmaxes share their numerators, so that one product and one exponential per logit do for all four sums (rows,
columns, and both weighted ones), which are small matrix products while a block is still in the cache. Heads whose
logits do not fit the plain float32 exponential are recognised by their sums and computed again with the usual
subtraction of the maximum; elsewhere than on a CPU it is always subtracted, because to look at the sums would wait for
the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from i2am_train.ops.numerics import at_least_float32

CACHE_BLOCK_BYTES = 2**20
"""Exponentials worked on at a time on a CPU. Chosen by us: of 1/4 to 4 MiB the fastest with 2 MiB of L2 per core, for
matrices of 48 x 192 to 3072 x 1036."""

_SMALLEST_SUM, _LARGEST_SUM = 1e-20, 1e30
"""Sums of exponentials within these bounds lost nothing to float32 underflow (1.2e-38) or overflow (3.4e38)."""


def column_means(
    generated: Float[Tensor, "batch head generated channel"],
    reference: Float[Tensor, "batch head reference channel"],
    scale: float,
    shares: Float[Tensor, "batch generated"] | None,
    byte_budget: int,
) -> tuple[Float[Tensor, "batch head generated"], Float[Tensor, "batch head reference"]]:
    """``to_generated`` and ``to_reference`` of `i2am_train.ops.attention.column_means`, in float32 or float64.

    ``shares`` of the generated tokens sum to one in each sample, or are all zero; None: all count the same.
    """
    batch, heads, rows, channels = generated.shape
    columns = reference.shape[2]
    flat_generated = at_least_float32(generated).reshape(batch * heads, rows, channels)
    flat_reference = at_least_float32(reference).reshape(batch * heads, columns, channels)
    weights = _row_weights(shares, flat_generated, heads)
    work = _Work.plan(flat_generated, columns, byte_budget)
    with torch.autocast(generated.device.type, enabled=False):
        to_generated, to_reference = _all_heads(flat_generated, flat_reference, scale, weights, work)
    return to_generated.view(batch, heads, rows), to_reference.view(batch, heads, columns)


def slices(total: int, size: int) -> Iterator[slice]:
    """Runs of at most ``size`` that make up ``total``.

    >>> list(slices(5, 2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _row_weights(shares: Tensor | None, generated: Tensor, heads: int) -> Tensor:
    """Shares of the generated tokens, one row per flattened head."""
    count, rows, _ = generated.shape
    if shares is None:
        return generated.new_full((1, 1), 1 / rows).expand(count, rows)
    return shares.to(generated.dtype).unsqueeze(1).expand(-1, heads, -1).reshape(count, rows)


@dataclass(frozen=True)
class _Work:
    """How many heads and rows are worked on at a time; whether exponentials are kept for the second sum."""

    heads: int
    rows: int
    keeps_exponentials: bool

    @classmethod
    def plan(cls, generated: Tensor, columns: int, byte_budget: int) -> _Work:
        count, rows, _ = generated.shape
        row_bytes = columns * generated.element_size()
        head_bytes = rows * row_bytes
        on_cpu = generated.device.type == "cpu"
        block_bytes = min(byte_budget, CACHE_BLOCK_BYTES) if on_cpu else byte_budget
        groups = math.ceil(count / max(1, block_bytes // head_bytes))
        return cls(
            heads=math.ceil(count / groups),  # groups of one size: no small rest
            rows=min(rows, max(1, block_bytes // row_bytes)),
            keeps_exponentials=head_bytes <= byte_budget,
        )


def _all_heads(
    generated: Tensor, reference: Tensor, scale: float, weights: Tensor, work: _Work
) -> tuple[Tensor, Tensor]:
    count, rows, _ = generated.shape
    columns = reference.shape[1]
    scratch_rows = rows if work.keeps_exponentials else work.rows
    scratch = generated.new_empty(work.heads * scratch_rows * columns)
    sums = _Sums.empty(generated, columns)
    on_cpu = generated.device.type == "cpu"
    for heads in slices(count, work.heads):
        group = _Group(generated[heads], reference[heads].mT, scale, scratch, work)
        if on_cpu:
            group.direct(weights[heads], sums.of(heads))
        else:  # whether plain exponentials fit is not known without waiting for the device
            sums.to_generated[heads], sums.to_reference[heads] = group.stabilised(weights[heads])
    if not on_cpu:
        return sums.to_generated, sums.to_reference.contiguous()
    to_generated, to_reference = sums.to_generated, sums.to_reference.contiguous()
    for head in sums.out_of_bounds():
        single = _Group(generated[head, None], reference[head, None].mT, scale, scratch, work)
        to_generated[head], to_reference[head] = single.stabilised(weights[head, None])
    return to_generated, to_reference


class _Sums(NamedTuple):
    """What plain exponentials ``E`` are summed to, per head."""

    row: Tensor  # head generated
    to_generated: Tensor  # head generated
    over_rows: Tensor  # head 2 reference: weighed by `row_factors`
    row_factors: Tensor  # head 2 generated: weight / row sum, and one

    @classmethod
    def empty(cls, generated: Tensor, columns: int) -> _Sums:
        count, rows, _ = generated.shape
        return cls(
            generated.new_empty(count, rows),
            generated.new_empty(count, rows),
            generated.new_zeros(count, 2, columns),
            generated.new_ones(count, 2, rows),
        )

    def of(self, heads: slice) -> _Sums:
        return _Sums(*(values[heads] for values in self))

    @property
    def to_reference(self) -> Tensor:
        return self.over_rows[:, 0]

    @property
    def column(self) -> Tensor:
        return self.over_rows[:, 1]

    def out_of_bounds(self) -> list[int]:
        """Heads with a sum that is not finite or near the ends of float32; rare, so that all are looked at together
        first."""
        sums = torch.cat((self.row, self.column), dim=1)
        if _in_bounds(*sums.aminmax()):
            return []
        return (~_in_bounds(*sums.aminmax(dim=1))).nonzero().flatten().tolist()


@dataclass(frozen=True)
class _Group:
    """A few heads whose logits are made block by block in a shared scratch buffer."""

    generated: Tensor  # head generated channel
    reference: Tensor  # head channel reference
    scale: float
    scratch: Tensor
    work: _Work

    def direct(self, weights: Tensor, sums: _Sums) -> None:
        """Column means from plain exponentials, into `sums`.

        With ``E = exp(logits)``, ``to_reference = sum_n w[n] / row_sum[n] * E[n]`` and the column sums are two rows of
        one small product per block, ``to_generated = E @ (1 / column_sum) / M`` is a second sweep over ``E``.
        """
        for rows in self._row_blocks():
            block = self._exponentials(rows)
            row, factors = sums.row[:, rows], sums.row_factors[:, :, rows]
            torch.sum(block, dim=2, out=row)
            torch.div(weights[:, rows], row, out=factors[:, 0])
            sums.over_rows.baddbmm_(factors, block)
        inverse = (sums.column * self.reference.shape[2]).reciprocal_().unsqueeze(2)
        to_generated = sums.to_generated.unsqueeze(2)
        for rows in self._row_blocks(again=True):
            block = self._exponentials(rows, again=True)
            torch.bmm(block, inverse, out=to_generated[:, rows])

    def stabilised(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Column means with the maximum of every row and column subtracted: any logits, two exponentials each."""
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
        return slices(total, total if whole else self.work.rows)

    def _exponentials(self, rows: slice, *, again: bool = False) -> Tensor:
        block = self._block(rows)
        if again and self.work.keeps_exponentials:
            return block
        return self._product(rows, block).exp_()

    def _logits(self, rows: slice) -> Tensor:
        return self._product(rows, self._block(rows))

    def _block(self, rows: slice) -> Tensor:
        """The scratch of these rows: their own place if exponentials are kept, else the shared start."""
        count, columns = self.reference.shape[0], self.reference.shape[2]
        held = self.generated.shape[1] if self.work.keeps_exponentials else self.work.rows
        matrix = self.scratch[: count * held * columns].view(count, held, columns)
        return matrix[:, rows] if self.work.keeps_exponentials else matrix[:, : rows.stop - rows.start]

    def _product(self, rows: slice, out: Tensor) -> Tensor:
        if out.shape[0] == 1:  # a strided single matrix product is faster than a batch of one
            generated, reference, single = self.generated[0, rows], self.reference[0], out[0]
            torch.addmm(single, generated, reference, beta=0, alpha=self.scale, out=single)
        else:
            generated = self.generated[:, rows]
            torch.baddbmm(out, generated, self.reference, beta=0, alpha=self.scale, out=out)
        return out


def _in_bounds(low: Tensor, high: Tensor) -> Tensor:
    """Whether all between the smallest and the largest sum can be trusted (False for NaN)."""
    return (low > _SMALLEST_SUM) & (high < _LARGEST_SUM)
