"""Token grids and the pictures that they lie on: coordinates, masks and maps in their sizes.

Coordinates are ``yx`` in patch units: 0 is the centre of the first row or column, ``height - 1`` the centre of the last
row. A grid is always passed and never guessed; :func:`solve_grid` derives the grid of a layer from the size of the
latent and refuses what does not fit. A mask is boolean and True inside the region that its name says.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from i2am_train.errors import CaptureError, ConfigError
from i2am_train.ops.numerics import at_least_float32
from i2am_train.types import Canvas, GridSize

ResizeMode = Literal["bilinear", "bicubic"]

PATCHES_SHOWN = 6
"""Specific patches that are drawn when the user names none."""

_ROUNDING = 16
"""Units of the last place within which a map is constant: else min-max would show rounding noise as a pattern. Chosen
by us: a few sums and one resize."""


def unflatten(values: Shaped[Tensor, "batch tokens *rest"], grid: GridSize) -> Tensor:
    """Split the token axis into rows and columns: ``[batch, height, width, ...]``.

    Raises:
        CaptureError: if the grid does not have as many cells as there are tokens.

    >>> unflatten(torch.arange(6)[None], GridSize(3, 2))[0]
    tensor([[0, 1],
            [2, 3],
            [4, 5]])
    """
    if values.shape[1] != grid.tokens:
        raise CaptureError(
            f"{values.shape[1]} tokens do not fill a grid of {grid} ({grid.tokens} cells). "
            "Pass the grid of the layer that the tokens come from, without special tokens."
        )
    return values.reshape(values.shape[0], grid.height, grid.width, *values.shape[2:])


def reference_coordinates(
    grid: GridSize, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Float[Tensor, "reference 2"]:
    """Position of every cell, ``yx`` in patch units, row-major (D of paper eq. 15, from 0).

    >>> reference_coordinates(GridSize(2, 2)).tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    rows = torch.arange(grid.height, dtype=dtype, device=device)
    columns = torch.arange(grid.width, dtype=dtype, device=device)
    return torch.cartesian_prod(rows, columns).reshape(grid.tokens, 2)


def scaled(points: Float[Tensor, "*cells 2"], vertical: float, horizontal: float) -> Float[Tensor, "*cells 2"]:
    """Each axis of ``yx`` times its factor. A tensor of the factors would have to be copied to a GPU, and waited for.

    >>> scaled(torch.ones(1, 2), 2.0, 0.5)
    tensor([[2.0000, 0.5000]])
    """
    return torch.stack((points[..., 0] * vertical, points[..., 1] * horizontal), dim=-1)


