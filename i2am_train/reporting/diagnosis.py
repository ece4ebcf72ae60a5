"""What ``i2am diagnose`` shows: figures by layer and head, how well they foretell the true error, and a proposal.

All is made of the rows that :func:`i2am_train.evaluation.diagnosis.diagnosis` gives, also those of other people's
models. A *place* is a layer's name, or ``name#head``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any, NamedTuple

import yaml

from i2am_train.attention.recipe import paper_number
from i2am_train.metrics.attention import MINIMUM_SPREAD_RATIO, SHARP_ENTROPY
from i2am_train.metrics.diagnosis import MOST_VIOLATIONS, Finding, finding
from i2am_train.reporting.faithfulness import numbered_layer, summary
from i2am_train.reporting.table import Cell, Heading, Mark, Row, Table, number
from i2am_train.results.statistics import correlation, few_samples_note

Results = Mapping[str, Any]
"""Content of ``diagnosis.json``."""


class Shown(NamedTuple):
    """How a figure is shown."""

    heading: Heading
    digits: int
    meaning: str


FIGURES: dict[str, Shown] = {
    "use": Shown(
        Heading("Use"),
        4,
        "Change of the image inside the mask, as a share of its range, when the layer (or head) attends to the whole "
        "reference alike.",
    ),
    "where": Shown(
        Heading("Where", "↑"),
        2,
        "Rank correlation, over generated patches, of the attention that goes to a quarter of the garment with the "
        "change of the image when that quarter is white.",
    ),
    "violations": Shown(
        Heading("Out of order", "↓"),
        2,
        "Share of pairs of garment patches in a row or column whose attention centres lie in the wrong order; .5 is "
        "chance.",
    ),
    "spread": Shown(
        Heading("Spread"),
        2,
        "Spread of the attention centres over that of the garment on the reference; about 1 is right, 0 is collapsed.",
    ),
    "entropy": Shown(
        Heading("Entropy"), 2, "Of the attention of a garment patch, as a share of that of uniform attention."
    ),
    "round_trip": Shown(
        Heading("Round trip", "↑"),
        2,
        "Agreement of both directions: how much of a patch's place is left after the way to the reference and back "
        "(slope); 1 is all, 0 nothing.",
    ),
    "agreement": Shown(
        Heading("Agreement", "↑"),
        2,
        "Concordance of the centres with those of the other layers, which count by their use; 1 is equal.",
    ),
    "sinks": Shown(
        Heading("Sinks"),
        3,
        "Share of the attention that the hundredth of the reference tokens gets which get most, mean over steps.",
    ),
    "error": Shown(
        Heading("True error", "↓"), 2, "Mean distance of the centres from the true place, in reference patches."
    ),
}
"""Figures in the order of the tables; only the last needs the truth."""
_TRUTH = "error"
PAGE, REPAIR, HEADS = "diagnosis.html", "repair.yaml", "diagnosis_heads"
"""The page, the proposed options, and the name of the longest table."""
TERMS_NOTE = "Terms and weights are those of experiment=refined"


# ---- what the rows say -------------------------------------------------------------------------------------------


def diagnosed(rows: Sequence[Mapping[str, Any]], layers: Sequence[str], *, least_use: float) -> dict[str, Any]:
    """Means over samples, what the rule says of each layer, and how well each figure foretells the true error.

    Args:
        rows: of the samples.
        layers: their names, in the model's order.
        least_use: of the rule (:func:`~i2am_train.metrics.diagnosis.finding`).

    >>> row = {"index": 0, "name": "a", "use/l": 0.1, "violations/l": 0.45, "spread/l": 0.9}
    >>> found = diagnosed([row], ["l"], least_use=0.02)
    >>> found["proposal"]["layers"], found["proposal"]["reason"]
    (['l'], 'Layer l: its choice changes the image by 0.100 of the range, and 45 % of its pairs are out of order.')
    """
    scores = summary(rows)
    findings = {layer: finding(*_rule_figures(scores, layer), least_use=least_use) for layer in layers}
    proposed = sorted(
        (name for name in layers if findings[name].proposed), key=lambda name: -mean_of(scores, "use", name)
    )
    return {
        "layers": list(layers),
        "scores": scores,
        "findings": {
            name: {**one._asdict(), "proposed": one.proposed, "near": _near(scores, name, least_use)}
            for name, one in findings.items()
        },
        "foretold": _foretold(scores, layers),
        "proposal": {"layers": proposed, "reason": _reason(scores, findings, proposed, least_use)},
        "samples": list(rows),
    }


def mean_of(scores: Mapping[str, Any], figure: str, place: str) -> Any:
    """The mean of a figure at a place; None where no sample has one."""
    return scores.get(f"{figure}/{place}", {}).get("mean")


def _rule_figures(scores: Mapping[str, Any], layer: str, ends: Sequence[str] = ("mean",) * 3) -> tuple[Any, Any, Any]:
    """What the rule asks of a layer: means, or an end of each interval (the mean where there is none)."""

    def value(figure: str, end: str) -> Any:
        found = scores.get(f"{figure}/{layer}", {})
        return found.get("mean") if found.get(end) is None else found[end]

    use, violations, spread = (
        value(figure, end) for figure, end in zip(("use", "violations", "spread"), ends, strict=True)
    )
    return use, violations, spread


def _near(scores: Mapping[str, Any], layer: str, least_use: float) -> bool:
    """Whether the rule says something else at the other ends of the intervals."""
    least, most = (
        finding(*_rule_figures(scores, layer, ends), least_use=least_use).proposed
        for ends in (("low", "low", "high"), ("high", "high", "low"))
    )
    return least != most


def _reason(
    scores: Mapping[str, Any], findings: Mapping[str, Finding], proposed: Sequence[str], least_use: float
) -> str:
    """Why these layers, or why none."""
    uses = {name: use for name in findings if (use := mean_of(scores, "use", name)) is not None}
    if proposed:
        return " ".join(
            f"Layer {label(name)}: its choice changes the image by {uses[name]:.3f} of the range, and "
            f"{' and '.join(findings[name].reasons)}."
            for name in proposed
        )
    if not uses:
        return "Nothing to repair here: no sample has a mask, so that nothing could be measured inside one."
    most = max(uses, key=lambda name: uses[name])
    if uses[most] < least_use:
        return (
            f"Nothing to repair here: the image depends on no layer's choice of where it looks (the largest use is "
            f"{uses[most]:.4f}, of layer {label(most)}; the rule asks for {least_use:g}). A model that is not trained "
            "is like that, and a model that gets its reference by another way: repaired attention would change no "
            "image."
        )
    used = [label(name) for name in findings if findings[name].used]
    several = len(used) > 1
    return (
        f"Nothing to repair here: the layer{'s' * several} that the image depends on ({', '.join(used)}) "
        f"{'are' if several else 'is'} in order (at most {MOST_VIOLATIONS:.0%} of pairs out of order, centres that "
        f"cover {MINIMUM_SPREAD_RATIO:g} of the extent of the garment or more)."
    ).replace("%", " %")


def _foretold(scores: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Any]:
    """Rank correlation of each figure with the true error, over layers and over heads; empty without truth."""
    heads = [place for key in scores if (place := key.removeprefix(f"{_TRUTH}/")) != key and "#" in place]
    found: dict[str, Any] = {}
    for kind, places in (("layers", layers), ("heads", heads)):
        for figure in FIGURES:
            pairs = [(mean_of(scores, figure, place), mean_of(scores, _TRUTH, place), place) for place in places]
            known = [pair for pair in pairs if None not in pair]
            if figure != _TRUTH and known:
                made = correlation(
                    [one for one, _, _ in known],
                    [error for _, error, _ in known],
                    # Heads of one layer resemble each other.
                    [place.partition("#")[0] for _, _, place in known],
                )
                if made is not None:
                    interval = made.spearman_interval
                    found.setdefault(figure, {})[kind] = {
                        "rank_correlation": made.spearman,
                        "interval": interval,
                        "n": made.n,
                    }
    return found


def label(place: str) -> str:
    """How a layer or a head is called: by its paper number where it has one.

    >>> label("up_blocks.2.attentions.1"), label("up_blocks.2.attentions.1#3"), label("mid_block.attentions.0")
    ('5', '5, head 3', 'mid_block.attentions.0')
    """
    layer, _, head = place.partition("#")
    shown = str(paper_number(layer) or layer)
    return f"{shown}, head {head}" if head else shown


# ---- the proposal ------------------------------------------------------------------------------------------------


def repair(results: Results, objective: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options of ``i2am train`` that repair the proposed layers; None where there are none.

    The term ``cwg``, which sharpens, is left out where all of these layers are sharp already (entropy below
    `SHARP_ENTROPY`).

    Args:
        results: of :func:`diagnosed`.
        objective: what is tried: variant, terms and weights.

    >>> results = {"proposal": {"layers": ["up_blocks.2.attentions.1"]}, "scores": {}}
    >>> repair(results, {"variant": "reward", "terms": {"cwg": {"weight": 0.01}}})["objective"]["layers"]
    {5: 1.0}
    """
    layers = results["proposal"]["layers"]
    if not layers:
        return None
    entropies = [mean_of(results["scores"], "entropy", name) for name in layers]
    sharp = all(entropy is not None and entropy < SHARP_ENTROPY for entropy in entropies)
    terms = {name: term for name, term in objective["terms"].items() if not (sharp and name == "cwg")}
    weights = {paper_number(name) or name: 1.0 for name in layers}
    return {
        "name": "repair",
        "label": f"Repair of layer {', '.join(map(label, layers))}",
        "objective": {**objective, "layers": weights, "terms": terms},
    }


