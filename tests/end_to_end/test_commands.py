"""Train, evaluate, ablate and explain on the embedded data, as a user would, and what bad input does to them."""

import base64
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from i2am_train.attention.maps import load_maps
from i2am_train.config.store import compose
from i2am_train.errors import ConfigError, RunFolderError
from i2am_train.evaluation.explanation import explanation_folders, read_explanation
from i2am_train.metrics.attention import imacs
from i2am_train.reporting.ablation_page import build_report
from i2am_train.reporting.figures.paper import PAPER_FIGURES
from i2am_train.types import Direction
from i2am_train.workflows.ablate import ablate
from i2am_train.workflows.evaluate import evaluate
from i2am_train.workflows.explain import explain
from i2am_train.workflows.report import report
from i2am_train.workflows.report import run as run_report
from i2am_train.workflows.train import train
from tests.support.commands import page_data
from tests.support.trainings import going_down, same_weights, weights

pytestmark = pytest.mark.filterwarnings("default")  # Lightning's and torch's own deprecations

LORA = ["optimization.trainable=lora", "optimization.lora_rank=2"]


def run_training(options: Sequence[str], output: Path) -> Path:
    return train(compose("train", [*options, f"output={output}"]))


@pytest.fixture(scope="module")
def refined(training: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the attention losses that was never stopped."""
    return run_training([*training, "experiment=refined"], tmp_path_factory.mktemp("runs") / "refined")


def test_training_leaves_what_a_run_needs(training: list[str], refined: Path, tmp_path: Path) -> None:
    """Model, curves of losses and scores, panels, manifest; the attention losses move the weights."""
    baseline = run_training([*training, "experiment=baseline"], tmp_path / "baseline")
    header = (refined / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"loss/total", "loss/denoising", "loss/dcml", "loss/tv", "loss/cwg"} <= set(header)
    assert {"val/imacs_g", "val/imacs_r", "val/correspondence_error", "val/ssim"} <= set(header)
    assert (refined / "validation" / "epoch-0001" / "panel.png").is_file()
    manifest = json.loads((refined / "manifest.json").read_text())
    assert manifest["finished"]
    assert manifest["seed"] == 0
    assert manifest["data"]
    other = weights(baseline)
    different = [name for name, value in weights(refined).items() if not other[name].equal(value)]
    assert any("attn2.to_k" in name for name in different)


@pytest.mark.long
def test_observers_do_not_change_the_weights(training: list[str], refined: Path, tmp_path: Path) -> None:
    """Bit-identical weights with and without validation, panels and logging."""
    silent = ["validation.every_epochs=100", "tracking.csv=false", "tracking.tensorboard=false"]
    without = run_training([*training, *silent, "experiment=refined"], tmp_path / "without")
    assert same_weights(without, refined)


@pytest.mark.long
def test_training_of_adapters(training: list[str], small_checkpoint: Path, tmp_path: Path) -> None:
    """The model holds them merged, under the names that every command reads; lora/ holds them alone."""
    options = [*training, *LORA, "experiment=refined", "trainer.snapshot_every_n_steps=2"]
    folder = run_training(options, tmp_path / "run")
    before = load_file(small_checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
    after = weights(folder)
    assert after.keys() == before.keys()
    changed = {name for name, value in after.items() if not before[name].equal(value)}
    attention = {n for n in before if re.search(r"attn[12]\.to_(q|k|v|out\.0)\.weight", n)}
    assert changed == attention
    snapshot = load_file(folder / "snapshots/step-000002/unet/diffusion_pytorch_model.safetensors")
    assert snapshot.keys() == before.keys()
    adapters = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    assert len(adapters) == 2 * len(attention)


@pytest.mark.long
@pytest.mark.parametrize(
    "extra", [[], pytest.param(LORA, marks=pytest.mark.slow), [*LORA, "optimization.ema_decay=0.9"]]
)
def test_resumed_equals_uninterrupted(
    training: list[str], extra: list[str], refined: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A run stopped at an epoch's border and started again ends at the same weights and keeps its curves."""
    options = [*training, *extra, "experiment=refined"]
    whole = run_training(options, tmp_path / "whole") if extra else refined
    with going_down(monkeypatch):
        run_training(options, tmp_path / "stopped")
    resumed = run_training(options, tmp_path / "stopped")
    assert same_weights(resumed, whole)
    curves = [(run / "metrics.csv").read_text().count("\n") for run in (whole, resumed)]
    assert curves[0] == curves[1]


def test_finished_run_is_left_alone(training: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command again trains nothing; another configuration is refused and changes nothing."""
    options = [*training, "experiment=baseline"]
    folder = run_training(options, tmp_path / "run")
    before = (folder / "model" / "model_index.json").stat().st_mtime_ns
    run_training(options, tmp_path / "run")
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(RunFolderError, match=r"optimization\.steps=5 \(there: 4\)"):
        run_training([*options, "optimization.steps=5"], tmp_path / "run")
    assert (folder / "model" / "model_index.json").stat().st_mtime_ns == before


def test_evaluation(overrides: list[str], small_checkpoint: Path, tmp_path: Path) -> None:
    """All scores with their files, the same whatever the batch, and not computed twice."""
    options = [*overrides, f"checkpoint={small_checkpoint}", "progress_bar=false", "device=cpu"]
    results = [
        evaluate(compose("evaluate", [*options, f"evaluation.batch_size={batch}"]), tmp_path / f"{batch}")
        for batch in (4, 6)
    ]
    scores = results[0]["metrics"]
    assert {"imacs_g", "imacs_r", "imacs_g@d0.4_l1", "correspondence_error", "pck_1", "ssim", "stlpips"} <= set(scores)
    assert {"fd_efficientnet_lite0", "kd_efficientnet_lite0", "spread_ratio"} <= set(scores)
    for name, value in results[1]["metrics"].items():
        assert value == pytest.approx(scores[name], abs=2e-3), name
    rows = [json.loads(line) for line in (tmp_path / "4" / "samples.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(6))
    images = sorted(path.stem for path in (tmp_path / "4" / "images").iterdir())
    assert images == sorted(row["name"] for row in rows)
    written = (tmp_path / "4" / "results.json").stat().st_mtime_ns
    evaluate(compose("evaluate", [*options, "evaluation.batch_size=4"]), tmp_path / "4")
    assert (tmp_path / "4" / "results.json").stat().st_mtime_ns == written


def test_unpaired_evaluation_has_no_paired_scores(overrides: list[str], small_checkpoint: Path, tmp_path: Path) -> None:
    """Without the truth there is no SSIM and no correspondence, but IMACS and the set distances are there."""
    options = [*overrides, f"checkpoint={small_checkpoint}", "progress_bar=false", "device=cpu"]
    config = compose("evaluate", [*options, "evaluation.pairing=unpaired"])
    scores = evaluate(config, tmp_path / "unpaired")["metrics"]
    assert {"imacs_g", "imacs_r", "fd_efficientnet_lite0"} <= set(scores)
    assert not {"ssim", "stlpips", "correspondence_error", "pck_1"} & set(scores)


@pytest.mark.long
def test_ablation(training: list[str], tmp_path: Path) -> None:
    """Arms x seeds with summary, paired differences and a report; more seeds extend it, finished cells are kept."""
    options = [*training, f"output={tmp_path / 'study'}", "bootstrap_samples=200", "device=cpu"]
    first = ablate(compose("ablate", [*options, "seeds=[0]"]))
    cell = tmp_path / "study" / "cells" / "refined-seed0" / "model" / "model_index.json"
    before = cell.stat().st_mtime_ns
    results = ablate(compose("ablate", [*options, "seeds=[0,1]"]))
    assert cell.stat().st_mtime_ns == before
    assert [(entry["arm"], entry["seed"]) for entry in first["cells"]] == [
        ("base", None),
        ("baseline", 0),
        ("refined", 0),
    ]
    assert len(results["cells"]) == 5
    paired = {entry["metric"]: entry for entry in results["paired"] if entry["arm"] == "refined"}
    difference = paired["imacs_g"]
    values = {(e["arm"], e["seed"]): e["metrics"]["imacs_g"] for e in results["cells"]}
    expected = sum(values["refined", seed] - values["baseline", seed] for seed in (0, 1)) / 2
    assert difference["difference"] == pytest.approx(expected)
    assert difference["n"] == 2
    report = build_report(tmp_path / "study")
    assert "Refined" in report.read_text()
    assert (tmp_path / "study" / "results.md").is_file()


def test_explanation(overrides: list[str], small_checkpoint: Path, tmp_path: Path) -> None:
    """Every kind of map as a picture, an archive from which the maps come back, and all that was scored."""
    options = [*overrides, f"checkpoint={small_checkpoint}", "sample=3", f"output={tmp_path / 'out'}"]
    folder = explain(compose("explain", [*options, "device=cpu", "generated_patches=[[1,2],[3,0]]"]))
    pictures = {path.stem for path in folder.glob("*.png")}
    assert pictures == {"centers"} | {
        name for name, figure in PAPER_FIGURES.items() if figure.single and name != "unpaired"
    } | {"scores"}
    archive = load_maps(folder / "maps.safetensors")
    assert len(archive.maps.layers) == 9
    assert archive.maps.store.steps == 2
    sample = read_explanation(folder)
    assert sample.generated_patches == ((1, 2), (3, 0))
    assert all(sample.maps.scores(layer).shape[0] == 1 for layer in sample.maps.layers)
    # decoded in two batches, whose last bits may differ: one grey level at most
    last, generated = (np.asarray(picture, int) for picture in (sample.clean[-1].picture, sample.images["generated"]))
    assert np.abs(last - generated).max() <= 1
    assert [image.step_index for image in sample.clean] == [0, 1]
    for side, direction, mask in zip("gr", Direction, ("inpaint", "garment"), strict=True):
        heat = torch.from_numpy(sample.unified(direction, thresholded=True))[None]
        score = imacs(heat, torch.from_numpy(sample.masks[mask])[None])
        assert sample.scores[f"imacs_{side}"] == pytest.approx(float(score), abs=1e-6)
    data = page_data(folder)
    assert all(layer["matrix"] for layer in data["layers"])
    looks, scores = data["captures"][0][0]["layers"][8]["looks"], archive.maps.scores(9)[0]
    units, low, step = (
        np.frombuffer(base64.b64decode(looks[name]), kind)
        for name, kind in (("units", "<u2"), ("low", "<f4"), ("step", "<f4"))
    )
    values = low[:, None] + units.reshape(scores.shape) * step[:, None]
    np.testing.assert_allclose(values, scores.numpy(), atol=1e-6)


@pytest.mark.long
def test_explanations_side_by_side(overrides: list[str], small_checkpoint: Path, tmp_path: Path) -> None:
    """Two checkpoints on one page, each with files of its own; the same weights give the same page data.

    Their order is the one they were given in, on the page and for reports.
    """
    other = shutil.copytree(small_checkpoint, tmp_path / "a")
    options = [f"checkpoint=[{small_checkpoint},{other}]", "sample=3", "device=cpu"]
    folder = explain(compose("explain", [*overrides, *options, f"output={tmp_path / 'out'}"]))
    first = small_checkpoint.parent.name
    folders = [folder / f"{name}-test3" for name in (first, "a")]
    assert explanation_folders(folder) == folders
    for name in folders:
        assert load_maps(name / "maps.safetensors").names == ("50003_00",)
        assert (name / "scores.png").is_file()
    data = page_data(folder)
    assert data["models"] == [first, "a"]
    assert data["captures"][0] == data["captures"][1]


@pytest.mark.long
def test_report_of_explained_samples(
    overrides: list[str], small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures of two folders, with an index that says what made them; what is impossible is named."""
    options = [*overrides, f"checkpoint={small_checkpoint}", "device=cpu"]
    for guidance in (1, 2):
        name = tmp_path / f"guidance{guidance}"
        explain(compose("explain", [*options, f"sampling.guidance={guidance}", f"output={name}"]))
    inputs = f"explained=[{tmp_path / 'guidance1'},{tmp_path / 'guidance2'}]"
    asked = [inputs, f"output={tmp_path / 'report'}", "formats=[png,svg]", "dpi=60"]
    run_report(compose("report", [*asked, "figures=[guidance,daam]"]))
    assert "3 figures, listed in" in capsys.readouterr().out
    index = json.loads((tmp_path / "report" / "index.json").read_text())
    files = {file for entry in index["figures"] for file in entry["files"]}
    stems = ("guidance", "daam-guidance1", "daam-guidance2")
    assert files == {f"figures/{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    made_by = index["inputs"]["guidance1"]
    assert made_by["settings"]["sampling"]["guidance"] == 1
    assert made_by["checkpoint"] == str(small_checkpoint)
    assert made_by["data"]
    assert made_by["git"]
    with Image.open(tmp_path / "report" / "figures" / "guidance.png") as picture:
        assert f"checkpoint {small_checkpoint}, data {made_by['data']}" in picture.text["Description"]
    assert index["left_out"] == {}
    with pytest.raises(ConfigError, match="unpaired needs a folder of 'i2am explain' with pairing"):
        report(compose("report", [inputs, "figures=[unpaired]", f"output={tmp_path / 'x'}"]))
    with pytest.raises(ConfigError, match="models has 1 names for 2 explained samples"):
        report(compose("report", [inputs, "models=[a]", f"output={tmp_path / 'x'}"]))
    with pytest.raises(ConfigError, match="nothing to report"):
        report(compose("report", [f"output={tmp_path / 'x'}"]))
    with pytest.raises(RunFolderError, match="that 'i2am explain' wrote"):
        report(compose("report", [f"explained=[{tmp_path / 'report'}]", f"output={tmp_path / 'x'}"]))
    assert not (tmp_path / "x").exists()
    one = f"explained=[{tmp_path / 'guidance1'}]"
    with pytest.raises(RunFolderError, match="another configuration: explained"):
        report(compose("report", [one, f"output={tmp_path / 'report'}"]))
