"""PASD- and SeeSR-like models: the paper's steps, guidance and time groups, from picture to figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from i2am_train.attribution.trace import trace
from i2am_train.commands.explain_other import explain_picture
from i2am_train.config.store import compose
from i2am_train.reporting.super_resolution import alignment_plot, alignment_table
from i2am_train.types import Direction, GridSize
from tests.super_resolution import TinyPASD, TinySeeSR

SIZE = GridSize(96, 64)
MODELS = {"pasd": (TinyPASD, 20, 9.0, 4, 12), "seesr": (TinySeeSR, 50, 5.5, 5, 9)}
"""Class, steps, guidance, time groups and layers (paper A.7; the public code's layers)."""


@pytest.fixture(scope="module")
def low_resolution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small picture of half the result's size: a bright disc on a gradient."""
    y, x = np.mgrid[: SIZE.height // 2, : SIZE.width // 2]
    disc = (y - 18) ** 2 + (x - 12) ** 2 < 64
    colours = np.stack([4 * y, 6 * x, 200 * disc], axis=-1).clip(0, 255).astype(np.uint8)
    path = tmp_path_factory.mktemp("pictures") / "low.png"
    Image.fromarray(colours).save(path)
    return path


@pytest.fixture(scope="module", params=MODELS)
def explained(
    request: pytest.FixtureRequest,
    low_resolution: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path]:
    """The folder that ``i2am explain model=factory`` writes with the presets of the model."""
    name = request.param
    overrides = [
        "model=factory", f"factory=tests.super_resolution:make_{name}", f"reference={low_resolution}",
        f"size=[{SIZE.height},{SIZE.width}]", f"attribution={name}", f"sampling={name}",
        f"output={tmp_path_factory.mktemp(name) / 'out'}",
    ]  # fmt: skip
    return name, explain_picture(compose("explain", overrides))


def test_figures_and_table_are_written(explained: tuple[str, Path]) -> None:
    """All figures lie in the folder, and every layer has its alignment beside that of even attention."""
    name, folder = explained
    figures = {path.stem for path in folder.glob("*.png")}
    assert {"layers", "time_heads", "unified", "alignment", "alignment_layers"} <= figures
    about = json.loads((folder / "scores.json").read_text())
    _, _, _, groups, layers = MODELS[name]
    assert (about["recipe"], about["time_groups"], len(about["alignment"])) == (
        name,
        groups,
        layers,
    )
    for row in about["alignment"]:
        assert 0 < row["relative"] < 1
        assert 0 < row["even"] < 1
        assert 0 <= row["within_one"] <= 1


@pytest.mark.parametrize("name", MODELS)
def test_capture_knows_steps_heads_and_grids(name: str, low_resolution: Path) -> None:
    """One record per step and layer; SeeSR's heads differ by level."""
    kind, steps, guidance, groups, layers = MODELS[name]
    pipeline = kind()
    options: dict[str, Any] = {
        "reference": Image.open(low_resolution), "height": SIZE.height, "width": SIZE.width,
        "steps": steps, "guidance": guidance, "seed": 3,
    }  # fmt: skip
    with trace(pipeline, name, matrix_layers=None) as attention:
        pipeline(**options)
    maps = attention.maps()
    assert (maps.store.steps, len(maps.layers)) == (steps, layers)
    assert maps.time_level(Direction.REFERENCE_TO_GENERATED, groups).values.shape[1] == groups
    heads = {20, 10, 5} if name == "seesr" else {4, 2}
    assert set(maps.by_head_count()) == heads
    finest = maps.store.layers[-1]
    assert finest.generated_grid == GridSize(24, 16)
    assert finest.reference_grid == (GridSize(12, 12) if name == "seesr" else GridSize(24, 16))
    table, plot = alignment_table(maps), alignment_plot(maps)
    drawn = plot.axes[0].lines[0].get_ydata()
    assert list(drawn) == pytest.approx([100 * row["relative"] for row in table])
