"""What a detection experiment tells W&B: mean IoU of every method, the sweep over thresholds, samples with boxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from i2am_train.config.reporting import TrackingConfig
from i2am_train.experiments.detection.report import Detected, Example, read_detected
from i2am_train.experiments.detection.tables import KINDS, Results, label, swept_name
from i2am_train.files import numbered
from i2am_train.metrics.boxes import METHOD_LABELS, METHODS_OF_MAPS
from i2am_train.reporting.figures.canvas import overlay
from i2am_train.results.panels import PANELS
from i2am_train.results.sample_scores import RESULTS, SAMPLES
from i2am_train.runs import RunFolder
from i2am_train.tracking.artifacts import log_results
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
from i2am_train.tracking.session import finish_run, open_run

SCORES = ("mean", "low", "high", "n", "left_out")
SCORE_COLUMNS = ("mean IoU", "low", "high", "images", "left out")
METHOD_COLUMNS = ("kind", "method", "label", *SCORE_COLUMNS)
THRESHOLD_COLUMNS = ("delta", "method", "label", *SCORE_COLUMNS)
SAMPLE_COLUMNS = ("index", "image_id", "name", "category", "crowd", "share")
"""Columns before the IoUs, which are called ``kind/method``."""
PICTURE_COLUMNS = ("sample", "category", "image", "reference", "painted", "map")

OBJECT, ATTENTION, SUPERVISED = "object", "attention", "detectors"
"""Groups of boxes that W&B switches on and off."""

Rows = Sequence[Mapping[str, Any]]


def track_detection(tracking: TrackingConfig, folder: Path, *, arm: str, use_inputs: Callable[[Any], None]) -> None:
    """Log the experiment in a folder as a run of its own; nothing where W&B is disabled.

    Args:
        tracking: mode, project, group, tags.
        folder: of ``i2am detect``, with its manifest and its written results.
        arm: of the pipeline, unless ``tracking.arm`` is set.
        use_inputs: says of a run what it reads (``artifacts.use_bench``, ``artifacts.use_model``).
    """
    if tracking.wandb == "disabled":
        return
    detected = read_detected(folder)
    manifest = RunFolder(folder, resumed=False).manifest
    del manifest["settings"]  # of the folder's first command; later ones may ask for more
    run = open_run(
        tracking,
        folder,
        name=folder.name,
        job_type=DETECTION_JOB,
        arm=arm,
        config={**detected.results["settings"], "provenance": manifest},
    )
    try:
        use_inputs(run)
        _log(run, detected, tracking.table_samples)
        files = {name: folder / name for name in (RESULTS, SAMPLES, PANELS)}
        log_results(run, DETECTION_JOB, folder, files)
    finally:
        finish_run(run)


def _log(run: Any, detected: Detected, table_samples: int) -> None:
    """The sweep as curves over delta, then all the rest at once."""
    run.define_metric(DETECTION_DELTA, hidden=True)
    run.define_metric(f"{DETECTION_SWEEP}*", step_metric=DETECTION_DELTA)
    swept = threshold_rows(detected.results)
    for delta in detected.results["thresholds"]:
        points = {f"{DETECTION_SWEEP}{row[1]}": row[3] for row in swept if row[0] == delta}
        known = {name: mean for name, mean in points.items() if mean is not None}
        run.log({DETECTION_DELTA: delta, **known})
    names = method_names(detected.results)
    logged: dict[str, Any] = {
        **means(detected.results),
        DETECTION_METHODS: _table(METHOD_COLUMNS, method_rows(detected.results)),
        DETECTION_THRESHOLDS: _table(THRESHOLD_COLUMNS, swept),
        DETECTION_SAMPLES: sample_table(detected.rows, names),
    }
    if examples := detected.examples[:table_samples]:
        logged[DETECTION_TABLE] = picture_table(examples, names)
        logged[DETECTION_BOXES] = [picture_with_boxes(one, names) for one in examples]
    run.log(logged)


def method_names(results: Results) -> dict[str, str]:
    """Names in W&B by method: our own word, or a detector's label; none twice."""
    detectors = list(results["miou"]["real"])
    labels = numbered([label(name) for name in detectors])
    return {**{name: name for name in METHOD_LABELS}, **dict(zip(detectors, labels, strict=True))}


