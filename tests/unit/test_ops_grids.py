"""Grids: order of coordinates, solving from the latent, masks, resizing of maps, and refusals."""

from __future__ import annotations

import pytest
import torch

from i2am_train.errors import CaptureError
from i2am_train.ops.grids import (
    ResizeMode,
    aligned_coordinates,
    mask_on_grid,
    reference_coordinates,
    resize_maps,
    solve_grid,
    unflatten,
)
from i2am_train.types import GridSize


def test_coordinates_are_row_major_and_y_first() -> None:
    """Token 5 of a grid three wide is row 1, column 2."""
    coordinates = reference_coordinates(GridSize(2, 3), dtype=torch.float64)
    assert coordinates.shape == (6, 2)
    assert coordinates.dtype is torch.float64
    assert coordinates[5].tolist() == [1.0, 2.0]


def test_unflatten_keeps_further_axes() -> None:
    """The token at row i, column j is token i * width + j, whatever follows."""
    values = torch.arange(2 * 12 * 5).reshape(2, 12, 5)
    assert torch.equal(unflatten(values, GridSize(4, 3))[1, 2, 1], values[1, 7])


def test_unflatten_refuses_another_number_of_tokens() -> None:
    """A class token that was forgotten is an error and not a shifted grid."""
    with pytest.raises(CaptureError, match="13 tokens do not fill a grid of 4x3"):
        unflatten(torch.zeros(2, 13), GridSize(4, 3))


def test_aligned_coordinates_put_centres_over_centres() -> None:
    """Equal grids give the coordinates themselves, a grid twice as fine the middle of two."""
    grid = GridSize(4, 3)
    assert torch.equal(aligned_coordinates(grid, grid), reference_coordinates(grid))
    finer = aligned_coordinates(grid, GridSize(8, 9))
    assert finer[0].tolist() == [0.5, 1.0]
    assert finer[-1].tolist() == [6.5, 7.0]


@pytest.mark.parametrize(
    ("tokens", "latent", "expected"),
    [
        (3072, (64, 48), (64, 48)),
        (48, (64, 48), (8, 6)),
        (192, (32, 24), (16, 12)),
        (35, (27, 20), (7, 5)),  # odd sizes round up: 27x20, 14x10, 7x5
    ],
)
def test_solve_grid(tokens: int, latent: tuple[int, int], expected: tuple[int, int]) -> None:
    """Levels of SD1.5 at 512x384, of the tiny model, and of an odd latent."""
    assert solve_grid(tokens, GridSize(*latent)) == GridSize(*expected)


def test_solve_grid_names_what_it_found() -> None:
    """191 tokens fit no level; the message lists those that there are."""
    with pytest.raises(CaptureError, match=r"191 generated tokens .* 64x48.*16x12 = 192"):
        solve_grid(191, GridSize(64, 48))


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


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_resize_keeps_leading_axes_and_constants(mode: ResizeMode) -> None:
    """No, one or three leading axes; a constant map stays constant."""
    size = GridSize(9, 10)
    for leading in ((), (2,), (2, 1, 3)):
        resized = resize_maps(torch.full((*leading, 4, 3), 0.25), size, mode)
        assert resized.shape == (*leading, 9, 10)
        torch.testing.assert_close(resized, torch.full_like(resized, 0.25))
