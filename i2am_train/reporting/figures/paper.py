"""The figures of the paper by name: what each needs, which samples it can be made of, its sheet."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from i2am_train.attention.recipe import LayerId
from i2am_train.evaluation.explanation import TO_REFERENCE, Explanation
from i2am_train.reporting.figures.by_layer import layer_maps, overview, time_and_head_maps, two_axis_maps
from i2am_train.reporting.figures.comparisons import daam_direction, guidance_effect, refinement, scores_under_maps
from i2am_train.reporting.figures.patches import (
    generation_flow,
    reverse_across_layers,
    specific_across_layers,
    specific_reference,
)
from i2am_train.reporting.figures.sheet import Sheet
from i2am_train.types import FigureName, GridSize

Layers = Sequence[LayerId] | None
Group = tuple[int, ...]
"""Positions of the samples that are drawn in one figure."""


@dataclass(frozen=True, slots=True)
class PaperFigure:
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


def _same_sample_by_models(samples: Sequence[Explanation]) -> list[Group]:
    return _alike_but(samples, "checkpoint")


def _same_sample_by_guidance(samples: Sequence[Explanation]) -> list[Group]:
    return _alike_but(samples, "guidance")


def _alike_but(samples: Sequence[Explanation], difference: str) -> list[Group]:
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


PAPER_FIGURES: Mapping[FigureName, PaperFigure] = {
    "layers": PaperFigure(
        "Fig. 2", "layer-level maps in both directions",
        "a folder of 'i2am explain'",
        _each(lambda sample: True),
        lambda samples, layers: layer_maps(samples[0], layers), True,
    ),
    "time_heads": PaperFigure(
        "Fig. 6", "time- and head-level maps in both directions",
        "a folder of 'i2am explain'",
        _each(lambda sample: True), _single(time_and_head_maps), True,
    ),
    "flow": PaperFigure(
        "Fig. 7", "generation flow: both directions by time, and specific patches",
        "a folder of 'i2am explain' with at least one patch on the garment",
        _each(lambda sample: _has_patches(sample) and bool(sample.clean)),
        _single(generation_flow), True,
    ),
    "specific_layers": PaperFigure(
        "Fig. 9", "specific-reference maps across layers",
        "score matrices of all layers ('i2am explain' with matrix_layers=null)",
        _each(_has_matrices),
        lambda samples, layers: specific_across_layers(samples[0], layers), True,
    ),
    "reverse_layers": PaperFigure(
        "Sec. A.4", "reverse specific-reference maps across layers",
        "score matrices of all layers ('i2am explain' with matrix_layers=null)",
        _each(_has_matrices),
        lambda samples, layers: reverse_across_layers(samples[0], layers), True,
    ),
    "refinement": PaperFigure(
        "Fig. 10", "the same sample by several models",
        "two folders of one sample by different checkpoints, otherwise made alike",
        _same_sample_by_models,
        lambda samples, layers: refinement(samples), False,
    ),
    "guidance": PaperFigure(
        "Fig. 11", "the same sample with and without guidance",
        "two folders of one sample and checkpoint with different sampling.guidance",
        _same_sample_by_guidance, guidance_effect, False,
    ),
    "specific_reference": PaperFigure(
        "Fig. 12", "where generated patches look on the garment",
        "a folder of 'i2am explain'",
        _each(_has_patches), _single(specific_reference), True,
    ),
    "scores": PaperFigure(
        "Fig. 15", "unified maps with masks and IMACS under them",
        "a folder of 'i2am explain'",
        _together,
        lambda samples, layers: scores_under_maps(samples), False,
    ),
    "daam": PaperFigure(
        "Fig. 16", "DAAM's softmax direction, which gives a constant map",
        "score matrices of all layers ('i2am explain' with matrix_layers=null)",
        _each(_has_matrices), _single(daam_direction), True,
    ),
    "two_axis": PaperFigure(
        "Fig. 20", "maps by resolution and time, and by resolution and head",
        "a folder of 'i2am explain'",
        _each(_has_reference), _single(two_axis_maps), True,
    ),
    "unpaired": PaperFigure(
        "Fig. 21", "all kinds of maps where the garment is another one",
        "a folder of 'i2am explain' with pairing=unpaired",
        _each(lambda sample: sample.paired is False and bool(sample.generated_patches)),
        _single(overview), True,
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
    """
    planned, left_out = [], {}
    for name in names or get_args(FigureName):
        groups = PAPER_FIGURES[name].groups(samples)
        planned += [PlannedFigure(name, group) for group in groups]
        if not groups:
            left_out[name] = PAPER_FIGURES[name].needs
    return planned, left_out
