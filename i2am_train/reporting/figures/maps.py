"""The maps of one explained sample as sheets, by the number of the paper's figure.

Unified, by layer, time and head (2, 6, 20, 21); of single patches (7, 9, 12); and of super-resolution models, how far
from its own place a patch looks (9, 18).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from i2am_train.attention.maps import AttributionMaps
from i2am_train.attention.recipe import LayerId, paper_number
from i2am_train.attention.store import by_resolution
from i2am_train.evaluation.explanation import TO_GENERATED, TO_REFERENCE, Explanation, PatchIndex, array
from i2am_train.metrics.attention import alignment_table, patch_distance
from i2am_train.reporting.figures.canvas import GREY, OKABE_ITO, STYLE, new_figure
from i2am_train.reporting.figures.panels import (
    boxed_panels,
    layer_label,
    layer_title,
    layers_of,
    map_panel,
    patch_colors,
    patch_panel,
    placed_box,
    plain_panel,
    reverse_panels,
    same_patch,
    specific_panels,
    time_titles,
)
from i2am_train.reporting.figures.sheet import (
    LINE,
    Panel,
    Section,
    Sheet,
    one_section,
    titled_once,
    warning_lines,
    write_warnings,
)
from i2am_train.types import Direction

_HEADS_SHOWN = 8
"""Heads per row; the paper's Fig. 17 shows 8 of 20."""
_LAYERS_PER_ROW = 9
"""The paper's layers, or as many of a model that has more."""
_HEADS_PER_RESOLUTION = 3
"""Heads in the paper's Fig. 20."""
_PATCHES_PER_LAYER_FIGURE = 4
"""Rows of the figures across layers, as in the paper's Fig. 9; more do not fit a page beside a caption."""
_PAIRS_PER_ROW = 3
_PLOT_HEIGHT = 2.4
"""Inches of the plot of distances below its marks (chosen by us)."""


# ---- unified, by layer, time and head ------------------------------------------------------------


def unified_maps(sample: Explanation) -> Sheet:
    """Both pictures, and the unified map of each direction that there is (eq. 7) with its score (eq. 8)."""
    pictures = (plain_panel(sample, TO_REFERENCE, "reference"), plain_panel(sample, TO_GENERATED, "generated"))
    maps = []
    for direction in sample.directions:
        side = "g" if direction is TO_GENERATED else "r"
        heat = array(sample.maps.unified(direction, sample.weighting).normalised())
        score = sample.scores.get(f"imacs_{side}")
        note = "" if score is None else f"IMACS {score:.3f}"
        maps.append(map_panel(sample, direction, heat, f"$M_{side}$", note))
    caption = f"Unified attribution maps of {sample.name} ({sample.model})."
    return one_section([(*pictures, *maps)], caption, groups=(2, len(maps)))


def mass_maps(sample: Explanation) -> Sheet:
    """Share of its attention that each place gives to the reference: all layers, then by resolution."""
    by_title = {"all layers": sample.maps} | {
        str(grid): sample.maps.select([record.layer for record in records])
        for grid, records in by_resolution(sample.maps.store).items()
    }
    panels = [plain_panel(sample, TO_GENERATED, "generated")]
    for title, maps in by_title.items():
        values = array(maps.mass())
        panels.append(map_panel(sample, TO_GENERATED, values, title, f"mean {values.mean():.2f}"))
    return Sheet(
        sections=(Section(rows=(tuple(panels),), groups=(1, len(by_title))),),
        caption=f"Share of attention that goes to the reference, {sample.name} "
        f"({sample.model}); the rest goes to the generated picture itself.",
        scale="share of attention that goes to the reference",
    )


