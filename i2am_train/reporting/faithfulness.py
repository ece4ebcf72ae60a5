"""What ``i2am faithful`` shows: use and place of each layer, and what deleting the reference's patches does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2am_train.attention.recipe import paper_number
from i2am_train.files import write_text
from i2am_train.metrics.faithfulness import SAMPLE
from i2am_train.reporting.figures.canvas import GREY, OKABE_ITO, STYLE, new_figure, save_figure
from i2am_train.reporting.table import Cell, Heading, Row, Table, markdown, number, percent
from i2am_train.results.statistics import few_samples_note, sample_interval, sample_mean

RESULTS = "faithfulness.json"
"""File of a measurement, in its folder."""
_RANKINGS = {
    "top": "highest in the map",
    "bottom": "lowest in the map",
    "random": "random",
    "middle": "nearest to the middle",
    "gradient": "highest gradient",
    "gradient_attention": "highest gradient x attention",
    "truth": "most shown, by the truth",
}
_COLORS = dict(
    zip(_RANKINGS, (*(OKABE_ITO[at] for at in (1, 0)), GREY, *(OKABE_ITO[at] for at in (4, 5, 3, 2))), strict=True)
)
_KINDS = {
    "deletion": "Deletion: change of the image when these patches of the garment go",
    "insertion": "Insertion: change of the image when all but these patches go",
    "patch": "Single patches: change at a generated patch when these go of what it looks at",
}
"""By the beginning of a score's name; a learned distance has its own after an underscore."""
_READING = {
    "deletion": "A faithful map changes the image more by its highest patches than by random and by its lowest ones, "
    "and more than a ranking that knows no model (the garment's middle).",
    "insertion": "A faithful map changes the image less than a random ranking does: what it ranks highest is enough.",
    "patch": "If the attention of a patch is a cause, the image changes there most when what it looks at goes.",
}
_SCORES = ("use/", "where/", *_KINDS)


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and 95 % interval over the samples of each score, and how many samples have it.

    >>> summary([{"index": 0, "name": "a", "use/all": 0.5}, {"index": 1, "name": "b", "use/all": None}])
    {'use/all': {'mean': 0.5, 'low': None, 'high': None, 'confidence': 0.95, 'n': 1}}
    """
    names = dict.fromkeys(name for row in rows for name in row if name not in SAMPLE)
    found = {name: sample_mean([row.get(name) for row in rows]) for name in names}
    return {name: entry for name, entry in found.items() if entry["n"]}


def measured(label: str, rows: Sequence[Mapping[str, Any]], shares: Sequence[float]) -> dict[str, Any]:
    """What tables and figure are made of: the samples that were made again, their means, and the layers.

    >>> rows = [{"index": 0, "name": "a", "ssim": 0.5, "where/up": 0.25}, {"index": 1, "name": "b", "ssim": 0.5}]
    >>> found = measured("tiny", rows, [0.25])
    >>> found["layers"], list(found["scores"]), len(found["samples"])
    (['up'], ['where/up'], 1)
    """
    samples = []
    for row in rows:
        scores = {name: value for name, value in row.items() if "/" in name and name.startswith(_SCORES)}
        if any(value is not None for value in scores.values()):
            samples.append({**{name: row[name] for name in SAMPLE}, **scores})
    places = [name.removeprefix("where/") for name in rows[0] if name.startswith("where/")]
    layers = [place for place in places if place not in ("all", "truth")]
    return {"label": label, "layers": layers, "shares": list(shares), "scores": summary(samples), "samples": samples}


def faithfulness_tables(results: Mapping[str, Any]) -> list[Table]:
    """Layers by use and place, and rankings by what changes when their patches go, or stay alone."""
    scores = results["scores"]
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
    return [layers, *(_curve_table(results, kind, note) for kind in _kinds(scores))]


def _kinds(scores: Mapping[str, Any]) -> list[str]:
    """Those that were measured, a learned distance behind the mean absolute difference."""
    found = dict.fromkeys(name.partition("/")[0] for name in scores)
    return [kind for begin in _KINDS for kind in found if kind.partition("_")[0] == begin]


def _curve_table(results: Mapping[str, Any], kind: str, note: str) -> Table:
    """Rankings by what the images change, at each share and over all."""
    scores, shares = results["scores"], results["shares"]
    begin, _, distance = kind.partition("_")
    known = [name for name in _RANKINGS if f"{kind}/{name}@{shares[0]:g}" in scores]
    # Of what stays there is no point at which nothing changes, and so no area.
    ends = [*([""] if f"{kind}/score" in scores else []), *(f"@{share:g}" for share in shares)]
    rows = [Row(_RANKINGS[name], tuple(_cell(scores, f"{kind}/{name}{end}", 4) for end in ends)) for name in known]
    if f"{kind}/score" in scores:
        rows.append(Row("highest minus lowest", (_cell(scores, f"{kind}/score", 4), *(None for _ in shares))))
    return Table(
        corner="Patches that stay" if begin == "insertion" else "Patches that go",
        headings=(
            *([Heading("Mean change")] if "" in ends else []),
            *(Heading(percent(share), group="Share of the garment") for share in shares),
        ),
        rows=tuple(rows),
        title=f"{results['label']}: {_KINDS[begin]}{f' ({distance})' if distance else ''}",
        name=f"faithfulness_{kind}",
        notes=(
            _READING[begin],
            "Change: a learned distance of the images, which differ inside the mask only."
            if distance
            else "Change: mean absolute difference inside the mask, as a share of the range.",
            note,
        ),
    )


def _places(results: Mapping[str, Any]) -> list[str]:
    extra = [place for place in ("all", "truth") if f"where/{place}" in results["scores"]]
    return [*results["layers"], *extra]


def sample_sentence(row: Mapping[str, Any], layer: str) -> str:
    """The figures of one sample in words, those that have a value.

    >>> row = {"use/up": 0.00042, "where/up": None, "where/all": 0.551, "deletion/score": 0.0123}
    >>> sample_sentence(row, "up")
    'use of up 0.0004, where (all layers) 0.55, deletion, highest minus lowest patches 0.0123'
    """
    named = {
        f"use/{layer}": (f"use of {layer}", 4),
        f"where/{layer}": (f"where of {layer}", 2),
        "where/all": ("where (all layers)", 2),
        "deletion/score": ("deletion, highest minus lowest patches", 4),
    }
    known = [(words, number(row[name], digits)) for name, (words, digits) in named.items() if row.get(name) is not None]
    return ", ".join(f"{words} {value}" for words, value in known)


def write_shown(results: Mapping[str, Any], folder: Path) -> None:
    """Writes tables (``faithfulness.md``) and figure (``faithfulness.png``) into a folder."""
    write_tables(folder / "faithfulness.md", faithfulness_tables(results))
    save_figure(faithfulness_figure(results), folder / "faithfulness.png")


def write_tables(path: Path, tables: Iterable[Table]) -> None:
    """Writes tables below each other as Markdown."""
    write_text(path, "\n\n".join(map(markdown, tables)) + "\n")


def _label(place: str) -> str:
    return {"all": "all layers", "truth": "true correspondence"}.get(place) or numbered_layer(place)


def numbered_layer(name: str) -> str:
    """A layer by the paper's number, where it has one, and its name.

    >>> numbered_layer("up_blocks.2.attentions.1"), numbered_layer("mid_block.attentions.0")
    ('5 (up_blocks.2.attentions.1)', 'mid_block.attentions.0')
    """
    number = paper_number(name)
    return name if number is None else f"{number} ({name})"


def _cell(scores: Mapping[str, Any], name: str, digits: int) -> Cell | None:
    if name not in scores:
        return None
    found = scores[name]
    return Cell.of(found["mean"], digits, interval=sample_interval(found), n=found["n"])


@mpl.rc_context(STYLE)
def faithfulness_figure(results: Mapping[str, Any]) -> Figure:
    """Use and place as bars by layer, and the curves of deletion and insertion."""
    scores = results["scores"]
    figure = new_figure(13.0, 3.2)
    use, where, *curves = figure.subplots(1, 4, width_ratios=(1, 1.15, 1.2, 1.2))
    figure.subplots_adjust(left=0.045, right=0.855, top=0.86, bottom=0.2, wspace=0.28)
    _bars(use, scores, "use", results["layers"], "Use: change of the image\nwithout the layer's choice")
    _bars(where, scores, "where", _places(results), "Where: does the image change\nwhere the map says?")
    where.axhline(0, color=GREY, linewidth=0.7)
    for axes, kind, change in zip(curves, ("deletion", "insertion"), ("go", "stay alone"), strict=True):
        for name, color in _COLORS.items():
            known = [share for share in results["shares"] if f"{kind}/{name}@{share:g}" in scores]
            values = [scores[f"{kind}/{name}@{share:g}"]["mean"] for share in known]
            if kind == "deletion" and known:  # of nothing, nothing; of all, insertion has no point at 0
                known, values = [0.0, *known], [0.0, *values]
            if known:
                axes.plot(known, values, color=color, marker="o", markersize=3, label=_RANKINGS[name])
        axes.set_title(f"{kind.capitalize()}: change of the image\nwhen patches {change}", loc="left")
        axes.set_xlabel("share of the garment's patches")
    figure.legend(*curves[0].get_legend_handles_labels(), fontsize=7, loc="center right")
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
