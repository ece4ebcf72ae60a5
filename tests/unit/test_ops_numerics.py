"""Value ranges of pictures, and the number format of scores."""

from __future__ import annotations

import pytest
import torch

from i2am_train.ops.numerics import at_least_float32, to_uint8, to_unit


def test_bytes_come_back_unchanged() -> None:
    """All 256 values survive the way to [-1, 1] and back."""
    levels = torch.arange(256, dtype=torch.uint8).reshape(2, 1, 8, 16)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)


def test_ranges_are_clamped_and_float32() -> None:
    """What a sampler overshoots is cut off; bfloat16 becomes float32."""
    unit = to_unit(torch.tensor([[-1.5, 1.25]], dtype=torch.bfloat16))
    assert unit.tolist() == [[0.0, 1.0]]
    assert unit.dtype is torch.float32


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_at_least_float32(given: torch.dtype, expected: torch.dtype) -> None:
    """Half formats go up, the others stay."""
    assert at_least_float32(torch.ones(2, 3, dtype=given)).dtype is expected
