"""The kernels of both column means in Triton's interpreter, beside two softmaxes in float64.

Triton asks for TRITON_INTERPRET=1 once, when it is imported, so that this is a program: it prints one line of JSON for
each case, with the largest errors of the kernels and of the CPU's way. The interpreter multiplies bfloat16 as
integers (`create_dot` of Triton 3.8), so that bfloat16 is left to the card (`i2am_train.ops.attention._fits_card`).
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

from i2am_train.ops import attention, column_blocks, column_kernels

COUNTED = "counted"
"""Whole numbers, so that logits of hundreds are exact in float32."""


class Case(NamedTuple):
    """``shape`` is batch, heads, heads of keys, rows, columns, channels; ``logits`` their size, or `COUNTED`."""

    shape: tuple[int, int, int, int, int, int]
    dtype: torch.dtype = torch.float32
    logits: str | float = 1.0
    weights: str | None = None
    tile: int = 64


CASES = {
    "192x1036": Case((1, 1, 1, 192, 1036, 40), tile=256),
    "48x192 half": Case((1, 1, 1, 48, 192, 16), torch.float16),
    "odd sizes, small tiles, weights": Case((2, 1, 1, 33, 50, 24), weights="some", tile=16),
    "weights all zero": Case((2, 1, 1, 5, 7, 8), weights="zero"),
    "one token": Case((1, 1, 1, 1, 1, 8)),
    "one reference token": Case((1, 1, 1, 17, 1, 3)),
    "one generated token": Case((1, 1, 1, 1, 19, 8)),
    "logits of 200": Case((1, 1, 1, 20, 37, 8), logits=COUNTED, tile=16),
    "shared keys, weights": Case((2, 4, 2, 6, 5, 8), weights="some"),
    "keys of all heads": Case((1, 3, 1, 18, 21, 8)),
    "wide heads": Case((1, 1, 1, 16, 17, 160), torch.float16),
}


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """Queries and keys as projections leave them (heads side by side), of a batch with rows left out."""
    batch, heads, key_heads, rows, columns, channels = case.shape
    generator = torch.Generator().manual_seed(len(str(case)))

    def tokens(heads: int, count: int) -> Tensor:
        if case.logits == COUNTED:
            drawn = torch.randint(-5, 6, (2 * batch, count + 1, heads, channels), generator=generator).float()
        else:
            drawn = torch.randn(2 * batch, count + 1, heads, channels, generator=generator) * case.logits
        return drawn.to(case.dtype).transpose(1, 2)[batch:, :, 1:]

    generated, reference = tokens(heads, rows), tokens(key_heads, columns)
    weights = None
    if case.weights is not None:
        weights = torch.rand(batch, rows, generator=generator).round(decimals=1)
        weights[0] *= case.weights != "zero"
    scale = 2.0 if case.logits == COUNTED else channels**-0.5
    return generated, reference, weights, scale


def expected(generated: Tensor, reference: Tensor, weights: Tensor | None, scale: float) -> list[Tensor]:
    """By definition, in float64."""
    logits = generated.double() @ attention.keys_per_head(reference, generated.shape[1]).double().mT * scale
    if weights is None:
        weights = torch.ones(len(generated), generated.shape[2])
    shares = weights.double() / weights.double().sum(dim=1, keepdim=True).clamp(min=1e-30)
    return [logits.softmax(dim=2).mean(dim=3), (shares[:, None, :, None] * logits.softmax(dim=3)).sum(dim=2)]


def errors(found: Any, right: list[Tensor]) -> list[float]:
    """Largest relative errors; of values that are 0, absolute ones."""
    return [
        float(((one - other).abs() / other.where(other > 1e-20, 1)).max())
        for one, other in zip(found, right, strict=True)
    ]


def launch(kernel: Any, grid: tuple[int, int], *arguments: Any, device: torch.device, **constants: Any) -> None:
    kernel[grid](*arguments, **constants)


def main() -> None:
    column_kernels.launch = launch
    for name, case in CASES.items():
        column_kernels._LARGEST_TILE = dict.fromkeys((2, 4), case.tile)
        column_kernels._TILE_NUMBERS = dict.fromkeys((2, 4), 2**16)
        generated, reference, weights, scale = inputs(case)
        right = expected(generated, reference, weights, scale)
        shares = None if weights is None else attention._shares(weights)
        found = column_kernels.column_means(generated, reference, scale, shares)
        keys = attention.keys_per_head(reference, generated.shape[1])
        blocks = column_blocks.column_means(generated, keys, scale, shares, attention.DEFAULT_BYTE_BUDGET)
        lse = column_kernels.row_logsumexp(generated, reference, scale)
        logits = generated.double() @ keys.double().mT * scale
        print(
            json.dumps(
                {
                    "case": name,
                    "largest_logit": float(logits.abs().max()),
                    "kernels": errors(found, right),
                    "blocks": errors(blocks, right),
                    "logsumexp": float((lse - logits.logsumexp(dim=3)).abs().max()),
                }
            )
        )


if __name__ == "__main__":
    main()
