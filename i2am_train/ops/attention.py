"""Attention scores and the two column means of an attention matrix, without keeping the matrix.

For one head, ``logits[n, m] = scale * generated[n] . reference[m]`` with ``N`` generated tokens in the rows and ``M``
reference tokens in the columns. An attribution map is the mean of one softmax over the *other* axis (paper eqs. 3 and
6):

- ``to_generated[n] = mean_m softmax_n(logits)[n, m]``: where the reference goes to, one value per generated token;
- ``to_reference[m] = mean_n softmax_m(logits)[n, m]``: where the generated tokens look, one value per reference token.

Both softmaxes share their numerators. `column_means` therefore takes one product and one exponential per logit and gets
all four sums (rows, columns, and both weighted ones) from small matrix products while a block is still in the cache.
That is about eight times faster than two softmaxes. Heads whose logits do not fit the plain float32 exponential are
recognised by their sums and computed again with the usual subtraction of the maximum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from i2am_train.ops.numerics import at_least_float32

DEFAULT_BYTE_BUDGET = 64 * 2**20
"""Scratch memory that `column_means` may use, in bytes. Chosen by us: the aim of issue 2 for a whole capture."""

_CACHE_BLOCK_BYTES = 2**20
"""Exponentials worked on at a time on a CPU. Chosen by us: of 1/4 to 4 MiB the fastest with 2 MiB of L2 per core, for
matrices of 48 x 192 to 3072 x 1036."""

_SMALLEST_SUM, _LARGEST_SUM = 1e-20, 1e30
"""Sums of exponentials within these bounds lost nothing to float32 underflow (1.2e-38) or overflow (3.4e38)."""


class ColumnMeans(NamedTuple):
    """Both column means of each head; every row of either sums to one."""

    to_generated: Float[Tensor, "batch head generated"]
    to_reference: Float[Tensor, "batch head reference"]


def attention_logits(
    generated: Float[Tensor, "*batch generated channel"],
    reference: Float[Tensor, "*batch reference channel"],
    scale: float | None = None,
) -> Float[Tensor, "*batch generated reference"]:
    """Scaled dot products in float32 (float64 stays float64); ``scale`` defaults to ``channel ** -0.5`` (eq. 3).

    >>> attention_logits(torch.ones(1, 2, 4), torch.ones(1, 3, 4))[0, 0]  # 4 / sqrt(4)
    tensor([2., 2., 2.])
    """
    factor = generated.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(generated.device.type, enabled=False):
        return (at_least_float32(generated) * factor) @ at_least_float32(reference).mT


def head_mean_scores(
    generated: Float[Tensor, "batch head generated channel"],
    reference: Float[Tensor, "batch head reference channel"],
    scale: float | None = None,
) -> Float[Tensor, "batch generated reference"]:
    """Softmax over the reference, averaged over heads, with gradient: what the losses are functions of.

    Every row sums to one. Leave special tokens out of ``reference`` beforehand: the softmax is over what is given.

    >>> head_mean_scores(torch.zeros(2, 4, 6, 8), torch.zeros(2, 4, 5, 8))[1, 3]
    tensor([0.2000, 0.2000, 0.2000, 0.2000, 0.2000])
    """
    return attention_logits(generated, reference, scale).softmax(dim=-1).mean(dim=1)


def log_head_scores(
    generated: Float[Tensor, "batch head generated channel"],
    reference: Float[Tensor, "batch head reference channel"],
    scale: float | None = None,
) -> Float[Tensor, "batch head generated reference"]:
    """Logarithm of each head's softmax over the reference, with gradient; their exponentials' mean is
    :func:`head_mean_scores`. Finite for any finite logits. Keeps the matrices of all heads.

    >>> log_head_scores(torch.zeros(2, 4, 6, 8), torch.zeros(2, 4, 5, 8))[1, 3, 0].exp()
    tensor([0.2000, 0.2000, 0.2000, 0.2000, 0.2000])
    """
    return attention_logits(generated, reference, scale).log_softmax(dim=-1)


def log_reference_mass(
    generated: Float[Tensor, "batch head generated channel"],
    keys: Float[Tensor, "batch head token channel"],
    reference: slice | Int[Tensor, " reference"],
    scale: float | None = None,
) -> Float[Tensor, "batch generated"]:
    """Logarithm of the head mean of :func:`reference_mass`, with gradient; at most 0, and finite for any finite logits.

    >>> keys = torch.zeros(2, 3, 6, 8)
    >>> log_reference_mass(torch.zeros(2, 3, 4, 8), keys, slice(2, 6))[1].exp()
    tensor([0.6667, 0.6667, 0.6667, 0.6667])
    """
    logits = attention_logits(generated, keys, scale)
    shares = logits[..., reference].logsumexp(dim=3) - logits.logsumexp(dim=3)
    return (shares.logsumexp(dim=1) - math.log(shares.shape[1])).clamp(max=0)  # rounding alone leads above it


class HeadMeanMatrices(NamedTuple):
    """Both softmaxes of the same logits, averaged over heads, as whole matrices."""

    over_reference: Float[Tensor, "batch generated reference"]
    over_generated: Float[Tensor, "batch generated reference"]


class HeadMatrices(NamedTuple):
    """Both softmaxes of the same logits, by head, as whole matrices."""

    over_reference: Float[Tensor, "batch head generated reference"]
    over_generated: Float[Tensor, "batch head generated reference"]


@torch.no_grad()
def head_mean_matrices(
    generated: Float[Tensor, "batch head generated channel"],
    reference: Float[Tensor, "batch head reference channel"],
    scale: float | None = None,
) -> HeadMeanMatrices:
    """Head means of the softmax over the reference and of the softmax over the generated tokens.

    Works on as many heads at a time as fit a cache block, but on one at least, so that its memory is that of the result
    and three matrices of one head per sample.

    >>> matrices = head_mean_matrices(torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 5, 8))
    >>> round(float(matrices.over_reference[0, 0, 0]), 6), float(matrices.over_generated[0, 0, 0])
    (0.2, 0.25)
    """
    batch, heads, rows, _ = generated.shape
    columns = reference.shape[2]
    dtype = torch.promote_types(generated.dtype, torch.float32)
    over_reference = generated.new_zeros(batch, rows, columns, dtype=dtype)
    over_generated = torch.zeros_like(over_reference)
    for group in _slices(heads, max(1, _CACHE_BLOCK_BYTES // over_reference.nbytes)):
        logits = attention_logits(generated[:, group], reference[:, group], scale)
        over_reference += logits.softmax(dim=3).sum(dim=1)
        over_generated += logits.softmax(dim=2).sum(dim=1)
    return HeadMeanMatrices(over_reference.div_(heads), over_generated.div_(heads))


@torch.no_grad()
def head_matrices(
    generated: Float[Tensor, "batch head generated channel"],
    reference: Float[Tensor, "batch head reference channel"],
    scale: float | None = None,
) -> HeadMatrices:
    """Softmax over the reference and softmax over the generated tokens of each head.

    >>> matrices = head_matrices(torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 5, 8))
    >>> round(float(matrices.over_reference[0, 2, 0, 0]), 6), float(matrices.over_generated[0, 2, 0, 0])
    (0.2, 0.25)
    """
    logits = attention_logits(generated, reference, scale)
    return HeadMatrices(logits.softmax(dim=3), logits.softmax(dim=2))


@torch.no_grad()
def column_means(
    generated: Float[Tensor, "batch head generated channel"],
    reference: Float[Tensor, "batch head reference channel"],
    scale: float | None = None,
    *,
    generated_weights: Float[Tensor, "batch generated"] | None = None,
    byte_budget: int = DEFAULT_BYTE_BUDGET,
) -> ColumnMeans:
    """Both column means of every head (paper eq. 6, averaged over the axis that disappears).

    ``generated_weights`` (one non-negative number per generated token) weighs the mean that makes ``to_reference``,
    e.g. a mask of the region of interest; without it every generated token counts the same. All weights zero give
    zeros. Float32 arithmetic whatever the inputs (float64 stays float64); never more scratch than ``byte_budget`` as
    long as a single row of logits fits it.

    >>> means = column_means(torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 5, 8))
    >>> means.to_generated[0, 0].tolist(), round(float(means.to_reference[1, 2, 0]), 6)
    ([0.25, 0.25, 0.25, 0.25], 0.2)
    """
    batch, heads, rows, channels = generated.shape
    columns = reference.shape[2]
    scale = channels**-0.5 if scale is None else scale
    flat_generated = at_least_float32(generated).reshape(batch * heads, rows, channels)
    flat_reference = at_least_float32(reference).reshape(batch * heads, columns, channels)
    weights = _row_weights(generated_weights, flat_generated, heads)
    work = _Work.plan(flat_generated, columns, byte_budget)
    with torch.autocast(generated.device.type, enabled=False):
        to_generated, to_reference = _all_heads(flat_generated, flat_reference, scale, weights, work)
    return ColumnMeans(to_generated.view(batch, heads, rows), to_reference.view(batch, heads, columns))


@torch.no_grad()
def reference_mass(
    generated: Float[Tensor, "batch head generated channel"],
    keys: Float[Tensor, "batch head token channel"],
    reference: slice | Int[Tensor, " reference"],
    scale: float | None = None,
    byte_budget: int = DEFAULT_BYTE_BUDGET,
) -> Float[Tensor, "batch head generated"]:
    """Share of its attention that each generated token gives to the ``reference`` among all ``keys``.

    ``exp(LSE_reference - LSE_all)`` of the logits, in [0, 1]; for models whose softmax runs over the keys of both
    pictures. Works on blocks of rows within ``byte_budget``.

    >>> keys = torch.zeros(2, 3, 6, 8)
    >>> round(float(reference_mass(torch.zeros(2, 3, 4, 8), keys, slice(2, 6))[1, 2, 3]), 6)
    0.666667
    """
    batch, heads, rows, _ = generated.shape
    row_bytes = 2 * 4 * batch * heads * keys.shape[2]  # the logits, and at most as many picked ones
    shares = []
    for block in _slices(rows, max(1, byte_budget // row_bytes)):
        logits = attention_logits(generated[:, :, block], keys, scale)
        shares.append(torch.exp(logits[..., reference].logsumexp(dim=3) - logits.logsumexp(dim=3)))
    return torch.cat(shares, dim=2)


def _row_weights(weights: Tensor | None, generated: Tensor, heads: int) -> Tensor:
    """Weights of the generated tokens that sum to one (or are all zero), one row per flattened head."""
    count, rows, _ = generated.shape
    if weights is None:
        return generated.new_full((1, 1), 1 / rows).expand(count, rows)
    total = weights.sum(dim=1, keepdim=True)
    shares = (weights / total.where(total > 0, 1)).to(generated.dtype)
    return shares.unsqueeze(1).expand(-1, heads, -1).reshape(count, rows)


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
        block_bytes = min(byte_budget, _CACHE_BLOCK_BYTES) if on_cpu else byte_budget
        groups = math.ceil(count / max(1, block_bytes // head_bytes))
        return cls(
            heads=math.ceil(count / groups),  # groups of one size: no small rest
            rows=min(rows, max(1, block_bytes // row_bytes)),
            keeps_exponentials=head_bytes <= byte_budget,
        )


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _all_heads(
    generated: Tensor, reference: Tensor, scale: float, weights: Tensor, work: _Work
) -> tuple[Tensor, Tensor]:
    count, rows, _ = generated.shape
    columns = reference.shape[1]
    scratch_rows = rows if work.keeps_exponentials else work.rows
    scratch = generated.new_empty(work.heads * scratch_rows * columns)
    sums = _Sums.empty(generated, columns)
    for heads in _slices(count, work.heads):
        group = _Group(generated[heads], reference[heads].mT, scale, scratch, work)
        group.direct(weights[heads], sums.of(heads))
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
        return _slices(total, total if whole else self.work.rows)

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
