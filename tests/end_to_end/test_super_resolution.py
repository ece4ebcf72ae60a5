"""PASD- and SeeSR-like models: the paper's steps, guidance and time groups, from picture to figures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from i2am_train.attention import load_maps
from i2am_train.config.store import compose
from i2am_train.types import Direction, GridSize
from i2am_train.workflows.explain import explain

pytestmark = pytest.mark.long

SIZE = GridSize(96, 64)
MODELS = {"pasd": (20, 4, 12), "seesr": (50, 5, 9)}
"""Steps, time groups (paper A.7) and layers (the public code)."""


@pytest.fixture(scope="module")
def low_resolution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small picture of half the result's size: a bright disc on a gradient."""
    y, x = np.mgrid[: SIZE.height // 2, : SIZE.width // 2]
    disc = (y - 18) ** 2 + (x - 12) ** 2 < 64
    colours = np.stack([4 * y, 6 * x, 200 * disc], axis=-1).clip(0, 255).astype(np.uint8)
    path = tmp_path_factory.mktemp("pictures") / "low.png"
    Image.fromarray(colours).save(path)
    return path


@pytest.fixture(scope="module", params=["pasd", pytest.param("seesr", marks=pytest.mark.slow)])
def explained(
    request: pytest.FixtureRequest, low_resolution: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The folder that ``i2am explain model=factory`` writes with the presets of the model."""
    name = request.param
    overrides = [
        "model=factory", f"factory=tests.support.super_resolution:make_{name}", f"reference={low_resolution}",
        f"size=[{SIZE.height},{SIZE.width}]", f"attribution={name}", f"sampling={name}",
        f"output={tmp_path_factory.mktemp(name) / 'out'}",
    ]  # fmt: skip
    return name, explain(compose("explain", overrides))


def test_figures_and_table_are_written(explained: tuple[str, Path]) -> None:
    """All figures lie in the folder, and every layer has its alignment beside that of even attention."""
    name, folder = explained
    figures = {path.stem for path in folder.glob("*.png")}
    assert {"layers", "time_heads", "unified", "alignment", "alignment_layers"} <= figures
    about = json.loads((folder / "scores.json").read_text())
    _, groups, layers = MODELS[name]
    assert (about["recipe"], about["time_groups"], len(about["alignment"])) == (name, groups, layers)
    for row in about["alignment"]:
        assert 0 < row["relative"] < 1
        assert 0 < row["even"] < 1
        assert 0 <= row["within_one"] <= 1


def test_capture_knows_steps_heads_and_grids(explained: tuple[str, Path]) -> None:
    """One record per step and layer, time groups of the paper; SeeSR's heads differ by level."""
    name, folder = explained
    steps, groups, layers = MODELS[name]
    maps = load_maps(folder / "maps.safetensors").maps
    assert (maps.store.steps, len(maps.layers)) == (steps, layers)
    assert maps.time_level(Direction.REFERENCE_TO_GENERATED, groups).values.shape[1] == groups
    heads = {20, 10, 5} if name == "seesr" else {4, 2}
    assert set(maps.by_head_count()) == heads
    finest = maps.store.layers[-1]
    assert finest.generated_grid == GridSize(24, 16)
    assert finest.reference_grid == (GridSize(12, 12) if name == "seesr" else GridSize(24, 16))
