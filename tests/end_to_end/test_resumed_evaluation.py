"""A stopped ``i2am evaluate`` goes on where it was: a real process, killed by the system between two batches."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from i2am_train.config.store import compose
from i2am_train.results.run_files import PANELS
from i2am_train.workflows.evaluate import evaluate
from tests.support.commands import Command

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("default"),  # Lightning's and torch's own deprecations
]


@pytest.fixture
def options(overrides: list[str], small_checkpoint: Path) -> list[str]:
    """Three batches of two samples, with enough steps that the first is not the last at once."""
    return [
        *overrides, f"checkpoint={small_checkpoint}", "sampling.steps=10",
        "evaluation.batch_size=2", "evaluation.panel_samples=3",
        "evaluation.metrics=[ssim,kd_efficientnet_lite0]", "progress_bar=false", "device=cpu",
    ]  # fmt: skip


def killed_after_a_batch(options: list[str], output: Path) -> None:
    """Starts the command and kills it as soon as one batch is finished."""
    command = Command(["evaluate", *options, f"output={output}"], output.with_suffix(".log"))
    deadline = time.monotonic() + 600
    while not list(output.glob("partial/*/rows.json")):
        if command.ended or time.monotonic() > deadline:
            pytest.fail(f"no batch was finished: {command.stop()[1][-3000:]}")
        time.sleep(0.005)
    assert command.stop()[0] == -signal.SIGKILL


def contents(folder: Path) -> dict[str, Any]:
    """What the files of a result hold, by name; an archive's tensors (its header has no fixed order)."""
    kept = [path for path in folder.rglob("*") if path.suffix in (".png", ".jsonl")]
    found: dict[str, Any] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept}
    with safe_open(folder / PANELS, framework="numpy") as file:
        found["names"] = file.metadata()["names"]
        return found | {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def test_killed_and_continued_equals_uninterrupted(options: list[str], tmp_path: Path) -> None:
    """Bit for bit the same images, rows, panels and scores; the finished batch is not made again."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    killed_after_a_batch(options, stopped)
    finished = sorted(path.parent.name for path in stopped.glob("partial/*/rows.json"))
    assert "batch-00000" in finished
    assert len(finished) < 3
    assert not (stopped / "results.json").exists()
    images = sorted((stopped / "images").glob("*.png"))[: 2 * len(finished)]
    written = [path.stat().st_mtime_ns for path in images]

    resumed = evaluate(compose("evaluate", [*options, f"output={stopped}"]), stopped)
    assert [path.stat().st_mtime_ns for path in images] == written
    uninterrupted = evaluate(compose("evaluate", [*options, f"output={whole}"]), whole)

    for part in ("metrics", "intervals", "protocol", "skipped", "samples"):
        assert resumed[part] == uninterrupted[part], part
    assert contents(stopped) == contents(whole)
    assert len(contents(whole)) == 6 + 1 + 1 + 12  # images, rows, names, arrays of the panels
    manifest = json.loads((stopped / "manifest.json").read_text())
    assert len(manifest["resumed"]) == 1
    assert manifest["finished"]