def layer_maps(sample: Explanation, layers: Sequence[LayerId] | None = None) -> Sheet:
    """Layer-level maps in both directions, coarse to fine (Fig. 2).

    Rows: on the generated image, on the garment. Columns: the picture, then ``layers`` (all where
    None) in the order of the model.
    """
    chosen = layers_of(sample.maps, layers)
    parts = [chosen[start : start + _LAYERS_PER_ROW] for start in range(0, len(chosen), _LAYERS_PER_ROW)]
    return Sheet(
        sections=tuple(_layer_section(sample, part) for part in parts),
        caption=f"Layer-level attribution maps of {sample.name} ({sample.model}), coarse to fine: "
        "where the reference goes (top), and what of it is used (bottom).",
    )


def _layer_section(sample: Explanation, layers: Sequence[str]) -> Section:
    chosen = sample.maps.select(layers)
    titles = [layer_title(chosen, name) for name in chosen.layers]
    rows = [
        (
            plain_panel(sample, direction),
            *_panels(sample, direction, array(chosen.layer_level(direction).normalised()), titles),
        )
        for direction in sample.directions
    ]
    row_titles = ("$M_g^{(l)}$", "$M_r^{(l)}$")[: len(rows)]
    return Section(rows=titled_once(rows), row_titles=row_titles, groups=(1, len(titles)))


def time_and_head_maps(sample: Explanation) -> Sheet:
    """Time-level (a) and head-level maps (b, c, ...) in both directions (Fig. 6).

    Layers with different numbers of heads cannot be put together by head: there is a block for
    each number, most heads first.
    """
    blocks = [_block(sample, "(a) by timestep", partial(_time_panels, sample))]
    by_heads = sorted(sample.maps.by_head_count().items(), reverse=True)
    for letter, (heads, maps) in zip("bcdefgh", by_heads, strict=False):
        title = f"({letter}) {_head_title(maps, heads)}"
        blocks.append(_block(sample, title, partial(_head_panels, sample, maps)))
    return Sheet(
        sections=tuple(_side_by_side(blocks)),
        caption=f"Time- and head-level attribution maps of {sample.name} ({sample.model}) on the "
        f"generated image (g) and on the {sample.reference} (r); the noisiest steps come first.",
    )


def two_axis_maps(sample: Explanation) -> Sheet:
    """Resolution x time and resolution x head in both directions (Fig. 20).

    Rows are the grids of the layers, coarse to fine; the left columns are time groups, the right
    ones the first heads.
    """
    titles = [*time_titles(sample), *(f"head {head + 1}" for head in range(_HEADS_PER_RESOLUTION))]
    return Sheet(
        sections=tuple(
            Section(
                rows=_two_axis_rows(sample, direction, titles),
                title=title,
                row_titles=tuple(str(grid) for grid in by_resolution(sample.maps.store)),
                groups=(sample.time_groups, _HEADS_PER_RESOLUTION),
                group_titles=("(a) by timestep", "(b) by head"),
            )
            for direction, title in ((TO_GENERATED, "On the generated image"), (TO_REFERENCE, "On the garment"))
        ),
        caption=f"Attribution maps of {sample.name} ({sample.model}) by the layers' resolution "
        "(rows) and time or head (columns).",
    )


def _two_axis_rows(sample: Explanation, direction: Direction, titles: Sequence[str]) -> tuple[tuple[Panel, ...], ...]:
    by_time = array(
        sample.maps.two_axis(direction, "time", groups=sample.time_groups, weighting=sample.weighting).normalised()
    )
    rows = []
    for level, records in enumerate(by_resolution(sample.maps.store).values()):
        alike = sample.maps.select([record.layer for record in records])
        by_head = array(alike.head_level(direction, sample.weighting).normalised())
        maps = [*by_time[:, level], *by_head[:_HEADS_PER_RESOLUTION]]
        shown = titles[: len(maps)] if level == 0 else [""] * len(maps)
        rows.append(_panels(sample, direction, maps, shown))
    return tuple(rows)