def repair_file(results: Results, options: Mapping[str, Any]) -> str:
    """The proposed options as the file that ``i2am train experiment=FILE`` takes.

    >>> text = repair_file({"label": "tiny", "proposal": {"reason": "Layer 5: scattered."}}, {"name": "repair"})
    >>> print(text)
    # Proposed by `i2am diagnose` of tiny. Layer 5: scattered.
    # Terms and weights are those of experiment=refined.
    name: repair
    <BLANKLINE>
    """
    about = f"Proposed by `i2am diagnose` of {results['label']}. {results['proposal']['reason']}"
    lines = [*wrap(about, 116), f"{TERMS_NOTE}."]
    return "".join(f"# {line}\n" for line in lines) + str(yaml.safe_dump(dict(options), sort_keys=False))


# ---- tables --------------------------------------------------------------------------------------------------------


def diagnosis_tables(results: Results) -> list[Table]:
    """By layer with the verdict, sinks by time, heads, and how well figures foretell the true error."""
    shown = [layer_table(results), sink_table(results)]
    if any("#" in key for key in results["scores"]):
        shown.append(head_table(results))
    if results["foretold"]:
        shown.append(foretold_table(results))
    return shown


def _known(results: Results) -> list[str]:
    return [name for name in FIGURES if any(key.startswith(f"{name}/") for key in results["scores"])]


