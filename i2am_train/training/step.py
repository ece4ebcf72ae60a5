"""What one training step draws and computes: the denoising loss plus the weighted attention losses.

A sample's noise depends on the run's seed, the epoch and the sample's index and on nothing else, so the numbers are the
same on one process or several, in any batch, and after a restart.

Where gradients are accumulated, attention terms are means over the samples of the whole optimizer step that they count
(the condition was not dropped, and the timestep lies in the term's window): for several batches to be one large batch,
all of them must divide by the same number. Order, dropped conditions and timesteps are functions of (seed, epoch,
sample), so it is known before the first of them is computed.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from i2am_train.attention.trace import ScoreTap
from i2am_train.data.cache import ENCODED, TOKENS, CachedBatch
from i2am_train.data.dataset import TryOnBatch
from i2am_train.errors import CaptureError
from i2am_train.losses.attention import Attention, Pictures, attention_of_tokens
from i2am_train.losses.objective import Objective, denoising_loss, snr_weights
from i2am_train.metrics.attention import target_on_grid
from i2am_train.models.tryon import Moments, TryOnModel
from i2am_train.ops.grids import garment_slope, mask_on_grid, matches_on_grid
from i2am_train.seeds import seed_for
from i2am_train.types import GridSize, Need

TrainingBatch = TryOnBatch | CachedBatch
"""Pictures, or what the frozen encoders made of them (:mod:`i2am_train.data.cache`)."""

ENCODED_AT_ONCE = 16
"""Samples. Chosen by us: the largest tensor of SD1.5's VAE at 512x384 is then 1.6 GB in float32."""

# -- random numbers -------------------------------------------------------------------------------------------------


class Draws(NamedTuple):
    """Random numbers of one training step."""

    timesteps: Int[Tensor, " batch"]
    """Uniform over the scheduler's timesteps."""
    noise: Float[Tensor, "batch 4 latent_height latent_width"]
    """The noise that the denoiser is asked for."""
    posterior: Float[Tensor, "batch 3 4 latent_height latent_width"]
    """Noise of the VAE's posteriors of person, agnostic and pose (the authors sample all three)."""
    dropped: Bool[Tensor, " batch"]
    """Samples whose reference is replaced by the null tokens."""


def draw(
    seed: int, epoch: int, indices: list[int], *, latent: GridSize, timesteps: int, condition_dropout: float
) -> Draws:
    """Random numbers for the samples with the given dataset indices.

    >>> one = draw(0, 3, [7, 9], latent=GridSize(4, 2), timesteps=1000, condition_dropout=0.2)
    >>> other = draw(0, 3, [9], latent=GridSize(4, 2), timesteps=1000, condition_dropout=0.2)
    >>> bool((one.noise[1] == other.noise[0]).all())
    True
    """
    rows = [
        _draw_one(seed_for(seed, "training", epoch, index), latent, timesteps, condition_dropout) for index in indices
    ]
    return Draws(*(torch.stack(column) for column in zip(*rows, strict=True)))


def _draw_one(
    seed: int, latent: GridSize, timesteps: int, condition_dropout: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(timesteps, (), generator=generator),
        torch.randn(4, *latent, generator=generator),
        torch.randn(3, 4, *latent, generator=generator),
        torch.rand((), generator=generator) < condition_dropout,
    )


def batches_of_step(
    order: list[int], batch_size: int, batch_index: int, accumulate: int, batches: int
) -> list[list[int]]:
    """The samples of each batch that goes into the same optimizer step as batch ``batch_index`` of the epoch.

    ``order`` is the epoch's, on this process; the epoch has ``batches``, and its last step may have fewer than others.

    >>> batches_of_step([5, 3, 0, 1, 4, 2], batch_size=2, batch_index=1, accumulate=2, batches=3)
    [[5, 3], [0, 1]]
    >>> batches_of_step([5, 3, 0, 1, 4, 2], batch_size=2, batch_index=2, accumulate=2, batches=3)
    [[4, 2]]
    """
    first = batch_index - batch_index % accumulate
    starts = [number * batch_size for number in range(first, min(first + accumulate, batches))]
    return [order[start : start + batch_size] for start in starts]


# -- frozen networks ------------------------------------------------------------------------------------------------


