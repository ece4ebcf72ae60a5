"""Value ranges of pictures, and the one way in which maps change size."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from i2am_train.ops.precision import at_least_float32
from i2am_train.types import Canvas, GridSize

ResizeMode = Literal["bilinear", "bicubic"]


def to_unit(images: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """From the model's range [-1, 1] to [0, 1], clamped, in float32 or float64.

    >>> to_unit(torch.tensor([-1.0, 0.0, 1.5])).tolist()
    [0.0, 0.5, 1.0]
    """
    return ((at_least_float32(images) + 1) / 2).clamp(0, 1)


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """From the model's range [-1, 1] to bytes, clamped and rounded.

    The inverse of ``bytes / 127.5 - 1``, exactly.

    >>> to_uint8(torch.tensor([-1.2, -1.0, 0.0, 1.0])).tolist()
    [0, 0, 128, 255]
    """
    return (to_unit(images) * 255).round().to(torch.uint8)


def resize_maps(
    maps: Float[Tensor, "*batch height width"], size: GridSize, mode: ResizeMode = "bilinear"
) -> Float[Tensor, "*batch new_height new_width"]:
    """Resize with half-pixel centres and without antialiasing, in float32 or float64.

    ``bicubic`` (torch's, a = -0.75) is what the authors' code uses. It can overshoot the range of
    the input; the result is not clamped here. Any number of leading axes, none included.

    >>> resize_maps(torch.tensor([[0.0, 1.0]]), GridSize(1, 4)).tolist()
    [[0.0, 0.25, 0.75, 1.0]]
    """
    leading = maps.shape[:-2]
    stacked = at_least_float32(maps).reshape(-1, 1, *maps.shape[-2:])
    resized = F.interpolate(stacked, size=tuple(size), mode=mode, align_corners=False)
    return resized.reshape(*leading, *size)


def on_picture(
    maps: Float[Tensor, "*batch height width"], picture: GridSize, canvas: Canvas
) -> Float[Tensor, "*batch picture_height picture_width"]:
    """Maps on a model's canvas, put where they belong on the picture that was fitted to it.

    The canvas has the proportions of the maps. What lies outside the canvas is zero.

    >>> on_picture(torch.ones(2, 2), GridSize(2, 4), Canvas.CENTRE_CROP).tolist()
    [[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]]
    >>> on_picture(torch.tensor([[1.0, 2, 3, 4]]).mT, GridSize(2, 1), Canvas.LETTERBOX).tolist()
    [[2.0], [3.0]]
    """
    if canvas is Canvas.STRETCH:
        return resize_maps(maps, picture)
    height, width = maps.shape[-2:]
    inside = min if canvas is Canvas.CENTRE_CROP else max
    factor = inside(picture.height / height, picture.width / width)
    resized = resize_maps(maps, GridSize(round(height * factor), round(width * factor)))
    borders = [picture.width - resized.shape[-1], picture.height - resized.shape[-2]]
    around = [part for total in borders for part in (total // 2, total - total // 2)]
    return F.pad(resized, around)  # negative borders crop
