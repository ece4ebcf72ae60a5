"""The choices of `i2am explain`: patches that are drawn when the user names none."""

import torch

from i2am_train.ops.grids import PATCHES_SHOWN, spread_patches
from i2am_train.types import GridSize


def test_patches_start_in_the_middle_and_lie_far_from_each_other():
    mask = torch.zeros(9, 7, dtype=torch.bool)
    mask[2:7, 1:6] = True  # five by five cells around (4, 3)
    middle, *corners, _ = spread_patches(mask.flatten(), GridSize(9, 7))
    assert middle == (4, 3)
    assert sorted(corners) == [(2, 1), (2, 5), (6, 1), (6, 5)]


def test_patches_are_masked_cells_each_once_and_all_count_without_a_mask():
    few = torch.tensor([[False, True, False], [True, False, False]])
    assert sorted(spread_patches(few.flatten(), GridSize(2, 3))) == [(0, 1), (1, 0)]
    none = torch.zeros(12, dtype=torch.bool)
    anywhere = spread_patches(none, GridSize(4, 3))
    assert len(set(anywhere)) == PATCHES_SHOWN
