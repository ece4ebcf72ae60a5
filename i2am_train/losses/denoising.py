"""The denoising loss per sample, and its signal-to-noise weights."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from i2am_train.ops.precision import at_least_float32
from i2am_train.types import PredictionType


def denoising_loss(
    prediction: Float[Tensor, "batch channels height width"],
    target: Float[Tensor, "batch channels height width"],
    weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """Mean squared error of each sample in float32, times its weight (None means 1).

    >>> prediction, target = torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]], [[[2.0, 0.0]]]])
    >>> denoising_loss(prediction, target, torch.tensor([1.0, 0.5]))
    tensor([5., 1.])
    """
    difference = at_least_float32(prediction) - at_least_float32(target)
    error = difference.square().mean(dim=(1, 2, 3))
    return error if weights is None else error * weights


def snr_weights(
    alphas_cumprod: Float[Tensor, " timesteps"],
    timesteps: Int[Tensor, " batch"],
    prediction_type: PredictionType,
    gamma: float | None,
) -> Float[Tensor, " batch"]:
    """Min-SNR weights of the drawn timesteps (Hang et al. 2023, arXiv:2303.09556, section 3.4).

    With the signal-to-noise ratio ``r = a / (1 - a)``: ``min(r, gamma) / r`` for epsilon,
    ``min(r, gamma) / (r + 1)`` for v-prediction. The authors of that paper use gamma 5. None means
    plain mean squared error: ones. A zero-terminal schedule (r = 0) gives 1 for epsilon, not NaN.

    >>> schedule, drawn = torch.tensor([0.9, 0.5]), torch.tensor([0, 1])
    >>> snr_weights(schedule, drawn, PredictionType.EPSILON, gamma=5.0)  # r = 9, 1
    tensor([0.5556, 1.0000])
    >>> snr_weights(schedule, drawn, PredictionType.V_PREDICTION, gamma=5.0)
    tensor([0.5000, 0.5000])
    """
    alphas = at_least_float32(alphas_cumprod)[timesteps]
    if gamma is None:
        return torch.ones_like(alphas)
    ratio = alphas / (1 - alphas)
    if prediction_type is PredictionType.EPSILON:
        return (gamma / ratio).clamp(max=1)
    return ratio.clamp(max=gamma) / (ratio + 1)
