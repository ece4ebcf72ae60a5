"""The object detection experiment (paper section 5.1): images, maps and detections kept in batches, then scores.

First every object of the bench is painted anew, and the unified map of that very sampling run is kept beside the
image. Then detectors look at the real and at the painted images. Both go on where they were stopped: a batch is
finished when its last file is there, and holds the same samples after any restart. Boxes and scores come from the kept
files alone, so that other thresholds and more detectors cost no new images.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from i2am_train.attention import HeatMap, normalise
from i2am_train.config.explanation import DetectConfig
from i2am_train.config.locations import expanded, revisions, shapes_folder
from i2am_train.config.options import plain
from i2am_train.data.picture_files import read_rgb, write_png
from i2am_train.data.pictures import Image
from i2am_train.detection.bench import SPLIT, Bench, BenchSample, make_shapes, read_bench
from i2am_train.detection.detectors import Detector, best_detection, load_detectors
from i2am_train.detection.report import KIND, SCHEMA, Example, read_detected, swept_name, write_examples, write_report
from i2am_train.detection.tracking import track_detection
from i2am_train.evaluation.evaluator import CONFIDENCE, IMAGES
from i2am_train.evaluation.scoring import batches
from i2am_train.files import read_json, write_json, write_text, written
from i2am_train.metrics.boxes import METHODS_OF_MAPS, Box, authors_box, box_iou, component_box, random_box, whole_box
from i2am_train.models.paint_by_example import PaintByExample, Painted, Painting, resized
from i2am_train.results.run_files import RESULTS, SAMPLES
from i2am_train.results.statistics import Over, paired_difference, sample_mean
from i2am_train.runs import RunFolder
from i2am_train.seeds import seed_for
from i2am_train.tracking.session import use_bench, use_model
from i2am_train.types import Direction, GridSize, LayerWeighting

MAPS, DETECTIONS = "maps", "detections"
REAL, GENERATED, SWEEP = "real", "generated", "sweep"
FUNCTIONAL = "functional"

LEAVING_OUT = ("i2am_authors", "random_authors")
"""Methods whose mean leaves out samples, as the authors' scripts do; a sample without a box counts 0 in all others."""
SMALLEST_RANDOM_IOU = 1e-5
"""Random boxes that agree less were left out of the authors' mean."""

WITHOUT_EFFECT_ON_IMAGES = ["output", "device", "progress_bar", "delta", "deltas", "detectors", "pictures", "tracking"]
"""Options that may differ when the same folder is asked for again: images and maps are kept."""

Rows = Sequence[Mapping[str, Any]]


def run_experiment(config: DetectConfig, folder: Path, device: torch.device) -> dict[str, Any]:
    """The results; what the folder holds already is not computed again.

    Raises:
        I2AMError: data, folder, detectors or pipeline do not fit; nothing is written then.
    """
    annotations, images = _data_of(config)
    bench = read_bench(annotations, images, crowds=config.crowds, limit=config.samples)
    settings = plain(config) | {"bench": bench.fingerprint}
    # What takes least time comes first: a pipeline of the hub may not even be on this machine yet.
    RunFolder.check(folder, settings, may_differ=(*WITHOUT_EFFECT_ON_IMAGES, "revisions"))
    detectors = load_detectors(config.detectors, config.size, device)
    model = PaintByExample.from_pretrained(config.pipeline, device, config.dtype)
    model.check_size(config.size)
    settings |= revisions(config.pipeline)
    opened = RunFolder.open(folder, settings, may_differ=WITHOUT_EFFECT_ON_IMAGES)
    before = _scores_of(read_json(folder / RESULTS)) if opened.finished else None
    opened.start(seed=config.seed, data=bench.fingerprint)
    kept = KeptPaintings(folder=folder, samples=bench.samples, batch_size=config.batch_size)
    _paint(model, kept, config)
    del model  # room for the detectors
    seen = {name: _detect(kept, name, one.to(device), config) for name, one in detectors.items()}
    rows = _score(kept, seen, config)
    results = {
        "schema": SCHEMA,
        "kind": KIND,
        **summarise(rows, kept, bench),
        "thresholds": config.thresholds,
        "settings": plain(config),
        "manifest": dict(opened.manifest),
    }
    write_text(folder / SAMPLES, "".join(json.dumps(row) + "\n" for row in rows))
    write_examples(folder, _examples(kept, rows, config))
    write_json(folder / RESULTS, results)
    detected = read_detected(folder)
    write_report(detected)
    if _scores_of(results) != before:
        use_inputs = partial(_use_inputs, config, bench, images)
        track_detection(config.tracking, detected, arm=Path(config.pipeline).name, use_inputs=use_inputs)
    opened.finish(detectors=revisions(*detectors).get("revisions", {}))
    return results


