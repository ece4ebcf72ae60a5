"""One small training and its evaluation, read back from W&B's offline files, metrics.csv and TensorBoard."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from i2am_train.config.store import compose
from i2am_train.files import read_json
from i2am_train.fingerprints import data_state
from i2am_train.metrics.registry import METRICS
from i2am_train.results.run_files import read_panels, read_samples
from i2am_train.tracking import names
from i2am_train.tracking.dashboard import dashboard_json
from i2am_train.tracking.scores import ATTRIBUTED, GARMENT, INPAINTED, TABLE_COLUMNS
from i2am_train.workflows.evaluate import evaluate
from i2am_train.workflows.train import train
from tests.support.trainings import curves, going_down

pytestmark = pytest.mark.filterwarnings("default")  # Lightning's, TensorBoard's and W&B's own


@pytest.fixture(scope="session")
def tracked() -> list[str]:
    return [f"tracking.{word}" for word in ("wandb=offline", "project=unit", "group=together", "tags=[mine]")]


@pytest.fixture(scope="session")
def training(training: list[str], tracked: list[str]) -> list[str]:
    """Two epochs of two steps with four validation samples."""
    return [*training, *tracked, "experiment=refined", "tracking.table_samples=3"]


@pytest.fixture(scope="module")
def run(training: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tracked") / "refined-seed0"
    return train(compose("train", [*training, f"output={output}"]))


@pytest.fixture(scope="module")
def evaluation(overrides: list[str], tracked: list[str], run: Path) -> Path:
    """The trained model on six test samples, two of them with panels."""
    options = [*overrides, *tracked, f"checkpoint={run}", "progress_bar=false", "device=cpu",
               "evaluation.panel_samples=2", "evaluation.metrics=[ssim]"]  # fmt: skip
    folder = run / "evaluation-paired"
    evaluate(compose("evaluate", options), folder)
    return folder


@pytest.fixture(scope="module")
def stored(run: Path, read_runs: Callable[[Path], list[Any]]) -> Any:
    (found,) = read_runs(run / "wandb")
    return found


@pytest.fixture(scope="module")
def judged(evaluation: Path, read_runs: Callable[[Path], list[Any]]) -> Any:
    (found,) = read_runs(evaluation / "wandb")
    return found


def csv_scalars(run: Path) -> dict[str, dict[int, float]]:
    """Values by step of every column."""
    found: dict[str, dict[int, float]] = {}
    for row in curves(run, timed=True):
        step = int(row.pop("step"))
        for name, value in row.items():
            found.setdefault(name, {})[step] = value
    return found


def test_three_stores_hold_the_same_scalars(run: Path, stored: Any) -> None:
    """CSV, TensorBoard and W&B: the same names, steps and values, and no other names than the documented ones."""
    from_csv = csv_scalars(run)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    prefixes = (names.LOSS, names.VALIDATION)
    expected = {name for name in from_csv if name.startswith(prefixes)} | {"lr", "grad_norm", "step_seconds", "epoch"}
    assert set(from_csv) == expected
    assert {n for n in expected if n.startswith(names.LOSS)} == {
        f"{names.LOSS}{name}" for name in ("total", "denoising", "dcml", "tv", "cwg")
    }
    assert {"val/imacs_g", "val/imacs_r", "val/pck_1", "val/ssim", "val/imacs_g@d0.4_l3"} <= expected
    assert set(events.Tags()["scalars"]) - {"hp_metric"} == expected
    in_wandb = {
        name
        for row in stored.history
        for name, value in row.items()
        if isinstance(value, (int, float))
        and not name.startswith(("_", "trainer/", "val/attribution", "val/samples"))
        and not name.startswith("val/table")
    }
    assert in_wandb == expected
    for name in expected:
        steps = from_csv[name]
        assert len(steps) >= 2, name
        assert stored.scalars(name) == pytest.approx(steps, rel=1e-6), name
        in_events = {event.step: event.value for event in events.Scalars(name)}
        assert in_events == pytest.approx(steps, rel=1e-5), name
    assert sorted(from_csv["loss/total"]) == [0, 1, 2, 3]
    assert sorted(from_csv["val/imacs_g"]) == [1, 3]


def test_curves_are_defined(stored: Any) -> None:
    """Every score is drawn over optimiser steps and keeps its best value by its direction."""
    defined = {metric.name: metric for metric in stored.metrics}
    assert defined["val/imacs_g"].summary.max
    assert defined["val/correspondence_error"].summary.min
    assert not defined["val/spread_ratio"].summary.max
    assert names.STEP in defined


def test_the_table_of_a_validation(run: Path, stored: Any) -> None:
    """Three samples with pictures and their own scores, worst IMACS_g first; means agree where all samples show."""
    rows = stored.table("val/table")
    assert len(rows) == 3
    assert list(rows[0])[:9] == ["epoch", "step", *TABLE_COLUMNS]
    assert {row["epoch"] for row in rows} == {1}
    assert {row["step"] for row in rows} == {3}
    scores = [row["imacs_g"] for row in rows]
    assert scores == sorted(scores)
    panels = read_panels(run / "validation" / "epoch-0001")
    assert len(panels) == 2
    by_name = {row["sample"]: row for row in rows}
    for one in panels:
        with Image.open(by_name[one.name]["generated"]) as picture:
            assert np.array_equal(np.asarray(picture.convert("RGB")), one.generated)
    columns = {name.removeprefix("val/") for name in csv_scalars(run) if name.startswith("val/")}
    assert columns == set(rows[0]) - {"epoch", "step", *TABLE_COLUMNS}


def test_table_means_are_the_logged_scores(
    training: list[str], tmp_path: Path, read_runs: Callable[[Path], list[Any]]
) -> None:
    """With all validation samples in the table, the mean of each column is the scalar of that step."""
    options = [*training, "optimization.steps=2", "tracking.table_samples=9", f"output={tmp_path / 'run'}"]
    run = train(compose("train", options))
    (stored,) = read_runs(run)
    rows = stored.table("val/table")
    assert len(rows) == 4
    logged = csv_scalars(run)
    for metric in ("imacs_g", "imacs_r", "ssim", "imacs_r@d0.4_l1"):
        mean = sum(row[metric] for row in rows) / 4
        assert logged[f"val/{metric}"][1] == pytest.approx(mean, rel=1e-5)


def test_masks_of_the_overlays(run: Path, stored: Any) -> None:
    """Both kinds of pictures with both masks, whose pixels are the panel's maps at delta."""
    panels = read_panels(run / "validation" / "epoch-0001")
    assert len(panels) == 2
    for name, maps, region in (
        ("attribution_generated", [one.map_generated for one in panels], INPAINTED),
        ("attribution_reference", [one.map_reference for one in panels], GARMENT),
    ):
        entry = [row for row in stored.history if f"val/{name}/count" in row][-1]
        masks = entry[f"val/{name}/all_masks"]
        assert len(masks) == 2
        for position, of_sample in enumerate(masks):
            assert set(of_sample) == {region, ATTRIBUTED}
            pixels = {
                key: np.asarray(Image.open(stored.folder / "files" / value["path"])) for key, value in of_sample.items()
            }
            assert np.array_equal(pixels[ATTRIBUTED] == 3, maps[position] >= 0.4)
            assert set(np.unique(pixels[region])) == {0, 1 if region == INPAINTED else 2}


