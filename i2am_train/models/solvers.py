"""Solvers of the sampling equation: at which timesteps the network is evaluated, and what follows from its prediction.

Each evaluates the network once per step and draws no noise, so that a sample is a function of its initial noise alone.
DDIM is ours, because the authors' time grid is not one that diffusers can express; the fast ones are diffusers'.
"""

import warnings
from typing import NamedTuple, Protocol

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from jaxtyping import Float
from torch import Tensor

from i2am_train.errors import ConfigError
from i2am_train.models.diffusion import NoiseSchedule, ddim_timesteps
from i2am_train.types import SamplerName


class SolverStep(NamedTuple):
    """What one step gives."""

    latents: Float[Tensor, "batch channel height width"]
    """Where the next step begins; after the last step, the clean latent."""
    clean: Float[Tensor, "batch channel height width"]
    """The clean latent that the network predicts at this step."""


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
        return SolverStep(
            self._schedule.noised(clean, noise, torch.full_like(at, following)), clean
        )


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
        self._scheduler = kinds[name].from_config(
            schedule.scheduler.config, timestep_spacing="trailing"
        )
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
