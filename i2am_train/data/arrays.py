"""A try-on sample as numpy arrays, as it is drawn, read and augmented before it becomes tensors.

Without torch: the processes that draw the synthetic dataset start faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]

GREY = 128
"""What the agnostic image shows where the clothes were."""


@dataclass(frozen=True, kw_only=True)
class SampleArrays:
    """Pictures of one sample: images RGB uint8 ``[H, W, 3]``, masks bool ``[H, W]`` (True = inside).

    ``correspondence`` is float32 ``[H, W, 2]``: y and x on the flat garment in 0..1, NaN where there is no garment.
    """

    person: Image
    garment: Image
    agnostic: Image
    densepose: Image
    garment_mask: Mask
    inpaint_mask: Mask
    warped_garment_mask: Mask
    correspondence: NDArray[np.float32]