def overview(sample: Explanation) -> Sheet:
    """All kinds of maps of one sample: unified, head-level, time-level, specific-reference (Fig. 21).

    Heads are those of the layers like the chosen one.
    """
    inputs = (
        *(Panel(picture=sample.images[name], title=name) for name in ("garment", "person", "generated")),
        map_panel(sample, TO_GENERATED, sample.unified(TO_GENERATED), "$M_g$"),
        map_panel(sample, TO_REFERENCE, sample.unified(TO_REFERENCE), "$M_r$"),
    )
    heads = sample.maps.store.layer(sample.layer).heads
    alike = sample.maps.by_head_count()[heads]
    patches = sample.generated_patches[: len(inputs) - 1]
    looks = (patch_panel(sample, TO_GENERATED, patches, title="patches"), *specific_panels(sample, patches))
    sections = (
        Section(rows=(inputs,), title="Unified maps", groups=(3, 2)),
        Section(
            rows=(_head_panels(sample, alike, TO_GENERATED),),
            title=f"Head-level maps $M_{{g,n}}$, {_head_title(alike, heads)}",
        ),
        Section(rows=(_time_panels(sample, TO_GENERATED),), title="Time-level maps $M_{g,\\tau}$ by timestep"),
        Section(
            rows=(looks,),
            title=f"Specific-reference maps $M_{{sr,i}}$, {layer_label(sample.layer)}",
            groups=(1, len(patches)),
        ),
    )
    return Sheet(
        sections=sections,
        caption=f"Attribution maps of {sample.name} with garment {sample.inputs['garment']} "
        f"({sample.model}, {'paired' if sample.paired else 'unpaired'}).",
    )


def _panels(
    sample: Explanation, direction: Direction, maps: Iterable[NDArray[np.floating]], titles: Sequence[str]
) -> tuple[Panel, ...]:
    return tuple(map_panel(sample, direction, heat, title) for heat, title in zip(maps, titles, strict=True))


def _time_panels(sample: Explanation, direction: Direction) -> tuple[Panel, ...]:
    maps = sample.maps.time_level(direction, sample.time_groups, sample.weighting)
    return _panels(sample, direction, array(maps.normalised()), time_titles(sample))


def _head_panels(sample: Explanation, maps: AttributionMaps, direction: Direction) -> tuple[Panel, ...]:
    values = array(maps.head_level(direction, sample.weighting).normalised())[:_HEADS_SHOWN]
    return _panels(sample, direction, values, [f"head {head + 1}" for head in range(len(values))])


def _block(sample: Explanation, title: str, panels: Callable[[Direction], tuple[Panel, ...]]) -> Section:
    """The picture and its maps, one row per direction."""
    rows = [(plain_panel(sample, direction), *panels(direction)) for direction in sample.directions]
    return Section(
        rows=titled_once(rows),
        row_titles=("on the image", f"on the {sample.reference}")[: len(rows)],
        groups=(len(rows[0]),),
        group_titles=(title,),
    )


def _side_by_side(blocks: Sequence[Section]) -> list[Section]:
    """Blocks of the same rows, joined where they fit beside each other."""
    joined: list[Section] = []
    for block in blocks:
        last = joined[-1] if joined else None
        if last is None or sum(last.groups) + sum(block.groups) > _HEADS_SHOWN + 1:
            joined.append(block)
            continue
        joined[-1] = replace(
            last,
            rows=tuple(left + right for left, right in zip(last.rows, block.rows, strict=True)),
            groups=last.groups + block.groups,
            group_titles=last.group_titles + block.group_titles,
        )
    return joined


def _head_title(maps: AttributionMaps, heads: int) -> str:
    shown = f"{_HEADS_SHOWN} of {heads} heads" if heads > _HEADS_SHOWN else f"{heads} heads"
    numbers = [paper_number(layer) for layer in maps.layers]
    known = [number for number in numbers if number is not None]
    if len(known) != len(numbers) or known != list(range(known[0], known[0] + len(known))):
        return f"{len(numbers)} layers, {shown}"
    which = f"layers {known[0]}–{known[-1]}" if len(known) > 1 else f"layer {known[0]}"
    return f"{which}, {shown}"


