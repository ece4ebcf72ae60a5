"""Golden file 10: noise schedule, time grid, guidance, one DDIM step and the forward process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from i2am_train.models.diffusion import NoiseSchedule, ddim_timesteps, guided


@pytest.fixture
def schedule() -> NoiseSchedule:
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return NoiseSchedule(scheduler)


def as_images(values: list[float]) -> torch.Tensor:
    return torch.tensor(values)[None, :, None, None]


def test_cumulative_alphas(schedule: NoiseSchedule, golden: Callable[[str], Any]) -> None:
    """diffusers' scaled-linear schedule is the authors', to float32."""
    for timestep, alpha in golden("10")["expected"]["alphas_bar_at"].items():
        assert schedule.signal[int(timestep)].item() ** 2 == pytest.approx(alpha, rel=2e-5)


def test_time_grid(golden: Callable[[str], Any]) -> None:
    """50 steps evaluate 999, 980, ..., 20 and never 0."""
    expected = golden("10")["expected"]["custom_pairs_t_to_tprev"]
    assert [list(pair) for pair in ddim_timesteps(50)] == expected


def test_guidance_and_step(schedule: NoiseSchedule, golden: Callable[[str], Any]) -> None:
    """Guided epsilon, predicted clean latent and the DDIM step agree with the golden numbers."""
    inputs, expected = golden("10")["inputs"], golden("10")["expected"]
    noisy = as_images(inputs["x"])
    epsilon = guided(as_images(inputs["eps_uncond"]), as_images(inputs["eps_cond"]), inputs["cfg_scale"])
    assert epsilon.flatten().tolist() == pytest.approx(expected["cfg_eps"], rel=1e-5)
    for name, (at, following), key in (
        ("step_999_to_980", (999, 980), "pred_x0"),
        ("step_20_to_0", (20, 0), "pred_x0 (custom final output)"),
    ):
        clean, noise = schedule.clean_and_noise(epsilon, noisy, torch.tensor([at]))
        assert clean.flatten().tolist() == pytest.approx(expected[name][key], rel=1e-3)
        stepped = schedule.noised(clean, noise, torch.tensor([following]))
        assert stepped.flatten().tolist() == pytest.approx(expected[name]["x_prev"], rel=1e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_parametrisations_invert(prediction_type: str) -> None:
    """The clean latent and the noise come back from the target of either parametrisation."""
    schedule = NoiseSchedule(DDIMScheduler(prediction_type=prediction_type))
    clean, noise = torch.randn(3, 4, 5, 2), torch.randn(3, 4, 5, 2)
    at = torch.tensor([1, 300, 700])
    noisy = schedule.noised(clean, noise, at)
    found = schedule.clean_and_noise(schedule.target(clean, noise, at), noisy, at)
    torch.testing.assert_close(found[0], clean, atol=2e-3, rtol=0)
    torch.testing.assert_close(found[1], noise, atol=2e-3, rtol=0)
