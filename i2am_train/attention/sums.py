"""Sums over time, heads and layers: pure functions from a store to tensors on one common grid.
Averages are taken first and maps are resized last: for the axis that a map lies on the two commute,
and the other axis has gone already (exact for bilinear resizing by whole factors). All layers are on
the paper's scale, i.e. probabilities: dividing by the number of terms turns the paper's sums
(eqs. 4, 7, 10-14) into means, which min-max normalisation cannot tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from i2am_train.attention.store import AttributionStore, LayerRecord
from i2am_train.errors import ConfigError
from i2am_train.ops.images import ResizeMode, resize_maps
from i2am_train.types import Direction, GridSize, LayerWeighting


def time_groups(steps: int, groups: int) -> tuple[slice, ...]:
    """Disjoint runs of sampling steps, noisiest first; lengths differ by one at most if ``groups`` does not divide.

    The paper's eq. 11 counts the step between two groups twice; the authors' code does not, nor do
    we (golden 08).

    >>> time_groups(20, 4)[1]
    slice(5, 10, None)
    """
    if not 1 <= groups <= steps:
        raise ConfigError(
            f"{steps} sampling steps cannot be cut into {groups} time groups. "
            f"Choose between 1 and {steps} groups, or sample with more steps."
        )
    borders = [round(group * steps / groups) for group in range(groups + 1)]
    return tuple(slice(start, stop) for start, stop in pairwise(borders))


@dataclass(frozen=True)
class Rollup:
    """How layers become maps: direction, weights of the layers, the common grid, and how maps are resized to it."""

    direction: Direction
    weighting: LayerWeighting
    mode: ResizeMode = "bilinear"

    def common_grid(self, store: AttributionStore) -> GridSize:
        """The finest grid of the direction's maps."""
        grids = [record.grid(self.direction) for record in store.layers]
        return max(grids, key=lambda grid: grid.tokens)

    def layer_maps(
        self, record: LayerRecord, *, groups: int | None = None, heads: bool = False
    ) -> Float[Tensor, "batch group head height width"]:
        """One layer's maps on its own grid: ``groups`` runs of steps (None: one), each head or their mean."""
        steps = record.vectors(self.direction)
        runs = time_groups(steps.shape[1], 1 if groups is None else groups)
        grouped = torch.stack([steps[:, run].mean(dim=1) for run in runs], dim=1)
        if not heads:
            grouped = grouped.mean(dim=2, keepdim=True)
        grid = record.grid(self.direction)
        density = grid.tokens if self.weighting is LayerWeighting.DENSITY else 1.0
        return grouped.reshape(*grouped.shape[:-1], *grid) * density

    def combine(
        self,
        records: Sequence[LayerRecord],
        size: GridSize,
        *,
        groups: int | None = None,
        heads: bool = False,
    ) -> Float[Tensor, "batch group head height width"]:
        """Mean over layers, each resized once per grid. A layer counts once per head, as in the paper's sum."""
        if heads:
            check_equal_heads(records)
        sums: dict[GridSize, Tensor] = {}
        for record in records:
            maps = self.layer_maps(record, groups=groups, heads=heads) * record.heads
            grid = record.grid(self.direction)
            sums[grid] = sums[grid] + maps if grid in sums else maps
        resized = [self._resize(maps, size) for maps in sums.values()]
        return torch.stack(resized).sum(dim=0) / sum(record.heads for record in records)

    def _resize(self, maps: Tensor, size: GridSize) -> Tensor:
        """Bicubic overshoots below zero, where a probability cannot be (the authors clamp too)."""
        if tuple(maps.shape[-2:]) == size:
            return maps
        resized = resize_maps(maps, size, self.mode)
        return resized if self.mode == "bilinear" else resized.clamp(min=0)


def check_equal_heads(records: Sequence[LayerRecord]) -> None:
    """Heads of different layers can be put side by side only if there are equally many."""
    counts = sorted({record.heads for record in records})
    if len(counts) > 1:
        raise ConfigError(
            f"The layers have different numbers of heads ({', '.join(map(str, counts))}), so there "
            "is no map per head over all of them. Use maps.by_head_count(), or select layers with "
            "equally many heads."
        )


def by_resolution(store: AttributionStore) -> dict[GridSize, tuple[LayerRecord, ...]]:
    """Layers by the grid of their generated tokens, coarse to fine."""
    grids = sorted({record.generated_grid for record in store.layers}, key=lambda grid: grid.tokens)
    return {
        grid: tuple(record for record in store.layers if record.generated_grid == grid)
        for grid in grids
    }
