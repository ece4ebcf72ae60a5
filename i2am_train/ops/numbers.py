"""Whether what was computed are numbers: NaN in a score means "no value", and must never mean a fault."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor


def rows_at_fault(values: Float[Tensor, "batch *shape"]) -> Bool[Tensor, " batch"]:
    """True for the samples of a batch with a value that is NaN or infinite; on the values' device, nothing is read.

    >>> import torch
    >>> rows_at_fault(torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [3.0, -torch.inf]])).tolist()
    [False, True, True]
    """
    ends = values.flatten(start_dim=1) if values.ndim > 1 else values[:, None]
    return ~ends.isfinite().all(dim=1)