def test_pictures(run: Path, stored: Any) -> None:
    """The panel of each validation, and its samples with their names: garment, truth, generated."""
    panels = read_panels(run / "validation" / "epoch-0001")
    assert len(panels) == 2
    assert sum("val/attribution/count" in row for row in stored.history) == 2
    samples = [row for row in stored.history if "val/samples/count" in row][-1]
    assert samples["val/samples/captions"] == [one.name for one in panels]
    assert (samples["val/samples/height"], samples["val/samples/width"]) == (64, 3 * 48)
    assert samples[names.STEP] == 3  # beside the scores


def test_configuration_and_provenance(run: Path, stored: Any, small_dataset: Path) -> None:
    """All options, commit, versions, command and data; group, job type and tags."""
    manifest = read_json(run / "manifest.json")
    assert stored.config["optimization"]["steps"] == 4
    assert stored.config["provenance"]["git"] == manifest["git"]
    assert stored.config["provenance"]["versions"] == manifest["versions"]
    assert stored.config["provenance"]["command"] == manifest["command"]
    assert stored.config["provenance"]["data"] == data_state(small_dataset).fingerprint
    assert stored.run.run_group == "together"
    assert stored.run.job_type == "train"
    assert stored.run.display_name == "refined-seed0"
    assert set(stored.run.tags) == {"refined", "seed0", "mine"}