def _scores_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """What was found, without how it was asked for: equal where there is nothing new to log."""
    return {name: value for name, value in results.items() if name not in ("settings", "manifest")}


def _use_inputs(config: DetectConfig, bench: Bench, images: Path, run: Any) -> None:
    use_bench(run, images, bench.fingerprint, len(bench.samples))
    pipeline = expanded(config.pipeline)
    if pipeline.is_dir():  # one of the hub is named by the run's configuration
        use_model(run, pipeline, upload=config.tracking.upload_model)


def _data_of(config: DetectConfig) -> tuple[Path, Path]:
    """COCO file and folder of images; the made set is made if it is not there yet."""
    if config.root is None:
        root, split = make_shapes(shapes_folder(config.shapes), config.shapes), SPLIT
    else:
        root, split = config.root, config.split
    file = config.annotations or root / "annotations" / f"instances_{split}.json"
    return file, root / split


# ---- what is kept ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class KeptPaintings:
    """Painted images, their maps and what detectors see in them, batch by batch in the folder of the experiment."""

    folder: Path
    samples: tuple[BenchSample, ...]
    batch_size: int

    def batches(self) -> list[range]:
        """Positions of all samples, batch by batch.

        >>> KeptPaintings(folder=Path("runs/detect"), samples=("a", "b", "c"), batch_size=2).batches()
        [range(0, 2), range(2, 3)]
        """
        return batches(len(self.samples), self.batch_size)

    def file(self, batch: range, place: str, ending: str) -> Path:
        """The file of a batch in ``place``; there when the batch is finished.

        >>> kept = KeptPaintings(folder=Path("runs/detect"), samples=(), batch_size=2)
        >>> str(kept.file(range(4, 6), "maps", "safetensors"))
        'runs/detect/maps/batch-00002.safetensors'
        """
        return self.folder / place / f"batch-{batch[0] // self.batch_size:05d}.{ending}"

    def write(self, batch: range, painted: Painted, weighting: LayerWeighting) -> None:
        """Keep a batch: images first, maps last and in one step."""
        for position, image in zip(batch, painted.images, strict=True):
            write_png(self.folder / IMAGES / f"{self.samples[position].name}.png", image)
        maps = _unified_maps(painted, weighting)
        with written(self.file(batch, MAPS, "safetensors")) as unfinished:
            save_file(maps, unfinished, {FUNCTIONAL: str(painted.functional)})

    def maps(self, batch: range) -> dict[str, Tensor]:
        """The maps ``[batch, height, width]`` of a batch, by name."""
        return load_file(self.file(batch, MAPS, "safetensors"))

    def image(self, position: int) -> Image:
        """A painted image, RGB ``[height, width, 3]``."""
        return read_rgb(self.folder / IMAGES / f"{self.samples[position].name}.png")

    @property
    def functional(self) -> bool:
        """False where the images do not depend on the attention that the maps show."""
        with safe_open(self.file(self.batches()[0], MAPS, "safetensors"), "pt") as archive:
            return str(archive.metadata()[FUNCTIONAL]) == str(True)

    def pending(self, place: str, ending: str, what: str, shown: bool) -> Iterator[range]:
        """The batches that have no file yet, with a bar that counts their samples.

        >>> kept = KeptPaintings(folder=Path("nowhere"), samples=("a", "b", "c"), batch_size=2)
        >>> list(kept.pending("maps", "safetensors", "images", shown=False))
        [range(0, 2), range(2, 3)]
        """
        batches = [b for b in self.batches() if not self.file(b, place, ending).is_file()]
        with tqdm(total=sum(map(len, batches)), desc=what, unit="image", disable=not shown) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch))