def means(results: Results) -> dict[str, float]:
    """Mean IoU by ``detect/<kind>/<method>``, without methods for which no image counts."""
    names = method_names(results)
    return {
        f"{DETECTION}{kind}/{names[method]}": score["mean"]
        for kind in KINDS
        for method, score in results["miou"][kind].items()
        if score["mean"] is not None
    }


def method_rows(results: Results) -> list[list[Any]]:
    """A row for each kind of image and method, in the order of ``METHOD_COLUMNS``."""
    return [
        [kind, method, label(method), *(score[name] for name in SCORES)]
        for kind in KINDS
        for method, score in results["miou"][kind].items()
    ]


def threshold_rows(results: Results) -> list[list[Any]]:
    """A row for each threshold and method, in the order of ``THRESHOLD_COLUMNS``."""
    swept = results["miou"]["sweep"]
    return [
        [delta, method, label(method), *(swept[swept_name(method, delta)][name] for name in SCORES)]
        for delta in results["thresholds"]
        for method in METHODS_OF_MAPS
    ]


def sample_table(rows: Rows, names: Mapping[str, str]) -> Any:
    """A ``wandb.Table`` of all samples: what each is, and its IoU by kind and method."""
    keys = [(kind, method) for kind in KINDS for method in rows[0]["iou"][kind]]
    columns = [*SAMPLE_COLUMNS, *(f"{kind}/{names[method]}" for kind, method in keys)]
    return _table(
        columns,
        [
            [*(row[name] for name in SAMPLE_COLUMNS), *(row["iou"][kind][method] for kind, method in keys)]
            for row in rows
        ],
    )


def picture_table(examples: Sequence[Example], names: Mapping[str, str]) -> Any:
    """A ``wandb.Table`` of the first samples: pictures, the map, and the IoU of every method on the painted image."""
    methods = list(examples[0].row["iou"]["generated"])
    return _table(
        [*PICTURE_COLUMNS, *(names[method] for method in methods)],
        [
            [
                one.row["name"],
                one.row["category"],
                *map(wandb.Image, (one.image, one.reference, one.generated)),
                wandb.Image(overlay(one.generated, one.heat)),
                *(one.row["iou"]["generated"][method] for method in methods),
            ]
            for one in examples
        ],
    )


def picture_with_boxes(example: Example, names: Mapping[str, str]) -> Any:
    """The painted image with boxes that can be switched on and off: the object's, the map's, the detectors' best."""
    row, detectors = example.row, example.row["detections"]
    groups = {
        OBJECT: {OBJECT: row["target"]},
        ATTENTION: {label(name): row["boxes"][name] for name in METHODS_OF_MAPS},
        SUPERVISED: {
            names[name]: found["generated"] and found["generated"]["box"] for name, found in detectors.items()
        },
    }
    return wandb.Image(
        example.generated,
        caption=f"{row['name']} ({row['category']})",
        boxes={name: _boxes(boxes) for name, boxes in groups.items() if boxes},
    )


def _boxes(boxes: Mapping[str, Sequence[float] | None]) -> dict[str, Any]:
    """A group of boxes in pixels as W&B wants it; those that are None were not found."""
    classes = dict(enumerate(boxes))
    return {
        "box_data": [
            {
                "position": dict(zip(("minX", "minY", "maxX", "maxY"), box, strict=True)),
                "class_id": number,
                "box_caption": name,
                "domain": "pixel",
            }
            for number, name in classes.items()
            if (box := boxes[name]) is not None
        ],
        "class_labels": classes,
    }


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    return wandb.Table(columns=list(columns), data=[list(row) for row in rows])
