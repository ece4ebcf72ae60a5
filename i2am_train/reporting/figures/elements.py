"""What the figures of explained samples are put together from: maps and patches as cells, titles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from i2am_train.attention.maps import AttributionMaps, time_groups
from i2am_train.attention.recipe import LayerId, describe_layers, layer_name, paper_number
from i2am_train.errors import CaptureError
from i2am_train.reporting.figures.canvas import OKABE_ITO
from i2am_train.reporting.figures.explained import Drawn, GridCell, array
from i2am_train.reporting.figures.sheet import Box, Cell, Mark, MarkKind
from i2am_train.types import Direction, GridSize

FIRST_BLOCK = ".transformer_blocks.0"
"""The only one in Stable Diffusion 1.5 and 2."""

TO_GENERATED = Direction.REFERENCE_TO_GENERATED
TO_REFERENCE = Direction.GENERATED_TO_REFERENCE


# ---- layers and times ----------------------------------------------------------------------------


def layers_of(maps: AttributionMaps, wanted: Sequence[LayerId] | None) -> list[str]:
    """Names of the wanted layers that were captured, in the model's order; all where None.

    Raises:
        CaptureError: none of them was captured.
    """
    if wanted is None:
        return list(maps.layers)
    names = {layer_name(layer) for layer in wanted}
    captured = [name for name in maps.layers if name in names]
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


def time_titles(sample: Drawn) -> list[str]:
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


# ---- cells ---------------------------------------------------------------------------------------


def plain_cell(sample: Drawn, direction: Direction, title: str = "") -> Cell:
    """The picture that maps of a direction lie on."""
    return Cell(picture=sample.picture(direction), title=title)


def map_cell(
    sample: Drawn,
    direction: Direction,
    heat: NDArray[np.floating],
    title: str = "",
    note: str = "",
) -> Cell:
    """A map over the picture that it lies on, with the mask that it should fill."""
    placement = sample.placement(direction)
    return Cell(
        picture=sample.picture(direction),
        heat=heat if placement is None else placement.heat(heat),
        outline=sample.outline(direction),
        title=title,
        note=note,
    )


def untitled(row: Sequence[Cell]) -> tuple[Cell, ...]:
    """The same cells without their titles: a row under another one of the same columns."""
    return tuple(replace(cell, title="") for cell in row)


# ---- patches -------------------------------------------------------------------------------------


def patch_cell(
    sample: Drawn, direction: Direction, patches: Sequence[GridCell], title: str = ""
) -> Cell:
    """The picture with a box around each patch: generated ones, or those of the garment."""
    boxes = tuple(
        placed_box(sample, direction, patch, color)
        for patch, color in zip(patches, patch_colors(len(patches)), strict=True)
    )
    return replace(plain_cell(sample, direction, title), boxes=boxes)


def placed_box(sample: Drawn, direction: Direction, patch: GridCell, color: str) -> Box:
    """The place of a patch of the sample's layer on the picture of a direction."""
    grid, placement = sample.grid(direction), sample.placement(direction)
    box = patch_box(patch, grid, color)
    return box if placement is None else placement.box(box, grid)


def patch_colors(count: int) -> list[str]:
    """One colour per patch, vermilion first (the paper draws red boxes)."""
    order = (OKABE_ITO[1], OKABE_ITO[0], OKABE_ITO[2], OKABE_ITO[3], OKABE_ITO[4], OKABE_ITO[5])
    return [order[index % len(order)] for index in range(count)]


def patch_box(patch: GridCell, grid: GridSize, color: str) -> Box:
    """The place of a grid's cell in the picture.

    >>> patch_box((1, 2), GridSize(4, 3), "black").top
    0.25
    """
    y, x = patch
    return Box(y / grid.height, x / grid.width, 1 / grid.height, 1 / grid.width, color)


def same_place(patch: GridCell, grid: GridSize, other: GridSize) -> GridCell:
    """The cell of another grid that holds the centre of a cell (the lower right of four).

    >>> same_place((1, 2), GridSize(4, 3), GridSize(8, 6))
    (3, 5)
    """
    y, x = ((2 * place + 1) for place in patch)
    return y * other.height // (2 * grid.height), x * other.width // (2 * grid.width)


def specific_cells(
    sample: Drawn,
    patches: Sequence[GridCell],
    layer: str | None = None,
    titles: Sequence[str] = (),
) -> list[Cell]:
    """Where generated patches look on the garment (eq. 14), with the strongest and the true place.

    Args:
        sample: whose score matrix of the layer was kept.
        patches: cells of the sample's own layer.
        layer: whose attention is shown, at the same place; the sample's own where None.
        titles: one per patch, or none.
    """
    record = sample.maps.store.layer(layer or sample.layer)
    places = [same_place(p, sample.grid(TO_GENERATED), record.generated_grid) for p in patches]
    maps = sample.maps.specific_reference(places, record.layer)
    reference = record.grid(TO_REFERENCE)
    truth = sample.true_places(record.generated_grid, reference)
    cells = []
    colors = patch_colors(len(patches))
    for index, (values, (y, x)) in enumerate(zip(array(maps.normalised()), places, strict=True)):
        marks = _marks(sample, TO_REFERENCE, values, truth[y * record.generated_grid.width + x])
        cell = map_cell(sample, TO_REFERENCE, values, titles[index] if titles else "")
        cells.append(replace(cell, marks=marks, frame=colors[index]))
    return cells


def reverse_cells(
    sample: Drawn,
    patches: Sequence[GridCell],
    layer: str | None = None,
    titles: Sequence[str] = (),
) -> list[Cell]:
    """What garment patches feed on the generated image, with the strongest place.

    The arguments are those of ``specific_cells``, with patches of the reference grid.
    """
    record = sample.maps.store.layer(layer or sample.layer)
    maps = sample.maps.reverse_specific_reference(patches, record.layer)
    cells = []
    colors = patch_colors(len(patches))
    for index, values in enumerate(array(maps.normalised())):
        cell = map_cell(sample, TO_GENERATED, values, titles[index] if titles else "")
        cells.append(
            replace(cell, marks=_marks(sample, TO_GENERATED, values, None), frame=colors[index])
        )
    return cells


def _marks(
    sample: Drawn,
    direction: Direction,
    values: NDArray[np.floating],
    truth: NDArray[np.floating] | None,
) -> tuple[Mark, ...]:
    """The strongest place of a map, and the true one (yx in patches) where it is known."""
    placement = sample.placement(direction)
    if placement is not None:  # what the model saw beside the picture is no place of it
        values = placement.heat(values)
    height, width = values.shape
    y, x = divmod(int(values.argmax()), width)
    peak = Mark((y + 0.5) / height, (x + 0.5) / width, MarkKind.PEAK)
    if truth is None or not np.isfinite(truth).all():
        return (peak,)
    true_y, true_x = (float(place) + 0.5 for place in truth)
    return peak, Mark(true_y / height, true_x / width, MarkKind.TRUTH)
