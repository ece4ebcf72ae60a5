"""The object detection experiment (paper section 5.1): images, maps and detections kept in batches, then scores.

First every object of the bench is painted anew, and the unified map of that very sampling run is kept beside the
image. Then detectors look at the real and at the painted images. Both go on where they were stopped: a batch is
finished when its last file is there, and holds the same samples after any restart. Boxes and scores come from the kept
files alone, so that other thresholds and more detectors cost no new images.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PillowImage
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from i2am_train.attention import HeatMap, normalise
from i2am_train.config.detection import DetectConfig
from i2am_train.data.arrays import Image
from i2am_train.evaluation.batches import batches
from i2am_train.evaluation.results import CONFIDENCE, IMAGES, write_image
from i2am_train.experiments.detection.coco import Bench, BenchSample
from i2am_train.experiments.detection.detectors import Detector, best_detection
from i2am_train.experiments.detection.tables import swept_name
from i2am_train.files import written
from i2am_train.json_files import read_json, write_json
from i2am_train.metrics.boxes import (
    METHODS_OF_MAPS,
    Box,
    authors_box,
    box_iou,
    component_box,
    random_box,
    whole_box,
)
from i2am_train.models.others.paint_by_example import PaintByExample, Painted, Painting, resized
from i2am_train.results.statistics import Over, mean_interval, paired_difference
from i2am_train.seeds import seed_for
from i2am_train.types import Direction, GridSize, LayerWeighting

MAPS, DETECTIONS = "maps", "detections"
REAL, GENERATED, SWEEP = "real", "generated", "sweep"
FUNCTIONAL = "functional"

LEAVING_OUT = ("i2am_authors", "random_authors")
"""Methods whose mean leaves out samples, as the authors' scripts do; a sample without a box counts 0 in all others."""
SMALLEST_RANDOM_IOU = 1e-5
"""Random boxes that agree less were left out of the authors' mean."""

Scores = dict[str, dict[str, float | None]]
"""IoU by kind (real, generated, sweep) and method; None where the sample is left out."""


def file_name(batch: range, size: int, ending: str) -> str:
    """Name of a batch's file."""
    return f"batch-{batch[0] // size:05d}.{ending}"


