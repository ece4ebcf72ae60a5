"""Attention scores and the two column means of an attention matrix, without keeping the matrix.

For one head, ``logits[n, m] = scale * generated[n] . reference[m]`` with ``N`` generated tokens in the rows and ``M``
reference tokens in the columns. An attribution map is the mean of one softmax over the *other* axis (paper eqs. 3 and
6):

- ``to_generated[n] = mean_m softmax_n(logits)[n, m]``: where the reference goes to, one value per generated token;
- ``to_reference[m] = mean_n softmax_m(logits)[n, m]``: where the generated tokens look, one value per reference token.

`column_means` has both about eight times faster than two softmaxes: on a CPU block by block
(`i2am_train.ops.column_blocks`), on a CUDA device by two Triton kernels (`i2am_train.ops.column_kernels`). Where these
cannot be used, one line says why, and the device works block by block, too.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from i2am_train.ops import column_blocks
from i2am_train.ops.column_blocks import CACHE_BLOCK_BYTES, slices
from i2am_train.ops.numerics import at_least_float32

DEFAULT_BYTE_BUDGET = 64 * 2**20
"""Scratch memory that `column_means` may use, in bytes. Chosen by us: the aim of issue 2 for a whole capture."""

_KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    for group in slices(heads, max(1, CACHE_BLOCK_BYTES // over_reference.nbytes)):
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
    reference: Float[Tensor, "batch key_head reference channel"],
    scale: float | None = None,
    *,
    generated_weights: Float[Tensor, "batch generated"] | None = None,
    byte_budget: int = DEFAULT_BYTE_BUDGET,
) -> ColumnMeans:
    """Both column means of every head (paper eq. 6, averaged over the axis that disappears).

    ``generated_weights`` (one non-negative number per generated token) weighs the mean that makes ``to_reference``,
    e.g. a mask of the region of interest; without it every generated token counts the same. All weights zero give
    zeros. Float32 arithmetic whatever the inputs (float64 stays float64); never more scratch than ``byte_budget`` as
    long as a single row of logits fits it. There may be fewer heads of keys than of queries, each for a run of equally
    many (grouped queries). Nothing waits for a CUDA device.

    >>> means = column_means(torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 5, 8))
    >>> means.to_generated[0, 0].tolist(), round(float(means.to_reference[1, 2, 0]), 6)
    ([0.25, 0.25, 0.25, 0.25], 0.2)
    """
    scale = generated.shape[3] ** -0.5 if scale is None else scale
    shares = None if generated_weights is None else _shares(generated_weights)
    if (kernels := _kernels_for(generated, reference)) is not None:
        return ColumnMeans(*kernels.column_means(generated, reference, scale, shares))
    keys = keys_per_head(reference, generated.shape[1])
    return ColumnMeans(*column_blocks.column_means(generated, keys, scale, shares, byte_budget))


@torch.no_grad()
def reference_mass(
    generated: Float[Tensor, "batch head generated channel"],
    keys: Float[Tensor, "batch key_head token channel"],
    reference: slice | Int[Tensor, " reference"],
    scale: float | None = None,
    byte_budget: int = DEFAULT_BYTE_BUDGET,
) -> Float[Tensor, "batch head generated"]:
    """Share of its attention that each generated token gives to the ``reference`` among all ``keys``.

    ``exp(LSE_reference - LSE_all)`` of the logits, in [0, 1]; for models whose softmax runs over the keys of both
    pictures. Works on blocks of rows within ``byte_budget``; heads may share keys as in `column_means`.

    >>> keys = torch.zeros(2, 3, 6, 8)
    >>> round(float(reference_mass(torch.zeros(2, 3, 4, 8), keys, slice(2, 6))[1, 2, 3]), 6)
    0.666667
    """
    batch, heads, rows, channels = generated.shape
    if (kernels := _kernels_for(generated, keys)) is not None:
        factor = channels**-0.5 if scale is None else scale
        among: Tensor = kernels.row_logsumexp(generated, keys[:, :, reference], factor)
        share: Tensor = (among - kernels.row_logsumexp(generated, keys, factor)).exp_()
        return share
    keys = keys_per_head(keys, heads)
    row_bytes = 2 * 4 * batch * heads * keys.shape[2]  # the logits, and at most as many picked ones
    shares = []
    for block in slices(rows, max(1, byte_budget // row_bytes)):
        logits = attention_logits(generated[:, :, block], keys, scale)
        shares.append(torch.exp(logits[..., reference].logsumexp(dim=3) - logits.logsumexp(dim=3)))
    return torch.cat(shares, dim=2)


def keys_per_head(keys: Float[Tensor, "batch key_head token channel"], heads: int) -> Tensor:
    """Keys of their own for all heads of queries: each repeated for the run of heads that share it; itself if none do.

    >>> keys_per_head(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), 4).flatten().tolist()
    [1.0, 1.0, 2.0, 2.0]
    """
    return keys if keys.shape[1] == heads else keys.repeat_interleave(heads // keys.shape[1], dim=1)


def _kernels_for(generated: Tensor, keys: Tensor) -> ModuleType | None:
    """The module of kernels if they can take these inputs; None on the CPU, and with a line that says why elsewhere."""
    if not generated.is_cuda:
        return None
    kernels = _triton_kernels()
    if kernels is None:
        return None
    channels, dtype = generated.shape[3], generated.dtype
    if channels > kernels.LARGEST_HEAD:
        return _slower(f"heads of {channels} channels: it takes up to {kernels.LARGEST_HEAD}")
    if dtype not in _KERNEL_TYPES or keys.dtype != dtype:
        return _slower(f"queries in {dtype} and keys in {keys.dtype}, which it does not take")
    return kernels if _fits_card(generated.device, dtype, channels) else None


@functools.cache
def _triton_kernels() -> ModuleType | None:
    try:
        from i2am_train.ops import column_kernels  # Triton comes with torch for CUDA alone, and takes a second
    except ImportError as error:
        return _slower(f"all layers: Triton cannot be imported ({error})")
    return column_kernels


@functools.cache
def _fits_card(device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Whether the kernels compile for a device and compute what they should: tried once, on a small attention of whole
    tiles and a rest. Waits for the device."""
    kernels = _triton_kernels()
    assert kernels is not None, "asked after Triton was found"
    heads, rows, columns = 2, 70, 133
    generator = torch.Generator().manual_seed(0)
    generated, reference = (
        torch.randn(1, count, heads, channels, generator=generator).to(dtype).transpose(1, 2)
        for count in (rows, columns)
    )
    shares = torch.arange(rows)[None] / (rows * (rows - 1) / 2)
    expected = column_blocks.column_means(generated, reference, channels**-0.5, shares, DEFAULT_BYTE_BUDGET)
    try:
        on_device = (values.to(device) for values in (generated, reference))
        found = kernels.column_means(*on_device, channels**-0.5, shares.to(device))
        found = [values.cpu() for values in found]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the compiler and the driver of a card that we do not know say
        reason = f"Triton cannot make it there ({type(error).__name__}: {error})"
    else:
        if all(torch.allclose(one, other, rtol=1e-3, atol=0) for one, other in zip(found, expected, strict=True)):
            return True
        reason = "what Triton makes there gives wrong results"
    _slower(f"heads of {channels} channels in {dtype} on {torch.cuda.get_device_name(device)}: {reason}")
    return False


@functools.cache
def _slower(what: str) -> None:
    """Says once that the device computes in the way of the CPU."""
    warnings.warn(f"Attention maps are made without the fused kernel, so more slowly, for {what}.", stacklevel=2)


def _shares(weights: Tensor) -> Tensor:
    """Weights that sum to one in each sample, or stay all zero."""
    total = weights.sum(dim=1, keepdim=True)
    return weights / total.where(total > 0, 1)
