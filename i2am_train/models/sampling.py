"""Sampling with classifier-free guidance (paper eq. 9).

The sampler owns time: around each evaluation it announces the step and the conditional rows, so that listeners such as
``trace`` never have to guess them.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from i2am_train.attention.frames import announce
from i2am_train.models.diffusion import guided, make_solver
from i2am_train.models.graphs import Call, replayed
from i2am_train.models.tryon import Conditions, Images, Latents, TryOnModel
from i2am_train.models.watch import Watch
from i2am_train.ops.numerics import chosen_precision
from i2am_train.types import SamplerName, SamplingPrecision


class SamplingStep(NamedTuple):
    """One finished step, handed to ``on_step``."""

    step_index: int
    timestep: int
    noisy: Latents
    """The latent that the model was asked about."""
    clean: Latents
    """The clean latent that it predicts at this step."""


def _arithmetic(precision: SamplingPrecision | None, device: torch.device) -> AbstractContextManager[object]:
    if precision is None:
        return nullcontext()
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(chosen_precision(precision, device))
    return torch.autocast(device.type, half, enabled=half is not None)


def _initial_noise(model: TryOnModel, seeds: Sequence[int]) -> Latents:
    """Standard normal latents, one stream for each sample: the same alone, in a batch, on two processes."""
    shape = (4, *model.latent_size)
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(model.device)


@torch.no_grad()
def sample(
    model: TryOnModel,
    garment: Images,
    agnostic: Images,
    densepose: Images,
    *,
    seeds: Sequence[int],
    steps: int = 50,
    guidance: float = 5.0,
    sampler: SamplerName = "ddim",
    precision: SamplingPrecision | None = None,
    cuda_graphs: bool = True,
    names: Sequence[str] | None = None,
    on_step: Callable[[SamplingStep], None] | None = None,
) -> Images:
    """Images in [-1, 1] of the persons in the garments; all inputs are in [-1, 1].

    ``steps``, ``guidance`` and ``sampler`` default to the paper's. With guidance 1 the unconditional half is not
    computed. Every sampler evaluates the network once per step, which ``trace`` hears of. ``precision`` is the
    denoiser's; None: that of its weights, or of the ``torch.autocast`` around the call. ``cuda_graphs`` replays the
    denoiser on a GPU (:func:`~i2am_train.models.graphs.replayed`), whose memory is kept until the model is gone or
    :func:`~i2am_train.models.graphs.release_graphs` is called. ``names`` of the samples are for messages.

    Raises:
        ConfigError: the card has no bfloat16, which ``precision`` asks for.
        NotFiniteError: a network gave NaN or infinity; the message names the step and the samples.
    """
    conditions = encoded_conditions(model, garment, agnostic, densepose)
    return sample_conditioned(
        model,
        conditions,
        seeds=seeds,
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        precision=precision,
        cuda_graphs=cuda_graphs,
        names=names,
        on_step=on_step,
    )


@torch.no_grad()
def encoded_conditions(model: TryOnModel, garment: Images, agnostic: Images, densepose: Images) -> Conditions:
    """What the denoiser is told of these pictures, which are in [-1, 1]."""
    return Conditions(model.encode_latents(agnostic), model.encode_latents(densepose), model.encode_reference(garment))


@torch.no_grad()
def sample_conditioned(
    model: TryOnModel,
    conditions: Conditions,
    *,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    sampler: SamplerName,
    precision: SamplingPrecision | None = None,
    cuda_graphs: bool = True,
    names: Sequence[str] | None = None,
    on_step: Callable[[SamplingStep], None] | None = None,
) -> Images:
    """As :func:`sample`, of inputs that are encoded already."""
    watch = Watch(names)
    watch.see(conditions.agnostic, "The VAE's latents of the agnostic image")
    watch.see(conditions.pose, "The VAE's latents of the DensePose image")
    watch.see(conditions.tokens, "The reference encoder's tokens of the garment")
    # An autocast around the call may have encoded them in another type than the denoiser computes in.
    conditions = Conditions(*(part.to(model.unet.dtype) for part in conditions))
    latents = _initial_noise(model, seeds)
    solver = make_solver(sampler, model.schedule, steps)
    asked = conditions if guidance == 1.0 else _doubled(model, conditions)
    call = replayed(model.unet) if cuda_graphs else None
    with _arithmetic(
        precision, latents.device
    ):  # around all steps: autocast keeps what it rounded, where calls are not replayed
        for step_index, timestep in enumerate(solver.timesteps):
            at = torch.full((len(asked.tokens),), timestep, device=latents.device)
            prediction = _predict(model, latents, at, asked, guidance, step_index, call)
            noisy = latents
            latents, clean = solver.step(step_index, prediction, noisy)
            watch.see_step(steps, step_index, timestep, latents)
            if on_step is not None:
                on_step(SamplingStep(step_index, timestep, noisy, clean))
    watch.check()
    return model.decode_latents(latents, names)


def _doubled(model: TryOnModel, conditions: Conditions) -> Conditions:
    """The batch [unconditional, conditional], as in diffusers."""
    null_tokens = model.projector.null_tokens.to(conditions.tokens.dtype).expand(len(conditions.tokens), -1, -1)
    return Conditions(
        conditions.agnostic.repeat(2, 1, 1, 1),
        conditions.pose.repeat(2, 1, 1, 1),
        torch.cat([null_tokens, conditions.tokens]),
    )


def _predict(
    model: TryOnModel,
    latents: Tensor,
    timesteps: Tensor,
    conditions: Conditions,
    guidance: float,
    step_index: int,
    call: Call | None,
) -> Tensor:
    """The guided prediction; conditions and timesteps are doubled where there is guidance."""
    count, rows = len(latents), len(timesteps)
    with announce(step_index=step_index, conditional_rows=slice(rows - count, rows)):
        noisy = latents.repeat(rows // count, 1, 1, 1)
        prediction = model.denoise(noisy, timesteps, conditions, call).float()
    if rows == count:
        return prediction
    unconditional, conditional = prediction.chunk(2)
    return guided(unconditional, conditional, guidance)
