"""The forward process and one DDIM step, as formulas on tensors.

The schedule's numbers come from diffusers' ``DDIMScheduler``; the step is ours, because the authors' time grid
{0, 20, ..., 980, 999} is not one that diffusers can express.
"""

from diffusers import DDIMScheduler
from jaxtyping import Float, Int
from torch import Tensor, nn

from i2am_train.errors import ConfigError
from i2am_train.types import PredictionType


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
        return self.signal[timesteps][:, None, None, None], self.noise[timesteps][
            :, None, None, None
        ]

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
    ) -> tuple[
        Float[Tensor, "batch channel height width"], Float[Tensor, "batch channel height width"]
    ]:
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