# ---- single patches ------------------------------------------------------------------------------


def generation_flow(sample: Explanation) -> Sheet:
    """How an image comes to be, row by row from noise to image (Fig. 7).

    Left: what of the garment is used in each time group. Middle: the clean image that the model
    predicts at the group's end, and where the garment goes. Right: a patch of the final image and
    where it looks, in the sample's layer.
    """
    to_reference, to_generated = (
        array(sample.maps.time_level(d, sample.time_groups, sample.weighting).normalised())
        for d in (TO_REFERENCE, TO_GENERATED)
    )
    pairs = _pairs(sample, sample.generated_patches[: sample.time_groups])
    rows = []
    for group, clean in enumerate(sample.clean):
        flow = (
            map_panel(sample, TO_REFERENCE, to_reference[group], "$M_{r,\\tau}$"),
            Panel(picture=clean.picture, title="predicted"),
            map_panel(sample, TO_GENERATED, to_generated[group], "$M_{g,\\tau}$"),
        )
        pair = pairs[group] if group < len(pairs) else ()
        rows.append((*flow, *(replace(p, title=t) for p, t in zip(pair, ("patch $i$", "$M_{sr,i}$"), strict=False))))
    return one_section(
        rows,
        f"Generation of {sample.name} ({sample.model}) from the noisiest steps (top) to the "
        "image (bottom): parts of the garment that are used, predicted image and where the garment "
        "goes, and specific patches of the image with what they look at.",
        row_titles=tuple(f"$t$ = {title}" for title in time_titles(sample)),
        groups=(1, 2, 2),
        group_titles=("what is used", "what is made", f"patches, {layer_label(sample.layer)}, all steps"),
    )


