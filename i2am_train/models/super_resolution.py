"""Where super-resolution models start to denoise: noise that still holds the low-resolution picture (paper A.7)."""

from jaxtyping import Float
from torch import Tensor

from i2am_train.errors import ConfigError

SEESR_RESIDUAL = 1.0
"""Equation 23: all of the picture that the last noise level leaves."""
PASD_RESIDUAL = 0.1189
"""The paper's alpha_a for PASD (A.7)."""


def low_resolution_start(
    low_resolution: Float[Tensor, "batch channel height width"],
    noise: Float[Tensor, "batch channel height width"],
    alpha_cumprod: float,
    residual: float = SEESR_RESIDUAL,
) -> Float[Tensor, "batch channel height width"]:
    """Start latents ``sqrt(r a) z_LR + sqrt(1 - r a) z_T`` (paper eqs. 23 and 24).

    ``low_resolution`` are scaled latents of the enlarged low-resolution picture, ``alpha_cumprod`` is the schedule's
    cumulative alpha at the last timestep (0.0047 for Stable Diffusion), ``residual`` is :data:`SEESR_RESIDUAL` (eq. 23;
    what ``scheduler.add_noise(z_LR, noise, 999)`` computes) or :data:`PASD_RESIDUAL` (eq. 24).

    Raises:
        ConfigError: ``residual * alpha_cumprod`` is not in [0, 1].

    >>> import torch
    >>> picture, noise = torch.full((2, 1, 1, 1), 10.0), torch.ones(2, 1, 1, 1)
    >>> round(low_resolution_start(picture, noise, 0.36)[0].item(), 6)  # .6 * 10 + .8 * 1
    6.8
    """
    kept = residual * alpha_cumprod
    if not 0 <= kept <= 1:
        raise ConfigError(
            f"residual {residual} times alpha_cumprod {alpha_cumprod} is {kept}; it must lie in [0, 1]. "
            "alpha_cumprod is scheduler.alphas_cumprod[-1]."
        )
    return float(kept**0.5) * low_resolution + float((1 - kept) ** 0.5) * noise
