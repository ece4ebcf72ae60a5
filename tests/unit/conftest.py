"""Explained samples made by hand: small, all axes different, every map known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from i2am_train.attention import AttributionMaps, AttributionStore, LayerRecord
from i2am_train.attention.recipe import PAPER_LAYERS
from i2am_train.evaluation.explaining import IMAGES, MASKS
from i2am_train.evaluation.explanation import CleanImage, Explanation, write_explanation
from i2am_train.runs import RunFolder
from i2am_train.types import GridSize, LayerWeighting

SIZE = GridSize(48, 36)
REFERENCE = GridSize(6, 5)
STEPS = 4
GRIDS = {1: GridSize(4, 3), 2: GridSize(8, 6), 3: GridSize(16, 12)}
HEADS = {1: 4, 2: 3, 3: 2}
TIMESTEPS = (999, 750, 500, 250)


def explained_maps(seed: int = 0) -> AttributionMaps:
    """Random attention of the nine layers with all score matrices."""
    generator = torch.Generator().manual_seed(seed)

    def record(name: str) -> LayerRecord:
        level = int(name.split(".")[1])
        grid, heads = GRIDS[level], HEADS[level]
        logits = 3 * torch.randn(1, grid.tokens, REFERENCE.tokens, generator=generator)
        vectors = [
            (2 * torch.randn(1, STEPS, heads, tokens, generator=generator)).softmax(-1)
            for tokens in (grid.tokens, REFERENCE.tokens)
        ]
        return LayerRecord(name, grid, REFERENCE, *vectors, True, logits.softmax(-1), logits.softmax(-2))

    return AttributionMaps(AttributionStore(tuple(map(record, PAPER_LAYERS)), TIMESTEPS))


@pytest.fixture(scope="session")
def make_explained() -> Callable[..., Explanation]:
    """Builds an explained sample; keywords replace its fields, those of its origin included."""

    def make(seed: int = 0, **changes: Any) -> Explanation:
        rng = np.random.default_rng(seed)
        origin = {"checkpoint": "weights/tiny", "data": "d0", "guidance": 2.0, "steps": 4, "seed": 0}
        origin |= {name: changes.pop(name) for name in list(changes) if name in origin}
        masks = {name: np.zeros(SIZE, bool) for name in MASKS}
        for mask in masks.values():
            mask[12:40, 8:30] = True
        y, x = np.mgrid[: SIZE.height, : SIZE.width].astype(np.float32)
        place = np.stack([(y + 0.5) / SIZE.height, (x + 0.5) / SIZE.width], -1)
        fields: dict[str, Any] = {
            "name": "00001_00",
            "inputs": {"person": "00001_00", "garment": "00001_00"},
            "paired": True,
            "layer": PAPER_LAYERS[1],
            "images": {n: rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8) for n in (*IMAGES, "generated")},
            "masks": masks,
            "correspondence": np.where(masks["warped_garment"][..., None], place, np.nan),
            "clean": tuple(
                CleanImage(step, TIMESTEPS[step], np.full((*SIZE, 3), 60 * step, np.uint8)) for step in (1, 3)
            ),
            "maps": explained_maps(seed),
            "scores": {"imacs_g": -0.25, "imacs_r": 0.5, "pck_1": None},
            "generated_patches": ((1, 1), (2, 0), (2, 1), (3, 2)),
            "reference_patches": ((2, 3), (4, 1)),
            "model": "tiny",
            "origin": origin,
            "delta": 0.4,
            "weighting": LayerWeighting.PAPER,
            "time_groups": 2,
        }
        return Explanation(**fields | changes)

    return make


@pytest.fixture(scope="session")
def write_explained_run() -> Callable[[Explanation, Path], Path]:
    """Writes a sample as the finished run folder of `i2am explain`."""

    def write(sample: Explanation, path: Path) -> Path:
        folder = RunFolder.open(path, {"checkpoint": sample.origin["checkpoint"]})
        folder.start(seed=sample.origin["seed"], data=sample.origin["data"])
        write_explanation(path, sample)
        folder.finish()
        return path

    return write
