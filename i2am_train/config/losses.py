"""Options of the attention losses."""

from __future__ import annotations

from dataclasses import dataclass

from i2am_train.config.build import Options
from i2am_train.config.constraints import Layer, NotNegative, Positive
from i2am_train.types import TERMS, LossVariant, TermName


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig(Options):
    """Attention losses added to the denoising loss; a weight of 0 switches a term off."""

    variant: LossVariant = LossVariant.REWARD
    """Form of the attention losses; i2am_train/types.py says what each does."""
    layer: Layer = 2
    """Layer that is trained: a paper number 1...9 or a name like up_blocks.1.attentions.1."""
    dcml: NotNegative = 0.0
    """Weight of distance centering (order of the attention centres)."""
    tv: NotNegative = 0.0
    """Weight of total variation (smoothness of the field of centres)."""
    cwg: NotNegative = 0.0
    """Weight of center weighting (sharpness of the attention around its centre)."""
    supervised: NotNegative = 0.0
    """Weight of the cross-entropy to the true correspondence, which only some data have; arms that
    use it are marked and not ranked."""
    sigma: Positive | None = None
    """Standard deviation of the Gaussians of cwg and supervised, in reference patches; null: the
    variant's own (0.5 for authors_v1, 1.0 for all others)."""
    margin: NotNegative = 1.0
    """Gap that the margin variant asks for, in reference patches per generated patch."""
    detach_centers: bool = False
    """Stop the gradient of cwg at the centres."""

    @property
    def width(self) -> float:
        """The sigma that is used: the one given, or the variant's own."""
        return self.variant.sigma if self.sigma is None else self.sigma

    @property
    def weights(self) -> dict[TermName, float]:
        """Weight by term, the terms that are off included."""
        return {name: getattr(self, name) for name in TERMS}

    @property
    def active(self) -> bool:
        """True if any attention loss is on, that is, if attention must be captured in training."""
        return any(weight != 0.0 for weight in self.weights.values())