# -- images and maps ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class KeptPaintings:
    """Painted images and their maps in the folder of the experiment."""

    folder: Path
    samples: tuple[BenchSample, ...]
    batch_size: int

    def batches(self) -> list[range]:
        """Positions of all samples, batch by batch."""
        return batches(len(self.samples), self.batch_size)

    def pending(self) -> list[range]:
        """Batches that are still to be painted."""
        return [batch for batch in self.batches() if not self._place(batch).is_file()]

    def write(self, batch: range, painted: Painted, weighting: LayerWeighting) -> None:
        """Keep a batch: images first, maps last and in one step."""
        for position, image in zip(batch, painted.images, strict=True):
            write_image(self.folder, self.samples[position].name, torch.from_numpy(image))
        maps = unified_maps(painted, weighting)
        with written(self._place(batch)) as unfinished:
            save_file(maps, unfinished, {FUNCTIONAL: str(painted.functional)})

    def maps(self, batch: range) -> dict[str, Tensor]:
        """The maps ``[batch, height, width]`` of a batch, by name."""
        with safe_open(self._place(batch), "pt") as archive:
            return {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118

    def image(self, position: int) -> Image:
        """A painted image, RGB ``[height, width, 3]``."""
        with PillowImage.open(
            self.folder / IMAGES / f"{self.samples[position].name}.png"
        ) as picture:
            return np.array(picture)

    @property
    def functional(self) -> bool:
        """False where the images do not depend on the attention that the maps show."""
        with safe_open(self._place(self.batches()[0]), "pt") as archive:
            return str(archive.metadata()[FUNCTIONAL]) == str(True)

    def _place(self, batch: range) -> Path:
        return self.folder / MAPS / file_name(batch, self.batch_size, "safetensors")


def unified_maps(painted: Painted, weighting: LayerWeighting) -> dict[str, Tensor]:
    """Unified maps on the finest grid, ``[batch, height, width]``.

    ``decoder``: the paper's nine layers. ``all``: the 15 that the authors' code reads. ``daam``: the decoder's with
    DAAM's softmax, over the reference (paper appendix A.7).
    """
    direction = Direction.REFERENCE_TO_GENERATED
    decoder = painted.decoder_maps
    found = {
        "decoder": decoder.unified(direction, weighting),
        "all": painted.maps.unified(direction, weighting),
        "daam": decoder.unified(direction, weighting, softmax_over="reference"),
    }
    return {name: heat.values.contiguous() for name, heat in found.items()}


def paint_bench(model: PaintByExample, kept: KeptPaintings, config: DetectConfig) -> None:
    """Paint the batches that are not there yet."""
    for batch in progress(kept.pending(), "images", config.progress_bar):
        paintings = [painting(kept.samples[position], config.seed) for position in batch]
        painted = model.paint(paintings, config.size, steps=config.steps, guidance=config.guidance)
        kept.write(batch, painted, config.weighting)


def painting(sample: BenchSample, seed: int) -> Painting:
    """The object of a sample, to be painted anew after itself."""
    image = sample.image()
    return Painting(
        image=image,
        mask=sample.mask(),
        reference=sample.reference(image),
        seed=seed_for(seed, "paint", sample.image_id),
    )


def progress(pending: Sequence[range], what: str, shown: bool) -> Iterator[range]:
    """The batches, with a bar that counts their samples."""
    with tqdm(total=sum(map(len, pending)), desc=what, unit="image", disable=not shown) as bar:
        for batch in pending:
            yield batch
            bar.update(len(batch))


# -- detectors ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class KeptDetections:
    """A detector's best detections, batch by batch."""

    folder: Path
    detector: str
    paintings: KeptPaintings

    def pending(self) -> list[range]:
        """Batches that the detector has not seen yet."""
        return [batch for batch in self.paintings.batches() if not self._place(batch).is_file()]

    def rows(self) -> list[dict[str, Any]]:
        """What was found in each sample: ``box``, ``score`` and ``category`` by kind of image, or None."""
        return [row for batch in self.paintings.batches() for row in read_json(self._place(batch))]

    def detect(self, detector: Detector, config: DetectConfig) -> None:
        """Look at the batches that were not seen yet."""
        for batch in progress(self.pending(), self.detector, config.progress_bar):
            rows = [self._row(detector, position, config) for position in batch]
            write_json(self._place(batch), rows)

    def _row(self, detector: Detector, position: int, config: DetectConfig) -> dict[str, Any]:
        sample = self.paintings.samples[position]
        # Both at one size: what differs between the columns is the content, not the aspect.
        images = {
            REAL: np.array(resized(sample.image(), config.size)),
            GENERATED: self.paintings.image(position),
        }
        category = sample.category if config.match_category else None
        found = {
            kind: best_detection(detector.detect(image, config.score), category)
            for kind, image in images.items()
        }
        return {
            kind: best and {"box": best.box, "score": best.score, "category": best.category}
            for kind, best in found.items()
        }

    def _place(self, batch: range) -> Path:
        digest = hashlib.sha256(self.detector.encode()).hexdigest()[
            :8
        ]  # names may differ in signs only
        name = f"{re.sub(r'[^a-zA-Z0-9]+', '-', self.detector)[-60:].strip('-')}-{digest}"
        return self.folder / DETECTIONS / name / file_name(batch, self.paintings.batch_size, "json")


# -- scores ---------------------------------------------------------------------------------------------------------


def on_picture(values: Tensor, size: GridSize) -> Tensor:
    """A map ``[h, w]`` at the picture's size, in [0, 1]; zeros where it is constant."""
    heat = HeatMap(values[None], Direction.REFERENCE_TO_GENERATED)
    return heat.on_picture(size).values[0]


def boxes_of(
    maps: Mapping[str, Tensor], sample: BenchSample, config: DetectConfig
) -> dict[str, Box | None]:
    """The box of each method without a detector, in the frame of the generated image.

    Args:
        maps: of this sample, as ``unified_maps`` names them, ``[height, width]``.
        sample: whose random box is drawn.
        config: size, seed and threshold.
    """
    size, daam = config.size, on_picture(maps["daam"], config.size)
    draw = np.random.default_rng(seed_for(config.seed, "random box", sample.image_id))
    boxes: dict[str, Box | None] = {
        "daam": component_box(daam, config.delta),
        "overall": whole_box(size),
        "random": random_box(size, draw),
    }
    boxes["random_authors"] = boxes["random"]
    return boxes | {
        name: found[config.delta]
        for name, found in boxes_by_threshold(maps, size, [config.delta]).items()
    }


def boxes_by_threshold(
    maps: Mapping[str, Tensor], size: GridSize, deltas: Sequence[float]
) -> dict[str, dict[float, Box | None]]:
    """The boxes of ``METHODS_OF_MAPS`` at several thresholds, from the same maps."""
    heat, of_all = on_picture(maps["decoder"], size), normalise(maps["all"])
    return {
        "i2am": {delta: component_box(heat, delta) for delta in deltas},
        "i2am_inverted": {delta: component_box(1 - heat, delta) for delta in deltas},
        "i2am_authors": {delta: authors_box(of_all, delta, size) for delta in deltas},
    }


def iou_of(method: str, box: Box | None, target: Box) -> float | None:
    """Agreement of a method's box with the object's; None where the method leaves the sample out."""
    value = 0.0 if box is None else box_iou(box, target)
    if method == "random_authors" and value < SMALLEST_RANDOM_IOU:
        return None
    return None if box is None and method in LEAVING_OUT else value


def score_bench(
    kept: KeptPaintings, detections: Mapping[str, Sequence[Mapping[str, Any]]], config: DetectConfig
) -> list[dict[str, Any]]:
    """One row per sample: what it is, the boxes of all methods, and their IoU with the object's.

    Args:
        kept: the painted images with their maps.
        detections: rows of ``KeptDetections`` by detector.
        config: of the experiment.
    """
    rows = []
    for batch in progress(kept.batches(), "boxes", config.progress_bar):
        maps = kept.maps(batch)
        for place, position in enumerate(batch):
            of_sample = {name: values[place] for name, values in maps.items()}
            seen = {name: found[position] for name, found in detections.items()}
            rows.append(sample_row(kept.samples[position], of_sample, seen, config))
    return rows


def sample_row(
    sample: BenchSample,
    maps: Mapping[str, Tensor],
    detections: Mapping[str, Mapping[str, Any]],
    config: DetectConfig,
) -> dict[str, Any]:
    """The row of one sample; every box lies in the frame of the generated image."""
    target = sample.box.scaled(sample.size, config.size)
    boxes = boxes_of(maps, sample, config)
    swept = boxes_by_threshold(maps, config.size, config.thresholds)
    scores: Scores = {
        GENERATED: {name: iou_of(name, box, target) for name, box in boxes.items()},
        REAL: {},
        SWEEP: {
            swept_name(name, delta): iou_of(name, box, target)
            for name, of_delta in swept.items()
            for delta, box in of_delta.items()
        },
    }
    for detector, found in detections.items():
        for kind in (REAL, GENERATED):
            best = found[kind]
            scores[kind][detector] = best and box_iou(Box(*best["box"]), target)
    return {
        "index": sample.index,
        "image_id": sample.image_id,
        "name": sample.name,
        "category": sample.category,
        "crowd": sample.crowd,
        "share": sample.box.area / sample.size.tokens,
        "target": target,
        "boxes": boxes,
        "detections": dict(detections),
        "iou": scores,
    }


# -- results --------------------------------------------------------------------------------------------------------


def summarise(
    rows: Sequence[Mapping[str, Any]], kept: KeptPaintings, bench: Bench
) -> dict[str, Any]:
    """Means with intervals over samples, by kind and method; what the bench is; what the maps are worth."""
    kinds: Scores = rows[0]["iou"]
    return {
        "bench": {
            "images": bench.images,
            "samples": len(bench.samples),
            "crowds": bench.crowds,
            "mean_share": float(np.mean([row["share"] for row in rows])),
        },
        FUNCTIONAL: kept.functional,
        "miou": {
            kind: {name: mean_iou(rows, kind, name) for name in methods}
            for kind, methods in kinds.items()
        },
        "missed": {
            name: sum(row["boxes"][name] is None for row in rows) for name in METHODS_OF_MAPS
        },
        "differences": [
            difference(rows, method, against)
            for method in ("i2am", "i2am_inverted")
            for against in ("overall", "random")
        ],
    }


def mean_iou(rows: Sequence[Mapping[str, Any]], kind: str, method: str) -> dict[str, Any]:
    """Mean IoU of the samples that count, its bootstrap interval over them, and how many there are."""
    values = [row["iou"][kind][method] for row in rows]
    known = [value for value in values if value is not None]
    low, high = mean_interval(known, Over.SAMPLES, CONFIDENCE)
    return {
        "mean": float(np.mean(known)) if known else None,
        "low": low,
        "high": high,
        "confidence": CONFIDENCE,
        "n": len(known),
        "left_out": len(values) - len(known),
    }


def difference(rows: Sequence[Mapping[str, Any]], method: str, against: str) -> dict[str, Any]:
    """Mean difference of two methods over the samples, with its interval."""
    first, second = ([row["iou"][GENERATED][name] for row in rows] for name in (method, against))
    found = paired_difference(first, second, Over.SAMPLES, CONFIDENCE)
    return {
        "method": method,
        "against": against,
        "difference": found.mean,
        "low": found.low,
        "high": found.high,
        "n": found.n,
    }
