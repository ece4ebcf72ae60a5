"""The number format of losses and scores, float32 at least whatever autocast says; and whether values are numbers.

The functions that follow this rule use sums and elementwise products only. Autocast would quietly
run a matrix product of float32 tensors in bfloat16.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def at_least_float32(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Float16 and bfloat16 become float32; float32 and float64 stay as they are.

    >>> at_least_float32(torch.zeros(2, dtype=torch.bfloat16)).dtype
    torch.float32
    >>> at_least_float32(torch.zeros(2, dtype=torch.float64)).dtype
    torch.float64
    """
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def rows_at_fault(values: Float[Tensor, "batch *shape"]) -> Bool[Tensor, " batch"]:
    """True for the samples of a batch with a value that is NaN or infinite; on the values' device, nothing is read.

    >>> import torch
    >>> rows_at_fault(torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [3.0, -torch.inf]])).tolist()
    [False, True, True]
    """
    ends = values.flatten(start_dim=1) if values.ndim > 1 else values[:, None]
    return ~ends.isfinite().all(dim=1)
