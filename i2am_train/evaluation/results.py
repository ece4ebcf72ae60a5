"""Files of an evaluation: scores as JSON, samples as JSON lines, images as PNG, panels as safetensors."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.numpy import save_file
from torch import Tensor

from i2am_train.evaluation.evaluator import EvaluationResult, Panel, score_columns
from i2am_train.files import write_text, written
from i2am_train.json_files import write_json
from i2am_train.results.sample_scores import RESULTS, SAMPLES
from i2am_train.results.statistics import Over, mean_interval
from i2am_train.results.study import PANEL_ARRAYS, PANELS, Panels

CONFIDENCE = 0.95
IMAGES = "images"


def write_evaluation(folder: Path, result: EvaluationResult, settings: dict[str, Any]) -> None:
    """Writes ``samples.jsonl`` first and ``results.json`` last, whose presence says that the evaluation is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in result.rows)
    write_text(folder / SAMPLES, lines)
    write_json(
        folder / RESULTS,
        {
            "metrics": result.metrics,
            "intervals": sample_intervals(result.rows),
            "samples": len(result.rows),
            "skipped": result.skipped,
            "warnings": result.warnings,
            "protocol": result.protocol,
            "settings": settings,
        },
    )


def sample_intervals(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Bootstrap interval of each mean: ``low``, ``high``, ``confidence`` and ``n``, the samples with a value.

    Distances between sets have none: resampling images would change the number that they are biased by.
    """
    intervals = {}
    for name, values in score_columns(rows).items():
        known = [value for value in values if value is not None]
        low, high = mean_interval(known, Over.SAMPLES, CONFIDENCE)
        if low is not None and high is not None:
            intervals[name] = {"low": low, "high": high, "confidence": CONFIDENCE, "n": len(known)}
    return intervals


def write_image(folder: Path, name: str, image: Tensor) -> None:
    """Writes a uint8 [height, width, 3] image as ``images/<name>.png``."""
    with written(folder / IMAGES / f"{name}.png") as unfinished:
        Image.fromarray(image.cpu().numpy()).save(unfinished, format="PNG")


def stack_panels(panels: Mapping[int, Panel]) -> Panels:
    """The panels of at least one sample by ascending index, as figures and the report draw them."""
    rows = [panel for _, panel in sorted(panels.items())]
    first = rows[0]
    arrays = {name: [panel.images[name] for panel in rows] for name in first.images}
    for name in ("map_generated", "map_reference", "centers", "target_centers", "mask"):
        arrays[name] = [getattr(panel, name) for panel in rows]
    return Panels(
        names=tuple(panel.name for panel in rows),
        garment_names=tuple(panel.garment_name for panel in rows),
        layer=first.layer,
        generated_grid=first.generated_grid,
        reference_grid=first.reference_grid,
        **{name: torch.stack(stack).numpy() for name, stack in arrays.items()},
    )


def write_panels(folder: Path, panels: Panels) -> None:
    """Writes panels as one archive, which ``reporting.records.read_panels`` reads."""
    metadata = {
        "layer": panels.layer,
        "generated_grid": str(panels.generated_grid),
        "reference_grid": str(panels.reference_grid),
        "names": json.dumps(panels.names),
        "garment_names": json.dumps(panels.garment_names),
    }
    with written(folder / PANELS) as unfinished:
        save_file({name: getattr(panels, name) for name in PANEL_ARRAYS}, unfinished, metadata)


def read_results(folder: Path) -> dict[str, Any] | None:
    """The finished evaluation in a folder, or None if there is none."""
    path = folder / RESULTS
    if not path.is_file():
        return None
    results: dict[str, Any] = json.loads(path.read_text())
    return results
