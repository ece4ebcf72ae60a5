"""Options of the attention losses."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from i2am_train.config.build import OptionError, Options
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
    terms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Terms of your own by name: {mine: {fn: my_package.losses:mine, weight: 0.05}}; further keys are
    keywords of the function (i2am_train/EXTENDING.md)."""

    def check(self) -> None:
        """Each term of one's own has a function, a weight and a name that is free."""
        for name, term in self.terms.items():
            _check_term(f"terms.{name}", name, term)

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
        return any(self.weights.values()) or any(term["weight"] for term in self.terms.values())

    @property
    def truth(self) -> bool:
        """True if a term that is on is given the true correspondence."""
        own = (term.get("truth") and term["weight"] for term in self.terms.values())
        return bool(self.supervised) or any(own)


def _check_term(option: str, name: str, term: dict[str, Any]) -> None:
    """Refuses what is no term; whether its function can be imported is found out later."""
    if not re.fullmatch(r"[^\W\d]\w*", name):
        raise OptionError(option, term, "a name of letters, digits and underscores")
    if name in (*TERMS, "total", "denoising"):
        raise OptionError(option, term, f"a name that is not taken, as '{name}' is")
    if not isinstance(term.get("fn"), str):
        raise OptionError(option, term, "{fn: package.module:name, weight: 0.05}")
    weight: Any = term.get("weight")
    if type(weight) not in (int, float) or not 0 <= weight < math.inf:
        raise OptionError(f"{option}.weight", weight, "a finite number of at least 0")
    term["weight"] = float(weight)
    if not isinstance(term.get("truth", False), bool):
        raise OptionError(f"{option}.truth", term["truth"], "true or false")
