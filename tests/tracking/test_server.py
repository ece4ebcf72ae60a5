"""Runs against a stand-in for W&B's server: online, without any server, and with one that dies."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import wandb

from i2am_train.config.store import compose
from i2am_train.tracking import session
from i2am_train.workflows import train as workflow
from i2am_train.workflows.train import train
from tests.support.trainings import going_down

pytestmark = pytest.mark.filterwarnings("default")  # Lightning's, TensorBoard's and W&B's own


@pytest.fixture(autouse=True)
def _as_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B remembers server and login for the life of a process."""
    wandb.teardown()
    monkeypatch.setattr(session, "_gone_offline", False)


@pytest.fixture
def training(training: list[str], tmp_path: Path) -> list[str]:
    """Two epochs of two steps."""
    return [
        *training, "validation.samples=2", "validation.panel_samples=1", "evaluation.metrics=[]",
        "tracking.wandb=online", "tracking.table_samples=2", "tracking.project=unit", f"output={tmp_path / 'run'}",
    ]  # fmt: skip


def losses(rows: list[dict[str, Any]]) -> dict[int, float]:
    return {row["trainer/global_step"]: row["loss/total"] for row in rows if "loss/total" in row}


def sync(url: str, folder: Path, *paths: Path | str) -> str:
    """`wandb sync`, as a user types it."""
    environment = {**os.environ, "WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40}
    environment.pop("WANDB_MODE", None)
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *map(str, paths)],
        env=environment, cwd=folder, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return done.stderr


def test_online(wandb_server: Any, training: list[str], tmp_path: Path) -> None:
    """The server gets scalars, table, model and lineage."""
    run = train(compose("train", training))
    run_id = json.loads((run / "wandb.json").read_text())["id"]
    rows = wandb_server.history(run_id)
    assert sorted(losses(rows)) == [0, 1, 2, 3]
    kinds = {one["type"]: one for one in wandb_server.artifacts.values() if one["committed"]}
    assert "model_index.json" in kinds["model"]["files"]
    assert any(name.endswith("val/table.table.json") for name in kinds["run_table"]["files"])
    assert wandb_server.inputs == {(run_id, kinds["dataset"]["name"])}


@pytest.mark.long
def test_without_a_server_the_run_goes_on_offline(
    training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    wandb_server: Any, read_runs: Callable[[Path], list[Any]],
) -> None:  # fmt: skip
    """It says so, stores everything, and the command that it prints brings all of it to the server later."""
    monkeypatch.setattr(session, "START_TIMEOUT", 2.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    run = train(compose("train", training))
    printed = " ".join(capfd.readouterr().err.split())
    assert "connection refused" in printed
    assert f"wandb sync {run}/wandb" in printed
    stored = [one for one in read_runs(run) if one.folder.name.startswith("offline-")]
    assert sorted(stored[0].scalars("loss/total")) == [0, 1, 2, 3]
    assert {"model", "dataset", "run_table"} <= {artifact.type for artifact in stored[0].artifacts}
    sync(wandb_server.url, tmp_path, run / "wandb")
    run_id = json.loads((run / "wandb.json").read_text())["id"]
    assert losses(wandb_server.history(run_id)) == pytest.approx(stored[0].scalars("loss/total"))
    assert {name for _, name in wandb_server.inputs} == {stored[0].of_type("dataset")[0].name}
    assert session.sync_advice(compose("train", training).tracking, run) is None  # all is sent


def test_without_a_login_the_run_goes_on_offline(
    training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    read_runs: Callable[[Path], list[Any]],
) -> None:  # fmt: skip
    """No key, no terminal to ask for one: the training finishes with its records on disk."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run = train(compose("train", training))
    assert "wandb login" in capfd.readouterr().err
    (stored,) = (one for one in read_runs(run) if one.folder.name.startswith("offline-"))
    assert sorted(stored.scalars("loss/total")) == [0, 1, 2, 3]


class ServerDies(L.Callback):
    """Stops the server at the beginning of the second epoch."""

    def __init__(self, server: Any) -> None:
        self.server = server

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.server.stop()


@pytest.mark.long
def test_a_server_that_dies_loses_nothing(
    wandb_server: Any, training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], make_server: Callable[[], Any],
) -> None:  # fmt: skip
    """Training ends soon, says what to do, and another server gets every scalar and the model from the disk."""
    make = workflow.make_trainer

    def make_with_outage(*arguments: Any) -> L.Trainer:
        trainer = make(*arguments)
        trainer.callbacks.append(ServerDies(wandb_server))
        return trainer

    monkeypatch.setattr(workflow, "make_trainer", make_with_outage)
    started = time.monotonic()
    run = train(compose("train", [*training, "tracking.finish_timeout=3"]))
    assert time.monotonic() - started < 40
    assert (run / "model" / "model_index.json").is_file()
    printed = " ".join(capfd.readouterr().err.split())
    assert "Nothing is lost" in printed
    (folder,) = (run / "wandb").glob("run-*")
    assert f"wandb sync --include-online {folder}" in printed
    later = make_server()
    sync(later.url, tmp_path, "--include-online", folder)
    run_id = json.loads((run / "wandb.json").read_text())["id"]
    assert sorted(losses(later.history(run_id))) == [0, 1, 2, 3]
    assert {one["type"] for one in later.artifacts.values()} >= {"dataset", "model", "run_table"}


@pytest.mark.slow
def test_resumed_offline_parts_become_one_run(
    wandb_server: Any, training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped and continued offline training is one curve on the server."""
    config = compose("train", [*training, "tracking.wandb=offline"])
    with going_down(monkeypatch):
        train(config)
    run = train(config)
    sync(wandb_server.url, tmp_path, run / "wandb")
    ((_, record),) = wandb_server.runs.items()
    rows = [json.loads(record["history"][number]) for number in sorted(record["history"])]
    assert sorted(losses(rows)) == [0, 1, 2, 3]
    assert [row["_step"] for row in rows] == list(range(len(rows)))