def _row(results: Results, place: str, text: str, group: str = "", more: Sequence[Cell] = ()) -> Row:
    return Row(text, (*(_cell(results["scores"], name, place) for name in _known(results)), *more), group)


def _cell(scores: Mapping[str, Any], figure: str, place: str) -> Cell | None:
    mean = mean_of(scores, figure, place)
    n = scores[f"{figure}/{place}"]["n"] if mean is not None else 0
    return None if mean is None else Cell.of(mean, FIGURES[figure].digits, n=n)


def _verdict(found: Mapping[str, Any]) -> Cell:
    near = ", near a limit" * found["near"]
    if found["proposed"]:
        return Cell(f"repair{near}", mark=Mark.BEST)
    if found["used"]:
        return Cell(f"in order{near}")
    return Cell(f"not used{', scattered' * found['scattered']}{near}", mark=Mark.FAINT)


def layer_table(results: Results) -> Table:
    """Every figure by layer, and what the rule says."""
    count = len(results["samples"])
    return Table(
        corner="Layer",
        headings=(*(FIGURES[name].heading for name in _known(results)), Heading("Verdict", words=True)),
        rows=tuple(
            _row(results, name, label(name), more=[_verdict(results["findings"][name])]) for name in results["layers"]
        ),
        title=f"{results['label']}: which layer to repair",
        name="diagnosis_layers",
        notes=(
            *(f"{FIGURES[name].heading.label}: {FIGURES[name].meaning}" for name in _known(results)),
            f"Means over {count} samples; intervals are in diagnosis.json." + few_samples_note(count),
        ),
    )


