"""What one training step computes: the denoising loss plus the weighted attention losses of one layer.

A batch holds pictures, or what the frozen encoders made of them (:mod:`i2am_train.data.cache`).
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from i2am_train.attention.trace import ScoreTap
from i2am_train.data.cache import ENCODED, TOKENS, CachedBatch
from i2am_train.data.dataset import TryOnBatch
from i2am_train.errors import CaptureError
from i2am_train.losses.attention import Attention, attention_on_grids
from i2am_train.losses.objective import Objective, denoising_loss, snr_weights
from i2am_train.metrics.attention import target_on_grid
from i2am_train.models.tryon import Moments, TryOnModel
from i2am_train.ops.grids import mask_on_grid
from i2am_train.training.draws import Draws

TrainingBatch = TryOnBatch | CachedBatch


def step_losses(
    model: TryOnModel,
    batch: TrainingBatch,
    draws: Draws,
    objective: Objective,
    tap: ScoreTap | None,
    *,
    snr_gamma: float | None = None,
    conditioned: Float[Tensor, ""] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Losses by name: ``denoising``, each attention term (unweighted), and ``total`` with gradient.

    Args:
        tap: listens to the objective's layer; None where the objective has no term.
        snr_gamma: Min-SNR weighting of the denoising loss; None: plain mean squared error.
        conditioned: divides the attention terms' sums: the mean number of samples with a condition over the batches
            whose gradients are accumulated. None: the number in this batch.

    Raises:
        CaptureError: there are attention terms and no tap to read the attention from.
    """
    denoising = _denoising(model, batch, draws, snr_gamma)
    if not objective.terms:
        return {"denoising": denoising.detach(), "total": denoising}
    if tap is None:
        raise CaptureError(
            f"The objective has attention terms ({', '.join(objective.terms)}) and got no score tap. "
            f"Attach ScoreTap(model, layers=[{objective.layer!r}]) before the step and hand it over."
        )
    if conditioned is None:
        conditioned = (~draws.dropped).sum().float()
    total, terms = objective(_attention(batch, draws, objective, tap), mean_over_processes(conditioned))
    return {"denoising": denoising.detach(), **terms, "total": denoising + total}


def _denoising(model: TryOnModel, batch: TrainingBatch, draws: Draws, snr_gamma: float | None) -> Float[Tensor, ""]:
    with torch.no_grad():
        person, agnostic, pose = (
            model.sample_latents(_moments(model, batch, name), draws.posterior[:, position])
            for position, name in enumerate(ENCODED)
        )
    schedule = model.schedule
    noisy = schedule.noised(person, draws.noise, draws.timesteps)
    prediction = model(
        noisy, draws.timesteps, agnostic, pose, batch.get("garment"), draws.dropped, batch.get(TOKENS)
    )  # fmt: skip
    weights = snr_weights(schedule.signal.square(), draws.timesteps, schedule.prediction_type, snr_gamma)
    target = schedule.target(person, draws.noise, draws.timesteps)
    return denoising_loss(prediction, target, weights).mean()


def _attention(batch: TrainingBatch, draws: Draws, objective: Objective, tap: ScoreTap) -> Attention:
    layer, worn = objective.layer, batch["warped_garment_mask"]
    generated, reference = tap.generated_grid(layer), tap.reference_grid(layer)
    target = None
    if objective.truth:
        target = target_on_grid(batch["correspondence"], worn, generated, reference)
    return attention_on_grids(
        tap.scores(layer),
        mask_on_grid(worn, generated),
        generated,
        reference,
        target=target,
        conditioned=~draws.dropped,
        centers=objective.centers,
    )


def mean_over_processes(count: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The mean of a number over all processes; collective under torch.distributed.

    >>> mean_over_processes(torch.tensor(3.0))
    tensor(3.)
    """
    mean = count.clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean


def _moments(model: TryOnModel, batch: Any, name: str) -> Moments:
    """A picture's posterior: as it was cached, or from the encoder."""
    if TOKENS in batch:
        return Moments(batch[f"{name}_mean"], batch[f"{name}_std"])
    return model.encode_moments(batch[name])
