"""Files of an evaluation: scores as JSON, samples as JSON lines, images as PNG, panels as safetensors."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from i2am_train.evaluation.evaluator import EvaluationResult, Panel
from i2am_train.runs import write_json, write_text

RESULTS, SAMPLES, PANELS, IMAGES = "results.json", "samples.jsonl", "panels.safetensors", "images"


def write_evaluation(folder: Path, result: EvaluationResult, settings: dict[str, Any]) -> None:
    """Writes ``samples.jsonl`` first and ``results.json`` last, whose presence says that the evaluation is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in result.rows)
    write_text(folder / SAMPLES, lines)
    write_json(
        folder / RESULTS,
        {
            "metrics": result.metrics,
            "samples": len(result.rows),
            "skipped": result.skipped,
            "warnings": result.warnings,
            "settings": settings,
        },
    )


def write_image(folder: Path, name: str, image: Tensor) -> None:
    """Writes a uint8 [height, width, 3] image as ``images/<name>.png``."""
    path = folder / IMAGES / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".png.tmp")
    Image.fromarray(image.cpu().numpy()).save(temporary, format="PNG")
    os.replace(temporary, path)


def write_panels(folder: Path, panels: list[Panel]) -> None:
    """Writes the panels, by ascending index, as one archive; nothing if there are none."""
    if not panels:
        return
    panels = sorted(panels, key=lambda panel: panel.index)
    tensors = {
        name: torch.stack([panel.images[name] for panel in panels]).contiguous()
        for name in panels[0].images
    }
    for name in ("map_generated", "map_reference", "centers", "target_centers", "mask"):
        tensors[name] = torch.stack([getattr(panel, name) for panel in panels]).contiguous()
    first = panels[0]
    metadata = {
        "layer": first.layer,
        "generated_grid": str(first.generated_grid),
        "reference_grid": str(first.reference_grid),
        "names": json.dumps([panel.name for panel in panels]),
        "garment_names": json.dumps([panel.garment_name for panel in panels]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{PANELS}.tmp"
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, folder / PANELS)


def read_results(folder: Path) -> dict[str, Any] | None:
    """The finished evaluation in a folder, or None if there is none."""
    path = folder / RESULTS
    if not path.is_file():
        return None
    results: dict[str, Any] = json.loads(path.read_text())
    return results
