"""What one try-on sample is, alone and in a batch: the contract between datasets and everything above them."""

from __future__ import annotations

from typing import TypedDict, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class TryOnSample(TypedDict):
    """One sample. Images lie in [-1, 1]; masks are True inside the region that their name says.

    ``correspondence`` gives, for each person pixel on the garment, its place (yx) on the flat garment in units of
    the garment picture's height and width: the centre of row r is at (r + .5) / H. It is NaN where there is none.
    """

    name: str
    """The person's file stem, such as ``00017_00``."""
    garment_name: str
    """The garment's file stem; equal to ``name`` in paired mode."""
    index: int
    """Position in the pair list, whatever subset is read: what per-sample seeds are made of."""
    paired: bool
    """Whether the person wears this garment in the ``person`` image."""
    person: Float[Tensor, "3 height width"]
    garment: Float[Tensor, "3 height width"]
    agnostic: Float[Tensor, "3 height width"]
    densepose: Float[Tensor, "3 height width"]
    garment_mask: Bool[Tensor, "height width"]
    inpaint_mask: Bool[Tensor, "height width"]
    """True where the model has to paint."""
    warped_garment_mask: Bool[Tensor, "height width"]
    """The garment on the person; all False where it is not known."""
    correspondence: Float[Tensor, "height width 2"]


class TryOnBatch(TypedDict):
    """A batch: torch's default collation of :class:`TryOnSample`."""

    name: list[str]
    garment_name: list[str]
    index: Int[Tensor, " batch"]
    paired: Bool[Tensor, " batch"]
    person: Float[Tensor, "batch 3 height width"]
    garment: Float[Tensor, "batch 3 height width"]
    agnostic: Float[Tensor, "batch 3 height width"]
    densepose: Float[Tensor, "batch 3 height width"]
    garment_mask: Bool[Tensor, "batch height width"]
    inpaint_mask: Bool[Tensor, "batch height width"]
    warped_garment_mask: Bool[Tensor, "batch height width"]
    correspondence: Float[Tensor, "batch height width 2"]


def batch_on(batch: TryOnBatch, device: torch.device | str) -> TryOnBatch:
    """The same batch with all its tensors on a device."""
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return cast(TryOnBatch, moved)