def _unified_maps(painted: Painted, weighting: LayerWeighting) -> dict[str, Tensor]:
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


def _paint(model: PaintByExample, kept: KeptPaintings, config: DetectConfig) -> None:
    """Paint every object anew after itself, in the batches that are not there yet."""
    for batch in kept.pending(MAPS, "safetensors", "images", config.progress_bar):
        paintings = [_painting(kept.samples[position], config.seed) for position in batch]
        painted = model.paint(paintings, config.size, steps=config.steps, guidance=config.guidance)
        kept.write(batch, painted, config.weighting)


def _painting(sample: BenchSample, seed: int) -> Painting:
    image, seed = sample.image(), seed_for(seed, "paint", sample.image_id)
    return Painting(image=image, mask=sample.mask(), reference=sample.reference(image), seed=seed)


def _detect(kept: KeptPaintings, name: str, detector: Detector, config: DetectConfig) -> list[dict[str, Any]]:
    """What a detector finds in each sample: ``box``, ``score`` and ``category`` by kind of image, or None.

    It looks at the batches that it has not seen yet.
    """
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]  # names may differ in signs only
    place = f"{DETECTIONS}/{re.sub(r'[^a-zA-Z0-9]+', '-', name)[-60:].strip('-')}-{digest}"
    for batch in kept.pending(place, "json", name, config.progress_bar):
        rows = [_best_detections(kept, position, detector, config) for position in batch]
        write_json(kept.file(batch, place, "json"), rows)
    return [row for batch in kept.batches() for row in read_json(kept.file(batch, place, "json"))]


def _best_detections(kept: KeptPaintings, position: int, detector: Detector, config: DetectConfig) -> dict[str, Any]:
    sample = kept.samples[position]
    # Both at one size: what differs between the columns is the content, not the aspect.
    images = {REAL: np.array(resized(sample.image(), config.size)), GENERATED: kept.image(position)}
    category = sample.category if config.match_category else None
    found = {kind: best_detection(detector.detect(image, config.score), category) for kind, image in images.items()}
    return {
        kind: best and {"box": best.box, "score": best.score, "category": best.category} for kind, best in found.items()
    }


# ---- scores ------------------------------------------------------------------------------------


def _on_picture(values: Tensor, size: GridSize) -> Tensor:
    """A map ``[h, w]`` at the picture's size, in [0, 1]; zeros where it is constant."""
    heat = HeatMap(values[None], Direction.REFERENCE_TO_GENERATED)
    return heat.on_picture(size).values[0]


def _other_boxes(maps: Mapping[str, Tensor], sample: BenchSample, config: DetectConfig) -> dict[str, Box | None]:
    """The boxes of methods that need neither our map nor a detector, in the frame of the generated image."""
    draw = np.random.default_rng(seed_for(config.seed, "random box", sample.image_id))
    drawn = random_box(config.size, draw)
    return {
        "daam": component_box(_on_picture(maps["daam"], config.size), config.delta),
        "overall": whole_box(config.size),
        "random": drawn,
        "random_authors": drawn,
    }


def _boxes_by_threshold(
    maps: Mapping[str, Tensor], size: GridSize, deltas: Sequence[float]
) -> dict[str, dict[float, Box | None]]:
    """The boxes of ``METHODS_OF_MAPS`` at several thresholds, from the same maps."""
    heat, of_all = _on_picture(maps["decoder"], size), normalise(maps["all"])
    return {
        "i2am": {delta: component_box(heat, delta) for delta in deltas},
        "i2am_inverted": {delta: component_box(1 - heat, delta) for delta in deltas},
        "i2am_authors": {delta: authors_box(of_all, delta, size) for delta in deltas},
    }


def iou_of(method: str, box: Box | None, target: Box) -> float | None:
    """Agreement of a method's box with the object's, in [0, 1]; None where the method leaves the sample out.

    >>> target = Box(0, 0, 4, 4)
    >>> iou_of("i2am", Box(0, 0, 2, 4), target), iou_of("i2am", None, target), iou_of("i2am_authors", None, target)
    (0.5, 0.0, None)
    """
    value = 0.0 if box is None else box_iou(box, target)
    if method == "random_authors" and value < SMALLEST_RANDOM_IOU:
        return None
    return None if box is None and method in LEAVING_OUT else value


