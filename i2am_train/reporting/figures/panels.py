"""What the figures of explained samples are put together from: maps and patches as panels, and their titles.

All panels of a figure have the generated picture's aspect. A reference of another one is drawn in a white frame, and
what lies on its grid of tokens is moved there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from i2am_train.attention.maps import AttributionMaps, HeatMap
from i2am_train.attention.recipe import LayerId, describe_layers, find_layer, paper_number
from i2am_train.attention.store import time_groups
from i2am_train.data.pictures import window
from i2am_train.errors import CaptureError
from i2am_train.evaluation.explanation import (
    FITS,
    SHOWN_AT_MOST,
    TO_GENERATED,
    TO_REFERENCE,
    WHITE,
    Explanation,
    PatchIndex,
    array,
)
from i2am_train.ops.grids import on_picture
from i2am_train.reporting.figures.canvas import OKABE_ITO
from i2am_train.reporting.figures.sheet import Box, Mark, MarkKind, Panel
from i2am_train.types import Canvas, Direction, GridSize

_FIRST_BLOCK = ".transformer_blocks.0"
"""The only one in Stable Diffusion 1.5 and 2."""


# ---- layers and times ----------------------------------------------------------------------------


def layers_of(maps: AttributionMaps, wanted: Sequence[LayerId] | None) -> list[str]:
    """Names of the wanted layers that were captured, in the model's order; all where None.

    Raises:
        CaptureError: none of them was captured.

    >>> from i2am_train.attention import AttributionStore, LayerRecord
    >>> grid, even = GridSize(2, 2), torch.full((1, 1, 1, 4), 0.25)
    >>> record = LayerRecord("up_blocks.1.attentions.1", grid, grid, even, even)
    >>> layers_of(AttributionMaps(AttributionStore((record,), (999,))), [2])
    ['up_blocks.1.attentions.1']
    """
    if wanted is None:
        return list(maps.layers)
    model = maps.store.model or maps.layers
    numbered = any(map(paper_number, model))
    chosen = {one if numbered else find_layer(one, model) for one in wanted}
    captured = [name for name in maps.layers if chosen & {name, paper_number(name)}]
    if not captured:
        raise CaptureError(
            f"None of the layers {', '.join(map(str, wanted))} was captured. There are "
            f"{describe_layers(maps.layers, model)}. Set layers=[...] to some of them."
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
    """The layer (short) and the grid of its generated tokens, in two lines, as ``layer 2`` and ``16x12``."""
    label = layer_label(layer) if paper_number(layer) else short_name(layer)
    return f"{label}\n{maps.store.layer(layer).generated_grid}"


def short_name(layer: str) -> str:
    """A layer of a U-Net of diffusers by its numbers; other names as they are.

    >>> short_name("down_blocks.0.attentions.1.transformer_blocks.0")
    'down 0.1'
    """
    side = layer.partition("_")[0]
    numbers = [word for word in layer.removesuffix(_FIRST_BLOCK).split(".") if word.isdigit()]
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


# ---- pictures and maps ---------------------------------------------------------------------------


def plain_panel(sample: Explanation, direction: Direction, title: str = "") -> Panel:
    """The picture that maps of a direction lie on."""
    place = _placement(sample, direction)
    picture = sample.picture(direction)
    return Panel(picture=picture if place is None else place.framed(_reduced(picture), WHITE), title=title)


def map_panel(
    sample: Explanation, direction: Direction, heat: NDArray[np.floating], title: str = "", note: str = ""
) -> Panel:
    """A map over the picture that it lies on, with the mask that it should fill."""
    mask = sample.mask(direction)
    if place := _placement(sample, direction):
        heat = place.heat(heat)
        mask = None if mask is None else place.framed(_reduced(mask), 0)
    return replace(plain_panel(sample, direction, title), heat=heat, outline=mask, note=note)


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
    panel = patch_panel(sample, direction, patches)
    return [replace(panel, boxes=(box,)) for box in panel.boxes]


def placed_box(sample: Explanation, direction: Direction, patch: PatchIndex, grid: GridSize, color: str) -> Box:
    """Where a patch of a grid lies on the drawn picture."""
    y, x = patch
    box = Box(y / grid.height, x / grid.width, 1 / grid.height, 1 / grid.width, color)
    place = _placement(sample, direction)
    return box if place is None else place.box(box, grid)


def patch_colors(count: int) -> list[str]:
    """One colour per patch, vermilion first (the paper draws red boxes).

    >>> patch_colors(2)
    ['#D55E00', '#0072B2']
    """
    order = (OKABE_ITO[1], OKABE_ITO[0], *OKABE_ITO[2:])
    return [order[index % len(order)] for index in range(count)]


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
    """What garment patches feed on the generated image (paper A.4), with the strongest place.

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
    panels = []
    for values, true_place, title, color in zip(
        array(maps.normalised()), truth, titles, patch_colors(len(titles)), strict=True
    ):
        marks = _marks(sample, direction, values, true_place)
        panels.append(replace(map_panel(sample, direction, values, title), marks=marks, frame=color))
    return panels


