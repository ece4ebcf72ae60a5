"""How far from its own place each generated patch looks, layer by layer.

In super-resolution the reference is the same picture, so that a patch should look at its own
position. The paper shows by eye that it does in PASD's middle layers and less so in the last ones
(section 5.3, Figs. 9 and 18); these are the numbers for it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from i2am_train.attention.maps import AttributionMaps
from i2am_train.ops.grids import aligned_coordinates, reference_coordinates
from i2am_train.ops.precision import at_least_float32
from i2am_train.types import Direction, GridSize


class Alignment(NamedTuple):
    """Of one layer, a value per sample; 0, 0 and 1 where every patch looks at its own place."""

    distance: Float[Tensor, " batch"]
    """Mean distance of the attention from the patch's own position, in reference patches."""
    relative: Float[Tensor, " batch"]
    """The same as a share of the reference's diagonal, in [0, 1]: comparable between grids."""
    within: Float[Tensor, " batch"]
    """Share of the attention within ``radius`` patches of the own position, in [0, 1]."""


def alignment(
    scores: Float[Tensor, "batch generated reference"],
    generated_grid: GridSize,
    reference_grid: GridSize,
    radius: float = 1.0,
) -> Alignment:
    """Alignment of attention between two pictures that show the same.

    Distances are expectations under the attention, not distances of its centre: attention that is
    spread evenly has its centre on every middle patch, and is not aligned with any.

    >>> one_to_the_right = torch.eye(3)[[1, 2, 2]].expand(2, 3, 3)  # the last one looks at itself
    >>> [round(float(value[0]), 3) for value in alignment(one_to_the_right, GridSize(1, 3), GridSize(1, 3))]
    [0.667, 0.211, 1.0]
    """
    values = at_least_float32(scores)
    away = _away(values, generated_grid, reference_grid)
    distance = (values * away).sum(dim=-1).mean(dim=-1)
    near = (away <= radius + 1e-6).to(values)
    return Alignment(distance, distance / _diagonal(reference_grid), (values * near).sum(dim=-1).mean(dim=-1))


def patch_distance(
    scores: Float[Tensor, "batch generated reference"], generated_grid: GridSize, reference_grid: GridSize
) -> Float[Tensor, "batch generated"]:
    """Mean distance of each generated patch's attention from its own position, as a share of the
    reference's diagonal, in [0, 1]; the mean over patches is `Alignment.relative`.

    >>> swapped = torch.eye(4)[[3, 1, 2, 0]].expand(2, 4, 4)  # two corners of a square look across
    >>> [round(value, 3) for value in patch_distance(swapped, GridSize(2, 2), GridSize(2, 2))[0].tolist()]
    [0.5, 0.0, 0.0, 0.5]
    """
    values = at_least_float32(scores)
    away = _away(values, generated_grid, reference_grid)
    return (values * away).sum(dim=-1) / _diagonal(reference_grid)


def even_alignment(generated_grid: GridSize, reference_grid: GridSize, radius: float = 1.0) -> Alignment:
    """What attention that is spread evenly would have: the value of no alignment at all.

    >>> round(float(even_alignment(GridSize(1, 2), GridSize(1, 2)).distance), 3)
    0.5
    """
    shape = (1, generated_grid.tokens, reference_grid.tokens)
    even = torch.full(shape, 1 / reference_grid.tokens)
    return alignment(even, generated_grid, reference_grid, radius)


def _away(values: Tensor, generated_grid: GridSize, reference_grid: GridSize) -> Float[Tensor, "generated reference"]:
    """Distance of each reference cell from each generated patch's own place, in reference cells."""
    dtype, device = values.dtype, values.device
    own = aligned_coordinates(generated_grid, reference_grid, dtype=dtype, device=device)
    cells = reference_coordinates(reference_grid, dtype=dtype, device=device)
    away: Tensor = torch.linalg.vector_norm(own[:, None] - cells[None], dim=-1)
    return away


def _diagonal(grid: GridSize) -> float:
    return math.hypot(grid.height, grid.width)


def layer_alignment(maps: AttributionMaps, radius: float = 1.0) -> dict[str, Alignment]:
    """Alignment of every layer that was traced with its matrix (``matrix_layers``), in the order in
    which the model runs them.

    The matrices are means over heads and steps. A layer with N generated and M reference tokens
    costs ``8 N M`` bytes per sample: 134 MB for 64x64 tokens on both sides.
    """
    found = {}
    for record in maps.store.layers:
        if record.scores_over_reference is not None:
            grid = record.grid(Direction.GENERATED_TO_REFERENCE)
            scores = record.scores_over_reference
            found[record.layer] = alignment(scores, record.generated_grid, grid, radius)
    return found


def alignment_table(maps: AttributionMaps) -> list[dict[str, Any]]:
    """The mean over samples of each layer's alignment, ready for JSON, in the order of the layers.

    ``distance`` counts reference patches, ``relative`` is a share of the diagonal, ``within_one`` the
    share of the attention at most one patch away; ``even`` is the ``relative`` of attention that is
    spread evenly. Layers without a score matrix are left out.
    """
    rows = []
    for layer, found in layer_alignment(maps).items():
        record = maps.store.layer(layer)
        grids = record.generated_grid, record.grid(Direction.GENERATED_TO_REFERENCE)
        rows.append(
            {
                "layer": layer,
                "generated_grid": grids[0],
                "reference_grid": grids[1],
                "distance": float(found.distance.mean()),
                "relative": float(found.relative.mean()),
                "within_one": float(found.within.mean()),
                "even": float(even_alignment(*grids).relative),
            }
        )
    return rows
