"""Where single patches look and what they feed: the paper's Figures 7, 9 and 12."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from i2am_train.attention.recipe import LayerId
from i2am_train.evaluation.explanation import TO_GENERATED, TO_REFERENCE, Explanation, PatchIndex, array
from i2am_train.reporting.figures.elements import (
    boxed_panels,
    layer_label,
    layer_title,
    layers_of,
    map_panel,
    reverse_panels,
    specific_panels,
    time_titles,
    titled_once,
)
from i2am_train.reporting.figures.sheet import Panel, Section, Sheet
from i2am_train.types import Direction

PATCHES_PER_LAYER_FIGURE = 4
"""Rows of the figures across layers; more do not fit a page beside a caption."""
PAIRS_PER_ROW = 3


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
    patches = sample.generated_patches[: sample.time_groups]
    pairs = _pairs(sample, patches)
    rows = []
    for group, clean in enumerate(sample.clean):
        flow = (
            map_panel(sample, TO_REFERENCE, to_reference[group], "$M_{r,\\tau}$"),
            Panel(picture=clean.picture, title="predicted"),
            map_panel(sample, TO_GENERATED, to_generated[group], "$M_{g,\\tau}$"),
        )
        pair = pairs[group] if group < len(pairs) else ()
        titled = [replace(panel, title=t) for panel, t in zip(pair, _PAIR_TITLES, strict=False)]
        rows.append((*flow, *titled))
    section = Section(
        rows=titled_once(rows),
        row_titles=tuple(f"$t$ = {title}" for title in time_titles(sample)),
        groups=(1, 2, 2),
        group_titles=("what is used", "what is made", f"patches, {layer_label(sample.layer)}, all steps"),
    )
    return Sheet(
        sections=(section,),
        caption=f"Generation of {sample.name} ({sample.model}) from the noisiest steps (top) to the "
        "image (bottom): parts of the garment that are used, predicted image and where the garment "
        "goes, and specific patches of the image with what they look at.",
    )


_PAIR_TITLES = ("patch $i$", "$M_{sr,i}$")


def specific_reference(sample: Explanation) -> Sheet:
    """Each generated patch, and by an arrow where it looks on the garment (Fig. 12)."""
    pairs = [(replace(box, arrow=True), looks) for box, looks in _pairs(sample, sample.generated_patches)]
    rows = _in_rows(pairs, PAIRS_PER_ROW)
    return Sheet(
        sections=(Section(rows=rows, groups=(2,) * (len(rows[0]) // 2)),),
        caption=f"Specific-reference attribution maps of {sample.name} ({sample.model}), "
        f"{layer_label(sample.layer)}: where the boxed patch looks on the {sample.reference}.",
    )


def specific_across_layers(sample: Explanation, layers: Sequence[LayerId] | None = None) -> Sheet:
    """Where a place of the generated image looks, from layer to layer (Fig. 9).

    Rows are patches of the sample's layer; in other layers the patch at the same place is shown.
    """
    chosen = layers_of(sample.maps, layers)
    patches = sample.generated_patches[:PATCHES_PER_LAYER_FIGURE]
    columns = [specific_panels(sample, patches, layer) for layer in chosen]
    return across_layers(
        sample, TO_GENERATED, patches, chosen, columns,
        f"Specific-reference attribution maps of {sample.name} ({sample.model}) across layers: "
        f"where the boxed place of the generated image looks on the {sample.reference}.",
    )  # fmt: skip


def reverse_across_layers(sample: Explanation, layers: Sequence[LayerId] | None = None) -> Sheet:
    """What a patch of the garment feeds on the generated image, from layer to layer."""
    chosen = layers_of(sample.maps, layers)
    patches = sample.reference_patches[:PATCHES_PER_LAYER_FIGURE]
    columns = [reverse_panels(sample, patches, layer) for layer in chosen]
    return across_layers(
        sample, TO_REFERENCE, patches, chosen, columns,
        f"Reverse specific-reference attribution maps of {sample.name} ({sample.model}) across "
        f"layers: where the boxed patch of the {sample.reference} goes on the generated image.",
    )  # fmt: skip


def across_layers(
    sample: Explanation,
    direction: Direction,
    patches: Sequence[PatchIndex],
    layers: Sequence[str],
    columns: Sequence[Sequence[Panel]],
    caption: str,
    first_title: str = "",
) -> Sheet:
    """``columns[layer][patch]`` beside the picture with the patch."""
    titles = (first_title, *(layer_title(sample.maps, layer) for layer in layers))
    rows = [
        tuple(replace(panel, title=title) for panel, title in zip(row, titles, strict=True))
        for row in zip(boxed_panels(sample, direction, patches), *columns, strict=True)
    ]
    section = Section(
        rows=titled_once(rows), row_titles=tuple(f"patch {y}, {x}" for y, x in patches), groups=(1, len(layers))
    )
    return Sheet(sections=(section,), caption=caption)


def _pairs(sample: Explanation, patches: Sequence[PatchIndex]) -> list[tuple[Panel, Panel]]:
    """For each patch the generated image with its box, and the map of where it looks."""
    boxed = boxed_panels(sample, TO_GENERATED, patches)
    return list(zip(boxed, specific_panels(sample, patches), strict=True))


def _in_rows(pairs: Sequence[tuple[Panel, Panel]], per_row: int) -> tuple[tuple[Panel, ...], ...]:
    starts = range(0, len(pairs), per_row)
    return tuple(tuple(panel for pair in pairs[start : start + per_row] for panel in pair) for start in starts)
