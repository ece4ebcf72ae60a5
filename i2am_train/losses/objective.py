"""What training minimises (paper eq. 22): the denoising loss, and the weighted sum of attention terms.

Weights of terms are applied here and nowhere else; ``training/step.py`` adds the two.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from inspect import signature
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from i2am_train.attention.hooks import AttentionInputs
from i2am_train.config.objective import TERMS, ObjectiveConfig, TermConfig
from i2am_train.config.options import convert
from i2am_train.doors import calls, resolve
from i2am_train.errors import ConfigError
from i2am_train.losses.attention import Attention, Pictures, attention_centers, attention_of_tokens
from i2am_train.losses.paper import VARIANTS, Variant
from i2am_train.ops.numerics import at_least_float32
from i2am_train.types import GridSize, Need, PredictionType, TermSchedule


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

NEEDS: tuple[Need, ...] = get_args(Need)


class Term(NamedTuple):
    """One attention loss, its weight, and when it counts."""

    weight: float
    function: Callable[[Attention], Float[Tensor, " batch"]]
    needs: tuple[Need, ...] = ()
    """The optional fields of `Attention` that it is given."""
    schedule: TermSchedule = "constant"
    share: float = 1.0
    """Share of the run that the schedule speaks of."""
    timesteps: tuple[int, int] | None = None
    """First and end of the drawn diffusion timesteps that count; None: all."""

    def weight_at(self, progress: float) -> float:
        """The weight at a point of the run, from 0 at its first step to almost 1 at its last.

        ``early``: on before ``share``, then 0. ``late``: 0 before, then on. ``ramp``: times min(1, progress / share).

        >>> [Term(2.0, VARIANTS["reward"].tv, schedule="late", share=0.5).weight_at(step / 4) for step in range(4)]
        [0.0, 0.0, 2.0, 2.0]
        >>> [Term(2.0, VARIANTS["reward"].tv, schedule="ramp", share=0.5).weight_at(step / 4) for step in range(4)]
        [0.0, 1.0, 2.0, 2.0]
        """
        match self.schedule:
            case "early":
                return self.weight if progress < self.share else 0.0
            case "late":
                return 0.0 if progress < self.share else self.weight
            case "ramp":
                return self.weight * min(1.0, progress / self.share)
        return self.weight


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Weighted sum of terms over layers (eq. 22). Without a term, attention is not looked at.

    ``sum over terms of weight * sum over layers of the layer's weight * the term's mean over the samples that count``.

    >>> from i2am_train.losses.attention import attention_on_grids
    >>> on = attention_on_grids(torch.eye(4)[None], torch.ones(1, 4).bool(), GridSize(2, 2), GridSize(2, 2))
    >>> total, terms = Objective(terms={"cwg": Term(0.5, VARIANTS["reward"].cwg)})({2: on})
    >>> total, terms  # every patch looks at a single place
    (tensor(-0.5000), {'cwg': tensor(-1.)})
    """

    terms: Mapping[str, Term] = field(default_factory=dict)
    """By the name that is logged."""
    layers: Mapping[int | str, float] = field(default_factory=lambda: {2: 1.0})
    """Weight of each layer by its number in the paper, whose own is 2 (A.5), or its name."""
    centers: Callable[[Tensor], Tensor] = attention_centers
    """Reading of eq. 15."""

    @property
    def needs(self) -> set[Need]:
        """The optional fields of `Attention` that terms need.

        >>> Objective(terms={"dcml": Term(1.0, VARIANTS["reward"].dcml, needs=("slope",))}).needs
        {'slope'}
        """
        return {need for term in self.terms.values() for need in term.needs}

    def counted(
        self, conditioned: Bool[Tensor, " batch"], timesteps: Int[Tensor, " batch"] | None = None
    ) -> Bool[Tensor, "terms batch"]:
        """Which samples each term counts: those with a condition whose timestep lies in the term's window.

        Raises:
            ConfigError: a term has a window, and there are no timesteps.

        >>> form = VARIANTS["reward"]
        >>> objective = Objective(terms={"tv": Term(1.0, form.tv), "cwg": Term(1.0, form.cwg, timesteps=(0, 500))})
        >>> objective.counted(torch.tensor([True, True, False]), torch.tensor([499, 500, 3]))
        tensor([[ True,  True, False],
                [ True, False, False]])
        """
        counted = [conditioned] * len(self.terms)
        for index, (name, term) in enumerate(self.terms.items()):
            if term.timesteps is not None:
                if timesteps is None:
                    raise ConfigError(f"The term '{name}' has a window of timesteps, and the step handed over none.")
                first, end = term.timesteps
                counted[index] = conditioned & (timesteps >= first) & (timesteps < end)
        return torch.stack(counted) if counted else conditioned.new_zeros(0, len(conditioned))

    def __call__(
        self,
        attention: Mapping[int | str, Attention],
        timesteps: Int[Tensor, " batch"] | None = None,
        *,
        counts: Float[Tensor, " terms"] | None = None,
        progress: float = 0.0,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The weighted sum with gradient, and each term's mean for the log: without its weight, with the layers'.

        Of several layers, ``<term>@<layer>`` is the mean of one, without any weight.

        Means are over the samples that the term counts. One whose mask is empty counts with the value 0, so that
        the pull on a sample does not depend on its neighbours' masks. If there is none, the mean is 0 with a gradient
        of 0.

        Args:
            attention: of each layer.
            timesteps: drawn ones, which a term with a window asks for.
            counts: divide the sums instead of the numbers of samples that count: with several processes or batches the
                mean of it over all, so that the mean of their losses is that over all samples.
            progress: share of the run's optimizer steps that are done.
        """
        one = next(iter(attention.values()))
        if counts is None:
            counts = self.counted(one.conditioned, timesteps).sum(dim=1)
        divisors = counts.to(one.centers.device).clamp(min=1e-6)  # none: 0 / 1e-6
        samples = {layer: self.per_sample(attention[layer], timesteps) for layer in self.layers}
        total, logged = one.centers.new_zeros(()), {}
        for index, (name, term) in enumerate(self.terms.items()):
            means = {layer: values[name].sum() / divisors[index] for layer, values in samples.items()}
            mean = torch.stack([self.layers[layer] * value for layer, value in means.items()]).sum()
            if weight := term.weight_at(progress):
                total = total + weight * mean
            logged[name] = mean.detach()
            if len(means) > 1:
                logged |= {f"{name}@{layer}": value.detach() for layer, value in means.items()}
        return total, logged

    def per_sample(
        self, attention: Attention, timesteps: Int[Tensor, " batch"] | None = None
    ) -> dict[str, Float[Tensor, " batch"]]:
        """Each term of one layer, unweighted; 0 for samples that do not count.

        >>> from i2am_train.losses.attention import attention_on_grids
        >>> scores, mask = torch.eye(4).expand(2, 4, 4), torch.ones(2, 4).bool()
        >>> on = attention_on_grids(scores, mask, *[GridSize(2, 2)] * 2, conditioned=torch.tensor([True, False]))
        >>> Objective(terms={"cwg": Term(0.5, VARIANTS["reward"].cwg)}).per_sample(on)
        {'cwg': tensor([-1., 0.])}
        """
        counted = dict(zip(self.terms, self.counted(attention.conditioned, timesteps), strict=True))
        with torch.autocast(attention.centers.device.type, enabled=False):
            values = {name: term.function(_seen(attention, term, counted[name])) for name, term in self.terms.items()}
        return {name: value.where(counted[name], 0.0) for name, value in values.items()}


def _seen(attention: Attention, term: Term, counted: Bool[Tensor, " batch"]) -> Attention:
    """What a term is given: nothing that it does not need, and no sample that does not count."""
    hidden: dict[str, Any] = dict.fromkeys(set(NEEDS) - set(term.needs))
    seen = attention._replace(**hidden)
    if term.timesteps is None:
        return seen
    return seen._replace(mask=attention.mask & counted[:, None, None], conditioned=counted)


def make_objective(options: ObjectiveConfig) -> Objective:
    """The objective of a training: the terms of ``objective.terms`` that have a weight.

    Raises:
        ConfigError: ``layers`` is null, or a term's function cannot be imported or called, has no such keyword, or does
            not give what a term gives.

    >>> objective = make_objective(ObjectiveConfig(layers=2, terms={"cwg": {"weight": 0.01}}))
    >>> list(objective.terms), objective.layers
    (['cwg'], {2: 1.0})
    """
    variant = VARIANTS[options.variant]
    terms = {name: _term(name, entry, variant) for name, entry in options.active.items()}
    return Objective(terms=terms, layers=options.layer_weights, centers=variant.centers)


def _term(name: str, entry: TermConfig, variant: Variant) -> Term:
    """A term with its keywords, tried on a small example."""
    option = f"objective.terms.{name}"
    needs: Sequence[Need] = entry.needs
    if entry.fn is None:
        built_in = TERMS[name]
        module, _, attribute = built_in.fn.partition(":")
        function = variant._asdict().get(name) or getattr(import_module(module), attribute)
        needs, keywords = built_in.needs_of(entry.keywords), _keywords(function, entry.keywords, option)
        named, expected = option, "other keywords"
    else:
        function = resolve(entry.fn, f"{option}.fn", EXPECTED, calls("attention", **entry.keywords))
        keywords, named, expected = entry.keywords, f"{option}.fn={entry.fn}", EXPECTED
    if keywords:
        function = partial(function, **keywords)
    if wrong := _what_is_wrong(function, needs):
        raise ConfigError(f"{named} {wrong}. Expected {expected}.")
    return Term(entry.weight, function, tuple(needs), entry.schedule, entry.share or 1.0, entry.timesteps)


def _keywords(function: Callable[..., Any], given: Mapping[str, Any], option: str) -> dict[str, Any]:
    """Keywords of a built-in term with the types and ranges of its annotations.

    Those that a term and the centres must agree on are the variant's to set.
    """
    plain = function.func if isinstance(function, partial) else function
    hints = get_type_hints(plain, include_extras=True)
    known = [name for name in signature(plain).parameters if name not in ("attention", "origin")]
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ConfigError(
                f"{option} has no keyword '{name}'. Its own are {', '.join(known)}; those of every term are weight, "
                f"schedule, share and timesteps.{hint}"
            )
    return {name: convert(hints[name], value, f"{option}.{name}") for name, value in given.items()}


def _what_is_wrong(term: Callable[[Attention], Any], needs: Collection[Need]) -> str | None:
    """Calls a term with two samples, of which the second has an empty mask; the end of a sentence on what it gives."""
    logits = torch.linspace(0, 360, 2 * 12 * 30).sin().reshape(2, 12, 30).requires_grad_()
    whole, in_blocks = _small_examples(logits, needs)
    hint = "" if needs else " (attention.target is None without needs: [target], and so are the other needs)"
    found = _tried(term, whole)
    if isinstance(found, str):
        return f"fails with {found}{hint}"
    if not isinstance(found, Tensor) or found.shape != (2,) or not found.is_floating_point():
        shown = f"{tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else found
        return f"returns {shown} for a batch of 2 samples and not one number for each"
    if not found.requires_grad:
        return "returns values without a gradient"
    (gradient,) = torch.autograd.grad(found.sum(), logits, retain_graph=True)
    if not (found.isfinite().all() and gradient.isfinite().all()):
        return (
            f"returns {found.tolist()} for a sample with a mask and one with an empty mask, or a gradient that is not "
            "finite (a mean over the mask divides by mask.sum().clamp(min=1))"
        )
    again = _tried(term, in_blocks)
    if isinstance(again, str):
        return f"fails where by_patch hands it a block of patches, as for a large layer, with {again}"
    if not torch.allclose(again, found, rtol=1e-3, atol=1e-5) and torch.equal(_tried(term, whole), found):
        return (
            f"returns {found.tolist()}, and {again.tolist()} where by_patch hands it blocks of patches, as for a large "
            "layer (what is handed to by_patch must treat every patch alone)"
        )
    return None


def _small_examples(logits: Float[Tensor, "2 12 30"], needs: Collection[Need]) -> tuple[Attention, Attention]:
    """Attention of these logits, and the same without its matrices."""
    mask = torch.tensor([[True], [False]]).expand(2, 12)
    heads = logits.log_softmax(dim=-1)[:, None]
    ramp = torch.linspace(-1, 1, 8 * 6).view(8, 6).expand(2, 3, 8, 6)
    matched = torch.eye(30)[:12].expand(2, 12, 30)
    parts: dict[Need, Any] = {
        "target": torch.where(mask[..., None], torch.ones(2, 12, 2), torch.nan),
        "matches": lambda rows: matched[:, rows],
        "log_heads": True,
        "log_mass": heads[:, 0, :, :5].logsumexp(dim=-1),
        "slope": torch.ones(2, 2),
        "pictures": Pictures(ramp.flip(2), mask[:, :1, None].expand(2, 8, 6), ramp),
    }
    given: dict[str, Any] = {need: parts[need] for need in needs}
    tokens = AttentionInputs(logits[:, None], torch.eye(30).expand(2, 1, 30, 30), 1.0)
    whole, in_blocks = (
        attention_of_tokens(tokens, mask, GridSize(4, 3), GridSize(6, 5), block_bytes=size, **given)
        for size in (None, 5 * 2 * 30 * 4)  # five patches
    )
    return whole, in_blocks


def _tried(term: Callable[[Attention], Any], attention: Attention) -> Any:
    """What a term gives, or the text of its error; options that are not possible are one of their own."""
    try:
        return term(attention)
    except ConfigError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
