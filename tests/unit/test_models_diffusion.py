"""Every solver solves the same equation, the fast ones in fewer steps; start latents of super-resolution (A.7)."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from i2am_train.attention.trace import trace
from i2am_train.errors import ConfigError
from i2am_train.models.diffusion import PASD_RESIDUAL, NoiseSchedule, low_resolution_start, make_solver
from i2am_train.models.sampling import SamplingStep, sample
from i2am_train.types import SamplerName, SamplingPrecision

SAMPLERS = get_args(SamplerName)
CENTER, SPREAD = 0.3, 0.5


def schedule(prediction_type: str, zero_terminal_snr: bool) -> NoiseSchedule:
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    return NoiseSchedule(scheduler)


def solved(name: SamplerName, of: NoiseSchedule, steps: int, noise: Tensor) -> Tensor:
    """Data from N(CENTER, SPREAD^2), whose best denoiser is known: what a sampler makes of the noise."""
    latents, solver = noise, make_solver(name, of, steps)
    for step_index, timestep in enumerate(solver.timesteps):
        at = torch.full((len(latents),), timestep)
        signal, level = of.levels(at)
        gain = signal * SPREAD**2 / (signal**2 * SPREAD**2 + level**2)
        clean = CENTER + gain * (latents - signal * CENTER)
        prediction = of.target(clean, (latents - signal * clean) / level, at)
        latents = solver.step(step_index, prediction, latents).latents
    return latents


@pytest.mark.parametrize(
    ("prediction_type", "zero_terminal_snr"), [("v_prediction", True), ("v_prediction", False), ("epsilon", False)]
)
def test_samplers_solve_the_equation(prediction_type: str, zero_terminal_snr: bool) -> None:
    """Noise ends where the exact flow of a Gaussian takes it; the fast ones come as near in half as many steps."""
    of = schedule(prediction_type, zero_terminal_snr)
    noise = torch.linspace(-3, 3, 24).reshape(2, 4, 3, 1)
    # The flow keeps each value's quantile: that of the last marginal becomes that of the data.
    signal, level = of.signal[-1], of.noise[-1]
    start = (signal**2 * SPREAD**2 + level**2).sqrt()
    exact = CENTER + SPREAD * (noise - signal * CENTER) / start
    error = {
        (name, steps): float((solved(name, of, steps, noise) - exact).abs().max())
        for name in SAMPLERS
        for steps in (10, 50, 100)
    }
    for name in SAMPLERS:
        assert error[name, 100] < 0.06, error
        assert error[name, 100] < error[name, 50] < error[name, 10]
    for name in ("dpmpp", "unipc"):
        assert error[name, 50] < error["ddim", 100], error
        assert error[name, 10] < error["ddim", 10], error


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_evaluation_per_step_is_announced(name: SamplerName, make_small_model: Callable[..., Any]) -> None:
    """Capture sees every step once, from the noisiest; the image is the same without it, alone and in a batch."""
    model = make_small_model()
    draw = torch.Generator().manual_seed(0)
    given = {image: torch.rand(3, 3, 64, 48, generator=draw) * 2 - 1 for image in ("garment", "agnostic", "densepose")}
    options: dict[str, Any] = {"steps": 3, "guidance": 2.0, "sampler": name}
    seen: list[SamplingStep] = []
    with trace(model) as attention:
        captured = sample(model, **given, seeds=[4, 5, 6], on_step=seen.append, **options)
    assert attention.maps().store.steps == 3
    assert [step.step_index for step in seen] == [0, 1, 2]
    assert seen[0].timestep == model.schedule.length - 1
    assert torch.equal(captured, sample(model, **given, seeds=[4, 5, 6], **options))
    first = {image: pixels[1:2] for image, pixels in given.items()}
    alone = sample(model, **first, seeds=[5], **options)
    torch.testing.assert_close(alone[0], captured[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("precision", "around", "denoiser"),
    [
        (None, False, torch.float32),
        (None, True, torch.bfloat16),
        ("auto", True, torch.float32),
        ("32-true", True, torch.float32),
        ("bf16-mixed", False, torch.bfloat16),
        ("16-mixed", True, torch.float16),
    ],
)
def test_precision_is_the_denoisers(
    precision: SamplingPrecision | None, around: bool, denoiser: torch.dtype, make_small_model: Callable[..., Any]
) -> None:
    """Whatever autocast is around; on a CPU ``auto`` is float32."""
    model = make_small_model()
    found: set[torch.dtype] = set()
    model.unet.up_blocks[1].attentions[1].register_forward_hook(lambda *call: found.add(call[2][0].dtype))
    given = {name: torch.zeros(1, 3, 64, 48) for name in ("garment", "agnostic", "densepose")}
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        sample(model, **given, seeds=[0], steps=2, precision=precision)
    assert found == {denoiser}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_numbers_of_steps(name: SamplerName, steps: int) -> None:
    """The message says what is possible."""
    with pytest.raises(ConfigError, match=rf"sampling\.steps is {steps}; .* from 1 to 1000"):
        make_solver(name, schedule("epsilon", zero_terminal_snr=False), steps)


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
    with pytest.raises(ConfigError, match=r"alpha_cumprod 2.0 .* must lie in \[0, 1\]"):
        low_resolution_start(torch.zeros(SHAPE), torch.zeros(SHAPE), 2.0)
