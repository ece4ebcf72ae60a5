"""Samples, models and settings side by side: the paper's Figures 10, 11, 15 and 16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

import numpy as np
import torch
from numpy.typing import NDArray

from i2am_train.attention.maps import normalise
from i2am_train.attention.recipe import LayerId
from i2am_train.evaluation.explanation import TO_GENERATED, TO_REFERENCE, Explanation, array
from i2am_train.ops.images import resize_maps
from i2am_train.reporting.figures.canvas import plain_text
from i2am_train.reporting.figures.elements import (
    layer_label,
    layer_title,
    layers_of,
    map_panel,
    patch_panel,
    plain_panel,
    specific_panels,
    titled_once,
)
from i2am_train.reporting.figures.sheet import Panel, Section, Sheet
from i2am_train.types import Direction

GIVEN = ("garment", "person", "agnostic", "densepose")
"""Pictures that all models are given (the person is what they should make), one per row."""
PATCH_TITLES = ("patch $i$", "patch $j$")
PATCHES_COMPARED = len(PATCH_TITLES)


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
    section = Section(rows=titled_once(rows), row_titles=tuple(_row_names(samples)), groups=(2, 2))
    return Sheet(
        sections=(section,),
        caption="Unified attribution maps above the threshold, the masks that they should fill (dashed), and IMACS.",
    )


def refinement(samples: Sequence[Explanation]) -> Sheet:
    """The same sample by several models, such as baseline and refined (Fig. 10).

    One row per model: generated image, both unified maps with their scores, and where the same
    patches look.
    """
    first = samples[0]
    patches = first.generated_patches[:PATCHES_COMPARED]
    boxes = patch_panel(first, TO_GENERATED, patches).boxes
    rows = [
        (
            Panel(picture=first.images[given], title="given", note=given),
            replace(plain_panel(sample, TO_GENERATED, "generated"), boxes=boxes),
            _scored_panel(sample, TO_GENERATED, "$M_g$"),
            _scored_panel(sample, TO_REFERENCE, "$M_r$"),
            *specific_panels(sample, patches, first.layer, PATCH_TITLES),
        )
        for sample, given in zip(samples, cycle(GIVEN), strict=False)
    ]
    section = Section(
        rows=titled_once(rows),
        row_titles=tuple(plain_text(sample.model) for sample in samples),
        groups=(1, 1, 2, len(patches)),
        group_titles=("", "", "unified maps", f"patches, {layer_label(first.layer)}"),
    )
    return Sheet(
        sections=(section,),
        caption=f"{first.name} by {_words([sample.model for sample in samples])}: unified maps "
        "above the threshold with IMACS, and where the two boxed patches look on the garment.",
    )


def guidance_effect(samples: Sequence[Explanation], layers: Sequence[LayerId] | None = None) -> Sheet:
    """The same sample with several guidance scales, the smallest first (Fig. 11).

    Generated image, layer-level maps and the unified map on it with its score. Guidance 1 is none.
    """
    ordered = sorted(samples, key=lambda sample: sample.origin["guidance"])
    first = ordered[0]
    chosen = layers_of(first.maps, layers)
    rows = []
    for sample in ordered:
        maps = sample.maps.select(chosen).layer_level(TO_GENERATED).normalised()
        titles = [layer_title(sample.maps, name) for name in chosen]
        by_layer = (
            map_panel(sample, TO_GENERATED, heat, title) for heat, title in zip(array(maps), titles, strict=True)
        )
        note = _score_note(sample, TO_GENERATED).replace(" ", "\n")  # panels may be narrow
        row = (
            plain_panel(sample, TO_GENERATED, "generated"),
            *by_layer,
            map_panel(sample, TO_GENERATED, sample.unified(TO_GENERATED), "$M_g$", note),
        )
        rows.append(row)
    section = Section(
        rows=titled_once(rows),
        row_titles=tuple(_guidance_title(sample.origin["guidance"]) for sample in ordered),
        groups=(1, len(chosen), 1),
    )
    return Sheet(
        sections=(section,),
        caption=f"Attribution on the generated image of {first.name} ({first.model}) without and "
        "with classifier-free guidance: layer-level maps, and the unified map with IMACS.",
    )


def daam_direction(sample: Explanation) -> Sheet:
    """Why the softmax direction matters (Fig. 16): over the reference, every place gets the same.

    From the score matrices of all layers: (a) the map of this method, (b) the mean over the
    reference of a softmax over the reference, which is one over the number of patches everywhere,
    (c) the same stretched to [0, 1], which shows nothing but rounding.
    """
    ours = array(sample.maps.unified(TO_GENERATED, sample.weighting))
    daam = daam_map(sample)
    panels = (
        plain_panel(sample, TO_GENERATED, "generated"),
        map_panel(sample, TO_GENERATED, _normalised(ours), "(a) $M_g$", _range(ours)),
        map_panel(sample, TO_GENERATED, _normalised(daam), "(b) DAAM", _range(daam)),
        map_panel(
            sample, TO_GENERATED, _stretched(daam), "(c) (b) stretched",
            f"max − min {np.ptp(daam):.0e}",
        ),
    )  # fmt: skip
    return Sheet(
        sections=(Section(rows=(panels,), groups=(1, 3)),),
        caption=f"Softmax over generated places (a) and, as in DAAM, over the reference (b) for "
        f"{sample.name} ({sample.model}). Rows of (b) sum to one, so that the map is constant; "
        "stretching it to [0, 1] shows rounding errors (c).",
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


def _stretched(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Min-max without regard to rounding, which is what makes a pattern of it."""
    low, high = values.min(), values.max()
    return np.asarray((values - low) / (high - low if high > low else 1.0), dtype=np.float32)


def _range(values: NDArray[np.float32]) -> str:
    return f"{values.min():.5f} to {values.max():.5f}"


def _scored_panel(sample: Explanation, direction: Direction, title: str) -> Panel:
    heat = sample.unified(direction, thresholded=True)
    return map_panel(sample, direction, heat, title, _score_note(sample, direction))


def _score_note(sample: Explanation, direction: Direction) -> str:
    side = "g" if direction is TO_GENERATED else "r"
    score = sample.scores.get(f"imacs_{side}")
    return f"IMACS$_{side}$ " + ("–" if score is None else f"{score:.3f}".replace("-", "−"))


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


def _guidance_title(guidance: float) -> str:
    return "no guidance" if guidance == 1.0 else f"guidance {guidance:g}"


def _words(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
