"""Two processes give the metrics of one: real processes with gloo, started by the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from i2am_train.results.run_files import read_panels
from i2am_train.workflows.ablate import TIMES
from tests.support.trainings import SCHEDULED, curves

pytestmark = pytest.mark.long


def logged(folder: Path) -> dict[str, float]:
    """The training losses of the first step and any validation scores of the last epoch in ``metrics.csv``."""
    rows = curves(folder)
    losses = next(row for row in rows if "loss/total" in row)
    scores = [row for row in rows if "val/imacs_g" in row][-1:]
    return {
        name: value
        for row, kind in ((losses, "loss/"), *((row, "val/") for row in scores))
        for name, value in row.items()
        if name.startswith(kind)
    }


def run(*words: str, launcher: tuple[str, ...] = ()) -> str:
    """What a command prints; one thread per process, so that sums have one order."""
    command = [sys.executable, *launcher, "-m", "i2am_train", *words]
    environment = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_equal_one(training: list[str], small_checkpoint: Path, tmp_path: Path) -> None:
    """The same global batch on one and on two processes: equal losses, weights and scores, each sample counted once.

    Half of the conditions are dropped, and a term counts half of the timesteps, so that the processes have unequally
    many samples with attention losses.
    """
    common = [
        *training, "optimization.steps=2", "validation.samples=5", "evaluation.batch_size=2",
        "tracking.tensorboard=false", "experiment=refined", "optimization.condition_dropout=0.5",
        "optimization.global_batch=4", *SCHEDULED,
    ]  # fmt: skip
    two = ["data.batch_size=2", "trainer.devices=2", "trainer.strategy=ddp"]
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    variants: dict[str, tuple[list[str], tuple[str, ...]]] = {
        "one": (["data.batch_size=4"], ()),
        "two": ([*two, "resume=false"], ()),
        "torchrun": (two, torchrun),
    }
    scores = {}
    for name, (options, launcher) in variants.items():
        run("train", *common, *options, f"output={tmp_path / name}", launcher=launcher)
        scores[name] = logged(tmp_path / name)
    assert scores["one"].keys() == scores["two"].keys() >= {"loss/total", "loss/cwg@5", "val/ssim"}
    assert scores["torchrun"] == scores["two"]
    for name, value in scores["one"].items():
        assert scores["two"][name] == pytest.approx(value, rel=2e-3, abs=2e-3), name
    one, two, launched = (
        load_file(tmp_path / name / "model/unet/diffusion_pytorch_model.safetensors")
        for name in ("one", "two", "torchrun")
    )
    assert all(torch.equal(two[name], launched[name]) for name in two)
    start = load_file(small_checkpoint / "unet/diffusion_pytorch_model.safetensors")
    moved = max(float((one[name] - start[name]).abs().max()) for name in one)
    apart = max(float((one[name] - two[name]).abs().max()) for name in one)
    assert apart < 0.02 * moved, (apart, moved)


@pytest.mark.slow
def test_adapters_on_two_processes_equal_those_on_one(training: list[str], tmp_path: Path) -> None:
    """LoRA with attention losses: equal losses and adapters, though the frozen weights get no gradient."""
    common = [
        *training, "optimization.steps=2", "validation.samples=0", "tracking.tensorboard=false", "experiment=refined",
        "optimization.condition_dropout=0.5", "optimization.global_batch=4", "optimization.trainable=lora",
        "optimization.lora_rank=2",
    ]  # fmt: skip
    variants = {"one": ["data.batch_size=4"], "two": ["data.batch_size=2", "trainer.devices=2", "trainer.strategy=ddp"]}
    for name, options in variants.items():
        run("train", *common, *options, f"output={tmp_path / name}")
    losses = {name: logged(tmp_path / name) for name in variants}
    assert losses["one"].keys() >= {"loss/total", "loss/dcml"}
    assert losses["two"] == pytest.approx(losses["one"], rel=2e-3, abs=2e-3)
    one, two = (load_file(tmp_path / name / "lora/pytorch_lora_weights.safetensors") for name in variants)
    moved = max(float(value.abs().max()) for name, value in one.items() if ".lora_B." in name)
    apart = max(float((one[name] - two[name]).abs().max()) for name in one)
    assert apart < 0.02 * moved, (apart, moved)


def test_two_processes_evaluate_as_one(overrides: list[str], small_checkpoint: Path, tmp_path: Path) -> None:
    """Bit for bit the same images, rows and scores from three batches on one and on two processes."""
    common = [
        *overrides, f"checkpoint={small_checkpoint}", "evaluation.batch_size=2", "evaluation.panel_samples=3",
        "evaluation.metrics=[ssim,fd_efficientnet_lite0]", "progress_bar=false", "device=cpu",
        "tracking.wandb=disabled",
    ]  # fmt: skip
    for name, options in {"one": [], "two": ["devices=2", "strategy=ddp"]}.items():
        printed = run("evaluate", *common, *options, f"output={tmp_path / name}")
        assert printed.count("6 samples") == 1, "one table, from one process"
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    for part in ("metrics", "intervals", "protocol", "skipped", "samples"):
        assert two[part] == one[part], part
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert files == sorted(path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*.*"))
    same = [path for path in files if path.suffix in (".png", ".jsonl")]
    assert len(same) == 6 + 1
    for path in same:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path
    first, second = (read_panels(tmp_path / name) for name in ("one", "two"))
    assert first
    for one, two in zip(first, second, strict=True):
        assert one.name == two.name
        assert one.map_generated.tobytes() == two.map_generated.tobytes()


def test_a_sweep_runs_as_jobs(tmp_path: Path) -> None:
    """Through submitit, as on a cluster; its local launcher starts real processes."""
    run(
        "data", "make", "-m", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5",
        f"hydra.launcher.submitit_folder={tmp_path / 'jobs'}", f"hydra.sweep.dir={tmp_path / 'sweep'}",
        "seed=0,1", "train=2", "test=2", "height=32", "width=32", f"root='{tmp_path}/drawn-${{seed}}'",
    )  # fmt: skip
    for seed in (0, 1):
        assert (tmp_path / f"drawn-{seed}" / "test_pairs.txt").is_file()
    assert list((tmp_path / "jobs").rglob("*_submitted.pkl"))


def test_a_study_with_two_jobs_equals_one_after_the_other(training: list[str], tmp_path: Path) -> None:
    """Equal scores of every cell; what a cell prints is in its log; asked again, nothing is run again."""
    study = [*training, "validation=none", "optimization.steps=2", "seeds=[0,1]", "evaluation.metrics=[ssim]"]
    study += ["arms=[base,baseline]", "device=cpu", "bootstrap_samples=200"]
    said = run("ablate", *study, "jobs=2", f"output={tmp_path / 'two'}")
    run("ablate", *study, f"output={tmp_path / 'one'}")
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert [cell["folder"] for cell in two["cells"]] == [cell["folder"] for cell in one["cells"]]
    for first, second in zip(one["cells"], two["cells"], strict=True):
        first["metrics"].pop("step_seconds", None), second["metrics"].pop("step_seconds", None)
        assert second["metrics"] == pytest.approx(first["metrics"], nan_ok=True)
    for results, longest in ((one, sum), (two, max)):  # of what runs at the same time, the longest; rounded
        assert results["wall_minutes"] >= longest(cell["minutes"] for cell in results["cells"]) - 0.1
    logs = sorted((tmp_path / "two/cells").glob("*.log"))
    assert [log.stem for log in logs] == ["base", "baseline-seed0", "baseline-seed1"]
    assert "weights: U-Net" in logs[1].read_text()
    assert "weights: U-Net" not in said
    before = [log.stat().st_mtime_ns for log in logs]
    run("ablate", *study, "jobs=2", f"output={tmp_path / 'two'}")
    assert [log.stat().st_mtime_ns for log in logs] == before


def test_a_stopped_study_stops_its_jobs_which_save_and_go_on(training: list[str], tmp_path: Path) -> None:
    """SIGTERM to the first process only, while both cells train."""
    study = [*training, "validation=none", "seeds=[0]", "evaluation.metrics=[ssim]", "arms=[baseline,refined]"]
    study += ["device=cpu", "bootstrap_samples=200", "jobs=2", f"output={tmp_path / 'study'}"]
    long = [*study, "optimization.steps=5000", "data.synthetic.train=6"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "i2am_train", "ablate", *long]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        curves_of = [tmp_path / f"study/cells/{arm}-seed0/metrics.csv" for arm in ("baseline", "refined")]
        deadline = time.monotonic() + 300
        while not all(file.is_file() for file in curves_of) and time.monotonic() < deadline:
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    for arm in ("baseline", "refined"):
        assert "training stopped after step" in (tmp_path / f"study/cells/{arm}-seed0.log").read_text()
        assert list((tmp_path / f"study/cells/{arm}-seed0/checkpoints").glob("*.ckpt"))
        ((beginning, end),) = json.loads((tmp_path / f"study/cells/{arm}-seed0/{TIMES}").read_text())
        assert 0 < end - beginning < 420


def test_a_job_that_fails_is_shown_with_its_log(training: list[str], tmp_path: Path) -> None:
    """A weight that makes the loss infinite; the other cell is stopped."""
    arm = tmp_path / "bad.yaml"
    arm.write_text("# @package _global_\nname: bad\nlabel: Bad\nobjective: {terms: {dcml: {weight: 1.0e+38}}}\n")
    study = [*training, "validation=none", "seeds=[0]", f"arms=[{arm}]", "reference=bad", "optimization.steps=3"]
    words = ["ablate", *study, "jobs=2", "device=cpu", f"output={tmp_path / 'study'}"]
    done = subprocess.run([sys.executable, "-m", "i2am_train", *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert "bad-seed0 ended with status 2" in done.stderr
    assert "lower optimization.learning_rate" in done.stderr
