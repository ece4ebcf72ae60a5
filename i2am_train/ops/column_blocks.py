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
    batch, heads, rows, _ = generated.shape
    columns = reference.shape[2]
    flat_generated = at_least_float32(generated).flatten(0, 1)
    flat_reference = at_least_float32(reference).flatten(0, 1)
    work = _Work(flat_generated, flat_reference, scale, _row_weights(shares, flat_generated, heads), byte_budget)
    with torch.autocast(generated.device.type, enabled=False):
        to_generated, to_reference = work.means()
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


class _Work:
    """Heads whose logits are made block by block in one scratch buffer: a few heads, or some rows of one head, at a
    time."""

    def __init__(self, generated: Tensor, reference: Tensor, scale: float, weights: Tensor, byte_budget: int) -> None:
        self._count, self._rows, _ = generated.shape
        self._columns = reference.shape[1]
        self._generated = generated  # head generated channel
        self._reference = reference.mT  # head channel reference
        self._weights = weights  # head generated
        self._scale = scale
        self._on_cpu = generated.device.type == "cpu"
        row_bytes = self._columns * generated.element_size()
        head_bytes = self._rows * row_bytes
        block_bytes = min(byte_budget, CACHE_BLOCK_BYTES) if self._on_cpu else byte_budget
        groups = math.ceil(self._count / max(1, block_bytes // head_bytes))
        self._heads_at_once = math.ceil(self._count / groups)  # groups of one size: no small rest
        self._rows_at_once = min(self._rows, max(1, block_bytes // row_bytes))
        self._keeps_exponentials = head_bytes <= byte_budget  # for the second sum
        held = self._rows if self._keeps_exponentials else self._rows_at_once
        self._scratch = generated.new_empty(self._heads_at_once, held, self._columns)
        # What plain exponentials are summed to.
        self._row = generated.new_empty(self._count, self._rows)
        self._row_factors = generated.new_ones(self._count, 2, self._rows)  # weight / row sum, and one
        self._over_rows = generated.new_zeros(self._count, 2, self._columns)  # weighed by these
        self._to_generated = generated.new_empty(self._count, 1, self._rows)

    def means(self) -> tuple[Tensor, Tensor]:
        """Both column means, ``[head, generated]`` and ``[head, reference]``."""
        groups = list(slices(self._count, self._heads_at_once))
        if self._on_cpu:
            for heads in groups:
                self._direct(heads)
        # Elsewhere, whether plain exponentials fit is not known without waiting for the device.
        for heads in self._out_of_bounds() if self._on_cpu else groups:
            self._stabilised(heads)
        return self._to_generated, self._over_rows[:, 0].contiguous()

    def _direct(self, heads: slice) -> None:
        """Column means from plain exponentials.

        With ``E = exp(logits)``, ``to_reference = sum_n w[n] / row_sum[n] * E[n]`` and the column sums are two rows of
        one small product per block, ``to_generated = (1 / column_sum) @ E.T / M`` is a second sweep over ``E``.
        """
        for rows in self._row_blocks():
            block = self._logits(heads, rows).exp_()
            row, factors = self._row[heads, rows], self._row_factors[heads, :, rows]
            torch.sum(block, dim=2, out=row)
            torch.div(self._weights[heads, rows], row, out=factors[:, 0])
            self._over_rows[heads].baddbmm_(factors, block)
        inverse = (self._over_rows[heads, 1:] * self._columns).reciprocal_()
        if self._keeps_exponentials:
            block = self._place(heads, slice(self._rows))
            torch.bmm(inverse, block.mT, out=self._to_generated[heads])  # a matrix times a column would take longer
            return
        for rows in self._row_blocks():
            block = self._logits(heads, rows).exp_()
            torch.bmm(inverse, block.mT, out=self._to_generated[heads, :, rows])

    def _out_of_bounds(self) -> list[slice]:
        """Heads with a sum that is not finite or near the ends of float32; rare, so that all are looked at together
        first."""
        both = self._row, self._over_rows[:, 1]
        if all(_in_bounds(*map(float, sums.aminmax())) for sums in both):
            return []
        ends = zip(*(end.tolist() for sums in both for end in sums.aminmax(dim=1)), strict=True)
        return [slice(head, head + 1) for head, each in enumerate(ends) if not _in_bounds(*each)]

    def _stabilised(self, heads: slice) -> None:
        """Column means with the maximum of every row and column subtracted: any logits, two exponentials each."""
        to_reference = self._over_rows[heads, :1].zero_()
        column_lse: Tensor | None = None
        for rows in self._row_blocks():
            logits = self._logits(heads, rows)
            block_lse = logits.logsumexp(dim=1, keepdim=True)
            column_lse = block_lse if column_lse is None else torch.logaddexp(column_lse, block_lse)
            to_reference += torch.bmm(self._weights[heads, None, rows], logits.softmax(dim=2))
        assert column_lse is not None, "an attention has at least one generated token"
        for rows in self._row_blocks():
            scores = self._logits(heads, rows).sub_(column_lse).exp_()
            self._to_generated[heads, 0, rows] = scores.mean(dim=2)

    def _row_blocks(self) -> Iterator[slice]:
        return slices(self._rows, self._rows_at_once)

    def _place(self, heads: slice, rows: slice) -> Tensor:
        """The scratch of these rows: their own place if exponentials are kept, else the shared start."""
        place = rows if self._keeps_exponentials else slice(rows.stop - rows.start)
        return self._scratch[: heads.stop - heads.start, place]

    def _logits(self, heads: slice, rows: slice) -> Tensor:
        out = self._place(heads, rows)
        if len(out) == 1:  # a strided single matrix product is faster than a batch of one
            head, single = heads.start, out[0]
            generated, reference = self._generated[head, rows], self._reference[head]
            torch.addmm(single, generated, reference, beta=0, alpha=self._scale, out=single)
        else:
            generated, reference = self._generated[heads, rows], self._reference[heads]
            torch.baddbmm(out, generated, reference, beta=0, alpha=self._scale, out=out)
        return out


def _in_bounds(*sums: float) -> bool:
    """Whether sums can be trusted (False for NaN)."""
    return all(_SMALLEST_SUM < one < _LARGEST_SUM for one in sums)
