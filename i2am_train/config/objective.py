"""Options of the attention losses: which terms, on which layers, from when to when; and the table of built-in terms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

from i2am_train.config.options import (
    LAYER,
    Layer,
    Natural,
    NotNegative,
    OptionError,
    Options,
    Positive,
    Rule,
    build,
    plain,
)
from i2am_train.errors import ConfigError
from i2am_train.types import LossVariant, Need, TermSchedule


class BuiltIn(NamedTuple):
    """A term of the package."""

    fn: str
    """Import path of its function, as that of a term of one's own."""
    needs: tuple[Need, ...] = ()
    """What it is given beside scores, centres and masks."""
    needs_with: Mapping[tuple[str, Any], tuple[Need, ...]] = MappingProxyType({})
    """What it is given, too, where a keyword has a value."""

    def needs_of(self, keywords: Mapping[str, Any]) -> tuple[Need, ...]:
        """What it is given with these keywords.

        >>> TERMS["dcml"].needs_of({"force": "reward"}), TERMS["dcml"].needs_of({"force": "extent"})
        ((), ('slope',))
        """
        more = [
            need for (name, value), needs in self.needs_with.items() if keywords.get(name) == value for need in needs
        ]
        return (*self.needs, *more)


TERMS: dict[str, BuiltIn] = {
    "dcml": BuiltIn(
        "i2am_train.losses.paper:dcml", needs_with={("force", force): ("slope",) for force in ("capped", "extent")}
    ),
    "tv": BuiltIn("i2am_train.losses.paper:tv"),
    "cwg": BuiltIn("i2am_train.losses.paper:cwg"),
    "supervised": BuiltIn("i2am_train.losses.literature:supervised", needs=("target",)),
    "matches": BuiltIn("i2am_train.losses.literature:matches", needs=("matches", "log_heads")),
    "leffa": BuiltIn("i2am_train.losses.literature:leffa", needs=("log_heads", "pictures")),
    "entropy": BuiltIn("i2am_train.losses.literature:entropy"),
    "mass": BuiltIn("i2am_train.losses.literature:mass", needs=("log_mass",)),
    "atv": BuiltIn("i2am_train.losses.literature:atv", needs=("log_heads",)),
}
"""Attention losses of the package: all there is to do for a new one, beside writing it. They are computed, summed and
logged in this order, before those of one's own."""

_TAKEN = ("total", "denoising")
"""Names of other losses in the log."""
TRUTH: frozenset[Need] = frozenset({"target", "matches"})
"""Needs that are made of the true correspondence; arms with a term that has one are marked and not ranked."""
_OWN = "{fn: package.module:name, weight: 0.05}"
SHARE = Rule("more than 0 and at most 1", lambda share: 0 < share <= 1)


@dataclass(kw_only=True, slots=True)
class TermConfig(Options):
    """What the objective does with a term; all other keys of its entry are keywords of its function."""

    weight: NotNegative
    """Factor in the sum; 0 switches the term off."""
    fn: str | None = None
    """Import path of the function of a term of one's own."""
    needs: list[Need] = field(default_factory=list)
    """What it is given beside scores, centres and masks; those of built-in terms are known."""
    schedule: TermSchedule = "constant"
    """How the weight goes over the optimizer steps of the run: constant; early (on for the first share, then off);
    late (off for the first share, then on); ramp (from 0 up to the weight over the first share)."""
    share: Annotated[float, SHARE] | None = None
    """Share of the run's steps that the schedule speaks of: {schedule: early, share: 0.25} of 60 steps is on in steps 0
    to 14."""
    timesteps: tuple[Natural, Natural] | None = None
    """Window [first, end) of the diffusion timesteps: [0, 500] counts samples whose drawn timestep is 0 to 499, and the
    mean is over those; null: all."""
    keywords: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """A schedule has its share, and a window of timesteps something inside.

        >>> TermConfig(weight=1, schedule="early")
        Traceback (most recent call last):
            ...
        i2am_train.config.options.OptionError: share=null is not possible: expected the share of steps that early ...
        """
        if self.schedule != "constant" and self.share is None:
            raise OptionError("share", None, f"the share of steps that {self.schedule} speaks of, such as 0.25")
        if self.schedule == "constant" and self.share is not None:
            raise OptionError("share", self.share, "none with schedule=constant, or a schedule (early, late, ramp)")
        if self.schedule == "late" and self.share == 1:
            raise OptionError("share", self.share, "less than 1 with schedule=late: the term would never be on")
        if self.timesteps is not None and self.timesteps[0] >= self.timesteps[1]:
            raise OptionError("timesteps", list(self.timesteps), "[first, end) with first below end, such as [0, 500]")


