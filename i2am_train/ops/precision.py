"""The number format of losses and scores: float32 at least, whatever autocast says.

The functions that follow this rule use sums and elementwise products only. Autocast would quietly
run a matrix product of float32 tensors in bfloat16.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def at_least_float32(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Float16 and bfloat16 become float32; float32 and float64 stay as they are.

    >>> at_least_float32(torch.zeros(2, dtype=torch.bfloat16)).dtype
    torch.float32
    >>> at_least_float32(torch.zeros(2, dtype=torch.float64)).dtype
    torch.float64
    """
    return values if values.dtype in (torch.float32, torch.float64) else values.float()
