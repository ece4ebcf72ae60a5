"""What the figures of explained samples are put together from: maps and patches as panels, titles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from i2am_train.attention.maps import AttributionMaps, HeatMap, time_groups
from i2am_train.attention.recipe import LayerId, describe_layers, paper_number, similar_layer
from i2am_train.errors import CaptureError
from i2am_train.evaluation.explanation import TO_GENERATED, TO_REFERENCE, Explanation, PatchIndex, array
from i2am_train.reporting.figures.canvas import OKABE_ITO
from i2am_train.reporting.figures.placement import drawn_mask, drawn_picture, placement
from i2am_train.reporting.figures.sheet import Box, Mark, MarkKind, Panel
from i2am_train.types import Direction, GridSize

FIRST_BLOCK = ".transformer_blocks.0"
"""The only one in Stable Diffusion 1.5 and 2."""


# ---- layers and times ----------------------------------------------------------------------------


def layers_of(maps: AttributionMaps, wanted: Sequence[LayerId] | None) -> list[str]:
    """Names of the wanted layers that were captured, in the model's order; all where None.

    Raises:
        CaptureError: none of them was captured.
    """
    if wanted is None:
        return list(maps.layers)
    model = maps.store.model or maps.layers
    numbered = any(map(paper_number, model))
    chosen = {one if numbered else similar_layer(one, model) for one in wanted}
    captured = [name for name in maps.layers if chosen & {name, paper_number(name)}]
    if not captured:
        raise CaptureError(
            f"None of the layers {', '.join(map(str, wanted))} was captured. There are "
            f"{describe_layers(maps.layers)}. Set layers=[...] to some of them."
        )
    return captured


def layer_label(layer: str) -> str:
    """A layer as the paper calls it, or its own name where the paper has none.

    >>> layer_label("up_blocks.1.attentions.1")
    'layer 2'
    """
    number = paper_number(layer)
    return layer if number is None else f"layer {number}"


def layer_title(maps: AttributionMaps, layer: str) -> str:
    """The layer (short) and the grid of its generated tokens, in two lines."""
    label = layer_label(layer) if paper_number(layer) else short_name(layer)
    return f"{label}\n{maps.store.layer(layer).generated_grid}"


def short_name(layer: str) -> str:
    """A layer of a U-Net of diffusers by its numbers; other names as they are.

    >>> short_name("down_blocks.0.attentions.1.transformer_blocks.0")
    'down 0.1'
    """
    side = layer.partition("_")[0]
    numbers = [word for word in layer.removesuffix(FIRST_BLOCK).split(".") if word.isdigit()]
    return f"{side} {'.'.join(numbers)}" if side in ("down", "mid", "up") else layer


def time_titles(sample: Explanation) -> list[str]:
    """First and last timestep of each time group, as the scheduler counts; steps where unknown."""
    steps = sample.maps.store.timesteps
    titles = []
    for run in time_groups(len(steps), sample.time_groups):
        first, last = steps[run.start], steps[run.stop - 1]
        if first is None or last is None:
            titles.append(f"step {_span(run.start + 1, run.stop)}")
        else:
            titles.append(_span(first, last))
    return titles


def _span(first: float, last: float) -> str:
    return f"{first:.0f}" if first == last else f"{first:.0f}–{last:.0f}"


# ---- panels --------------------------------------------------------------------------------------


def plain_panel(sample: Explanation, direction: Direction, title: str = "") -> Panel:
    """The picture that maps of a direction lie on."""
    return Panel(picture=drawn_picture(sample, direction), title=title)


def map_panel(
    sample: Explanation, direction: Direction, heat: NDArray[np.floating], title: str = "", note: str = ""
) -> Panel:
    """A map over the picture that it lies on, with the mask that it should fill."""
    place = placement(sample, direction)
    return Panel(
        picture=drawn_picture(sample, direction),
        heat=heat if place is None else place.heat(heat),
        outline=drawn_mask(sample, direction),
        title=title,
        note=note,
    )


def titled_once(rows: Sequence[Sequence[Panel]]) -> tuple[tuple[Panel, ...], ...]:
    """Rows of the same columns: titles stand over the first one only."""
    first, *others = (tuple(row) for row in rows)
    return (first, *(tuple(replace(panel, title="") for panel in row) for row in others))


# ---- patches -------------------------------------------------------------------------------------


def patch_panel(sample: Explanation, direction: Direction, patches: Sequence[PatchIndex], title: str = "") -> Panel:
    """The picture with a box around each patch: generated ones, or those of the garment."""
    boxes = tuple(
        placed_box(sample, direction, patch, sample.grid(direction), color)
        for patch, color in zip(patches, patch_colors(len(patches)), strict=True)
    )
    return replace(plain_panel(sample, direction, title), boxes=boxes)


def boxed_panels(sample: Explanation, direction: Direction, patches: Sequence[PatchIndex]) -> list[Panel]:
    """The picture for each patch, with a box around it in the patch's own colour."""
    picture = plain_panel(sample, direction)
    return [replace(picture, boxes=(box,)) for box in patch_panel(sample, direction, patches).boxes]