def test_lineage(run: Path, stored: Any, judged: Any, small_dataset: Path) -> None:
    """Data -> training -> model -> evaluation: the same artifacts by name and content on both sides."""
    data, (model,) = stored.of_type("dataset"), stored.of_type("model")
    assert [(one.name, one.use_after_commit) for one in data] == [
        (f"dataset-{data_state(small_dataset).fingerprint}", True)
    ]
    assert (model.name, model.use_after_commit) == ("model-refined-seed0", False)
    metadata = json.loads(model.metadata)
    assert metadata["step"] == 4
    assert metadata["data"] == data_state(small_dataset).fingerprint
    assert metadata["metrics"]["imacs_g"] == pytest.approx(csv_scalars(run)["val/imacs_g"][3], rel=1e-6)
    inputs = {one.type: one for one in judged.artifacts if one.use_after_commit}
    assert inputs["dataset"].digest == data[0].digest
    assert inputs["model"].digest == model.digest
    assert inputs["model"].name == model.name
    (results,) = judged.of_type("evaluation")
    assert not results.use_after_commit
    files = {entry.path for entry in results.manifest.contents}
    assert files == {"results.json", "samples.jsonl", "panels.safetensors"}
    assert judged.config["inputs"] == {"dataset": data[0].name, "model": model.name}


def test_the_dashboard_shows_what_is_logged(stored: Any, judged: Any, shown: Callable[[Any], set[str]]) -> None:
    """Everything but the metrics that these runs left out, an ablation's tables, and detection."""
    logged = {key for one in (stored, judged) for row in one.history for key in row}
    logged |= {key.rsplit("/", 1)[0] for key in logged}  # pictures and tables have several keys
    faithfulness = (name for name, info in METRICS.items() if info.group == "faithfulness")
    metrics = ("stlpips", "fd_efficientnet_lite0", "kd_efficientnet_lite0", *faithfulness)
    left_out = {f"{prefix}{name}" for prefix in ("val/", "eval/") for name in metrics}
    left_out |= {names.STUDY_ARMS, names.STUDY_DIFFERENCES}
    absent = shown(dashboard_json("unit", None)) - logged
    assert {name for name in absent if not name.startswith(names.DETECTION)} == left_out


def test_the_run_folder_is_enough(run: Path, stored: Any, judged: Any) -> None:
    """What `wandb sync` will read lies in the run folder, and nowhere in the user's home."""
    entries = [entry for one in (stored, judged) for artifact in one.artifacts for entry in artifact.manifest.contents]
    assert len(entries) > 30
    assert all(Path(entry.local_path).is_relative_to(run) for entry in entries)
    assert all(Path(entry.local_path).is_file() for entry in entries)


def test_the_model_is_not_copied(run: Path, stored: Any) -> None:
    """The artifact's files are read from the run folder when they are sent."""
    (model,) = stored.of_type("model")
    paths = {Path(entry.local_path) for entry in model.manifest.contents}
    assert paths == {path for path in (run / "model").rglob("*") if path.is_file()}


def test_evaluation_scores_and_tables(evaluation: Path, judged: Any) -> None:
    """Every score, all samples' scores, and pictures of the panel samples."""
    results = read_json(evaluation / "results.json")
    (row,) = judged.history
    for name, value in results["metrics"].items():
        assert row[f"eval/{name}"] == pytest.approx(value), name
    samples = {sample["name"]: sample for sample in read_samples(evaluation / "samples.jsonl")}
    table = judged.table("eval/samples")
    assert {entry["name"] for entry in table} == set(samples)
    assert all(entry["imacs_g"] == pytest.approx(samples[entry["name"]]["imacs_g"]) for entry in table)
    pictures = judged.table("eval/table")
    assert len(pictures) == 2
    assert all(entry["ssim"] == pytest.approx(samples[entry["sample"]]["ssim"]) for entry in pictures)
    assert judged.run.job_type == "evaluation"
    assert judged.run.display_name == "refined-seed0-evaluation-paired"


def test_a_resumed_training_continues_its_run(
    training: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    read_runs: Callable[[Path], list[Any]], stored: Any,
) -> None:  # fmt: skip
    """Both parts have one id, and together the scalars of an uninterrupted run."""
    config = compose("train", [*training, f"output={tmp_path / 'run'}"])
    with going_down(monkeypatch):
        train(config)
    train(config)
    first, second = read_runs(tmp_path / "run")
    assert first.run.run_id == second.run.run_id != stored.run.run_id
    for name in ("loss/total", "val/imacs_g", "lr"):
        assert first.scalars(name) | second.scalars(name) == pytest.approx(stored.scalars(name)), name
    assert [len(part.of_type("model")) for part in (first, second)] == [0, 1]
