"""The forward process as formulas on tensors, and solvers that go back: at which timesteps the network is evaluated.

A solver evaluates the network once per step and draws no noise, so that a sample is a function of its initial noise
alone. The schedule's numbers and the fast solvers are diffusers'; DDIM is ours, because the authors' time grid
{0, 20, ..., 980, 999} is not one that diffusers can express.
"""

import warnings
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from jaxtyping import Float, Int
from torch import Tensor, nn

from i2am_train.errors import ConfigError
from i2am_train.types import PredictionType, SamplerName


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
        """Number of training timesteps (1000 for Stable Diffusion)."""
        return len(self.signal)

    def levels(
        self, timesteps: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch 1 1 1"], Float[Tensor, "batch 1 1 1"]]:
        """Signal and noise amplitude of each sample, ready to multiply images."""
        return self.signal[timesteps][:, None, None, None], self.noise[timesteps][:, None, None, None]

    def noised(
        self,
        clean: Float[Tensor, "batch channel height width"],
        noise: Float[Tensor, "batch channel height width"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channel height width"]:
        """x_t = signal * x_0 + noise_level * eps (Ho et al. 2020, eq. 4)."""
        signal, level = self.levels(timesteps)
        return signal * clean + level * noise

    def target(
        self,
        clean: Float[Tensor, "batch channel height width"],
        noise: Float[Tensor, "batch channel height width"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channel height width"]:
        """What the network is asked for: eps, or v = signal * eps - noise_level * x_0."""
        if self.prediction_type is PredictionType.EPSILON:
            return noise
        signal, level = self.levels(timesteps)
        return signal * noise - level * clean

    def clean_and_noise(
        self,
        prediction: Float[Tensor, "batch channel height width"],
        noisy: Float[Tensor, "batch channel height width"],
        timesteps: Int[Tensor, " batch"],
    ) -> tuple[Float[Tensor, "batch channel height width"], Float[Tensor, "batch channel height width"]]:
        """The x_0 and the eps that a prediction stands for."""
        signal, level = self.levels(timesteps)
        if self.prediction_type is PredictionType.EPSILON:
            return (noisy - level * prediction) / signal, prediction
        return signal * noisy - level * prediction, level * noisy + signal * prediction


def ddim_timesteps(steps: int, length: int = 1000) -> list[tuple[int, int]]:
    """Pairs (evaluated timestep, timestep stepped to) in sampling order, on the authors' grid.

    The last pair's output is the predicted clean latent; timestep 0 is never evaluated.

    >>> ddim_timesteps(4)
    [(999, 750), (750, 500), (500, 250), (250, 0)]
    """
    if not 1 <= steps <= length:
        raise ConfigError(
            f"sampling.steps is {steps}; the noise schedule has {length} timesteps. "
            f"Set it to a number from 1 to {length} (the paper uses 50)."
        )
    grid = [length * index // steps for index in range(steps)] + [length - 1]
    return [(grid[i], grid[i - 1]) for i in range(steps, 0, -1)]


def guided(
    unconditional: Float[Tensor, "*shape"], conditional: Float[Tensor, "*shape"], guidance: float
) -> Float[Tensor, "*shape"]:
    """Classifier-free guidance: unconditional + guidance * (conditional - unconditional)."""
    return unconditional + guidance * (conditional - unconditional)


class SolverStep(NamedTuple):
    """What one step gives."""

    latents: Float[Tensor, "batch channel height width"]
    """Where the next step begins; after the last step, the clean latent."""
    clean: Float[Tensor, "batch channel height width"]
    """The clean latent that the network predicts at this step."""


@runtime_checkable
class Solver(Protocol):
    """Takes a whole batch from noise to clean latents, step by step."""

    timesteps: list[int]
    """Where the network is evaluated, noisiest first."""

    def step(
        self,
        step_index: int,
        prediction: Float[Tensor, "batch channel height width"],
        latents: Float[Tensor, "batch channel height width"],
    ) -> SolverStep:
        """Follows the (guided) prediction that was made for ``latents`` at ``timesteps[step_index]``."""


class DDIMSolver:
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


class MultistepSolver:
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


def make_solver(name: SamplerName, schedule: NoiseSchedule, steps: int) -> Solver:
    """The solver that ``sampling.sampler`` names.

    Raises:
        ConfigError: the schedule does not have so many timesteps.
    """
    if name == "ddim":
        return DDIMSolver(schedule, steps)
    if not 1 <= steps <= schedule.length:
        raise ConfigError(
            f"sampling.steps is {steps}; the noise schedule has {schedule.length} timesteps. Set it to a number from 1 "
            f"to {schedule.length}."
        )
    return MultistepSolver(name, schedule, steps)
