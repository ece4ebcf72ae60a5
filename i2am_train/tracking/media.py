"""Tables of samples with their pictures, and pictures with masks that W&B can switch on and off."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import wandb
from numpy.typing import NDArray

from i2am_train.evaluation.evaluator import SAMPLE_NAMES
from i2am_train.reporting.figures.canvas import overlay
from i2am_train.results.panels import SamplePanels

INPAINTED, GARMENT, ATTRIBUTED = "inpainted region", "garment", "attribution above delta"
"""Masks of the overlays, as W&B shows them."""
CLASSES = {1: INPAINTED, 2: GARMENT, 3: ATTRIBUTED}

TABLE_COLUMNS = (
    "sample",
    "garment name",
    "garment",
    "person",
    "generated",
    "attribution on generated",
    "attribution on garment",
)
"""Columns before the scores, which are called as in ``samples.jsonl``."""

WORST_FIRST = "imacs_g"
"""The score that tables are sorted by, ascending."""

Rows = Sequence[Mapping[str, Any]]
T = TypeVar("T")


def sample_table(rows: Rows, panels: Sequence[SamplePanels], **moment: int) -> Any:
    """A ``wandb.Table`` of the first samples, those with panels: pictures, maps and every score, worst first.

    Args:
        rows: names and scores of samples (``EvaluationResult.rows``).
        panels: of the first of them, in their order.
        moment: first columns, equal in all rows: epoch and optimiser step.
    """
    scores = _score_names(rows)
    table = wandb.Table(columns=[*moment, *TABLE_COLUMNS, *scores])
    pairs = list(zip(rows, panels, strict=False))
    for row, one in worst_first(pairs, rows[: len(pairs)]):
        pictures = (
            one.garment,
            one.person,
            one.generated,
            overlay(one.generated, one.map_generated),
            overlay(one.garment, one.map_reference),
        )
        table.add_data(
            *moment.values(),
            one.name,
            one.garment_name,
            *(wandb.Image(picture) for picture in pictures),
            *(row[name] for name in scores),
        )
    return table


def score_table(rows: Rows) -> Any:
    """A ``wandb.Table`` of the scores of all samples, worst first, without pictures."""
    names = [name for name in (*SAMPLE_NAMES, *_score_names(rows)) if name in rows[0]]
    return wandb.Table(columns=names, data=[[row[name] for name in names] for row in worst_first(rows, rows)])


def worst_first(items: Iterable[T], rows: Rows) -> list[T]:
    """Items by ascending IMACS_g of their rows; those without one come last, in their order."""

    def order(pair: tuple[T, Mapping[str, Any]]) -> tuple[bool, float]:
        value = pair[1].get(WORST_FIRST)
        return (value is None, value or 0.0)

    return [item for item, _ in sorted(zip(items, rows, strict=True), key=order)]


def generated_overlays(panels: Iterable[SamplePanels], delta: float) -> list[Any]:
    """Generated images, each with the inpainted region and where the attribution is ``delta`` or more."""
    return [
        _overlaid(one.generated, {INPAINTED: one.inpaint_mask, ATTRIBUTED: one.map_generated >= delta}, one.name)
        for one in panels
    ]


def reference_overlays(panels: Iterable[SamplePanels], delta: float) -> list[Any]:
    """Garments, each with its mask and where the attribution is ``delta`` or more."""
    return [
        _overlaid(
            one.garment,
            {GARMENT: one.garment_mask, ATTRIBUTED: one.map_reference >= delta},
            f"{one.garment_name} on {one.name}",
        )
        for one in panels
    ]


def _overlaid(picture: NDArray[np.uint8], masks: Mapping[str, NDArray[np.bool_] | None], caption: str) -> Any:
    numbers = {name: number for number, name in CLASSES.items()}
    return wandb.Image(
        picture,
        caption=caption,
        masks={
            name: {"mask_data": mask.astype(np.uint8) * numbers[name], "class_labels": {numbers[name]: name}}
            for name, mask in masks.items()
            if mask is not None
        },
    )


def _score_names(rows: Rows) -> list[str]:
    return [name for name in rows[0] if name not in SAMPLE_NAMES]
