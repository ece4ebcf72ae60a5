"""Queries and keys that are drawn; attention with all its optional parts, made of scores and a mask alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from i2am_train.losses.attention import Attention, Pictures, attention_on_grids
from i2am_train.ops.numerics import at_least_float32
from i2am_train.types import GridSize

PIXELS = 4
"""Sides of a patch of the generated grid."""


def drawn_tokens(
    samples: int, heads: int, counts: tuple[int, int], channels: int, spread: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Queries and keys with a gradient, the same numbers in every type."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (
        torch.randn(samples, heads, count, channels, generator=generator, dtype=torch.float64)
        .mul(spread)
        .to(dtype)
        .requires_grad_()
        for count in counts
    )
    return queries, keys


def whole_attention(
    scores: Tensor, mask: Tensor, generated: GridSize, reference: GridSize, **options: Any
) -> Attention:
    """Two heads, of which the second is sharper; a mass that is the first row's scores; other parts that are drawn once
    and are the same for every sample.
    """
    logarithms = at_least_float32(scores).log()

    def numbers(seed: int, *shape: int) -> Tensor:
        drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        return drawn.to(logarithms).expand(len(scores), *shape)

    worn = mask.unflatten(1, generated).repeat_interleave(PIXELS, 1).repeat_interleave(PIXELS, 2)
    matches = numbers(1, generated.tokens, reference.tokens) ** 8
    matches = matches.index_fill(1, torch.tensor([1], device=matches.device), 0.0)
    parts = {
        "target": numbers(2, generated.tokens, 2) * matches.new_tensor(reference) - 0.5,
        "matches": matches / matches.sum(dim=2, keepdim=True).clamp(min=1e-9),
        "log_heads": torch.stack((logarithms, (2 * logarithms).log_softmax(dim=2)), dim=1),
        "log_mass": logarithms[..., : reference.width].logsumexp(dim=2).clamp(max=0),
        "slope": 0.5 + numbers(3, 2),
        "pictures": Pictures(numbers(4, 3, *worn.shape[1:]), worn, numbers(5, 3, 11, 9)),
    }
    return attention_on_grids(scores, mask, generated, reference, **parts | options)
