"""Maps by layer, time, head and two of them at once: the paper's Figures 2, 6, 20 and 21."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from i2am_train.attention.maps import AttributionMaps, by_resolution
from i2am_train.attention.recipe import LayerId, paper_number
from i2am_train.evaluation.explanation import TO_GENERATED, TO_REFERENCE, Explanation, array
from i2am_train.reporting.figures.elements import (
    layer_label,
    layer_title,
    layers_of,
    map_panel,
    patch_panel,
    plain_panel,
    specific_panels,
    time_titles,
    titled_once,
)
from i2am_train.reporting.figures.sheet import Panel, Section, Sheet
from i2am_train.types import Direction

HEADS_SHOWN = 8
"""Heads per row; the paper's Fig. 17 shows 8 of 20."""
LAYERS_PER_ROW = 9
"""The paper's layers, or as many of a model that has more."""
HEADS_PER_RESOLUTION = 3
"""Heads in the paper's Fig. 20."""


def layer_maps(sample: Explanation, layers: Sequence[LayerId] | None = None) -> Sheet:
    """Layer-level maps in both directions, coarse to fine (Fig. 2).

    Rows: on the generated image, on the garment. Columns: the picture, then ``layers`` (all where
    None) in the order of the model.
    """
    chosen = layers_of(sample.maps, layers)
    parts = [chosen[start : start + LAYERS_PER_ROW] for start in range(0, len(chosen), LAYERS_PER_ROW)]
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
    return Section(
        rows=titled_once(rows), row_titles=("$M_g^{(l)}$", "$M_r^{(l)}$")[: len(rows)], groups=(1, len(titles))
    )


def time_and_head_maps(sample: Explanation) -> Sheet:
    """Time-level (a) and head-level maps (b, c, ...) in both directions (Fig. 6).

    Layers with different numbers of heads cannot be put together by head: there is a block for
    each number, most heads first.
    """
    blocks = [_block(sample, "(a) by timestep", lambda d: _time_panels(sample, d))]
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
    titles = [*time_titles(sample), *(f"head {head + 1}" for head in range(HEADS_PER_RESOLUTION))]
    groups = (sample.time_groups, HEADS_PER_RESOLUTION)
    return Sheet(
        sections=tuple(
            Section(
                rows=_two_axis_rows(sample, direction, titles),
                title=title,
                row_titles=tuple(str(grid) for grid in by_resolution(sample.maps.store)),
                groups=groups,
                group_titles=("(a) by timestep", "(b) by head"),
            )
            for direction, title in ((TO_GENERATED, "On the generated image"), (TO_REFERENCE, "On the garment"))
        ),
        caption=f"Attribution maps of {sample.name} ({sample.model}) by the layers' resolution "
        "(rows) and time or head (columns).",
    )


def overview(sample: Explanation) -> Sheet:
    """All kinds of maps of one sample: unified, head-level, time-level, specific-reference (Fig. 21).

    Heads are those of the layers like the chosen one.
    """
    inputs = (
        Panel(picture=sample.images["garment"], title="garment"),
        Panel(picture=sample.images["person"], title="person"),
        Panel(picture=sample.images["generated"], title="generated"),
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
    sample: Explanation, direction: Direction, maps: NDArray[np.floating], titles: Sequence[str]
) -> tuple[Panel, ...]:
    return tuple(map_panel(sample, direction, heat, title) for heat, title in zip(maps, titles, strict=True))


def _time_panels(sample: Explanation, direction: Direction) -> tuple[Panel, ...]:
    maps = sample.maps.time_level(direction, sample.time_groups, sample.weighting)
    return _panels(sample, direction, array(maps.normalised()), time_titles(sample))


def _head_panels(sample: Explanation, maps: AttributionMaps, direction: Direction) -> tuple[Panel, ...]:
    values = array(maps.head_level(direction, sample.weighting).normalised())[:HEADS_SHOWN]
    titles = [f"head {head + 1}" for head in range(len(values))]
    return _panels(sample, direction, values, titles)


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
        if last is None or sum(last.groups) + sum(block.groups) > HEADS_SHOWN + 1:
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
    shown = f"{HEADS_SHOWN} of {heads} heads" if heads > HEADS_SHOWN else f"{heads} heads"
    numbers = [paper_number(layer) for layer in maps.layers]
    known = [number for number in numbers if number is not None]
    if len(known) != len(numbers) or known != list(range(known[0], known[0] + len(known))):
        return f"{len(numbers)} layers, {shown}"
    which = f"layers {known[0]}–{known[-1]}" if len(known) > 1 else f"layer {known[0]}"
    return f"{which}, {shown}"


def _two_axis_rows(sample: Explanation, direction: Direction, titles: Sequence[str]) -> tuple[tuple[Panel, ...], ...]:
    by_time = array(
        sample.maps.two_axis(
            direction, "time", "resolution", groups=sample.time_groups, weighting=sample.weighting
        ).normalised()
    )
    rows = []
    for level, records in enumerate(by_resolution(sample.maps.store).values()):
        alike = sample.maps.select([record.layer for record in records])
        by_head = array(alike.head_level(direction, sample.weighting).normalised())
        maps = [*by_time[:, level], *by_head[:HEADS_PER_RESOLUTION]]
        shown = titles[: len(maps)] if level == 0 else [""] * len(maps)
        panels = zip(maps, shown, strict=True)
        rows.append(tuple(map_panel(sample, direction, heat, title) for heat, title in panels))
    return tuple(rows)