def sink_table(results: Results) -> Table:
    """Sinks by layer and time."""
    scores = results["scores"]
    groups = sorted({key.partition("/")[0] for key in scores if key.startswith("sinks@")})

    def cell(group: str, place: str) -> Cell | None:
        mean = mean_of(scores, group, place)
        return None if mean is None else Cell.of(mean, FIGURES["sinks"].digits)

    return Table(
        corner="Layer",
        headings=tuple(Heading(group.partition("@")[2], group="Steps, 0 the noisiest") for group in groups),
        rows=tuple(Row(label(name), tuple(cell(group, name) for group in groups)) for name in results["layers"]),
        title=f"{results['label']}: sinks by time",
        name="diagnosis_sinks",
        notes=(FIGURES["sinks"].meaning.replace(", mean over steps", ""),),
    )


def head_table(results: Results) -> Table:
    """Every figure by head."""
    places = [key.removeprefix("use/") for key in results["scores"] if key.startswith("use/") and "#" in key]
    return Table(
        corner="Head",
        headings=tuple(FIGURES[name].heading for name in _known(results)),
        rows=tuple(
            _row(results, place, f"head {place.partition('#')[2]}", group=numbered_layer(layer))
            for layer in results["layers"]
            for place in places
            if place.startswith(f"{layer}#")
        ),
        title=f"{results['label']}: heads",
        name=HEADS,
        notes=("The rule looks at layers: the losses train the mean of a layer's heads.",),
    )


def foretold_table(results: Results) -> Table:
    """How well each figure that knows no truth foretells the true error."""

    def cell(found: Mapping[str, Any] | None) -> Cell | None:
        if found is None:
            return None
        interval = found["interval"] and (found["interval"][0], found["interval"][1])
        return Cell.of(found["rank_correlation"], 2, interval=interval, n=found["n"])

    foretold = results["foretold"]
    kinds = [kind for kind in ("layers", "heads") if any(kind in found for found in foretold.values())]
    counts = {kind: max(found[kind]["n"] for found in foretold.values() if kind in found) for kind in kinds}
    return Table(
        corner="Figure",
        headings=tuple(Heading(f"over {counts[kind]} {kind}") for kind in kinds),
        rows=tuple(
            Row(FIGURES[name].heading.label, tuple(cell(found.get(kind)) for kind in kinds))
            for name, found in foretold.items()
        ),
        title=f"{results['label']}: how well each figure foretells the true error",
        name="diagnosis_foretold",
        notes=(
            "Spearman's rank correlation with the true correspondence error, in [-1, 1]; 1: the higher the figure, the "
            "larger the error. 95 % intervals (Fisher) count layers, since heads of one layer resemble each other.",
        ),
    )


def verdict_sentences(results: Results) -> Iterator[str]:
    """The proposal in words."""
    proposal = results["proposal"]
    if proposal["layers"]:
        several = "s" * (len(proposal["layers"]) > 1)
        yield f"Repair layer{several} {', '.join(map(label, proposal['layers']))}."
    yield str(proposal["reason"])
    near = [label(name) for name in results["layers"] if results["findings"][name]["near"]]
    if near:
        yield (
            f"Near a limit of the rule: {', '.join(near)}. It would decide otherwise at the other end of the 95 % "
            "interval of a figure; more samples tell."
        )
    best = max(
        (
            (abs(found["layers"]["rank_correlation"]), name, found["layers"])
            for name, found in results["foretold"].items()
            if "layers" in found
        ),
        default=None,
    )
    if best is not None:
        _, name, found = best
        yield (
            f"Of the figures that need no truth, {FIGURES[name].heading.label.lower()} foretells the true error best: "
            f"rank correlation {number(found['rank_correlation'], 2)} over {found['n']} layers."
        )