@torch.no_grad()  # no inference mode, whose tensors cannot be kept for a gradient
def encode_pictures(model: TryOnModel, pictures: Mapping[str, Any]) -> dict[str, Tensor]:
    """What VAE and reference encoder make of a batch's pictures, as a cache holds it (``CachedBatch``).

    ``ENCODED_AT_ONCE`` samples at a time, in the networks' own number format where that is half precision.
    """
    device = model.device.type
    own = torch.autocast(device, enabled=False) if model.vae.dtype == torch.bfloat16 else nullcontext()
    with own:
        values: dict[str, Tensor] = {}
        for name in ENCODED:
            moments = [model.encode_moments(part) for part in pictures[name].split(ENCODED_AT_ONCE)]
            values[f"{name}_mean"], values[f"{name}_std"] = map(torch.cat, zip(*moments, strict=True))
        tokens = [model.encode_garment(part) for part in pictures["garment"].split(ENCODED_AT_ONCE)]
    return values | {TOKENS: torch.cat(tokens)}


# -- losses ---------------------------------------------------------------------------------------------------------


def step_losses(
    model: TryOnModel,
    batch: TrainingBatch,
    draws: Draws,
    objective: Objective,
    tap: ScoreTap | None,
    *,
    snr_gamma: float | None = None,
    counts: Float[Tensor, " terms"] | None = None,
    progress: float = 0.0,
    encoders: TryOnModel | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Losses by name: ``denoising``, each attention term (unweighted), and ``total`` with gradient.

    Args:
        tap: listens to the objective's layers; None where the objective has no term.
        snr_gamma: Min-SNR weighting of the denoising loss; None: plain mean squared error.
        counts: divide the attention terms' sums: the mean number of samples that each counts over the batches whose
            gradients are accumulated. None: the numbers in this batch.
        progress: share of the run's optimizer steps that are done, for terms with a schedule.
        encoders: the model whose frozen networks encode pictures; None: ``model`` itself.

    Raises:
        CaptureError: there are attention terms and no tap to read the attention from.
    """
    if TOKENS not in batch:
        values: Any = {**batch, **encode_pictures(encoders or model, batch)}
        batch = values
    denoising = _denoising(model, batch, draws, snr_gamma)
    if not objective.terms:
        return {"denoising": denoising.detach(), "total": denoising}
    if tap is None:
        raise CaptureError(
            f"The objective has attention terms ({', '.join(objective.terms)}) and got no score tap. "
            f"Attach ScoreTap(model, layers={list(objective.layers)}) before the step and hand it over."
        )
    if counts is None:
        counts = objective.counted(~draws.dropped, draws.timesteps).sum(dim=1).float()
    attention = {layer: _attention(batch, draws, objective, tap, layer) for layer in objective.layers}
    total, terms = objective(attention, draws.timesteps, counts=_mean_over_processes(counts), progress=progress)
    return {"denoising": denoising.detach(), **terms, "total": denoising + total}


def _denoising(model: TryOnModel, batch: Any, draws: Draws, snr_gamma: float | None) -> Float[Tensor, ""]:
    person, agnostic, pose = (
        model.sample_latents(Moments(batch[f"{name}_mean"], batch[f"{name}_std"]), draws.posterior[:, position])
        for position, name in enumerate(ENCODED)
    )
    schedule = model.schedule
    noisy = schedule.noised(person, draws.noise, draws.timesteps)
    prediction = model(noisy, draws.timesteps, agnostic, pose, batch[TOKENS], draws.dropped)
    weights = snr_weights(schedule.signal.square(), draws.timesteps, schedule.prediction_type, snr_gamma)
    target = schedule.target(person, draws.noise, draws.timesteps)
    return denoising_loss(prediction, target, weights).mean()


def _attention(batch: TrainingBatch, draws: Draws, objective: Objective, tap: ScoreTap, layer: int | str) -> Attention:
    worn = batch["warped_garment_mask"]
    pictures: Any = batch  # a cache has none: TrainConfig refuses terms that need them
    generated, reference = grids = tap.generated_grid(layer), tap.reference_grid(layer)
    parts: dict[Need, Callable[[], Any]] = {
        "target": lambda: target_on_grid(batch["correspondence"], worn, *grids),
        "matches": lambda: partial(matches_on_grid, batch["correspondence"], worn, *grids),
        "log_heads": lambda: True,
        "log_mass": lambda: tap.log_mass(layer),
        "slope": lambda: garment_slope(worn, batch["garment_mask"], *grids),
        "pictures": lambda: Pictures(pictures["person"], worn, pictures["garment"]),
    }
    needed: dict[str, Any] = {need: parts[need]() for need in objective.needs}
    return attention_of_tokens(
        tap.tokens(layer),
        mask_on_grid(worn, generated),
        generated,
        reference,
        conditioned=~draws.dropped,
        centers=objective.centers,
        **needed,
    )


def _mean_over_processes(count: Float[Tensor, " terms"]) -> Float[Tensor, " terms"]:
    """The mean of numbers over all processes; collective under torch.distributed.

    >>> _mean_over_processes(torch.tensor([3.0]))
    tensor([3.])
    """
    mean = count.clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean
