"""What a detection experiment tells W&B: mean IoU of every method, the sweep over thresholds, samples with boxes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import wandb

from i2am_train.config.reporting import TrackingConfig
from i2am_train.detection.report import KINDS, Detected, Example, label, swept_name
from i2am_train.files import numbered
from i2am_train.metrics.boxes import METHOD_LABELS, METHODS_OF_MAPS
from i2am_train.reporting.figures.canvas import overlay
from i2am_train.tracking.names import (
    DETECTION,
    DETECTION_BOXES,
    DETECTION_DELTA,
    DETECTION_JOB,
    DETECTION_METHODS,
    DETECTION_SAMPLES,
    DETECTION_SWEEP,
    DETECTION_TABLE,
    DETECTION_THRESHOLDS,
)
from i2am_train.tracking.scores import track_finished

_SCORES = {"mean": "mean IoU", "low": "low", "high": "high", "n": "images", "left_out": "left out"}
"""Entries of a score, and their columns."""
METHOD_COLUMNS = ("kind", "method", "label", *_SCORES.values())
THRESHOLD_COLUMNS = ("delta", "method", "label", *_SCORES.values())
SAMPLE_COLUMNS = ("index", "image_id", "name", "category", "crowd", "share")
"""Columns before the IoUs, which are called ``kind/method``."""
PICTURE_COLUMNS = ("sample", "category", "image", "reference", "painted", "map")


def track_detection(
    tracking: TrackingConfig, detected: Detected, *, arm: str, use_inputs: Callable[[Any], None]
) -> None:
    """Log an experiment as a run of its own; nothing where W&B is disabled.

    Args:
        tracking: mode, project, group, tags.
        detected: the experiment, in the folder with its manifest and its written results.
        arm: of the pipeline, unless ``tracking.arm`` is set.
        use_inputs: says of a run what it reads (``session.use_bench``, ``session.use_model``).
    """
    track_finished(
        tracking,
        detected.folder,
        partial(_log, detected, tracking.table_samples),
        name=detected.folder.name,
        job_type=DETECTION_JOB,
        arm=arm,
        use_inputs=use_inputs,
        settings=detected.results["settings"],  # the manifest's are of the folder's first command
    )


def _log(detected: Detected, table_samples: int, run: Any) -> None:
    """The sweep as curves over delta, then all the rest at once."""
    miou, deltas = detected.results["miou"], detected.results["thresholds"]
    run.define_metric(DETECTION_DELTA, hidden=True)
    run.define_metric(f"{DETECTION_SWEEP}*", step_metric=DETECTION_DELTA)
    for delta in deltas:
        points = {name: miou["sweep"][swept_name(name, delta)]["mean"] for name in METHODS_OF_MAPS}
        known = {f"{DETECTION_SWEEP}{name}": mean for name, mean in points.items() if mean is not None}
        run.log({DETECTION_DELTA: delta, **known})
    scores = [(kind, method, score) for kind in KINDS for method, score in miou[kind].items()]
    swept = [(delta, name, miou["sweep"][swept_name(name, delta)]) for delta in deltas for name in METHODS_OF_MAPS]
    names = _method_names(list(miou["real"]))
    logged: dict[str, Any] = {
        **{f"{DETECTION}{k}/{names[m]}": score["mean"] for k, m, score in scores if score["mean"] is not None},
        DETECTION_METHODS: _score_table(METHOD_COLUMNS, scores),
        DETECTION_THRESHOLDS: _score_table(THRESHOLD_COLUMNS, swept),
        DETECTION_SAMPLES: _sample_table(detected.rows, names),
    }
    if examples := detected.examples[:table_samples]:
        logged[DETECTION_TABLE] = _picture_table(examples, names)
        logged[DETECTION_BOXES] = [_picture_with_boxes(one, names) for one in examples]
    run.log(logged)


def _method_names(detectors: Sequence[str]) -> dict[str, str]:
    """Names in W&B by method: our own word, or a detector's label; none twice.

    >>> names = _method_names(["/a/yolos", "/b/yolos"])
    >>> names["i2am"], names["/a/yolos"], names["/b/yolos"]
    ('i2am', 'yolos-1', 'yolos-2')
    """
    labels = numbered([label(name) for name in detectors])
    return {**{name: name for name in METHOD_LABELS}, **dict(zip(detectors, labels, strict=True))}


def _score_table(columns: Sequence[str], scores: Iterable[tuple[Any, str, Mapping[str, Any]]]) -> Any:
    """A ``wandb.Table`` of mean IoUs: kind or threshold, method, its label, and the entries of the score."""
    rows = [[first, method, label(method), *(score[name] for name in _SCORES)] for first, method, score in scores]
    return wandb.Table(columns=list(columns), data=rows)


def _sample_table(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> Any:
    """A ``wandb.Table`` of all samples: what each is, and its IoU by kind and method."""
    keys = [(kind, method) for kind in KINDS for method in rows[0]["iou"][kind]]
    return wandb.Table(
        columns=[*SAMPLE_COLUMNS, *(f"{kind}/{names[method]}" for kind, method in keys)],
        data=[
            [*(row[name] for name in SAMPLE_COLUMNS), *(row["iou"][kind][method] for kind, method in keys)]
            for row in rows
        ],
    )


def _picture_table(examples: Sequence[Example], names: Mapping[str, str]) -> Any:
    """A ``wandb.Table`` of the first samples: pictures, the map, and the IoU of every method on the painted image."""
    methods = list(examples[0].row["iou"]["generated"])
    table = wandb.Table(columns=[*PICTURE_COLUMNS, *(names[method] for method in methods)])
    for one in examples:
        pictures = (one.image, one.reference, one.generated, overlay(one.generated, one.heat))
        scores = (one.row["iou"]["generated"][method] for method in methods)
        table.add_data(one.row["name"], one.row["category"], *map(wandb.Image, pictures), *scores)
    return table


def _picture_with_boxes(example: Example, names: Mapping[str, str]) -> Any:
    """The painted image with boxes that can be switched on and off: the object's, the map's, the detectors' best."""
    row, seen = example.row, example.row["detections"]
    groups = {
        "object": {"object": row["target"]},
        "attention": {label(name): row["boxes"][name] for name in METHODS_OF_MAPS},
        "detectors": {names[name]: found["generated"] and found["generated"]["box"] for name, found in seen.items()},
    }
    return wandb.Image(
        example.generated,
        caption=f"{row['name']} ({row['category']})",
        boxes={name: _boxes(boxes) for name, boxes in groups.items() if boxes},
    )


def _boxes(boxes: Mapping[str, Sequence[float] | None]) -> dict[str, Any]:
    """A group of boxes in pixels as W&B wants it; those that are None were not found."""
    return {
        "box_data": [
            {
                "position": dict(zip(("minX", "minY", "maxX", "maxY"), box, strict=True)),
                "class_id": number,
                "box_caption": name,
                "domain": "pixel",
            }
            for number, (name, box) in enumerate(boxes.items())
            if box is not None
        ],
        "class_labels": dict(enumerate(boxes)),
    }
