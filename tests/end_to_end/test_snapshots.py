"""Checkpoints on the way: kept by training, judged by evaluate and ablate, correlated by report."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from i2am_train.config.store import compose
from i2am_train.errors import CheckpointError
from i2am_train.metrics.attention import imacs_column
from i2am_train.results.evaluations import read_evaluations
from i2am_train.runs import checkpoint_label
from i2am_train.tracking.session import arm_name
from i2am_train.workflows.ablate import ablate
from i2am_train.workflows.evaluate import run as run_evaluate
from i2am_train.workflows.report import report
from i2am_train.workflows.train import train

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("default"),  # Lightning's and torch's own deprecations
]


def unet(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("averaged", [False, True])
def test_snapshots_are_the_models_of_those_steps(training: list[str], tmp_path: Path, averaged: bool) -> None:
    """Averaged where weights are; the last step is the finished model; keeping them changes no weight."""
    options = [*training, "validation=none", f"optimization.ema_decay={0.5 if averaged else 'null'}"]
    options += ["optimization.warmup_steps=0", "optimization.final_lr_fraction=1"]
    keeping = "trainer.snapshot_every_n_steps=2"
    kept, plain, half = (
        train(compose("train", [*options, *more, f"output={tmp_path / name}"]))
        for name, more in (("kept", [keeping]), ("plain", []), ("half", ["optimization.steps=2"]))
    )
    assert [path.name for path in (kept / "snapshots").iterdir()] == ["step-000002"]
    assert not (plain / "snapshots").exists()
    assert equal(unet(kept / "model"), unet(plain / "model"))
    assert equal(unet(kept / "snapshots/step-000002"), unet(half / "model"))
    assert not equal(unet(half / "model"), unet(kept / "model"))


def test_from_scratch_keeps_only_the_frozen_networks(
    training: list[str], small_checkpoint: Path, tmp_path: Path
) -> None:
    """The denoiser starts from weights drawn by the seed; VAE and encoder are those of init."""
    options = [*training, "validation=none", "optimization.from_scratch=true", "optimization.steps=1"]
    options.append("optimization.learning_rate=1e-12")
    first, again, other = (
        train(compose("train", [*options, f"seed={seed}", f"output={tmp_path / name}"])) / "model"
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert equal(unet(first), unet(again))
    assert not equal(unet(first), unet(other))
    start = unet(small_checkpoint)
    name = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q.weight"
    assert not torch.allclose(unet(first)[name], start[name], atol=1e-3)
    vae = [load_file(folder / "vae/diffusion_pytorch_model.safetensors") for folder in (first, small_checkpoint)]
    assert equal(*vae)


def test_evaluate_judges_every_snapshot_of_a_run(training: list[str], overrides: list[str], tmp_path: Path) -> None:
    """Each in a folder of the run, found there by report; Table 4 is affine in lambda on real maps."""
    options = [*training, "validation=none", "trainer.snapshot_every_n_steps=1"]
    run = train(compose("train", [*options, f"output={tmp_path / 'run'}"]))
    judging = [*overrides, "device=cpu", "progress_bar=false", "attribution=sweep", "evaluation.metrics=[ssim]"]
    run_evaluate(compose("evaluate", [*judging, f"checkpoint={run}", "snapshots=true"]))
    names = sorted(path.name for path in run.glob("evaluation*"))
    assert names == ["evaluation-paired", *(f"evaluation-paired-step-00000{n}" for n in (1, 2, 3))]
    scores = [json.loads((run / name / "results.json").read_text())["metrics"] for name in names]
    assert len({score["ssim"] for score in scores}) == 4
    folder = report(compose("report", [f"runs=[{run}]", f"output={tmp_path / 'report'}", "formats=[svg]"]))
    assert {path.name for path in (folder / "tables").glob("*.json")} == {
        *(f"table{number}.json" for number in (2, 3, 4)), "correlation.json",
    }  # fmt: skip
    for side in ("imacs_g", "imacs_r"):
        for score in scores:
            at = {p: score[imacs_column(side, 0.4, p)] for p in (1.0, 3.0, 5.0, 10.0)}
            outside = (at[1.0] - at[3.0]) / 2
            assert outside > 0
            for penalty, value in at.items():
                assert value == pytest.approx(at[1.0] - (penalty - 1) * outside, abs=1e-6)
    text = (folder / "report.html").read_text()
    assert text.count("which needs") == text.count("faithfulness, which needs") == 1  # nothing else is left out


def test_a_snapshot_given_by_its_folder_is_judged_in_its_run(
    training: list[str], overrides: list[str], tmp_path: Path
) -> None:
    options = [*training, "validation=none", "trainer.snapshot_every_n_steps=2"]
    run = train(compose("train", [*options, f"output={tmp_path / 'run'}"]))
    judging = [*overrides, "device=cpu", "progress_bar=false", "evaluation.metrics=[ssim]"]
    run_evaluate(compose("evaluate", [*judging, f"checkpoint={run / 'snapshots/step-000002'}"]))
    assert (run / "evaluation-paired-step-000002" / "results.json").is_file()


def test_the_best_model_is_judged_in_its_run_like_a_snapshot(
    training: list[str], overrides: list[str], tmp_path: Path
) -> None:
    """Given by its folder, beside the finished model: its own folder, name, arm and step, and no row of its own."""
    run = train(compose("train", [*training, "trainer.keep_best=ssim", f"output={tmp_path / 'run'}"]))
    judging = [*overrides, "device=cpu", "progress_bar=false", "evaluation.metrics=[ssim]"]
    for name in ("best", "model"):
        run_evaluate(compose("evaluate", [*judging, f"checkpoint={run / name}"]))
    assert sorted(path.name for path in run.glob("evaluation*")) == ["evaluation-paired", "evaluation-paired-best"]
    finished, best = read_evaluations([run])
    assert (finished.snapshot, best.snapshot) == (False, True)
    assert (finished.run, finished.step) == (best.run, 4)
    assert best.step == json.loads((run / "best.json").read_text())["step"]
    # which step is best depends on the last digits; where it is the last one, the names differ
    apart = "" if best.step < 4 else f" {best.folder.name}"
    assert best.model == finished.model + apart
    assert checkpoint_label(run / "best") == "run-best"
    assert arm_name(run / "best") == arm_name(run / "model") == "train"


def test_snapshots_that_are_not_there_are_missed(overrides: list[str], small_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no snapshots.*snapshot_every_n_steps"):
        run_evaluate(compose("evaluate", [*overrides, f"checkpoint={small_checkpoint}", "snapshots=true"]))


def test_a_study_judges_its_snapshots(training: list[str], tmp_path: Path) -> None:
    """Beside the finished models, which alone make the study's table; report correlates all of them."""
    options = [*training, "validation=none", f"output={tmp_path / 'study'}", "bootstrap_samples=200", "device=cpu"]
    results = ablate(compose("ablate", [*options, "seeds=[0]", "trainer.snapshot_every_n_steps=2"]))
    assert len(results["cells"]) == 3
    folder = report(
        compose("report", [f"runs=[{tmp_path / 'study'}]", f"output={tmp_path / 'report'}", "formats=[svg]"])
    )
    index = json.loads((folder / "index.json").read_text())
    steps = [(entry["model"], entry["step"]) for entry in index["evaluations"]]
    assert len(steps) == 5
    assert {step for model, step in steps if model == "Refined"} == {2, 4}
    table = json.loads((folder / "tables/table2.json").read_text())
    assert [row["label"] for row in table["rows"]][1:] == ["Baseline", "Refined"]
