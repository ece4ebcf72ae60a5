"""A detection experiment as a run, read back from its offline file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from i2am_train.config.store import compose
from i2am_train.detection.bench import make_shapes
from i2am_train.detection.experiment import run_experiment
from i2am_train.detection.tracking import METHOD_COLUMNS, PICTURE_COLUMNS, THRESHOLD_COLUMNS
from i2am_train.files import read_json
from i2am_train.results.run_files import read_samples
from i2am_train.tracking.dashboard import dashboard_json
from i2am_train.workflows.explain import detect
from tests.support.detectors import tiny_yolos

pytestmark = pytest.mark.filterwarnings("default")  # W&B's own

SAMPLES = 3


@pytest.fixture(scope="module")
def yolos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detectors") / "yolos"
    return tiny_yolos(folder, box=(0.5, 0.5, 0.4, 0.5), score=0.8)


@pytest.fixture(scope="module")
def options(paint_by_example: Path, yolos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three objects, two of them drawn, two thresholds, one detector."""
    coco = make_shapes(tmp_path_factory.mktemp("coco") / "shapes", SAMPLES)
    return [
        f"root={coco}", f"pipeline={paint_by_example}", f"detectors=[{yolos}]", "height=32", "width=48", "steps=2",
        "pictures=2", "deltas=[0.2]", "delta=0.6", "batch_size=2", "device=cpu", "progress_bar=false",
        "tracking.project=unit", "tracking.group=together", "tracking.tags=[mine]",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracked") / "experiment"
    run_experiment(compose("detect", options), folder, torch.device("cpu"))
    return folder


@pytest.fixture(scope="module")
def stored(folder: Path, read_runs: Callable[[Path], list[Any]]) -> Any:
    (found,) = read_runs(folder / "wandb")
    return found


def test_the_run_says_what_it_is(stored: Any, folder: Path) -> None:
    """Job type, name, group and tags; options and what made it."""
    assert (stored.run.job_type, stored.run.display_name) == ("detection", "experiment")
    assert (stored.run.run_group, list(stored.run.tags)) == ("together", ["mine"])
    assert stored.config["delta"] == 0.6
    assert stored.config["arm"] == "paint_by_example"
    assert stored.config["provenance"]["git"] == read_json(folder / "manifest.json")["git"]


def test_scalars_are_those_of_the_results(stored: Any, folder: Path) -> None:
    """Every mean by kind and method, and no other; thresholds are the axis of the sweep."""
    miou = read_json(folder / "results.json")["miou"]
    expected = {
        f"detect/{kind}/{'yolos' if 'yolos' in name else name}": score["mean"]
        for kind in ("real", "generated")
        for name, score in miou[kind].items()
        if score["mean"] is not None
    }
    assert {"detect/real/yolos", "detect/generated/yolos", "detect/generated/i2am"} <= set(expected)
    last = stored.history[-1]
    logged = {name for name in last if name.startswith(("detect/real/", "detect/generated/"))}
    assert {name: last[name] for name in logged} == expected
    curve = {row["detect/delta"]: row for row in stored.history if "detect/delta" in row}
    assert list(curve) == [0.2, 0.6]
    for delta, row in curve.items():
        for name in ("i2am", "i2am_inverted"):
            assert row[f"detect/sweep/{name}"] == miou["sweep"][f"{name}@d{delta:g}"]["mean"]
    (axis,) = (one for one in stored.metrics if one.glob_name == "detect/sweep/*")
    assert axis.step_metric == "detect/delta"


def test_tables_hold_intervals_and_samples(stored: Any, folder: Path, yolos: Path) -> None:
    """Methods and thresholds with intervals and counts; every sample's IoU."""
    results = read_json(folder / "results.json")
    methods = stored.table("detect/methods")
    assert tuple(methods[0]) == METHOD_COLUMNS
    assert len(methods) == sum(len(results["miou"][kind]) for kind in ("real", "generated"))
    by_name = {(row["kind"], row["method"]): row for row in methods}
    for kind, name in (("generated", "i2am"), ("real", str(yolos))):
        score, row = results["miou"][kind][name], by_name[kind, name]
        assert [row[c] for c in ("mean IoU", "low", "high", "images", "left out")] == [
            score[c] for c in ("mean", "low", "high", "n", "left_out")
        ]
    assert by_name["real", str(yolos)]["label"] == "yolos"
    thresholds = stored.table("detect/thresholds")
    assert tuple(thresholds[0]) == THRESHOLD_COLUMNS
    assert [(row["delta"], row["method"]) for row in thresholds[::3]] == [(0.2, "i2am"), (0.6, "i2am")]  # fmt: skip
    assert thresholds[3]["low"] == results["miou"]["sweep"]["i2am@d0.6"]["low"]
    rows = read_samples(folder / "samples.jsonl")
    samples = stored.table("detect/samples")
    assert [row["name"] for row in samples] == [row["name"] for row in rows]
    for row, kept in zip(samples, rows, strict=True):
        assert row["generated/i2am"] == kept["iou"]["generated"]["i2am"]
        assert row["real/yolos"] == kept["iou"]["real"][str(yolos)]


def test_pictures_with_boxes(stored: Any, folder: Path) -> None:
    """The first two painted images in a table, and with boxes in their own pixels."""
    rows = read_samples(folder / "samples.jsonl")[:2]
    table = stored.table("detect/table")
    assert tuple(table[0])[: len(PICTURE_COLUMNS)] == PICTURE_COLUMNS
    for shown, row in zip(table, rows, strict=True):
        with Image.open(shown["painted"]) as logged, Image.open(folder / "images" / f"{row['name']}.png") as kept:
            assert np.array_equal(np.asarray(logged.convert("RGB")), np.asarray(kept))
        assert shown["i2am"] == row["iou"]["generated"]["i2am"]
    boxes = stored.history[-1]["detect/boxes/all_boxes"]
    assert [set(of_sample) for of_sample in boxes] == [{"object", "attention", "detectors"}] * 2
    for of_sample, row in zip(boxes, rows, strict=True):
        kept = json.loads((stored.folder / "files" / of_sample["object"]["path"]).read_text())
        (box,) = kept["box_data"]
        assert box["domain"] == "pixel"
        corners = [box["position"][name] for name in ("minX", "minY", "maxX", "maxY")]
        assert corners == pytest.approx(row["target"])


def test_the_dashboard_shows_what_is_logged(stored: Any, shown: Callable[[Any], set[str]]) -> None:
    """No panel of the detection section refers to a name that a run lacks."""
    logged = {key for row in stored.history for key in row}
    logged |= {key.rsplit("/", 1)[0] for key in logged}  # pictures and tables have several keys
    panels = {name for name in shown(dashboard_json("unit", None)) if name.startswith("detect/")}
    assert panels
    assert panels <= logged


def test_lineage(stored: Any, folder: Path, paint_by_example: Path) -> None:
    """The objects and the pipeline are inputs, the results the output."""
    data = read_json(folder / "manifest.json")["data"]
    inputs = {one.type: one.name for one in stored.artifacts if one.use_after_commit}
    assert inputs == {"dataset": f"dataset-{data}", "model": f"model-{paint_by_example.name}"}
    (results,) = stored.of_type("detection")
    files = {entry.path for entry in results.manifest.contents}
    assert files == {"results.json", "samples.jsonl", "panels.safetensors"}


def test_only_news_are_logged(
    options: list[str],
    folder: Path,
    stored: Any,
    tmp_path: Path,
    read_runs: Callable[[Path], list[Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same command adds nothing; another threshold goes on with the run; a line says how to send it."""
    copy = tmp_path / "experiment"
    shutil.copytree(folder, copy)
    run_experiment(compose("detect", options), copy, torch.device("cpu"))
    assert len(read_runs(copy)) == 1
    detect(compose("detect", [*options, "deltas=[0.3]", f"output={copy}"]))
    assert f"wandb sync {copy / 'wandb'}" in "".join(capsys.readouterr().out.splitlines())
    first, second = read_runs(copy)
    assert first.run.run_id == second.run.run_id
    assert [row["detect/delta"] for row in second.history if "detect/delta" in row] == [0.3, 0.6]
