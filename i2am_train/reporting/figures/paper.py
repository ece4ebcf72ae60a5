"""The figures of the paper by name: what each needs, which samples it can be made of, its sheet; and the figures of one
explanation, as ``i2am explain`` draws them.

The sheets of single samples are in ``maps``; those of several side by side (the paper's Figures 10, 11, 15 and 16) are
here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import get_args

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from i2am_train.attention.known import of_same_picture
from i2am_train.attention.recipe import LayerId
from i2am_train.evaluation.explanation import TO_GENERATED, TO_REFERENCE, Explanation, array
from i2am_train.ops.grids import normalise, resize_maps
from i2am_train.reporting.figures.arms import sample_figure
from i2am_train.reporting.figures.canvas import plain_text
from i2am_train.reporting.figures.maps import (
    alignment_plot,
    alignment_sheet,
    generation_flow,
    layer_maps,
    mass_maps,
    overview,
    reverse_across_layers,
    specific_across_layers,
    specific_reference,
    time_and_head_maps,
    two_axis_maps,
    unified_maps,
)
from i2am_train.reporting.figures.panels import (
    layer_label,
    layer_title,
    layers_of,
    map_panel,
    patch_panel,
    plain_panel,
    specific_panels,
)
from i2am_train.reporting.figures.sheet import Panel, Sheet, draw_sheet, one_section
from i2am_train.types import Direction, FigureName, GridSize

Layers = Sequence[LayerId] | None
Group = tuple[int, ...]
"""Positions of the samples that are drawn in one figure."""

_GIVEN = ("garment", "person", "agnostic", "densepose")
"""Pictures that all models are given (the person is what they should make), one per row."""
_PATCH_TITLES = ("patch $i$", "patch $j$")


# ---- several samples side by side ----------------------------------------------------------------


def scores_under_maps(samples: Sequence[Explanation]) -> Sheet:
    """Unified maps above the threshold with their masks, and the scores under them (Fig. 15).

    One row per sample: garment, generated image, and the two maps that IMACS reads.
    """
    rows = [
        (
            plain_panel(sample, TO_REFERENCE, "garment"),
            plain_panel(sample, TO_GENERATED, "generated"),
            _scored_panel(sample, TO_GENERATED, f"$M_g$ above {sample.delta:g}"),
            _scored_panel(sample, TO_REFERENCE, f"$M_r$ above {sample.delta:g}"),
        )
        for sample in samples
    ]
    caption = "Unified attribution maps above the threshold, the masks that they should fill (dashed), and IMACS."
    return one_section(rows, caption, row_titles=tuple(_row_names(samples)), groups=(2, 2))


def _row_names(samples: Sequence[Explanation]) -> list[str]:
    """Names of the samples, and below them the models and guidance scales where these differ."""
    several_models = len({sample.model for sample in samples}) > 1
    several_scales = len({sample.origin["guidance"] for sample in samples}) > 1
    names = []
    for sample in samples:
        about = [sample.model] if several_models else []
        about += [_guidance_title(sample.origin["guidance"])] if several_scales else []
        names.append(plain_text("\n".join(filter(None, (sample.name, ", ".join(about))))))
    return names


def refinement(samples: Sequence[Explanation]) -> Sheet:
    """The same sample by several models, such as baseline and refined (Fig. 10).

    One row per model: generated image, both unified maps with their scores, and where the same
    patches look.
    """
    first = samples[0]
    patches = first.generated_patches[: len(_PATCH_TITLES)]
    boxes = patch_panel(first, TO_GENERATED, patches).boxes
    rows = [
        (
            Panel(picture=first.images[given], title="given", note=given),
            replace(plain_panel(sample, TO_GENERATED, "generated"), boxes=boxes),
            _scored_panel(sample, TO_GENERATED, "$M_g$"),
            _scored_panel(sample, TO_REFERENCE, "$M_r$"),
            *specific_panels(sample, patches, first.layer, _PATCH_TITLES),
        )
        for sample, given in zip(samples, cycle(_GIVEN), strict=False)
    ]
    *others, last = (sample.model for sample in samples)
    models = " and ".join(filter(None, (", ".join(others), last)))
    return one_section(
        rows,
        f"{first.name} by {models}: unified maps above the threshold with IMACS, and where the two boxed patches look "
        "on the garment.",
        row_titles=tuple(plain_text(sample.model) for sample in samples),
        groups=(1, 1, 2, len(patches)),
        group_titles=("", "", "unified maps", f"patches, {layer_label(first.layer)}"),
    )


def guidance_effect(samples: Sequence[Explanation], layers: Layers = None) -> Sheet:
    """The same sample with several guidance scales, the smallest first (Fig. 11).

    Generated image, layer-level maps and the unified map on it with its score. Guidance 1 is none.
    """
    ordered = sorted(samples, key=lambda sample: sample.origin["guidance"])
    first = ordered[0]
    chosen = layers_of(first.maps, layers)
    rows = []
    for sample in ordered:
        maps = array(sample.maps.select(chosen).layer_level(TO_GENERATED).normalised())
        note = _score_note(sample, TO_GENERATED).replace(" ", "\n")  # panels may be narrow
        row = (
            plain_panel(sample, TO_GENERATED, "generated"),
            *(
                map_panel(sample, TO_GENERATED, heat, layer_title(sample.maps, name))
                for heat, name in zip(maps, chosen, strict=True)
            ),
            map_panel(sample, TO_GENERATED, sample.unified(TO_GENERATED), "$M_g$", note),
        )
        rows.append(row)
    return one_section(
        rows,
        f"Attribution on the generated image of {first.name} ({first.model}) without and "
        "with classifier-free guidance: layer-level maps, and the unified map with IMACS.",
        row_titles=tuple(_guidance_title(sample.origin["guidance"]) for sample in ordered),
        groups=(1, len(chosen), 1),
    )


def _guidance_title(guidance: float) -> str:
    return "no guidance" if guidance == 1.0 else f"guidance {guidance:g}"


def _scored_panel(sample: Explanation, direction: Direction, title: str) -> Panel:
    heat = sample.unified(direction, thresholded=True)
    return map_panel(sample, direction, heat, title, _score_note(sample, direction))


def _score_note(sample: Explanation, direction: Direction) -> str:
    side = "g" if direction is TO_GENERATED else "r"
    score = sample.scores.get(f"imacs_{side}")
    return f"IMACS$_{side}$ " + ("–" if score is None else f"{score:.3f}".replace("-", "−"))


def daam_direction(sample: Explanation) -> Sheet:
    """Why the softmax direction matters (Fig. 16): over the reference, every place gets the same.

    From the score matrices of all layers: (a) the map of this method, (b) the mean over the
    reference of a softmax over the reference, which is one over the number of patches everywhere,
    (c) the same stretched to [0, 1], which shows nothing but rounding.
    """
    ours = array(sample.maps.unified(TO_GENERATED, sample.weighting))
    daam = daam_map(sample)
    low, high = daam.min(), daam.max()
    # Min-max without regard to rounding, which is what makes a pattern of it.
    stretched = np.asarray((daam - low) / (high - low if high > low else 1.0), dtype=np.float32)
    panels = (
        plain_panel(sample, TO_GENERATED, "generated"),
        map_panel(sample, TO_GENERATED, _normalised(ours), "(a) $M_g$", _range(ours)),
        map_panel(sample, TO_GENERATED, _normalised(daam), "(b) DAAM", _range(daam)),
        map_panel(sample, TO_GENERATED, stretched, "(c) (b) stretched", f"max − min {np.ptp(daam):.0e}"),
    )
    return one_section(
        [panels],
        f"Softmax over generated places (a) and, as in DAAM, over the reference (b) for "
        f"{sample.name} ({sample.model}). Rows of (b) sum to one, so that the map is constant; "
        "stretching it to [0, 1] shows rounding errors (c).",
        groups=(1, 3),
    )


def daam_map(sample: Explanation) -> NDArray[np.float32]:
    """DAAM's map on the finest grid, not normalised, from the score matrices of all layers."""
    records = sample.maps.store.layers
    size = max((record.generated_grid for record in records), key=lambda grid: grid.tokens)
    maps = []
    for record in records:
        row_means = sample.maps.scores(record.layer)[0].mean(dim=-1)
        maps.append(resize_maps(row_means.reshape(record.generated_grid), size))
    return np.asarray(torch.stack(maps).mean(dim=0).numpy())