def specific_reference(sample: Explanation) -> Sheet:
    """Each generated patch, and by an arrow where it looks on the garment (Fig. 12)."""
    pairs = [(replace(box, arrow=True), looks) for box, looks in _pairs(sample, sample.generated_patches)]
    starts = range(0, len(pairs), _PAIRS_PER_ROW)
    rows = [[panel for pair in pairs[start : start + _PAIRS_PER_ROW] for panel in pair] for start in starts]
    return one_section(
        rows,
        f"Specific-reference attribution maps of {sample.name} ({sample.model}), "
        f"{layer_label(sample.layer)}: where the boxed patch looks on the {sample.reference}.",
        groups=(2,) * (len(rows[0]) // 2),
    )


def _pairs(sample: Explanation, patches: Sequence[PatchIndex]) -> list[tuple[Panel, Panel]]:
    """For each patch the generated image with its box, and the map of where it looks."""
    return list(zip(boxed_panels(sample, TO_GENERATED, patches), specific_panels(sample, patches), strict=True))


def specific_across_layers(sample: Explanation, layers: Sequence[LayerId] | None = None) -> Sheet:
    """Where a place of the generated image looks, from layer to layer (Fig. 9).

    Rows are patches of the sample's layer; in other layers the patch at the same place is shown.
    """
    caption = (
        f"Specific-reference attribution maps of {sample.name} ({sample.model}) across layers: "
        f"where the boxed place of the generated image looks on the {sample.reference}."
    )
    return _across_layers(sample, TO_GENERATED, layers, specific_panels, caption)


def reverse_across_layers(sample: Explanation, layers: Sequence[LayerId] | None = None) -> Sheet:
    """What a patch of the garment feeds on the generated image, from layer to layer (paper A.4)."""
    caption = (
        f"Reverse specific-reference attribution maps of {sample.name} ({sample.model}) across "
        f"layers: where the boxed patch of the {sample.reference} goes on the generated image."
    )
    return _across_layers(sample, TO_REFERENCE, layers, reverse_panels, caption)


def alignment_sheet(sample: Explanation, layers: Sequence[LayerId] | None = None) -> Sheet:
    """Where a place of the generated image looks in each layer, and how far away that is (Figs. 9, 18; paper 5.3, A.7).

    As ``specific_across_layers``; the box is the patch's own place on the reference, the number the mean
    distance of its attention from there in percent of the picture's diagonal.

    Raises:
        CaptureError: the score matrix of a layer was not kept.
    """
    caption = (
        f"Alignment of {sample.name} ({sample.model}): where the boxed place of the generated "
        f"image looks on the {sample.reference} in each layer; the box there is the same place, "
        "the number the mean distance of the attention from it in percent of the diagonal."
    )
    return _across_layers(sample, TO_GENERATED, layers, _alignment_panels, caption, first_title="generated")


def _across_layers(
    sample: Explanation,
    direction: Direction,
    layers: Sequence[LayerId] | None,
    panels_of: Callable[[Explanation, Sequence[PatchIndex], str], list[Panel]],
    caption: str,
    first_title: str = "",
) -> Sheet:
    """A row for each patch that lies on a direction's picture: the picture with it, then its panel of each layer."""
    chosen = layers_of(sample.maps, layers)
    of_direction = sample.generated_patches if direction is TO_GENERATED else sample.reference_patches
    patches = of_direction[:_PATCHES_PER_LAYER_FIGURE]
    columns = [panels_of(sample, patches, layer) for layer in chosen]
    titles = (first_title, *(layer_title(sample.maps, layer) for layer in chosen))
    rows = [
        tuple(replace(panel, title=title) for panel, title in zip(row, titles, strict=True))
        for row in zip(boxed_panels(sample, direction, patches), *columns, strict=True)
    ]
    row_titles = tuple(f"patch {y}, {x}" for y, x in patches)
    return one_section(rows, caption, row_titles=row_titles, groups=(1, len(chosen)))


# ---- alignment of super-resolution models --------------------------------------------------------


def _alignment_panels(sample: Explanation, patches: Sequence[PatchIndex], layer: str) -> list[Panel]:
    """One layer's map of each patch, with the patch's own place and the distance from it."""
    record = sample.maps.store.layer(layer)
    grid = record.generated_grid
    away = patch_distance(sample.maps.scores(layer), grid, record.grid(TO_REFERENCE))[0].tolist()
    panels = []
    for panel, patch, color in zip(
        specific_panels(sample, patches, layer), patches, patch_colors(len(patches)), strict=True
    ):
        y, x = same_patch(patch, sample.grid(TO_GENERATED), grid)
        box = placed_box(sample, TO_REFERENCE, (y, x), grid, color)
        note = f"{100 * away[y * grid.width + x]:.0f} %"
        panels.append(replace(panel, boxes=(box,), note=note, frame=None))
    return panels


@mpl.rc_context(STYLE)
def alignment_plot(maps: AttributionMaps, width: float = 5.5) -> Figure:
    """Distance of the attention from the own place by layer, with that of even attention as a yardstick.

    The maps' marks stand above it; ``width`` is in inches.
    """
    rows = alignment_table(maps)
    marks = warning_lines(maps.marks, width)
    height = _PLOT_HEIGHT + LINE * len(marks)
    figure = new_figure(width, height)
    write_warnings(figure, marks)
    scale = _PLOT_HEIGHT / height
    axes = figure.add_axes((0.11, 0.24 * scale, 0.87, 0.68 * scale))
    for name, color, marker, label in (
        ("relative", OKABE_ITO[0], "o", "this model"),
        ("even", GREY, "_", "attention spread evenly"),
    ):
        values = [100 * row[name] for row in rows]
        axes.plot(range(len(rows)), values, color=color, marker=marker, linewidth=1.2, label=label)
    axes.set_xticks(range(len(rows)), [layer_title(maps, row["layer"]) for row in rows], fontsize=6.5)
    axes.set_ylabel("distance from the own place\n(% of the diagonal)", fontsize=7)
    axes.set_ylim(0, 1.1 * 100 * max(max(row["relative"], row["even"]) for row in rows))
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(fontsize=7, loc="lower right")
    return figure