def aligned_coordinates(
    generated_grid: GridSize,
    reference_grid: GridSize,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Float[Tensor, "generated 2"]:
    """Reference position under each generated cell when both pictures are overlaid.

    In patch units of the reference. It is the layout of an identity correspondence, and the yardstick for the spread of
    attention where the true correspondence is unknown.

    >>> aligned_coordinates(GridSize(1, 2), GridSize(2, 4)).tolist()
    [[0.5, 0.5], [0.5, 2.5]]
    """
    cells = reference_coordinates(generated_grid, dtype=dtype, device=device)
    ratios = reference_grid.height / generated_grid.height, reference_grid.width / generated_grid.width
    return scaled(cells + 0.5, *ratios) - 0.5


def solve_grid(tokens: int, latent: GridSize) -> GridSize:
    """Grid of a layer with so many tokens, in a U-Net that halves the latent at each level.

    Odd sizes are rounded up, as a stride-2 convolution with padding 1 does.

    Raises:
        CaptureError: if no level has that many tokens.

    >>> solve_grid(192, GridSize(64, 48))
    GridSize(height=16, width=12)
    """
    grids = _halvings(latent)
    for grid in grids:
        if grid.tokens == tokens:
            return grid
    known = ", ".join(f"{grid} = {grid.tokens}" for grid in grids)
    raise CaptureError(
        f"A layer with {tokens} generated tokens does not fit a latent of {latent}: its levels "
        f"have {known} tokens. Check the latent size, or give the layer's grid in the recipe."
    )


def _halvings(latent: GridSize) -> list[GridSize]:
    grids = [latent]
    while grids[-1].tokens > 1:
        height, width = grids[-1]
        grids.append(GridSize((height + 1) // 2, (width + 1) // 2))
    return grids


def spread_patches(
    mask: Bool[Tensor, " generated"], grid: GridSize, count: int = PATCHES_SHOWN
) -> list[tuple[int, int]]:
    """``count`` of the masked cells (of all, if there are none) that lie far from each other.

    The one nearest to their middle, then again and again the one farthest from those chosen.

    >>> spread_patches(torch.tensor([False, True, True, True, True, True]), GridSize(1, 6))[:3]  # the middle, both ends
    [(0, 3), (0, 1), (0, 5)]
    """
    on_grid = mask.reshape(grid).cpu()
    cells = (on_grid if on_grid.any() else torch.ones_like(on_grid)).nonzero()
    places = cells.float()
    distance = torch.linalg.vector_norm(places - places.mean(dim=0), dim=-1)
    chosen = [int(distance.argmin())]
    nearest = torch.full_like(distance, torch.inf)
    while len(chosen) < min(count, len(cells)):
        step = torch.linalg.vector_norm(places - places[chosen[-1]], dim=-1)
        nearest = torch.minimum(nearest, step)
        chosen.append(int(nearest.argmax()))
    return [(int(y), int(x)) for y, x in cells[chosen]]


def mask_on_grid(mask: Bool[Tensor, "batch height width"], grid: GridSize) -> Bool[Tensor, "batch generated"]:
    """Cells of which at least half lies inside the mask, flattened row-major.

    The authors' code takes the single pixel at the corner of each cell instead, so that one pixel decides for 32x32.
    Where the sizes do not divide, neighbouring windows overlap by a pixel.

    >>> import torch
    >>> mask = torch.tensor([[[1, 1, 1, 0], [1, 1, 0, 0]]], dtype=torch.bool)
    >>> mask_on_grid(mask, GridSize(1, 2))
    tensor([[ True, False]])
    """
    share = F.adaptive_avg_pool2d(mask.float()[:, None], (grid.height, grid.width))
    return (share >= 0.5).flatten(1)


def garment_slope(
    worn: Bool[Tensor, "batch height width"],
    flat: Bool[Tensor, "batch flat_height flat_width"],
    generated_grid: GridSize,
    reference_grid: GridSize,
) -> Float[Tensor, "batch 2"]:
    """How many reference patches a garment extends over per generated patch, ``yx``, told by its two masks alone.

    The extent of a mask along an axis is the standard deviation of its pixels' positions. If the flat garment is the
    worn one, shifted and scaled along the axes, this is the true correspondence's slope. On the embedded data (48
    samples, grids of 8x6 and 16x12) it is 4 % (y) and 11 % (x) above the truth in the mean: sleeves hang when they are
    worn. Bounding boxes are 3 and 17 % off, the two pictures' sizes 32 and 19 %.

    Args:
        worn: the garment on the person, whose picture the generated grid covers.
        flat: the garment on its own picture, which the reference grid covers.

    Returns:
        0 along an axis where a mask is empty or less than two pixels long.

    >>> worn, flat = torch.zeros(1, 4, 4).bool(), torch.ones(1, 4, 4).bool()
    >>> worn[:, :2, 1:3] = True  # half of the picture in both axes
    >>> garment_slope(worn, flat, GridSize(4, 4), GridSize(8, 4))  # sqrt(15 / 3) times as long in pixels
    tensor([[4.4721, 2.2361]])
    """
    spreads, other = _spreads(flat), _spreads(worn)
    cells = scaled(spreads, reference_grid.height / generated_grid.height, reference_grid.width / generated_grid.width)
    return torch.where(other > 0, cells / torch.where(other > 0, other, 1.0), 0.0)


def _spreads(mask: Bool[Tensor, "batch height width"]) -> Float[Tensor, "batch 2"]:
    """Standard deviation of a mask's pixels along each axis, as a share of the picture's length; 0 without pixels."""
    spreads = []
    for other in (2, 1):
        pixels = mask.sum(dim=other).float()
        share = pixels / pixels.sum(dim=1, keepdim=True).clamp(min=1)
        places = (torch.arange(pixels.shape[1], device=mask.device) + 0.5) / pixels.shape[1]
        middle = (share * places).sum(dim=1, keepdim=True)
        spreads.append((share * (places - middle).square()).sum(dim=1).sqrt())
    return torch.stack(spreads, dim=1)


def matches_on_grid(
    places: Float[Tensor, "batch height width 2"],
    worn: Bool[Tensor, "batch height width"],
    generated_grid: GridSize,
    reference_grid: GridSize,
    cells: slice = slice(None),
) -> Float[Tensor, "batch generated reference"]:
    """Share of each generated cell's matched pixels whose place on the garment lies in each reference cell.

    Rows sum to 1, and are zeros for a cell without a match. A pixel belongs to the cell that its centre lies in.

    Args:
        places: of each pixel, ``yx`` in units of the flat garment's height and width; NaN where nothing is matched.
        worn: pixels that count.
        cells: of the generated grid, neighbours in row-major order.

    >>> known = torch.tensor([[[[0.5, 0.1], [0.5, 0.9], [0.5, 0.9], [torch.nan, torch.nan]]]])  # one row of four pixels
    >>> matches_on_grid(known, torch.ones(1, 1, 4).bool(), GridSize(1, 2), GridSize(1, 2))[0]
    tensor([[0.5000, 0.5000],
            [0.0000, 1.0000]])
    """
    batch, height, width = worn.shape
    found = worn & places.isfinite().all(dim=-1)
    counted = torch.where(found[..., None], at_least_float32(places), 0.0)
    y, x = ((counted[..., axis] * side).long().clamp(0, side - 1) for axis, side in enumerate(reference_grid))
    rows, columns = (
        torch.div((2 * torch.arange(pixels, device=worn.device) + 1) * side, 2 * pixels, rounding_mode="floor")
        for pixels, side in zip((height, width), generated_grid, strict=True)
    )
    chosen = range(generated_grid.tokens)[cells]
    generated = rows[:, None] * generated_grid.width + columns - chosen.start
    found = found & (generated >= 0) & (generated < len(chosen))
    pairs = generated.clamp(0, len(chosen) - 1) * reference_grid.tokens + y * reference_grid.width + x
    counts = counted.new_zeros(batch, len(chosen) * reference_grid.tokens)
    counts.scatter_add_(1, pairs.flatten(1), found.flatten(1).to(counts))
    on_grids = counts.view(batch, len(chosen), reference_grid.tokens)
    return on_grids / on_grids.sum(dim=2, keepdim=True).clamp(min=1)


def normalise(
    values: Float[Tensor, "*batch height width"], *, joint_axes: int = 0, epsilon: float = 0.0
) -> Float[Tensor, "*batch height width"]:
    """Min-max per map to [0, 1]; a map that is constant (to rounding) becomes zeros, and one with a value that is not a
    number stays without numbers.

    ``joint_axes`` counts the axes before height and width that share one minimum and maximum, so that maps can be
    compared. ``epsilon`` is added to the range (the authors' code adds 1e-8).

    >>> normalise(torch.tensor([[2.0, 4.0], [3.0, 2.0]])).tolist()
    [[0.0, 1.0], [0.5, 0.0]]
    """
    axes = tuple(range(-2 - joint_axes, 0))
    low = values.amin(dim=axes, keepdim=True)
    high = values.amax(dim=axes, keepdim=True)
    rounding = _ROUNDING * torch.finfo(values.dtype).eps * torch.maximum(low.abs(), high.abs())
    spread = (values - low) / (high - low + epsilon)
    constant = (high - low <= rounding) & rounding.isfinite()
    return torch.where(constant, torch.zeros_like(values), spread)


def threshold(values: Float[Tensor, "*batch height width"], delta: float) -> Float[Tensor, "*batch height width"]:
    """Values above ``delta`` as they are, others zero: ``m * 1(m > delta)`` (paper eq. 5; strictly greater). What is
    not a number stays so.

    >>> threshold(torch.tensor([[0.2, 0.4, 0.7]]), 0.4).tolist()
    [[0.0, 0.0, 0.699999988079071]]
    """
    if not 0 <= delta < 1:
        raise ConfigError(f"delta is {delta}; it must be at least 0 and below 1 (the paper uses 0.4).")
    return torch.where(values <= delta, torch.zeros_like(values), values)


def resize_maps(
    maps: Float[Tensor, "*batch height width"], size: GridSize, mode: ResizeMode = "bilinear"
) -> Float[Tensor, "*batch new_height new_width"]:
    """Resize with half-pixel centres and without antialiasing, in float32 or float64.

    ``bicubic`` (torch's, a = -0.75) is what the authors' code uses. It can overshoot the range of the input; the result
    is not clamped here. Any number of leading axes, none included.

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
