"""Masks on grids, value ranges of pictures, resizing of maps, and the number format of scores."""

from __future__ import annotations

import pytest
import torch

from i2am_train.ops.grids import mask_on_grid
from i2am_train.ops.images import ResizeMode, resize_maps, to_uint8, to_unit
from i2am_train.ops.precision import at_least_float32
from i2am_train.types import GridSize


def test_half_of_a_cell_is_enough() -> None:
    """A cell is inside from half of its area on; its corner pixel alone does not decide."""
    mask = torch.zeros(2, 8, 12, dtype=torch.bool)
    mask[0, :2, :4] = True  # exactly half of the first 4x4 cell
    mask[0, 4, 4] = True  # one pixel of another cell, at its corner
    mask[1, 4:, 8:] = True
    expected = torch.zeros(2, 2, 3, dtype=torch.bool)
    expected[0, 0, 0] = expected[1, 1, 2] = True
    assert torch.equal(mask_on_grid(mask, GridSize(2, 3)), expected.flatten(1))


@pytest.mark.parametrize("size", [(7, 5), (16, 20)])
def test_a_full_mask_stays_full_on_any_grid(size: tuple[int, int]) -> None:
    """Sizes that do not divide, and grids finer than the mask."""
    mask = torch.ones(2, 10, 8, dtype=torch.bool)
    assert mask_on_grid(mask, GridSize(*size)).all()


def test_bytes_come_back_unchanged() -> None:
    """All 256 values survive the way to [-1, 1] and back."""
    levels = torch.arange(256, dtype=torch.uint8).reshape(2, 1, 8, 16)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)


def test_ranges_are_clamped_and_float32() -> None:
    """What a sampler overshoots is cut off; bfloat16 becomes float32."""
    unit = to_unit(torch.tensor([[-1.5, 1.25]], dtype=torch.bfloat16))
    assert unit.tolist() == [[0.0, 1.0]]
    assert unit.dtype is torch.float32


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_resize_keeps_leading_axes_and_constants(mode: ResizeMode) -> None:
    """No, one or three leading axes; a constant map stays constant."""
    size = GridSize(9, 10)
    for leading in ((), (2,), (2, 1, 3)):
        resized = resize_maps(torch.full((*leading, 4, 3), 0.25), size, mode)
        assert resized.shape == (*leading, 9, 10)
        torch.testing.assert_close(resized, torch.full_like(resized, 0.25))


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