def _marks(
    sample: Explanation, direction: Direction, values: NDArray[np.floating], truth: NDArray[np.floating] | None
) -> tuple[Mark, ...]:
    """The strongest place of a map, and the true one (yx in patches) where it is known."""
    if place := _placement(sample, direction):  # what was seen beside the picture is no place of it
        values = place.heat(values)
    height, width = values.shape
    y, x = divmod(int(values.argmax()), width)
    peak = Mark((y + 0.5) / height, (x + 0.5) / width, MarkKind.PEAK)
    if truth is None or not np.isfinite(truth).all():
        return (peak,)
    true_y, true_x = (float(place) + 0.5 for place in truth)
    return peak, Mark(true_y / height, true_x / width, MarkKind.TRUTH)


# ---- references of another aspect ----------------------------------------------------------------

_FINE = 256
"""Fractions of a grid's cell to which positions are rounded."""


@dataclass(frozen=True, slots=True)
class _Placement:
    """How a grid of tokens covers a picture that is drawn in a frame of another aspect.

    The picture (height and width in pixels) was fitted to the model's canvas as ``canvas`` says; it
    lies in the middle of ``frame``, which is at least as large, with borders around it.
    """

    picture: GridSize
    frame: GridSize
    canvas: Canvas

    def framed(self, array: NDArray[Any], fill: int) -> NDArray[Any]:
        """An array ``[height, width, ...]`` of the picture's size in the middle of the frame."""
        height, width = array.shape[:2]
        result = np.full((*self.frame, *array.shape[2:]), fill, array.dtype)
        top, left = (self.frame.height - height) // 2, (self.frame.width - width) // 2
        result[top : top + height, left : left + width] = array
        return result

    def heat(self, values: NDArray[np.floating]) -> NDArray[np.float32]:
        """A map on the canvas as one on the frame; zero beside the canvas and the picture."""
        placed = on_picture(torch.from_numpy(np.ascontiguousarray(values)), self.picture, self.canvas)
        return np.asarray(self.framed(placed.numpy(), 0), np.float32)

    def box(self, box: Box, grid: GridSize) -> Box:
        """A rectangle in fractions of the canvas as one in fractions of the frame."""
        top, left = self.spot(box.top, box.left, grid)
        bottom, right = self.spot(box.top + box.height, box.left + box.width, grid)
        return replace(box, top=top, left=left, height=bottom - top, width=right - left)

    def spot(self, y: float, x: float, grid: GridSize) -> tuple[float, float]:
        """A place in fractions of the canvas (of the aspect of ``grid``) in fractions of the frame.

        >>> _Placement(GridSize(40, 40), GridSize(80, 40), Canvas.STRETCH).spot(1.0, 0.5, GridSize(4, 4))
        (0.75, 0.5)
        """
        fine = GridSize(grid.height * _FINE, grid.width * _FINE)
        seen = window(self.picture, fine, FITS[self.canvas])
        inside = (seen.top + y * seen.height, seen.left + x * seen.width)
        return tuple(  # type: ignore[return-value]
            (place * size + (outer - size) // 2) / outer
            for place, size, outer in zip(inside, self.picture, self.frame, strict=True)
        )


def _placement(sample: Explanation, direction: Direction) -> _Placement | None:
    """Where the grids of a direction lie on its drawn picture; None: they cover it."""
    if direction is TO_GENERATED or sample.covers_pictures:
        return None
    picture = GridSize(*_reduced(sample.picture(TO_REFERENCE)).shape[:2])
    return _Placement(picture, _frame_of(picture, sample.size), sample.maps.store.canvas)


def _frame_of(picture: GridSize, aspect: GridSize) -> GridSize:
    """The smallest frame around a picture that has the proportions of another size.

    >>> _frame_of(GridSize(40, 40), GridSize(64, 32))
    GridSize(height=80, width=40)
    """
    return GridSize(
        max(picture.height, round(picture.width * aspect.height / aspect.width)),
        max(picture.width, round(picture.height * aspect.width / aspect.height)),
    )


def _reduced(array: NDArray[Any]) -> NDArray[Any]:
    """Every n-th pixel, so that the longer side fits."""
    step = -(-max(array.shape[:2]) // SHOWN_AT_MOST)
    return array[::step, ::step]
