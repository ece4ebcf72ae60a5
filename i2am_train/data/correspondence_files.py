"""How the exact correspondence is stored: 16-bit PNG, channels y, x, valid (RGB order)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WHOLE = 65_535
"""A coordinate is stored as round(coordinate x 65535), and valid as 0 or 65535."""


def encode_correspondence(correspondence: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Coordinates ``[H, W, 2]`` in 0..1 with NaN, as 16-bit ``[H, W, 3]``.

    >>> encode_correspondence(np.array([[[0.5, 1.0], [np.nan, np.nan]]], np.float32)).tolist()
    [[[32768, 65535, 65535], [0, 0, 0]]]
    """
    valid = ~np.isnan(correspondence[..., :1])
    whole = np.rint(np.where(valid, correspondence, 0.0) * WHOLE)
    return np.concatenate([whole, valid * WHOLE], axis=-1).astype(np.uint16)


def decode_correspondence(encoded: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Inverse of :func:`encode_correspondence`, exact to 1 / 131070."""
    coordinates = encoded[..., :2].astype(np.float32) / np.float32(WHOLE)
    return np.where(encoded[..., 2:] > WHOLE // 2, coordinates, np.float32(np.nan))
