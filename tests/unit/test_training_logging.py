"""training/csv_history.py and training/checkpoint_io.py: what survives when a run is stopped."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from i2am_train.errors import CheckpointError
from i2am_train.training.checkpoint_io import PARTS, AtomicCheckpointIO
from i2am_train.training.csv_history import ContinuedCSVLogger

pytestmark = pytest.mark.filterwarnings("default")  # Lightning's own deprecations


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def log(folder: Path, step: int, **values: float) -> None:
    """What an attempt logs that goes on from a checkpoint of this many steps."""
    logger = ContinuedCSVLogger(folder, step)
    logger.log_metrics(values, step=step)
    logger.save()


def test_a_continued_run_keeps_its_rows(tmp_path: Path) -> None:
    """Rows of three attempts stand below each other, also when a later one logs another column."""
    log(tmp_path / "run", 1, loss=0.5)
    log(tmp_path / "run", 2, loss=0.25, score=3.0)
    log(tmp_path / "run", 3, loss=0.125)
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == ["1", "2", "3"]
    assert [row["loss"] for row in found] == ["0.5", "0.25", "0.125"]
    assert [row["score"] for row in found] == ["", "3.0", ""]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.csv"]


def test_rows_of_steps_that_are_taken_again_are_dropped(tmp_path: Path) -> None:
    """A killed attempt had come further than its last checkpoint, and was writing a line."""
    for step in range(4):
        log(tmp_path / "run", step, loss=1.0 + step)
    with (tmp_path / "run/metrics.csv").open("a") as file:
        file.write("5.0")
    log(tmp_path / "run", 2, loss=7.0)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path / "run")] == [
        ("0", "1.0"), ("1", "2.0"), ("2", "7.0"),
    ]  # fmt: skip


def test_another_process_leaves_the_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process may be writing at this very moment."""
    log(tmp_path / "run", 0, loss=0.5)
    monkeypatch.setenv("LOCAL_RANK", "1")
    ContinuedCSVLogger(tmp_path / "run", 0)
    assert [row["loss"] for row in rows(tmp_path / "run")] == ["0.5"]


def test_rows_set_aside_by_a_killed_process_come_back(tmp_path: Path) -> None:
    """A process that died while it opened the logger has lost nothing."""
    log(tmp_path / "run", 1, loss=0.5)
    (tmp_path / "run" / "metrics.csv").rename(tmp_path / "run" / "metrics.csv.previous")
    log(tmp_path / "run", 2, loss=0.25)
    assert [row["step"] for row in rows(tmp_path / "run")] == ["1", "2"]


def test_a_failed_save_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disk fills up half-way, the old file is still whole and in its place."""
    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"weights": torch.arange(6.0).reshape(2, 3)}, path)

    def disk_full(self: Any, checkpoint: Any, path: Path, options: Any = None) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", disk_full)
    with pytest.raises(OSError, match="no space left"):
        writer.save_checkpoint({"weights": torch.zeros(2, 3)}, path)
    assert torch.equal(torch.load(path)["weights"], torch.arange(6.0).reshape(2, 3))


def test_a_save_replaces_the_last_checkpoint(tmp_path: Path) -> None:
    """The new content under the same name, and no temporary file beside it."""
    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
    rest: dict[str, Any] = {name: {} for name in PARTS - {"state_dict"}}
    for value in (1.0, 2.0):
        state = {"weights": torch.full((2, 3), value)}
        writer.save_checkpoint({"state_dict": state, **rest}, path)
    weights = writer.load_checkpoint(path)["state_dict"]["weights"]
    assert torch.equal(weights, torch.full((2, 3), 2.0))
    assert list(tmp_path.iterdir()) == [path]


def test_another_file_of_torch_is_no_checkpoint(tmp_path: Path) -> None:
    """Somebody's weights under a checkpoint's name are not taken for one."""
    torch.save({"weights": torch.zeros(2, 3)}, tmp_path / "step-000007.ckpt")
    with pytest.raises(CheckpointError, match="is no checkpoint of a training: expected global_step"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "step-000007.ckpt")
