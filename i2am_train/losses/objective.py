"""The objective: the weighted sum of attention terms (eq. 22), and the one place where weights are applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from i2am_train.config.training import ObjectiveConfig
from i2am_train.doors import calls, resolve
from i2am_train.errors import ConfigError
from i2am_train.losses.attention import Attention, attention_centers, attention_on_grids, supervised
from i2am_train.losses.variants import VARIANTS
from i2am_train.types import GridSize, TermName

EXPECTED = "a function of an Attention (i2am_train/losses/attention.py) that returns one value per sample"


class Term(NamedTuple):
    """One attention loss and its weight."""

    weight: float
    function: Callable[[Attention], Float[Tensor, " batch"]]
    truth: bool = False
    """Whether it is given the true correspondence."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Weighted sum of terms of one layer's attention. Without a term, attention is not looked at."""

    terms: Mapping[str, Term] = field(default_factory=dict)
    """By the name that is logged."""
    layer: int | str = 2
    """Number of the layer in the paper, whose own is 2 (A.5), or its name."""
    centers: Callable[[Tensor], Tensor] = attention_centers
    """Reading of eq. 15."""

    @property
    def truth(self) -> bool:
        """Whether a term needs the true correspondence."""
        return any(term.truth for term in self.terms.values())

    def __call__(
        self, attention: Attention, count: Float[Tensor, ""] | None = None
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The weighted sum with gradient, and each term's unweighted mean for the log.

        Means are over the samples that have their condition. One whose mask is empty counts with the value 0, so that
        the pull on a sample does not depend on its neighbours' masks. If every condition was dropped, the total is 0
        with a gradient of 0.

        Args:
            count: divides the sums instead of the number of samples that count: with several processes the mean of it
                over all, so that the mean of the processes' losses is that over all samples.
        """
        if count is None:
            count = attention.conditioned.sum()
        divisor = count.to(attention.scores.device).clamp(min=1e-6)  # all dropped: 0 / 1e-6
        means = {name: values.sum() / divisor for name, values in self.per_sample(attention).items()}
        total = attention.scores.new_zeros(())
        for name, term in self.terms.items():
            total = total + term.weight * means[name]
        return total, {name: mean.detach() for name, mean in means.items()}

    def per_sample(self, attention: Attention) -> dict[str, Float[Tensor, " batch"]]:
        """Each term, unweighted; 0 where the condition was dropped."""
        blind = attention._replace(target=None)
        with torch.autocast(attention.scores.device.type, enabled=False):
            values = {name: term.function(attention if term.truth else blind) for name, term in self.terms.items()}
        return {name: value.where(attention.conditioned, 0.0) for name, value in values.items()}


def make_objective(options: ObjectiveConfig) -> Objective:
    """The objective of a training: the terms of ``objective.<term>`` and ``objective.terms`` that have a weight.

    Raises:
        ConfigError: a term from outside cannot be imported or called, or does not give what a term gives.
    """
    variant = VARIANTS[options.variant]
    built_in: dict[TermName, Callable[[Attention], Tensor]] = {
        "dcml": partial(variant.dcml, margin=options.margin),
        "tv": variant.tv,
        "cwg": partial(variant.cwg, sigma=options.width, detach_centers=options.detach_centers),
        "supervised": partial(supervised, sigma=options.width),
    }
    terms: dict[str, Term] = {
        name: Term(weight, built_in[name], truth=name == "supervised")
        for name, weight in options.weights.items()
        if weight
    }
    for name, entry in options.terms.items():
        if entry["weight"]:
            terms[name] = _outside(name, **entry)
    return Objective(terms=terms, layer=options.layer, centers=variant.centers)


def _outside(name: str, fn: str, weight: float, truth: bool = False, **keywords: Any) -> Term:
    """A term by its import path, tried on a small example."""
    option = f"objective.terms.{name}.fn"
    function = resolve(fn, option, EXPECTED, calls("attention", **keywords))
    term = partial(function, **keywords) if keywords else function
    if wrong := _what_is_wrong(term, truth):
        raise ConfigError(f"{option}={fn} {wrong}. Expected {EXPECTED}.")
    return Term(weight, term, truth)


def _what_is_wrong(term: Callable[[Attention], Any], truth: bool) -> str | None:
    """Calls a term with two samples, of which the second has an empty mask; the end of a sentence on what it gives."""
    logits = torch.linspace(0, 360, 2 * 12 * 30).sin().reshape(2, 12, 30).requires_grad_()
    mask = torch.tensor([[True], [False]]).expand(2, 12)
    target = torch.where(mask[..., None], torch.ones(2, 12, 2), torch.nan) if truth else None
    attention = attention_on_grids(logits.softmax(-1), mask, GridSize(4, 3), GridSize(6, 5), target=target)
    try:
        found = term(attention)
    except Exception as error:
        hint = "" if truth else " (attention.target is None without truth: true)"
        return f"fails with {type(error).__name__}: {error}{hint}"
    if not isinstance(found, Tensor) or found.shape != (2,) or not found.is_floating_point():
        shown = f"{tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else found
        return f"returns {shown} for a batch of 2 samples and not one number for each"
    if not found.requires_grad:
        return "returns values without a gradient"
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    if not (found.isfinite().all() and gradient.isfinite().all()):
        return (
            f"returns {found.tolist()} for a sample with a mask and one with an empty mask, or a gradient that is not "
            "finite (a mean over the mask divides by mask.sum().clamp(min=1))"
        )
    return None
