"""Two processes give the metrics of one: real processes with gloo, started by the command line."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest


def logged(folder: Path) -> dict[str, float]:
    """The training losses of the first step and the validation scores of the last epoch in ``metrics.csv``."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = next(row for row in rows if row["loss/total"])
    scores = [row for row in rows if row["val/imacs_g"]][-1]
    return {
        name: float(row[name])
        for row, kind in ((losses, "loss/"), (scores, "val/"))
        for name in row
        if name.startswith(kind) and row[name]
    }


def test_two_processes_equal_one(
    small_dataset: Path, small_checkpoint: Path, tmp_path: Path
) -> None:
    """The same global batch on one and on two processes: equal scores of every kind, each sample counted once.

    The losses are logged as means over the processes: no condition is dropped here, so that these are the means over
    the samples.
    """
    common = [
        f"data.root={small_dataset}", f"init={small_checkpoint}", "data.height=64", "data.width=48",
        "data.workers=0", "sampling.steps=2", "optimization.steps=2", "validation.samples=5",
        "validation.panel_samples=2", "evaluation.batch_size=2", "trainer.progress_bar=false",
        "trainer.accelerator=cpu", "tracking.wandb=disabled", "tracking.tensorboard=false", "experiment=refined",
        "trainer.log_every_n_steps=1", "optimization.condition_dropout=0",
    ]  # fmt: skip
    variants = {
        "one": ["data.batch_size=4"],
        "two": ["data.batch_size=2", "trainer.devices=2", "trainer.strategy=ddp", "resume=false"],
    }
    scores = {}
    for name, options in variants.items():
        command = [
            sys.executable,
            "-m",
            "i2am_train",
            "train",
            *common,
            *options,
            f"output={tmp_path / name}",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        scores[name] = logged(tmp_path / name)
    assert scores["one"].keys() == scores["two"].keys() >= {"loss/total", "loss/dcml", "val/ssim"}
    for name, value in scores["one"].items():
        assert scores["two"][name] == pytest.approx(value, rel=2e-3, abs=2e-3), name
