"""The weighted sum of attention terms (eq. 22): the one place where weights are applied."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from i2am_train.errors import ConfigError
from i2am_train.losses.center_weighted import center_weighted
from i2am_train.losses.centers import attention_centers
from i2am_train.losses.distance_centering import dcml
from i2am_train.losses.supervised import correspondence_cross_entropy
from i2am_train.losses.total_variation import total_variation
from i2am_train.ops.precision import at_least_float32
from i2am_train.types import GridSize, LossVariant


@dataclass(frozen=True, kw_only=True)
class TermWeights:
    """Weight of each term. None or 0.0 switches a term off: it is neither computed nor logged.

    Weights belong to a variant. The paper's (.01, .0001, 2) go with sums and with CWG divided by
    H'W'h'w'; the mean-normalised variants need others.

    >>> TermWeights(dcml=0.007, tv=0.002, cwg=0.0).active
    {'dcml': 0.007, 'tv': 0.002}
    """

    dcml: float | None = None
    tv: float | None = None
    cwg: float | None = None
    supervised: float | None = None

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            if weight is not None and not (math.isfinite(weight) and weight >= 0):
                raise ConfigError(
                    f"The weight of the attention term '{name}' is {weight}. Give a finite number "
                    "that is at least 0; 0 or null switches the term off."
                )

    @property
    def active(self) -> dict[str, float]:
        """The terms that are switched on, in a fixed order."""
        return {name: weight for name, weight in asdict(self).items() if weight}


@dataclass(frozen=True)
class ObjectiveValue:
    """What one layer of one batch adds to the training loss."""

    total: Float[Tensor, ""]
    """Weighted sum, with gradient."""
    terms: dict[str, Float[Tensor, ""]]
    """Unweighted batch mean of each active term, detached, for the log as ``loss/<term>``."""


@dataclass(frozen=True, kw_only=True)
class AttentionObjective:
    """Weighted attention terms of one layer.

    Attributes:
        weights: of the terms.
        variant: reading of the paper's three terms.
        margin: of the ``margin`` variant, reference patches per generated step.
        sigma: of CWG in reference patches; None is the variant's own.
        supervised_sigma: of the Gaussian at the true position, in reference patches.
        detach_centers: whether CWG leaves the centres alone.
    """

    weights: TermWeights = field(default_factory=TermWeights)
    variant: LossVariant = LossVariant.REWARD
    margin: float = 1.0
    sigma: float | None = None
    supervised_sigma: float = 1.0
    detach_centers: bool = False

    def __call__(
        self,
        scores: Float[Tensor, "batch generated reference"],
        mask: Bool[Tensor, "batch generated"],
        *,
        generated_grid: GridSize,
        reference_grid: GridSize,
        target: Float[Tensor, "batch generated 2"] | None = None,
        conditioned: Bool[Tensor, " batch"] | None = None,
        count: Float[Tensor, ""] | None = None,
    ) -> ObjectiveValue:
        """Weighted sum of the terms' means over the conditioned samples of the batch.

        ``count`` divides the sums instead of their number: with several processes the mean of it
        over all, so that the mean of the processes' losses is that over all conditioned samples.

        A sample with a dropped condition takes no part: no value, no gradient, not counted. One
        with an empty mask counts with the value 0, so that the pull on a sample does not depend on
        its neighbours' masks. If every condition was dropped, the total is 0 with a gradient of 0.
        """
        samples = self.terms(
            scores,
            mask,
            generated_grid=generated_grid,
            reference_grid=reference_grid,
            target=target,
            conditioned=conditioned,
        )
        if count is None:
            count = torch.full((), len(scores)) if conditioned is None else conditioned.sum()
        divisor = count.to(scores.device).clamp(min=1e-6)  # all dropped: 0 / 1e-6
        means = {name: values.sum() / divisor for name, values in samples.items()}
        total = at_least_float32(scores).new_zeros(())
        for name, weight in self.weights.active.items():
            total = total + weight * means[name]
        return ObjectiveValue(total, {name: mean.detach() for name, mean in means.items()})

    def terms(
        self,
        scores: Float[Tensor, "batch generated reference"],
        mask: Bool[Tensor, "batch generated"],
        *,
        generated_grid: GridSize,
        reference_grid: GridSize,
        target: Float[Tensor, "batch generated 2"] | None = None,
        conditioned: Bool[Tensor, " batch"] | None = None,
    ) -> dict[str, Float[Tensor, " batch"]]:
        """Each active term, unweighted, one value per sample; 0 where the condition was dropped.

        Values depend on their own sample alone, but for CWG of ``authors_v1`` (:func:`center_weighted`).
        """
        if conditioned is not None:
            scores = torch.where(conditioned[:, None, None], scores, 0.0)
            mask = mask & conditioned[:, None]
        values = self._paper_terms(scores, mask, generated_grid, reference_grid, conditioned)
        if "supervised" in self.weights.active:
            values["supervised"] = self._supervised(scores, mask, reference_grid, target)
        return values

    def _paper_terms(
        self,
        scores: Float[Tensor, "batch generated reference"],
        mask: Bool[Tensor, "batch generated"],
        generated_grid: GridSize,
        reference_grid: GridSize,
        conditioned: Bool[Tensor, " batch"] | None,
    ) -> dict[str, Tensor]:
        variant, active, values = self.variant, self.weights.active, dict[str, Tensor]()
        centers = attention_centers(scores, reference_grid, variant)
        if "dcml" in active:
            values["dcml"] = dcml(centers, mask, generated_grid, variant, self.margin)
        if "tv" in active:
            values["tv"] = total_variation(centers, mask, generated_grid, variant)
        if "cwg" in active:
            values["cwg"] = center_weighted(
                scores,
                centers,
                mask,
                reference_grid,
                variant,
                self.sigma,
                self.detach_centers,
                conditioned,
            )
        return values

    def _supervised(
        self,
        scores: Float[Tensor, "batch generated reference"],
        mask: Bool[Tensor, "batch generated"],
        reference_grid: GridSize,
        target: Float[Tensor, "batch generated 2"] | None,
    ) -> Float[Tensor, " batch"]:
        if target is None:
            raise ConfigError(
                "The attention term 'supervised' has a weight, but the data has no correspondence. "
                "Use a dataset with a 'correspondence' folder, or set the weight to 0."
            )
        on_garment = torch.where(mask[..., None], target, torch.nan)
        return correspondence_cross_entropy(
            scores, on_garment, reference_grid, self.supervised_sigma
        )