def _score(kept: KeptPaintings, detections: Mapping[str, Rows], config: DetectConfig) -> list[dict[str, Any]]:
    """One row per sample: what it is, the boxes of all methods, and their IoU with the object's."""
    rows = []
    for batch in tqdm(kept.batches(), desc="boxes", disable=not config.progress_bar):
        maps = kept.maps(batch)
        for place, position in enumerate(batch):
            of_sample = {name: values[place] for name, values in maps.items()}
            seen = {name: found[position] for name, found in detections.items()}
            rows.append(sample_row(kept.samples[position], of_sample, seen, config))
    return rows


def sample_row(
    sample: BenchSample, maps: Mapping[str, Tensor], detections: Mapping[str, Mapping[str, Any]], config: DetectConfig
) -> dict[str, Any]:
    """The row of one sample; every box lies in the frame of the generated image.

    Args:
        sample: what is looked for.
        maps: of this sample, as ``_unified_maps`` names them, ``[height, width]``.
        detections: by detector, what it sees in the real and in the generated image (``_best_detections``).
        config: size, seed and thresholds.
    """
    target = sample.box.scaled(sample.size, config.size)
    swept = _boxes_by_threshold(maps, config.size, config.thresholds)
    boxes = _other_boxes(maps, sample, config) | {name: found[config.delta] for name, found in swept.items()}
    scores: dict[str, dict[str, float | None]] = {
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


def _examples(kept: KeptPaintings, rows: Rows, config: DetectConfig) -> list[Example]:
    """The first samples as pictures."""
    found = []
    for position, row in enumerate(rows[: config.pictures]):
        sample, batch = kept.samples[position], kept.batches()[position // kept.batch_size]
        heat, image = kept.maps(batch)["decoder"][position - batch[0]], sample.image()
        found.append(
            Example(
                image=np.asarray(resized(image, config.size)),
                mask=np.asarray(resized(sample.mask(), config.size)) > 0,
                reference=np.asarray(resized(sample.reference(image), config.size)),
                generated=kept.image(position),
                heat=_on_picture(heat, config.size).numpy(),
                row=row,
            )
        )
    return found


# ---- results -----------------------------------------------------------------------------------


def summarise(rows: Rows, kept: KeptPaintings, bench: Bench) -> dict[str, Any]:
    """Means with intervals over samples, by kind and method; what the bench is; what the maps are worth."""
    return {
        "bench": {
            "images": bench.images,
            "samples": len(bench.samples),
            "crowds": bench.crowds,
            "mean_share": float(np.mean([row["share"] for row in rows])),
        },
        FUNCTIONAL: kept.functional,
        "miou": {
            kind: {name: mean_iou(rows, kind, name) for name in methods} for kind, methods in rows[0]["iou"].items()
        },
        "missed": {name: sum(row["boxes"][name] is None for row in rows) for name in METHODS_OF_MAPS},
        "differences": [
            _difference(rows, method, against)
            for method in ("i2am", "i2am_inverted")
            for against in ("overall", "random")
        ],
    }


def mean_iou(rows: Rows, kind: str, method: str) -> dict[str, Any]:
    """Mean IoU of the samples that count, its bootstrap interval over them, and how many there are.

    >>> rows = [{"iou": {"real": {"yolo": iou}}} for iou in (0.5, None, 0.7)]
    >>> found = mean_iou(rows, "real", "yolo")
    >>> found["mean"], found["n"], found["left_out"]
    (0.6, 2, 1)
    """
    values = [row["iou"][kind][method] for row in rows]
    found = sample_mean(values, CONFIDENCE)
    return {**found, "left_out": len(values) - found["n"]}


def _difference(rows: Rows, method: str, against: str) -> dict[str, Any]:
    """Mean difference of two methods over the samples, with its interval."""
    first, second = ([row["iou"][GENERATED][name] for row in rows] for name in (method, against))
    found = paired_difference(first, second, Over.SAMPLES, CONFIDENCE)
    return {
        "method": method,
        "against": against,
        "difference": found.mean,
        **{name: getattr(found, name) for name in ("low", "high", "n")},
    }
