"""The forward process as formulas on tensors, and the way back: where it starts, and solvers that say how it goes on.

A solver evaluates the network once per step and draws no noise, so that a sample is a function of its initial noise
alone. The schedule's numbers and the fast solvers are diffusers'; DDIM is ours, because the authors' time grid
{0, 20, ..., 980, 999} is not one that diffusers can express.
"""

import warnings
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from jaxtyping import Float, Int
from torch import Tensor, nn

from i2am_train.errors import ConfigError
from i2am_train.types import PredictionType, SamplerName

SEESR_RESIDUAL = 1.0
"""Equation 23: all of the picture that the last noise level leaves."""
PASD_RESIDUAL = 0.1189
"""The paper's alpha_a for PASD (A.7)."""

_Latents = Float[Tensor, "batch channel height width"]
_Level = Float[Tensor, "batch 1 1 1"]
_Timesteps = Int[Tensor, " batch"]


class NoiseSchedule(nn.Module):
    """Noise levels of a diffusion model and the conversions between its parametrisations.

    ``signal`` is the square root of the cumulative alpha, ``noise`` that of its complement; both have one
    entry for each of the scheduler's timesteps 0 (clean) ... 999 (noise).
    """

    signal: Tensor
    noise: Tensor

    def __init__(self, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.scheduler = scheduler
        self.prediction_type = PredictionType(scheduler.config["prediction_type"])
        alphas = scheduler.alphas_cumprod.double()
        self.register_buffer("signal", alphas.sqrt().float(), persistent=False)
        self.register_buffer("noise", (1 - alphas).clamp_min(0).sqrt().float(), persistent=False)

    @property
    def length(self) -> int:
        """Number of training timesteps (1000 for Stable Diffusion).

        >>> NoiseSchedule(DDIMScheduler()).length
        1000
        """
        return len(self.signal)

    def levels(self, timesteps: _Timesteps) -> tuple[_Level, _Level]:
        """Signal and noise amplitude of each sample, ready to multiply images.

        >>> signal, noise = NoiseSchedule(DDIMScheduler()).levels(torch.tensor([0, 999]))
        >>> signal.shape, bool((signal**2 + noise**2).allclose(torch.ones(2, 1, 1, 1)))
        (torch.Size([2, 1, 1, 1]), True)
        """
        return self.signal[timesteps][:, None, None, None], self.noise[timesteps][:, None, None, None]

    def noised(self, clean: _Latents, noise: _Latents, timesteps: _Timesteps) -> _Latents:
        """x_t = signal * x_0 + noise_level * eps (Ho et al. 2020, eq. 4).

        >>> schedule, last = NoiseSchedule(DDIMScheduler(rescale_betas_zero_snr=True)), torch.tensor([999])
        >>> schedule.noised(torch.full((1, 4, 1, 1), 5.0), torch.ones(1, 4, 1, 1), last).flatten()  # nothing but noise
        tensor([1., 1., 1., 1.])
        """
        signal, level = self.levels(timesteps)
        return signal * clean + level * noise

    def target(self, clean: _Latents, noise: _Latents, timesteps: _Timesteps) -> _Latents:
        """What the network is asked for: eps, or v = signal * eps - noise_level * x_0 (Salimans and Ho 2022).

        >>> noise, at = torch.ones(1, 4, 1, 1), torch.tensor([500])
        >>> bool((NoiseSchedule(DDIMScheduler()).target(torch.zeros(1, 4, 1, 1), noise, at) == noise).all())
        True
        """
        if self.prediction_type is PredictionType.EPSILON:
            return noise
        signal, level = self.levels(timesteps)
        return signal * noise - level * clean

    def clean_and_noise(
        self, prediction: _Latents, noisy: _Latents, timesteps: _Timesteps
    ) -> tuple[_Latents, _Latents]:
        """The x_0 and the eps that a prediction stands for.

        >>> schedule, at = NoiseSchedule(DDIMScheduler(prediction_type="v_prediction")), torch.tensor([500])
        >>> clean, noise = torch.full((1, 4, 1, 1), 0.5), torch.ones(1, 4, 1, 1)
        >>> found = schedule.clean_and_noise(schedule.target(clean, noise, at), schedule.noised(clean, noise, at), at)
        >>> bool(found[0].allclose(clean)), bool(found[1].allclose(noise))
        (True, True)
        """
        signal, level = self.levels(timesteps)
        if self.prediction_type is PredictionType.EPSILON:
            return (noisy - level * prediction) / signal, prediction
        return signal * noisy - level * prediction, level * noisy + signal * prediction


def low_resolution_start(
    low_resolution: _Latents, noise: _Latents, alpha_cumprod: float, residual: float = SEESR_RESIDUAL
) -> _Latents:
    """Where super-resolution models start to denoise: ``sqrt(r a) z_LR + sqrt(1 - r a) z_T`` (paper eqs. 23 and 24).

    ``low_resolution`` are scaled latents of the enlarged low-resolution picture, ``alpha_cumprod`` is the schedule's
    cumulative alpha at the last timestep (0.0047 for Stable Diffusion), ``residual`` is :data:`SEESR_RESIDUAL` (eq. 23;
    what ``scheduler.add_noise(z_LR, noise, 999)`` computes) or :data:`PASD_RESIDUAL` (eq. 24).

    Raises:
        ConfigError: ``residual * alpha_cumprod`` is not in [0, 1].

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


def guided(
    unconditional: Float[Tensor, "*shape"], conditional: Float[Tensor, "*shape"], guidance: float
) -> Float[Tensor, "*shape"]:
    """Classifier-free guidance: unconditional + guidance * (conditional - unconditional) (paper eq. 9).

    >>> guided(torch.tensor([1.0]), torch.tensor([3.0]), 5.0)
    tensor([11.])
    """
    return unconditional + guidance * (conditional - unconditional)


# -- solvers --------------------------------------------------------------------------------------------------------


def ddim_timesteps(steps: int, length: int = 1000) -> list[tuple[int, int]]:
    """Pairs (evaluated timestep, timestep stepped to) in sampling order, on the authors' grid.

    The last pair's output is the predicted clean latent; timestep 0 is never evaluated.

    >>> ddim_timesteps(4)
    [(999, 750), (750, 500), (500, 250), (250, 0)]
    """
    grid = [length * index // steps for index in range(steps)] + [length - 1]
    return [(grid[i], grid[i - 1]) for i in range(steps, 0, -1)]


class SolverStep(NamedTuple):
    """What one step gives."""

    latents: _Latents
    """Where the next step begins; after the last step, the clean latent."""
    clean: _Latents
    """The clean latent that the network predicts at this step."""


class _DDIMSolver:
    """Deterministic DDIM on the authors' time grid (Song et al. 2021)."""

    def __init__(self, schedule: NoiseSchedule, steps: int) -> None:
        self._schedule = schedule
        self._pairs = ddim_timesteps(steps, schedule.length)
        self.timesteps = [timestep for timestep, _ in self._pairs]

    def step(self, step_index: int, prediction: Tensor, latents: Tensor) -> SolverStep:
        """One step; the last one's result is the predicted clean latent."""
        timestep, following = self._pairs[step_index]
        at = torch.full((len(latents),), timestep, device=latents.device)
        clean, noise = self._schedule.clean_and_noise(prediction, latents, at)
        if step_index == len(self.timesteps) - 1:
            return SolverStep(clean, clean)
        return SolverStep(self._schedule.noised(clean, noise, torch.full_like(at, following)), clean)


class _MultistepSolver:
    """A multistep solver of diffusers, of second order, which remembers the steps before.

    ``dpmpp`` is DPM-Solver++(2M) (Lu et al. 2022), ``unipc`` UniPC (Zhao et al. 2023). Timesteps are spaced from the
    end ("trailing"), so that the first is the noisiest also with few steps, as a schedule that ends in pure noise needs
    (Lin et al. 2024). Spacings in noise levels (Karras et al. 2022, or uniform in log-SNR) are no choice there: the
    noise level has no end, and most steps would fall on the last two timesteps.
    """

    def __init__(self, name: SamplerName, schedule: NoiseSchedule, steps: int) -> None:
        kinds = {"dpmpp": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
        self._schedule = schedule
        self._scheduler = kinds[name].from_config(schedule.scheduler.config, timestep_spacing="trailing")
        with warnings.catch_warnings():
            # diffusers turns tensors into arrays in a way that numpy 2 warns of.
            warnings.filterwarnings("ignore", category=DeprecationWarning, message="__array__")
            self._scheduler.set_timesteps(steps, device=schedule.signal.device)
        self.timesteps = [int(timestep) for timestep in self._scheduler.timesteps]

    def step(self, step_index: int, prediction: Tensor, latents: Tensor) -> SolverStep:
        """One step; steps must come in order."""
        timestep = self._scheduler.timesteps[step_index]
        at = torch.full((len(latents),), self.timesteps[step_index], device=latents.device)
        clean, _ = self._schedule.clean_and_noise(prediction, latents, at)
        following = self._scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        return SolverStep(following, clean)


def make_solver(name: SamplerName, schedule: NoiseSchedule, steps: int) -> _DDIMSolver | _MultistepSolver:
    """The solver that ``sampling.sampler`` names: it takes a whole batch from noise to clean latents.

    ``timesteps`` are where the network is evaluated, noisiest first; ``step(index, prediction, latents)`` follows the
    (guided) prediction that was made for ``latents`` at ``timesteps[index]``.

    Raises:
        ConfigError: the schedule does not have so many timesteps.

    >>> schedule = NoiseSchedule(DDIMScheduler())
    >>> make_solver("ddim", schedule, 4).timesteps, make_solver("unipc", schedule, 4).timesteps
    ([999, 750, 500, 250], [999, 749, 499, 249])
    """
    if not 1 <= steps <= schedule.length:
        raise ConfigError(
            f"sampling.steps is {steps}; the noise schedule has {schedule.length} timesteps. "
            f"Set it to a number from 1 to {schedule.length} (the paper uses 50)."
        )
    return _DDIMSolver(schedule, steps) if name == "ddim" else _MultistepSolver(name, schedule, steps)
