"""Masks on token grids. A mask is boolean and True inside the region that its name says."""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F

from i2am_train.types import GridSize


def mask_on_grid(
    mask: Bool[Tensor, "batch height width"], grid: GridSize
) -> Bool[Tensor, "batch generated"]:
    """Cells of which at least half lies inside the mask, flattened row-major.

    The authors' code takes the single pixel at the corner of each cell instead, so that one pixel
    decides for 32x32. Where the sizes do not divide, neighbouring windows overlap by a pixel.

    >>> import torch
    >>> mask = torch.tensor([[[1, 1, 1, 0], [1, 1, 0, 0]]], dtype=torch.bool)
    >>> mask_on_grid(mask, GridSize(1, 2))
    tensor([[ True, False]])
    """
    share = F.adaptive_avg_pool2d(mask.float()[:, None], (grid.height, grid.width))
    return (share >= 0.5).flatten(1)
