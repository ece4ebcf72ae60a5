"""``i2am detect``: the object detection experiment on COCO, with Paint-by-Example and detectors (paper 5.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2am_train.config.detection import DetectConfig
from i2am_train.config.locations import expanded
from i2am_train.entry.command import entry

if TYPE_CHECKING:
    from i2am_train.experiments.detection.coco import Bench
    from i2am_train.experiments.detection.detectors import Detector
    from i2am_train.experiments.detection.evaluation import KeptPaintings
    from i2am_train.experiments.detection.results import Example

WITHOUT_EFFECT_ON_IMAGES = (
    "output",
    "device",
    "progress_bar",
    "delta",
    "deltas",
    "detectors",
    "pictures",
    "tracking",
)
"""Options that may differ when the same folder is asked for again: images and maps are kept."""


def run(config: DetectConfig) -> None:
    """Run the experiment, print its tables and say where everything lies."""
    from rich.console import Console

    from i2am_train.experiments.detection.tables import tables_of
    from i2am_train.locks import locked
    from i2am_train.reporting.table import terminal
    from i2am_train.tracking.session import sync_advice

    folder = output_folder(config)
    with locked(folder):
        results = detect(config, folder)
    console = Console(markup=False, emoji=False)
    for table in tables_of(results):
        console.print(terminal(table))
    print(f"Everything of this experiment: {folder} (page: {folder / 'report.html'})")
    if advice := sync_advice(config.tracking, folder):
        print(advice)


def output_folder(config: DetectConfig) -> Path:
    """``output``, or a folder in ``runs/`` named after pipeline and data."""
    if config.output is not None:
        return config.output
    data = "shapes" if config.root is None else config.root.name
    return Path.cwd() / "runs" / f"detect-{Path(config.pipeline).name}-{data}"


def detect(config: DetectConfig, folder: Path) -> dict[str, Any]:
    """The results; what the folder holds already is not computed again.

    Raises:
        I2AMError: data, pipeline, detectors, device or folder do not fit; nothing is written then.
    """
    from i2am_train.assembly import chosen_device
    from i2am_train.config.build import plain
    from i2am_train.config.hub import revisions
    from i2am_train.experiments.detection.coco import read_bench
    from i2am_train.experiments.detection.detectors import load_detector
    from i2am_train.experiments.detection.evaluation import KeptPaintings, paint_bench
    from i2am_train.experiments.detection.tracking import track_detection
    from i2am_train.json_files import read_json
    from i2am_train.models.others.paint_by_example import PaintByExample
    from i2am_train.results.finished_runs import RESULTS
    from i2am_train.runs import RunFolder

    device = chosen_device(config.device)
    annotations, images = data_of(config)
    bench = read_bench(annotations, images, crowds=config.crowds, limit=config.samples)
    model = PaintByExample.from_pretrained(config.pipeline, device, config.dtype)
    model.check_size(config.size)
    detectors = {name: load_detector(name) for name in config.detectors}
    settings = plain(config) | {"bench": bench.fingerprint} | revisions(config.pipeline)
    opened = RunFolder.open(folder, settings, may_differ=WITHOUT_EFFECT_ON_IMAGES)
    before = scores_of(read_json(folder / RESULTS)) if opened.finished else None
    opened.start(seed=config.seed, data=bench.fingerprint)
    kept = KeptPaintings(folder=folder, samples=bench.samples, batch_size=config.batch_size)
    paint_bench(model, kept, config)
    del model  # room for the detectors
    seen = look(kept, {name: one.to(device) for name, one in detectors.items()}, config)
    results = conclude(config, bench, kept, seen, opened.manifest)
    if scores_of(results) != before:
        track_detection(
            config.tracking,
            folder,
            arm=Path(config.pipeline).name,
            use_inputs=partial(_use_data_and_pipeline, config, bench, images),
        )
    opened.finish(detectors=revisions(*config.detectors).get("revisions", {}))
    return results


def scores_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """What was found, without how it was asked for: equal where there is nothing new to log."""
    return {name: value for name, value in results.items() if name not in ("settings", "manifest")}


def _use_data_and_pipeline(config: DetectConfig, bench: Bench, images: Path, run: Any) -> None:
    from i2am_train.tracking.artifacts import use_bench, use_model

    use_bench(run, images, bench.fingerprint, len(bench.samples))
    pipeline = expanded(config.pipeline)
    if pipeline.is_dir():  # one of the hub is named by the run's configuration
        use_model(run, pipeline, upload=config.tracking.upload_model)


def data_of(config: DetectConfig) -> tuple[Path, Path]:
    """COCO file and folder of images; the made set is made if it is not there yet."""
    from i2am_train.config.locations import shapes_folder
    from i2am_train.experiments.detection.shapes import SPLIT, make_shapes

    if config.root is None:
        root, split = make_shapes(shapes_folder(config.shapes), config.shapes), SPLIT
    else:
        root, split = config.root, config.split
    file = config.annotations or root / "annotations" / f"instances_{split}.json"
    return file, root / split


def look(
    kept: KeptPaintings, detectors: Mapping[str, Detector], config: DetectConfig
) -> dict[str, Sequence[Mapping[str, Any]]]:
    """What each detector sees in each sample."""
    from i2am_train.experiments.detection.evaluation import KeptDetections

    seen: dict[str, Sequence[Mapping[str, Any]]] = {}
    for name, detector in detectors.items():
        detections = KeptDetections(folder=kept.folder, detector=name, paintings=kept)
        detections.detect(detector, config)
        seen[name] = detections.rows()
    return seen


def conclude(
    config: DetectConfig,
    bench: Bench,
    kept: KeptPaintings,
    seen: Mapping[str, Sequence[Mapping[str, Any]]],
    manifest: Mapping[str, Any],
) -> dict[str, Any]:
    """Score everything, write the results, and make tables and page of them."""
    import json

    from i2am_train.config.build import plain
    from i2am_train.experiments.detection.evaluation import score_bench, summarise
    from i2am_train.experiments.detection.report import write_report
    from i2am_train.experiments.detection.results import KIND, SCHEMA, read_detected, write_examples
    from i2am_train.files import write_text
    from i2am_train.json_files import write_json
    from i2am_train.results.finished_runs import RESULTS, SAMPLES

    rows = score_bench(kept, seen, config)
    results = {
        "schema": SCHEMA,
        "kind": KIND,
        **summarise(rows, kept, bench),
        "thresholds": config.thresholds,
        "settings": plain(config),
        "manifest": dict(manifest),
    }
    write_text(kept.folder / SAMPLES, "".join(json.dumps(row) + "\n" for row in rows))
    write_examples(kept.folder, examples(kept, rows, config))
    write_json(kept.folder / RESULTS, results)
    write_report(read_detected(kept.folder))
    return results


def examples(
    kept: KeptPaintings, rows: Sequence[Mapping[str, Any]], config: DetectConfig
) -> list[Example]:
    """The first samples as pictures."""
    import numpy as np

    from i2am_train.experiments.detection.evaluation import on_picture
    from i2am_train.experiments.detection.results import Example
    from i2am_train.models.others.paint_by_example import resized

    chosen = range(min(config.pictures, len(rows)))
    found = []
    for position in chosen:
        sample, batch = kept.samples[position], kept.batches()[position // config.batch_size]
        heat = kept.maps(batch)["decoder"][position - batch[0]]
        image = sample.image()
        found.append(
            Example(
                image=np.asarray(resized(image, config.size)),
                mask=np.asarray(resized(sample.mask(), config.size)) > 0,
                reference=np.asarray(resized(sample.reference(image), config.size)),
                generated=kept.image(position),
                heat=on_picture(heat, config.size).numpy(),
                row=rows[position],
            )
        )
    return found


if __name__ == "__main__":
    entry("detect", run)
