"""Rows of the curves survive when a run is stopped and continued."""

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest

from i2am_train.callbacks.loggers import ContinuedCSVLogger, StepSeconds

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


def test_a_step_is_measured_from_the_end_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches a step; the first step, and one behind a validation, have nothing to be measured from."""
    logged: list[tuple[str, float]] = []
    module = SimpleNamespace(log=lambda name, value: logged.append((name, value)))
    clock = iter([2.0, 5.0, 9.0, 30.0, 37.0])  # when steps 3 to 7 end
    monkeypatch.setattr("i2am_train.callbacks.loggers.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    timer = StepSeconds()
    timer.on_train_start(SimpleNamespace(global_step=2), module)
    for step in (2, 3, 3, 4, 4, 5):
        timer.on_train_batch_end(SimpleNamespace(global_step=step), module)
    timer.on_validation_start(SimpleNamespace(), module)
    for step in (5, 6, 6, 7):
        timer.on_train_batch_end(SimpleNamespace(global_step=step), module)
    assert logged == [("step_seconds", 3.0), ("step_seconds", 4.0), ("step_seconds", 7.0)]