def _normalised(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(normalise(torch.from_numpy(values)).numpy())


def _range(values: NDArray[np.float32]) -> str:
    return f"{values.min():.5f} to {values.max():.5f}"


# ---- by name -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _PaperFigure:
    """One kind of figure.

    ``groups`` picks from all samples those of each figure; ``needs`` says what is missing where it
    picks none. ``sheet`` draws one group; ``layers`` are those of figures by layer.
    """

    source: str
    about: str
    needs: str
    groups: Callable[[Sequence[Explanation]], list[Group]]
    sheet: Callable[[Sequence[Explanation], Layers], Sheet]
    single: bool
    """Whether each figure is of one sample."""


def _each(fits: Callable[[Explanation], bool]) -> Callable[..., list[Group]]:
    """One figure for each sample that fits."""
    return lambda samples: [(index,) for index, sample in enumerate(samples) if fits(sample)]


def _has_reference(sample: Explanation) -> bool:
    return TO_REFERENCE in sample.directions


def _has_patches(sample: Explanation) -> bool:
    return _has_reference(sample) and bool(sample.generated_patches)


def _has_matrices(sample: Explanation) -> bool:
    layers = sample.maps.store.layers
    return _has_reference(sample) and all(record.scores_over_reference is not None for record in layers)


def _together(samples: Sequence[Explanation]) -> list[Group]:
    """All samples of try-on models whose pictures have the same size."""
    sizes: dict[GridSize, list[int]] = {}
    for index, sample in enumerate(samples):
        if sample.is_tryon:
            sizes.setdefault(sample.size, []).append(index)
    return [tuple(members) for members in sizes.values()]


def _alike_but(difference: str, samples: Sequence[Explanation]) -> list[Group]:
    """Groups of try-on samples that agree in how they were made, but for one thing that varies."""
    alike: dict[str, dict[object, int]] = {}
    for index, sample in enumerate(samples):
        if sample.is_tryon:
            origin = dict(sample.origin)
            varying = origin.pop(difference)
            key = json.dumps([sample.name, sample.inputs, origin], sort_keys=True)
            alike.setdefault(key, {}).setdefault(varying, index)
    return [tuple(members.values()) for members in alike.values() if len(members) > 1]


def _single(draw: Callable[[Explanation], Sheet]) -> Callable[..., Sheet]:
    return lambda samples, layers: draw(samples[0])


def _by_layer(draw: Callable[[Explanation, Layers], Sheet]) -> Callable[..., Sheet]:
    return lambda samples, layers: draw(samples[0], layers)


def _of_all(draw: Callable[[Sequence[Explanation]], Sheet]) -> Callable[..., Sheet]:
    return lambda samples, layers: draw(samples)


_A_FOLDER = "a folder of 'i2am explain'"
_ALL_MATRICES = "score matrices of all layers ('i2am explain' with matrix_layers=null)"

PAPER_FIGURES: Mapping[FigureName, _PaperFigure] = {
    "layers": _PaperFigure(
        "Fig. 2", "layer-level maps in both directions", _A_FOLDER,
        _each(lambda sample: True), _by_layer(layer_maps), True,
    ),
    "time_heads": _PaperFigure(
        "Fig. 6", "time- and head-level maps in both directions", _A_FOLDER,
        _each(lambda sample: True), _single(time_and_head_maps), True,
    ),
    "flow": _PaperFigure(
        "Fig. 7", "generation flow: both directions by time, and specific patches",
        f"{_A_FOLDER} with at least one patch on the garment",
        _each(lambda sample: _has_patches(sample) and bool(sample.clean)), _single(generation_flow), True,
    ),
    "specific_layers": _PaperFigure(
        "Fig. 9", "specific-reference maps across layers", _ALL_MATRICES,
        _each(_has_matrices), _by_layer(specific_across_layers), True,
    ),
    "reverse_layers": _PaperFigure(
        "Sec. A.4", "reverse specific-reference maps across layers", _ALL_MATRICES,
        _each(_has_matrices), _by_layer(reverse_across_layers), True,
    ),
    "refinement": _PaperFigure(
        "Fig. 10", "the same sample by several models",
        "two folders of one sample by different checkpoints, otherwise made alike",
        partial(_alike_but, "checkpoint"), _of_all(refinement), False,
    ),
    "guidance": _PaperFigure(
        "Fig. 11", "the same sample with and without guidance",
        "two folders of one sample and checkpoint with different sampling.guidance",
        partial(_alike_but, "guidance"), guidance_effect, False,
    ),
    "specific_reference": _PaperFigure(
        "Fig. 12", "where generated patches look on the garment", _A_FOLDER,
        _each(_has_patches), _single(specific_reference), True,
    ),
    "scores": _PaperFigure(
        "Fig. 15", "unified maps with masks and IMACS under them", _A_FOLDER,
        _together, _of_all(scores_under_maps), False,
    ),
    "daam": _PaperFigure(
        "Fig. 16", "DAAM's softmax direction, which gives a constant map", _ALL_MATRICES,
        _each(_has_matrices), _single(daam_direction), True,
    ),
    "two_axis": _PaperFigure(
        "Fig. 20", "maps by resolution and time, and by resolution and head", _A_FOLDER,
        _each(_has_reference), _single(two_axis_maps), True,
    ),
    "unpaired": _PaperFigure(
        "Fig. 21", "all kinds of maps where the garment is another one", f"{_A_FOLDER} with pairing=unpaired",
        _each(lambda sample: sample.paired is False and bool(sample.generated_patches)), _single(overview), True,
    ),
}  # fmt: skip
"""How each is drawn."""


@dataclass(frozen=True, slots=True)
class PlannedFigure:
    """One figure that can be drawn: its kind, and which samples it shows."""

    name: FigureName
    group: Group

    def sheet(self, samples: Sequence[Explanation], layers: Layers = None) -> Sheet:
        """What the figure shows, under the marks of its maps; ``samples`` are all of them."""
        shown = [samples[index] for index in self.group]
        marks = tuple(dict.fromkeys(mark for sample in shown for mark in sample.maps.marks))
        return replace(PAPER_FIGURES[self.name].sheet(shown, layers), warnings=marks)


def plan(
    samples: Sequence[Explanation], names: Sequence[FigureName] = ()
) -> tuple[list[PlannedFigure], dict[str, str]]:
    """What can be drawn of these samples, and what each kind that cannot be drawn would need.

    ``names`` are kinds of figures; all where empty.

    >>> plan([], ["layers"])
    ([], {'layers': "a folder of 'i2am explain'"})
    """
    planned, left_out = [], {}
    for name in names or get_args(FigureName):
        groups = PAPER_FIGURES[name].groups(samples)
        planned += [PlannedFigure(name, group) for group in groups]
        if not groups:
            left_out[name] = PAPER_FIGURES[name].needs
    return planned, left_out


# ---- of one explanation --------------------------------------------------------------------------


def figures_of(explanation: Explanation) -> dict[str, Figure]:
    """By name: of a try-on sample the paper's figures and the field of its attention centres; of other people's models
    those that the model allows. Each carries the marks of its maps."""
    drawn: dict[str, Figure] = {}
    if explanation.is_tryon:
        for figure in plan([explanation])[0]:
            drawn[figure.name] = draw_sheet(figure.sheet([explanation]))
        panels = {"model": [explanation.panels()]}
        return drawn | {"centers": sample_figure(panels, labels={"model": "generated"})}
    sheets = {
        "unified": unified_maps(explanation),
        "layers": layer_maps(explanation),
        "time_heads": time_and_head_maps(explanation),
    }
    if explanation.maps.store.joint:
        sheets["mass"] = mass_maps(explanation)
    scores_kept = explanation.record().scores_over_reference is not None
    if _has_reference(explanation) and scores_kept:
        sheets["specific_reference"] = specific_reference(explanation)
        sheets["reverse_specific"] = reverse_across_layers(explanation, [explanation.layer])
    if traced := _aligned_layers(explanation):
        sheets["alignment"] = alignment_sheet(explanation, traced)
        drawn["alignment_layers"] = alignment_plot(explanation.maps)
    marks = explanation.maps.marks
    return drawn | {name: draw_sheet(replace(sheet, warnings=marks)) for name, sheet in sheets.items()}


def _aligned_layers(explanation: Explanation) -> list[str]:
    """Layers with score matrices, where the reference shows what is generated."""
    if not of_same_picture(explanation.maps.store.recipe):
        return []
    layers = explanation.maps.store.layers
    return [one.layer for one in layers if one.scores_over_reference is not None]
