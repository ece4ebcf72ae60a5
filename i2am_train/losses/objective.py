"""What training minimises (paper eq. 22): the denoising loss, and the weighted sum of attention terms.

Weights of terms are applied here and nowhere else; ``training/step.py`` adds the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from i2am_train.config.training import ObjectiveConfig
from i2am_train.doors import calls, resolve
from i2am_train.errors import ConfigError
from i2am_train.losses.attention import VARIANTS, Attention, attention_centers, attention_on_grids, supervised
from i2am_train.ops.numerics import at_least_float32
from i2am_train.types import GridSize, PredictionType, TermName


def denoising_loss(
    prediction: Float[Tensor, "batch channels height width"],
    target: Float[Tensor, "batch channels height width"],
    weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """Mean squared error of each sample in float32, times its weight (None means 1).

    >>> prediction, target = torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]], [[[2.0, 0.0]]]])
    >>> denoising_loss(prediction, target, torch.tensor([1.0, 0.5]))
    tensor([5., 1.])
    """
    difference = at_least_float32(prediction) - at_least_float32(target)
    error = difference.square().mean(dim=(1, 2, 3))
    return error if weights is None else error * weights


def snr_weights(
    alphas_cumprod: Float[Tensor, " timesteps"],
    timesteps: Int[Tensor, " batch"],
    prediction_type: PredictionType,
    gamma: float | None,
) -> Float[Tensor, " batch"]:
    """Min-SNR weights of the drawn timesteps (Hang et al. 2023, arXiv:2303.09556, section 3.4).

    With the signal-to-noise ratio ``r = a / (1 - a)``: ``min(r, gamma) / r`` for epsilon, ``min(r, gamma) / (r + 1)``
    for v-prediction. The authors of that paper use gamma 5. None means plain mean squared error: ones. A zero-terminal
    schedule (r = 0) gives 1 for epsilon, not NaN.

    >>> schedule, drawn = torch.tensor([0.9, 0.5]), torch.tensor([0, 1])
    >>> snr_weights(schedule, drawn, PredictionType.EPSILON, gamma=5.0)  # r = 9, 1
    tensor([0.5556, 1.0000])
    >>> snr_weights(schedule, drawn, PredictionType.V_PREDICTION, gamma=5.0)
    tensor([0.5000, 0.5000])
    """
    alphas = at_least_float32(alphas_cumprod)[timesteps]
    if gamma is None:
        return torch.ones_like(alphas)
    ratio = alphas / (1 - alphas)
    if prediction_type is PredictionType.EPSILON:
        return (gamma / ratio).clamp(max=1)
    return ratio.clamp(max=gamma) / (ratio + 1)


EXPECTED = "a function of an Attention (i2am_train/losses/attention.py) that returns one value per sample"


class Term(NamedTuple):
    """One attention loss and its weight."""

    weight: float
    function: Callable[[Attention], Float[Tensor, " batch"]]
    truth: bool = False
    """Whether it is given the true correspondence."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Weighted sum of terms of one layer's attention (eq. 22). Without a term, attention is not looked at.

    >>> on = attention_on_grids(torch.eye(4)[None], torch.ones(1, 4).bool(), GridSize(2, 2), GridSize(2, 2))
    >>> total, terms = Objective(terms={"cwg": Term(0.5, VARIANTS["reward"].cwg)})(on)
    >>> total, terms  # every patch looks at a single place
    (tensor(-0.5000), {'cwg': tensor(-1.)})
    """

    terms: Mapping[str, Term] = field(default_factory=dict)
    """By the name that is logged."""
    layer: int | str = 2
    """Number of the layer in the paper, whose own is 2 (A.5), or its name."""
    centers: Callable[[Tensor], Tensor] = attention_centers
    """Reading of eq. 15."""

    @property
    def truth(self) -> bool:
        """Whether a term needs the true correspondence.

        >>> Objective(terms={"supervised": Term(1.0, supervised, truth=True)}).truth
        True
        """
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
        """Each term, unweighted; 0 where the condition was dropped.

        >>> scores, mask = torch.eye(4).expand(2, 4, 4), torch.ones(2, 4).bool()
        >>> on = attention_on_grids(scores, mask, *[GridSize(2, 2)] * 2, conditioned=torch.tensor([True, False]))
        >>> Objective(terms={"cwg": Term(0.5, VARIANTS["reward"].cwg)}).per_sample(on)
        {'cwg': tensor([-1., 0.])}
        """
        blind = attention._replace(target=None)
        with torch.autocast(attention.scores.device.type, enabled=False):
            values = {name: term.function(attention if term.truth else blind) for name, term in self.terms.items()}
        return {name: value.where(attention.conditioned, 0.0) for name, value in values.items()}


def make_objective(options: ObjectiveConfig) -> Objective:
    """The objective of a training: the terms of ``objective.<term>`` and ``objective.terms`` that have a weight.

    Raises:
        ConfigError: a term from outside cannot be imported or called, or does not give what a term gives.

    >>> objective = make_objective(ObjectiveConfig(cwg=0.01))
    >>> list(objective.terms), objective.layer
    (['cwg'], 2)
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