def placed_box(sample: Explanation, direction: Direction, patch: PatchIndex, grid: GridSize, color: str) -> Box:
    """Where a patch of a grid lies on the drawn picture."""
    box, place = patch_box(patch, grid, color), placement(sample, direction)
    return box if place is None else place.box(box, grid)


def patch_colors(count: int) -> list[str]:
    """One colour per patch, vermilion first (the paper draws red boxes)."""
    order = (OKABE_ITO[1], OKABE_ITO[0], OKABE_ITO[2], OKABE_ITO[3], OKABE_ITO[4], OKABE_ITO[5])
    return [order[index % len(order)] for index in range(count)]


def patch_box(patch: PatchIndex, grid: GridSize, color: str) -> Box:
    """A patch of a grid in the picture that the grid covers.

    >>> patch_box((1, 2), GridSize(4, 3), "black").top
    0.25
    """
    y, x = patch
    return Box(y / grid.height, x / grid.width, 1 / grid.height, 1 / grid.width, color)


def same_patch(patch: PatchIndex, grid: GridSize, other: GridSize) -> PatchIndex:
    """The patch of another grid that holds the centre of a patch (the lower right of four).

    >>> same_patch((1, 2), GridSize(4, 3), GridSize(8, 6))
    (3, 5)
    """
    y, x = ((2 * place + 1) for place in patch)
    return y * other.height // (2 * grid.height), x * other.width // (2 * grid.width)


def specific_panels(
    sample: Explanation, patches: Sequence[PatchIndex], layer: str | None = None, titles: Sequence[str] = ()
) -> list[Panel]:
    """Where generated patches look on the garment (eq. 14), with the strongest and the true place.

    Args:
        sample: whose score matrix of the layer was kept.
        patches: of the sample's own layer.
        layer: whose attention is shown, at the same place; the sample's own where None.
        titles: one per patch, or none.
    """
    record = sample.maps.store.layer(layer or sample.layer)
    places = [same_patch(p, sample.grid(TO_GENERATED), record.generated_grid) for p in patches]
    maps = sample.maps.specific_reference(places, record.layer)
    true_places = sample.true_places(record.generated_grid, record.grid(TO_REFERENCE))
    truth = [true_places[y * record.generated_grid.width + x] for y, x in places]
    return _patch_maps(sample, TO_REFERENCE, maps, truth, titles or [""] * len(patches))


def reverse_panels(sample: Explanation, patches: Sequence[PatchIndex], layer: str | None = None) -> list[Panel]:
    """What garment patches feed on the generated image, with the strongest place.

    The arguments are those of ``specific_panels``, with patches of the reference grid.
    """
    maps = sample.maps.reverse_specific_reference(patches, layer or sample.layer)
    return _patch_maps(sample, TO_GENERATED, maps, [None] * len(patches), [""] * len(patches))


def _patch_maps(
    sample: Explanation,
    direction: Direction,
    maps: HeatMap,
    truth: Sequence[NDArray[np.floating] | None],
    titles: Sequence[str],
) -> list[Panel]:
    """One panel per patch, framed in the patch's colour."""
    colors = patch_colors(len(titles))
    return [
        replace(
            map_panel(sample, direction, values, title),
            marks=_marks(sample, direction, values, true_place),
            frame=color,
        )
        for values, true_place, title, color in zip(array(maps.normalised()), truth, titles, colors, strict=True)
    ]


def _marks(
    sample: Explanation, direction: Direction, values: NDArray[np.floating], truth: NDArray[np.floating] | None
) -> tuple[Mark, ...]:
    """The strongest place of a map, and the true one (yx in patches) where it is known."""
    if place := placement(sample, direction):  # what was seen beside the picture is no place of it
        values = place.heat(values)
    height, width = values.shape
    y, x = divmod(int(values.argmax()), width)
    peak = Mark((y + 0.5) / height, (x + 0.5) / width, MarkKind.PEAK)
    if truth is None or not np.isfinite(truth).all():
        return (peak,)
    true_y, true_x = (float(place) + 0.5 for place in truth)
    return peak, Mark(true_y / height, true_x / width, MarkKind.TRUTH)
