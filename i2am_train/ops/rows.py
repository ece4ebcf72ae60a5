"""Attention scores with gradient, and functions of them row by row without keeping their matrix.

A row belongs to one generated token: what it looks at on the reference. Most of what a loss needs of a row (its centre,
its entropy, its cross-entropy to a target) depends on no other row. :func:`map_rows` computes such functions on blocks
of rows from queries and keys, forgets each block's logits, and computes them again in backward: memory is that of the
tokens and of one block, whatever the number of rows, and gradients are exact. Unlike identities of log-sum-exps, that
also holds for functions of the mean over heads, which does not decompose into functions of each head.

Small matrices are kept, as backward is then spared the second computation (:func:`keeps_matrix`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from i2am_train.ops.attention import attention_logits
from i2am_train.ops.numerics import at_least_float32

MATRIX_BYTES = 16 * 2**20
"""Size of one sample's logits (all heads) up to which matrices are kept. Chosen by us: 16x12 generated and 37x28
reference patches of 8 heads, the layer that the paper refines, have 6 MiB; 64x48 generated ones have 97. By sample, so
that a sample is computed alike in every batch."""

BLOCK_BYTES = 64 * 2**20
"""Size of a block's logits, all samples and heads together; backward needs three times as much. Chosen by us: on a
CPU 2 to 16 MiB took the same time within its noise, and a GPU has less to start the larger they are."""


def keeps_matrix(
    generated: Float[Tensor, "batch head generated channel"], reference: Float[Tensor, "batch head token channel"]
) -> bool:
    """Whether the logits of a sample are so small that the matrix is kept.

    >>> keeps_matrix(torch.zeros(1, 8, 192, 40), torch.zeros(1, 8, 1036, 40))
    True
    >>> keeps_matrix(torch.zeros(1, 8, 3072, 40), torch.zeros(1, 8, 1036, 40))
    False
    """
    return _logit_bytes(generated, reference) <= MATRIX_BYTES * len(generated)


def _logit_bytes(generated: Tensor, reference: Tensor) -> int:
    width = torch.promote_types(generated.dtype, torch.float32).itemsize
    return math.prod(generated.shape[:3]) * reference.shape[2] * width


def map_rows(
    function: Callable[[Tensor, slice], Tensor],
    generated: Float[Tensor, "batch head generated channel"],
    reference: Float[Tensor, "batch head token channel"],
    scale: float | None = None,
    *,
    block_bytes: int | None = None,
) -> Tensor:
    """``function(logits, rows)`` of blocks of rows, joined: ``[batch, generated, ...]``, with gradient.

    Logits are those of :func:`~i2am_train.ops.attention.attention_logits`. Only queries, keys and results are kept; in
    backward each block is computed once more. Gradients also reach what the function takes from elsewhere (tensors of
    which it picks ``rows``), a second backward is right, and so are gradients of gradients.

    Args:
        function: of ``[batch, head, row, token]`` logits of the generated tokens ``rows`` (a slice with a start and a
            stop); gives ``[batch, row, ...]``. Rows must not see each other, or the result depends on the blocks.
        block_bytes: size of the largest block's logits; at least one row is computed at a time. None: `BLOCK_BYTES`.

    >>> largest = map_rows(lambda logits, _: logits.amax(dim=(1, 3)), torch.ones(2, 3, 5, 4), torch.ones(2, 3, 7, 4))
    >>> largest.shape, float(largest[0, 0])  # 4 / sqrt(4)
    (torch.Size([2, 5]), 2.0)
    """
    rows, reference = generated.shape[2], at_least_float32(reference)
    blocks = math.ceil(_logit_bytes(generated, reference) / (BLOCK_BYTES if block_bytes is None else block_bytes))
    size = math.ceil(rows / min(blocks, rows))  # blocks of one size: no small rest

    def of_block(tokens: Tensor, first: int) -> Tensor:
        return function(attention_logits(tokens, reference, scale), slice(first, first + tokens.shape[2]))

    parts = [
        checkpoint(of_block, tokens, number * size, use_reentrant=False)
        for number, tokens in enumerate(torch.split(generated, size, dim=2))
    ]
    return torch.cat(parts, dim=1)


def head_mean_scores(
    generated: Float[Tensor, "batch head generated channel"],
    reference: Float[Tensor, "batch head reference channel"],
    scale: float | None = None,
) -> Float[Tensor, "batch generated reference"]:
    """Softmax over the reference, averaged over heads, with gradient: what the losses are functions of.

    Every row sums to one. Leave special tokens out of ``reference`` beforehand: the softmax is over what is given.
    Keeps the matrices of all heads only where these are small.

    >>> head_mean_scores(torch.zeros(2, 4, 6, 8), torch.zeros(2, 4, 5, 8))[1, 3]
    tensor([0.2000, 0.2000, 0.2000, 0.2000, 0.2000])
    """
    if keeps_matrix(generated, reference):
        return mean_over_heads(attention_logits(generated, reference, scale))
    return map_rows(lambda logits, _: mean_over_heads(logits), generated, reference, scale)


def mean_over_heads(logits: Float[Tensor, "batch head row reference"]) -> Float[Tensor, "batch row reference"]:
    """Each head's softmax, averaged over heads.

    >>> mean_over_heads(torch.tensor([[[[0.0, 0.0]], [[0.0, 100.0]]]]))
    tensor([[[0.2500, 0.7500]]])
    """
    return logits.softmax(dim=-1).mean(dim=1)


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
    """Logarithm of the head mean of :func:`~i2am_train.ops.attention.reference_mass`, with gradient; at most 0, and
    finite for any finite logits. Keeps the matrices of all heads only where these are small.

    >>> keys = torch.zeros(2, 3, 6, 8)
    >>> log_reference_mass(torch.zeros(2, 3, 4, 8), keys, slice(2, 6))[1].exp()
    tensor([0.6667, 0.6667, 0.6667, 0.6667])
    """

    def of_rows(logits: Tensor, _: slice) -> Tensor:
        shares = logits[..., reference].logsumexp(dim=3) - logits.logsumexp(dim=3)
        return (shares.logsumexp(dim=1) - math.log(shares.shape[1])).clamp(max=0)  # rounding alone leads above it

    if keeps_matrix(generated, keys):
        return of_rows(attention_logits(generated, keys, scale), slice(0, generated.shape[2]))
    return map_rows(of_rows, generated, keys, scale)
