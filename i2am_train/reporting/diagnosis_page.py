"""The page and the figure of ``i2am diagnose``."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from i2am_train.metrics.attention import MINIMUM_SPREAD_RATIO, SHARP_ENTROPY
from i2am_train.metrics.diagnosis import MOST_VIOLATIONS
from i2am_train.reporting.diagnosis import TERMS_NOTE, Results, diagnosis_tables, label, mean_of, verdict_sentences
from i2am_train.reporting.figures.canvas import GREY, OKABE_ITO, STYLE, new_figure
from i2am_train.reporting.pages import Picture, Section, embedded_figure, making, page
from i2am_train.reporting.table import minus


@mpl.rc_context(STYLE)
def diagnosis_figure(results: Results) -> Figure:
    """Layers and heads by use and disorder, by use and spread, and sinks by time; shaded: what the rule repairs."""
    figure = new_figure(11.0, 3.6)
    order, spread, sinks = figure.subplots(1, 3, width_ratios=(1.25, 1.25, 1))
    figure.subplots_adjust(left=0.055, right=0.985, top=0.86, bottom=0.16, wspace=0.24)
    _points(order, results, "violations", "Pairs out of order", yardstick=0.5)
    _shade(order, results["settings"]["least_use"], MOST_VIOLATIONS, order.get_ylim()[1])
    _points(spread, results, "spread", "Spread of the centres, as a share of the garment's", yardstick=1.0)
    _shade(spread, results["settings"]["least_use"], 0, MINIMUM_SPREAD_RATIO)
    _sinks(sinks, results)
    return figure


def _shade(axes: Axes, least_use: float, low: float, high: float) -> None:
    """The region of what is repaired."""
    right = axes.get_xlim()[1]
    axes.fill_between([least_use, right], low, high, color=OKABE_ITO[1], alpha=0.13, linewidth=0, zorder=0)


def _points(axes: Axes, results: Results, figure: str, title: str, yardstick: float) -> None:
    """Layers as numbers on discs, heads as dots; the scale of the use spreads small values."""
    scores, findings = results["scores"], results["findings"]
    axes.set_xscale("function", functions=(_root, _cube))
    heads = [key.removeprefix("use/") for key in scores if key.startswith("use/") and "#" in key]
    for places, size in ((heads, 6.0), (results["layers"], 110.0)):
        for place in places:
            use, value = mean_of(scores, "use", place), mean_of(scores, figure, place)
            if use is None or value is None:
                continue
            layer = findings[place.partition("#")[0]]
            color = OKABE_ITO[1] if layer["proposed"] else OKABE_ITO[0] if layer["used"] else GREY
            axes.scatter([use], [value], s=size, color=color, linewidth=0, zorder=2)
            if place in findings:
                axes.annotate(
                    label(place), (use, value), ha="center", va="center", color="white", fontsize=7, weight="bold"
                )
    right = max(axes.get_xlim()[1], 1.3 * results["settings"]["least_use"])
    axes.set_xlim(0, right)
    axes.set_xticks([tick for tick in (0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1) if tick <= right])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.1 * yardstick))
    axes.axhline(yardstick, color=GREY, linewidth=0.7, linestyle=":")
    axes.set_xlabel("use: change of the image (cube root scale)")
    axes.set_title(title, loc="left")


def _root(values: Any) -> Any:
    return abs(values) ** (1 / 3)


def _cube(values: Any) -> Any:
    return values**3


def _sinks(axes: Axes, results: Results) -> None:
    scores = results["scores"]
    groups = sorted({key.partition("/")[0] for key in scores if key.startswith("sinks@")})
    for at, name in enumerate(results["layers"]):
        values = [mean_of(scores, group, name) for group in groups]
        if None not in values:
            shade = 0.15 + 0.7 * at / max(1, len(results["layers"]) - 1)
            axes.plot(range(len(groups)), values, color=mpl.colormaps["viridis"](shade), marker="o", markersize=2.5)
            axes.annotate(
                label(name), (len(groups) - 1, values[-1]), xytext=(4, -2), textcoords="offset points", fontsize=7
            )
    axes.set_xticks(range(len(groups)))
    axes.set_ylim(0, None)
    axes.set_xlabel("runs of steps, the noisiest first")
    axes.set_title("Sinks: share of the top 1 % of tokens", loc="left")


def diagnosis_page(results: Results, file: str | None) -> str:
    """The page: verdict, figure, tables.

    Args:
        file: text of the proposed options; None where nothing is proposed.
    """
    caption = (
        "Layers (numbers) and their heads (dots of the same colour) by how much the image depends on their choice, and "
        "by how scattered it is. Shaded: what the rule repairs; grey: not used; dotted: chance, and the garment's own "
        "extent. Last: attention sinks by time."
    )
    layers, *others = diagnosis_tables(results)
    picture = Picture(embedded_figure(diagnosis_figure(results)), caption, "Scatter plots of the first table.", 1100)
    sections = [
        Section(
            "The rule",
            lead=_rule(results["settings"]["least_use"]),
            details={} if file is None else {"repair.yaml": file},
        ),
        _with_picture(Section.of(layers), picture),
        *(Section.of(table) for table in others),
        making(results["provenance"], results["settings"]),
    ]
    return page(
        f"Which layer to repair: {results['label']}",
        sections,
        kind="diagnosis of attention",
        facts=[(str(len(results["samples"])), "samples"), (str(len(results["layers"])), "layers")],
        verdicts=[minus(sentence) for sentence in verdict_sentences(results)],
    )


def _with_picture(section: Section, picture: Picture) -> Section:
    section.pictures.append(picture)
    return section


def _rule(least_use: float) -> str:
    return (
        "A layer is proposed when the image depends on where it looks (its use is at least "
        f"{least_use:g}) and its attention is scattered: more than {MOST_VIOLATIONS:.0%} of the pairs of patches out "
        f"of order (halfway between order and chance), or centres that cover less than {MINIMUM_SPREAD_RATIO:g} of the "
        f"extent of the garment (collapse). {TERMS_NOTE}; cwg, which sharpens, is left out where the proposed layers "
        f"are sharp already (entropy below {SHARP_ENTROPY:g})."
    ).replace("%", " %")