_OF_EVERY_TERM = {item.name for item in fields(TermConfig)} - {"keywords"}


def term_config(name: str, entry: Any) -> TermConfig:
    """An entry of ``objective.terms``, checked; whether its function can be imported and called is found out later.

    Raises:
        OptionError: there is no such term, or a key of every term has no possible value.

    >>> term_config("cwg", {"weight": 0.01, "sigma": 2}).keywords
    {'sigma': 2}
    >>> term_config("cvg", {"weight": 0.01})
    Traceback (most recent call last):
        ...
    i2am_train.config.options.OptionError: terms.cvg=... is not possible: expected one of dcml, ... Did you mean 'cwg'?
    """
    option = f"terms.{name}"
    if not isinstance(entry, Mapping):
        raise OptionError(option, entry, f"a mapping with a weight, such as {option}={{weight: 0.05}}")
    own = "fn" in entry
    if name in TERMS and own:
        raise OptionError(option, entry, f"a name that is not taken, as '{name}' is by a built-in term")
    if name not in TERMS and not own:
        near = get_close_matches(name, TERMS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise OptionError(option, entry, f"one of {', '.join(TERMS)}, or one of your own, {_OWN}", hint)
    if not re.fullmatch(r"[^\W\d]\w*", name):
        raise OptionError(option, entry, "a name of letters, digits and underscores")
    if name in _TAKEN:
        raise OptionError(option, entry, f"a name that is not taken, as '{name}' is")
    if own and not isinstance(entry["fn"], str):
        raise OptionError(option, entry, _OWN)
    if "weight" not in entry:
        given = f"fn: {entry['fn']}, " if own else ""
        raise OptionError(option, entry, f"a weight, too: {{{given}weight: 0.05}}")
    if "needs" in entry and not own:
        raise OptionError(f"{option}.needs", entry["needs"], "nothing: what a built-in term needs is known")
    values = {key: value for key, value in entry.items() if key in _OF_EVERY_TERM}
    keywords = {key: value for key, value in entry.items() if key not in _OF_EVERY_TERM}
    return build(TermConfig, {**values, "keywords": keywords}, f"{option}.")


def term_needs(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    """What a term of an objective, as files keep it, is given beside scores, centres and masks; none if it is off.

    >>> term_needs("supervised", {"weight": 0.1}), term_needs("mine", {"fn": "a:b", "weight": 0, "needs": ["target"]})
    (('target',), ())
    """
    if not entry["weight"]:
        return ()
    return TERMS[name].needs_of(entry) if name in TERMS else tuple(entry.get("needs", ()))


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig(Options):
    """Attention losses added to the denoising loss."""

    variant: LossVariant = LossVariant.REWARD
    """Form of dcml, tv and cwg: keywords that a term's own go before; i2am_train/types.py says what each does."""
    layers: Layer | list[Layer] | dict[str, Positive] | None = None
    """Layers that are trained: paper numbers 1...9 or names like up_blocks.1.attentions.1, as [2, 5], or with
    a weight each, as {2: 1.0, 5: 0.5}; null: the layer of init (2, the paper's, unless it was trained at
    another). Every term is applied to each. The first of the greatest weight becomes the trained model's own."""
    terms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Losses by name: dcml (order of the attention centres), tv (smoothness of their field), cwg (sharpness
    around them), supervised and matches (cross-entropy to the true correspondence, which only some data have;
    such arms are marked and not ranked), leffa (the warped garment against the person), entropy, mass (share of
    the attention that goes to the reference), atv (tv of each head), or one of your own with fn.
    objective.terms.cwg=0.01 is short for {cwg: {weight: 0.01}}; further keys: schedule (constant, early, late,
    ramp) with share, timesteps, and keywords of the function such as sigma (i2am_train/losses/README.md)."""

    def check(self) -> None:
        """Layers have weights, and terms are terms.

        >>> ObjectiveConfig(layers=[2, 5]).layers, ObjectiveConfig(terms={"cwg": {"weight": 1}}).terms
        ({'2': 1.0, '5': 1.0}, {'cwg': {'weight': 1.0}})
        >>> ObjectiveConfig(terms={"cwg": {"fn": "a:b", "weight": 1}})
        Traceback (most recent call last):
            ...
        i2am_train.config.options.OptionError: terms.cwg=... is not possible: expected a name that is not taken, ...
        """
        if self.layers is not None:
            self.layers = _weights_of(self.layers)
        for name, entry in self.terms.items():
            term = term_config(name, entry)
            self.terms[name] = {k: plain(getattr(term, k)) if k in _OF_EVERY_TERM else v for k, v in entry.items()}
        if self.variant is LossVariant.PAPER and "slope" in self.needs:
            raise OptionError(
                "variant", self.variant, "one whose centres are in reference patches, for a force that has an extent"
            )

    @property
    def layer_weights(self) -> dict[int | str, float]:
        """Weight by layer, paper numbers as numbers, once a command has put a layer in the place of null.

        Raises:
            ConfigError: it is null.

        >>> ObjectiveConfig(layers={2: 1, "up_blocks.2.attentions.1": 0.5}).layer_weights
        {2: 1.0, 'up_blocks.2.attentions.1': 0.5}
        """
        if self.layers is None:
            raise ConfigError(
                "objective.layers=null stands for the layer of the model in init, and no model was asked for it. Set "
                "layers, such as 2, the paper's; commands ask models.by_name.with_layers."
            )
        return {_layer(name): weight for name, weight in _weights_of(self.layers).items()}

    @property
    def first_layer(self) -> int | str:
        """The layer of the greatest weight, of several the first: the one that a trained model is judged at.

        >>> ObjectiveConfig(layers={2: 0.5, 5: 1.0, 6: 1.0}).first_layer
        5
        """
        weights = self.layer_weights
        return max(weights, key=lambda layer: weights[layer])

    @property
    def active(self) -> dict[str, TermConfig]:
        """The terms that have a weight, built-in ones first. Without any, attention is not captured in training.

        >>> list(ObjectiveConfig(terms={"cwg": {"weight": 1}, "tv": {"weight": 0}, "dcml": {"weight": 1}}).active)
        ['dcml', 'cwg']
        """
        order = [name for name in TERMS if name in self.terms] + [name for name in self.terms if name not in TERMS]
        terms = {name: term_config(name, self.terms[name]) for name in order}
        return {name: term for name, term in terms.items() if term.weight}

    @property
    def needs(self) -> set[str]:
        """What the terms are given beside scores, centres and masks.

        >>> ObjectiveConfig(terms={"cwg": {"weight": 1}, "supervised": {"weight": 1}}).needs
        {'target'}
        """
        return {need for name, entry in self.terms.items() for need in term_needs(name, entry)}


def _weights_of(layers: int | str | list[int | str] | dict[str, float]) -> dict[str, float]:
    """Weight by layer, from every way to write it."""
    match layers:
        case dict():
            weights = layers
        case list():
            weights = {str(layer): 1.0 for layer in layers}
        case _:
            weights = {str(layers): 1.0}
    if not weights or (isinstance(layers, list) and len(weights) < len(layers)):
        raise OptionError("layers", layers, "layers without repetition, such as 2, [2, 5] or {2: 1.0, 5: 0.5}")
    for name in weights:
        if not LAYER.holds(_layer(name)):
            raise OptionError(f"layers.{name}", weights[name], LAYER.expected)
    return weights


def _layer(name: str) -> int | str:
    return int(name) if name.isdecimal() else name
