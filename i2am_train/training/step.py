"""What one training step computes: the denoising loss plus the weighted attention losses of one layer.

A batch holds pictures, or what the frozen encoders made of them (:mod:`i2am_train.data.cache`).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from i2am_train.attention.live import ScoreTap
from i2am_train.attention.recipe import LayerId
from i2am_train.data.cache import ENCODED, TOKENS, CachedBatch
from i2am_train.data.sample import TryOnBatch
from i2am_train.errors import CaptureError
from i2am_train.losses.denoising import denoising_loss, snr_weights
from i2am_train.losses.objective import AttentionObjective, ObjectiveValue
from i2am_train.metrics.correspondence import target_on_grid
from i2am_train.models.tryon import Moments, TryOnModel
from i2am_train.ops.masks import mask_on_grid
from i2am_train.training.draws import Draws

TrainingBatch = TryOnBatch | CachedBatch


@dataclass(frozen=True, kw_only=True)
class TrainingObjective:
    """Everything that decides the loss of a batch, without state."""

    attention: AttentionObjective = field(default_factory=AttentionObjective)
    """Attention losses; with no active term the attention is not looked at."""
    layer: LayerId = 2
    """Layer whose attention the losses see; the paper's is number 2 (A.5)."""
    snr_gamma: float | None = None
    """Min-SNR weighting of the denoising loss; None: plain mean squared error."""

    @property
    def needs_attention(self) -> bool:
        """True if a score tap must be attached."""
        return bool(self.attention.weights.active)

    def __call__(
        self,
        model: TryOnModel,
        batch: TrainingBatch,
        draws: Draws,
        tap: ScoreTap | None,
        conditioned: Float[Tensor, ""] | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """Losses by name: ``denoising``, each active attention term (unweighted), and ``total`` with gradient.

        ``conditioned`` divides the attention terms' sums: the mean number of samples with a condition over the batches
        whose gradients are accumulated. None: the number in this batch.

        Raises ``CaptureError`` when there are attention terms and no tap to read the attention from.
        """
        denoising = self._denoising(model, batch, draws)
        if not self.needs_attention:
            return {"denoising": denoising.detach(), "total": denoising}
        if tap is None:
            raise CaptureError(
                f"The objective has attention terms ({', '.join(self.attention.weights.active)}) and got no score tap. "
                f"Attach ScoreTap(model, layers=[{self.layer!r}]) before the step and hand it over."
            )
        if conditioned is None:
            conditioned = (~draws.dropped).sum().float()
        attention = self._attention(batch, draws, tap, mean_over_processes(conditioned))
        return {
            "denoising": denoising.detach(),
            **attention.terms,
            "total": denoising + attention.total,
        }

    def _denoising(
        self, model: TryOnModel, batch: TrainingBatch, draws: Draws
    ) -> Float[Tensor, ""]:
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
        weights = snr_weights(
            schedule.signal.square(), draws.timesteps, schedule.prediction_type, self.snr_gamma
        )
        target = schedule.target(person, draws.noise, draws.timesteps)
        return denoising_loss(prediction, target, weights).mean()

    def _attention(
        self, batch: TrainingBatch, draws: Draws, tap: ScoreTap, count: Float[Tensor, ""]
    ) -> ObjectiveValue:
        generated, reference = tap.generated_grid(self.layer), tap.reference_grid(self.layer)
        target = None
        if self.attention.weights.active.get("supervised"):
            target = target_on_grid(
                batch["correspondence"], batch["warped_garment_mask"], generated, reference
            )
        return self.attention(
            tap.scores(self.layer),
            mask_on_grid(batch["warped_garment_mask"], generated),
            generated_grid=generated,
            reference_grid=reference,
            target=target,
            conditioned=~draws.dropped,
            count=count,
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
