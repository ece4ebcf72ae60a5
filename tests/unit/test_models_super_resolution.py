"""Start latents of super-resolution models (paper eqs. 23 and 24)."""

import pytest
import torch
from diffusers import DDPMScheduler

from i2am_train.errors import ConfigError
from i2am_train.models.super_resolution import PASD_RESIDUAL, low_resolution_start

SHAPE = (2, 4, 3, 5)


@pytest.fixture
def scheduler() -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def test_seesr_start_is_the_schedulers_noising(scheduler: DDPMScheduler) -> None:
    """Equation 23 is the forward process at the last timestep, as the public code has it."""
    picture, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    expected = scheduler.add_noise(picture, noise, torch.tensor([999, 999]))
    start = low_resolution_start(picture, noise, float(scheduler.alphas_cumprod[-1]))
    torch.testing.assert_close(start, expected)


def test_pasd_keeps_less_of_the_picture() -> None:
    """Equation 24 with alpha_T = 0.0047: sqrt(.1189 * .0047) of the picture, and unit variance in all."""
    zero, one = torch.zeros(SHAPE), torch.ones(SHAPE)
    kept = low_resolution_start(one, zero, 0.0047, PASD_RESIDUAL)
    noise = low_resolution_start(zero, one, 0.0047, PASD_RESIDUAL)
    assert kept[0, 0, 0, 0].item() == pytest.approx(0.023640, abs=1e-6)
    torch.testing.assert_close(kept**2 + noise**2, one)


def test_impossible_levels_are_refused() -> None:
    """A cumulative alpha above one (a beta, a percentage) is named."""
    with pytest.raises(ConfigError, match=r"alpha_cumprod 2 .* must lie in \[0, 1\]"):
        low_resolution_start(torch.zeros(SHAPE), torch.zeros(SHAPE), 2)
