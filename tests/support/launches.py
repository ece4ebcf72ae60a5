"""Triton's kernels on a card that is not there: a launch computes by torch what the kernel computes.

It takes what the kernel takes: addresses, strides, counts. So a wrong stride, count, order or device of the code around
the kernels shows; the kernels themselves run in Triton's interpreter (`tests.support.interpreted_kernels`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from i2am_train.ops import attention

SIDES = ("generated", "reference")


def launch(kernel: Any, grid: tuple[int, int], *arguments: Any, device: torch.device, **constants: Any) -> None:
    """Stands in for `i2am_train.ops.column_kernels.launch`."""
    given = SimpleNamespace(**dict(zip(kernel.arg_names, arguments, strict=False)), **constants)
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    assert vars(given).keys() == set(kernel.arg_names)
    assert {tensor.device for tensor in tensors} == {device} == {torch.device("cuda:0")}
    assert given.tile >= 16 <= given.width >= given.channels
    assert given.generated.dtype == given.reference.dtype
    batch = grid[1] // given.heads
    counts = {"generated": (given.heads, given.rows), "reference": (given.heads // given.sharing, given.columns)}
    generated, reference = (
        torch.as_strided(
            getattr(given, side),
            (batch, *counts[side], given.channels),
            tuple(getattr(given, f"{side}_{axis}") for axis in ("batch", "head", "token", "channel")),
        ).float()
        for side in SIDES
    )
    logits = (generated @ reference.repeat_interleave(given.sharing, dim=1).mT * given.scale).flatten(0, 1)
    both = grid[0] > given.row_tiles
    assert grid[0] in (given.row_tiles, given.row_tiles + -(-given.columns // given.tile))
    assert given.row_tiles == -(-given.rows // given.tile)
    if hasattr(given, "weighted"):
        over_rows = (logits - given.column_top[:, None]).exp() / given.column_total[:, None]
        over_columns = (logits - given.row_top[..., None]).exp() / given.row_total[..., None]
        shares = torch.full((1, given.rows), 1 / given.rows, device=device)
        if given.weighted:
            shares = given.weights.repeat_interleave(given.heads, dim=0)
        _write(given.to_generated, over_rows.mean(dim=2))
        _write(given.to_reference, (shares[:, :, None] * over_columns).sum(dim=1))
        return
    _write(given.row_top, logits.amax(dim=2))
    _write(given.row_total, (logits - logits.amax(dim=2, keepdim=True)).exp().sum(dim=2))
    if both:
        _write(given.column_top, logits.amax(dim=1))
        _write(given.column_total, (logits - logits.amax(dim=1, keepdim=True)).exp().sum(dim=1))


def _write(where: Tensor, values: Tensor) -> None:
    assert where.dtype == torch.float32
    assert where.is_contiguous()
    assert where.shape == values.shape
    where.copy_(values)


@contextmanager
def launches() -> Iterator[None]:
    """Launches compute here; without Triton, as on a machine that has none (and says nothing)."""
    if importlib.util.find_spec("triton") is None:
        replaced: Any = patch.object(attention, "_triton_kernels", lambda: None)
    else:
        replaced = patch("i2am_train.ops.column_kernels.launch", launch)
    attention._fits_card.cache_clear()
    with replaced:
        yield
    attention._fits_card.cache_clear()
