"""What ``i2am faithful`` shows: use and place of each layer, and what deleting the reference's patches does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2am_train.attention.recipe import paper_number
from i2am_train.metrics.faithfulness import SAMPLE
from i2am_train.reporting.figures.canvas import GREY, OKABE_ITO, STYLE, new_figure
from i2am_train.reporting.table import Cell, Heading, Row, Table, percent
from i2am_train.results.statistics import few_samples_note, sample_interval, sample_mean

_RANKINGS = {
    "top": "highest in the map",
    "bottom": "lowest in the map",
    "random": "random",
    "middle": "nearest to the middle",
    "truth": "most shown, by the truth",
}
_COLORS = dict(zip(_RANKINGS, (OKABE_ITO[1], OKABE_ITO[0], GREY, OKABE_ITO[4], OKABE_ITO[2]), strict=True))


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and 95 % interval over the samples of each score, and how many samples have it.

    >>> summary([{"index": 0, "name": "a", "use/all": 0.5}, {"index": 1, "name": "b", "use/all": None}])
    {'use/all': {'mean': 0.5, 'low': None, 'high': None, 'confidence': 0.95, 'n': 1}}
    """
    names = dict.fromkeys(name for row in rows for name in row if name not in SAMPLE)
    found = {name: sample_mean([row.get(name) for row in rows]) for name in names}
    return {name: entry for name, entry in found.items() if entry["n"]}


def faithfulness_tables(results: Mapping[str, Any]) -> list[Table]:
    """Layers by use and place, and rankings by what their deletion changes."""
    scores, shares = results["scores"], results["shares"]
    note = f"Means over {len(results['samples'])} samples with their 95 % intervals (bootstrap, BCa)."
    note += few_samples_note(len(results["samples"]))
    places = _places(results)
    layers = Table(
        corner="Layer",
        headings=(Heading("Use"), Heading("Where", "↑")),
        rows=tuple(
            Row(_label(place), (_cell(scores, f"use/{place}", 4), _cell(scores, f"where/{place}", 2)))
            for place in places
        ),
        title=f"{results['label']}: what each layer's attention is worth, and whether it tells where",
        name="faithfulness_layers",
        notes=(
            "Use: mean change of the image inside the mask, as a share of its range, when the layer attends to the "
            "whole reference alike. Where: rank correlation of the attention that goes to a quarter of the garment "
            "with the change of the image when that quarter is white.",
            note,
        ),
    )
    rankings = [name for name in _RANKINGS if f"deletion/{name}" in scores]
    deletion = Table(
        corner="Patches that go",
        headings=(Heading("Mean change"), *(Heading(percent(share), group="Share of the garment") for share in shares)),
        rows=(
            *(
                Row(
                    _RANKINGS[name],
                    (
                        _cell(scores, f"deletion/{name}", 4),
                        *(_cell(scores, f"deletion/{name}@{share:g}", 4) for share in shares),
                    ),
                )
                for name in rankings
            ),
            Row("highest minus lowest", (_cell(scores, "deletion/score", 4), *(None for _ in shares))),
        ),
        title=f"{results['label']}: change of the image when patches of the garment go",
        name="faithfulness_deletion",
        notes=(
            "The map is the unified one on the reference. A faithful map changes the image more by its highest patches "
            "than by random and by its lowest ones, and more than a map that knows no model (the garment's middle).",
            note,
        ),
    )
    return [layers, deletion]


def _places(results: Mapping[str, Any]) -> list[str]:
    extra = [place for place in ("all", "truth") if f"where/{place}" in results["scores"]]
    return [*results["layers"], *extra]


def _label(place: str) -> str:
    if place in ("all", "truth"):
        return {"all": "all layers", "truth": "true correspondence"}[place]
    number = paper_number(place)
    return place if number is None else f"{number} ({place})"


def _cell(scores: Mapping[str, Any], name: str, digits: int) -> Cell | None:
    if name not in scores:
        return None
    found = scores[name]
    return Cell.of(found["mean"], digits, interval=sample_interval(found), n=found["n"])


@mpl.rc_context(STYLE)
def faithfulness_figure(results: Mapping[str, Any]) -> Figure:
    """Use and place as bars by layer, and the curves of deletion."""
    scores = results["scores"]
    figure = new_figure(10.0, 3.2)
    use, where, curves = figure.subplots(1, 3, width_ratios=(1, 1.15, 1.2))
    figure.subplots_adjust(left=0.06, right=0.985, top=0.88, bottom=0.2, wspace=0.28)
    _bars(use, scores, "use", results["layers"], "Use: change of the image\nwithout the layer's choice")
    places = _places(results)
    _bars(where, scores, "where", places, "Where: does the image change\nwhere the map says?")
    where.axhline(0, color=GREY, linewidth=0.7)
    for name, color in _COLORS.items():
        if f"deletion/{name}" in scores:
            values = [0.0, *(scores[f"deletion/{name}@{share:g}"]["mean"] for share in results["shares"])]
            curves.plot([0.0, *results["shares"]], values, color=color, marker="o", markersize=3, label=_RANKINGS[name])
    curves.set_title("Deletion: change of the image", loc="left")
    curves.set_xlabel("share of the garment's patches that go")
    curves.legend(fontsize=7, loc="lower right")
    return figure


def _bars(axes: Axes, scores: Mapping[str, Any], kind: str, places: Sequence[str], title: str) -> None:
    known = [place for place in places if f"{kind}/{place}" in scores]
    means = [scores[f"{kind}/{place}"]["mean"] for place in known]
    colors = [OKABE_ITO[0] if place not in ("all", "truth") else GREY for place in known]
    axes.bar(range(len(known)), means, color=colors)
    for at, place in enumerate(known):
        if (interval := sample_interval(scores[f"{kind}/{place}"])) is not None:
            axes.plot([at, at], interval, color="#222222", linewidth=0.9)
    axes.set_xticks(range(len(known)), [str(paper_number(place) or place) for place in known])
    axes.set_xlabel("layer")
    axes.set_title(title, loc="left")
