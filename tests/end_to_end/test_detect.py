"""``i2am detect`` on made pictures with a tiny Paint-by-Example: the paper's tables, kept work, bad input."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from i2am_train.config.store import compose
from i2am_train.detection import experiment
from i2am_train.detection.bench import make_shapes
from i2am_train.detection.experiment import run_experiment
from i2am_train.detection.report import read_detected, write_report
from i2am_train.errors import CheckpointError, ConfigError, DataError, I2AMError, RunFolderError
from i2am_train.workflows.explain import detect as run_detect
from i2am_train.workflows.report import report
from i2am_train.workflows.report import run as run_report
from tests.support.detectors import tiny_rt_detr, tiny_yolos

SAMPLES = 5


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("coco") / "shapes", SAMPLES)


@pytest.fixture(scope="module")
def yolos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_yolos(tmp_path_factory.mktemp("detectors") / "yolos", box=(0.5, 0.5, 0.4, 0.5), score=0.8)


@pytest.fixture(scope="module")
def rt_detr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_rt_detr(tmp_path_factory.mktemp("detectors") / "rt_detr")


@pytest.fixture
def options(coco: Path, paint_by_example: Path) -> list[str]:
    """Five images in batches of two, none of them drawn."""
    return [
        f"root={coco}", f"pipeline={paint_by_example}", "height=32", "width=48", "steps=2", "batch_size=2",
        "pictures=0", "device=cpu", "progress_bar=false", "tracking=files",
    ]  # fmt: skip


def detect(options: list[str], folder: Path) -> dict[str, Any]:
    return run_experiment(compose("detect", options), folder, torch.device("cpu"))


def kept(folder: Path) -> dict[str, bytes]:
    """Images, maps and rows."""
    files = [*folder.glob("images/*"), *folder.glob("maps/*"), folder / "samples.jsonl"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def finished(
    coco: Path, paint_by_example: Path, yolos: Path, rt_detr: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """A run with two detectors."""
    folder = tmp_path_factory.mktemp("detect") / "run"
    options = [
        f"root={coco}", f"pipeline={paint_by_example}", "height=32", "width=48", "steps=2", "batch_size=2",
        "pictures=2", "device=cpu", "progress_bar=false", "tracking=files", f"detectors=[{yolos},{rt_detr}]",
    ]  # fmt: skip
    return folder, detect(options, folder)


def test_the_tables_are_made(finished: tuple[Path, dict[str, Any]], yolos: Path, rt_detr: Path) -> None:
    """Every method has its mean over all samples; results, tables, figure and page lie in the folder."""
    folder, results = finished
    generated = results["miou"]["generated"]
    assert set(generated) == {
        "daam", "overall", "random", "random_authors", "i2am", "i2am_inverted", "i2am_authors",
        str(yolos), str(rt_detr),
    }  # fmt: skip
    assert generated["daam"] == generated["overall"]
    assert generated["overall"]["mean"] == pytest.approx(results["bench"]["mean_share"], abs=1e-6)
    assert all(generated[name]["n"] == SAMPLES for name in ("i2am", "random", "daam"))
    # The detector always sees the middle: the same on real and on painted images.
    assert results["miou"]["real"][str(yolos)] == generated[str(yolos)]
    # RT-DETR looks at the pictures: other boxes on real than on painted ones.
    of_rt_detr = [results["miou"][kind][str(rt_detr)] for kind in ("real", "generated")]
    assert all(0 < score["mean"] < 1 for score in of_rt_detr)
    assert of_rt_detr[0]["mean"] != of_rt_detr[1]["mean"]
    assert not results["functional"]
    assert json.loads((folder / "results.json").read_text())["miou"] == results["miou"]
    assert len((folder / "samples.jsonl").read_text().splitlines()) == SAMPLES
    assert len(list(folder.glob("images/*.png"))) == SAMPLES
    assert json.loads((folder / "manifest.json").read_text())["finished"]
    page = (folder / "report.html").read_text()
    for text in ("paper Table 1", "paper Table 3", "Not functional", "data:image/png"):
        assert text in page
    assert "I²AM" in (folder / "results.md").read_text()
    assert "toprule" in (folder / "results.tex").read_text()
    assert (folder / "figures" / "samples.png").is_file()


def test_other_thresholds_and_detectors_cost_no_images(
    finished: tuple[Path, dict[str, Any]], options: list[str], tmp_path: Path
) -> None:
    """The folder is asked for again with other options of scoring: images and maps stay as they are."""
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    places = [*folder.glob("images/*"), *folder.glob("maps/*"), *folder.glob("detections/*/*")]
    written = {path: path.stat().st_mtime_ns for path in places}
    results = detect([*options, "delta=0.5", "deltas=[0.1,0.9]"], folder)
    assert {path: path.stat().st_mtime_ns for path in places} == written
    assert results["thresholds"] == [0.1, 0.5, 0.9]
    swept = results["miou"]["sweep"]
    assert swept["i2am@d0.5"] == results["miou"]["generated"]["i2am"]
    assert finished[1]["miou"]["sweep"]["i2am@d0.5"] == swept["i2am@d0.5"]
    with pytest.raises(RunFolderError, match=r"another configuration: .*steps=3 \(there: 2\)"):
        detect([*options, "steps=3", "pipeline=nobody/none"], folder)  # said before the pipeline is looked for


def test_stopped_and_continued_equals_uninterrupted(
    finished: tuple[Path, dict[str, Any]],
    options: list[str],
    yolos: Path,
    rt_detr: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped between the images and the maps of the second batch: bit for bit the same in the end."""
    folder, save = tmp_path / "stopped", experiment.save_file
    batches: list[Any] = []

    def stop(tensors: Any, *rest: Any) -> None:
        batches.append(tensors)
        if len(batches) == 2:
            raise KeyboardInterrupt("stopped")
        save(tensors, *rest)

    monkeypatch.setattr(experiment, "save_file", stop)
    options = [*options, f"detectors=[{yolos},{rt_detr}]"]
    with pytest.raises(KeyboardInterrupt, match="stopped"):
        detect(options, folder)
    assert [path.name for path in (folder / "maps").iterdir()] == ["batch-00000.safetensors"]
    assert not (folder / "results.json").exists()
    results = detect(options, folder)
    assert len(batches) == 4  # one of them twice
    assert results["miou"] == finished[1]["miou"]
    assert kept(folder) == kept(finished[0])
    assert len(json.loads((folder / "manifest.json").read_text())["resumed"]) == 1


def test_the_report_is_made_again_from_the_folder(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Tables, figure and page come out bit for bit, wherever the folder lies."""
    made = ("report.html", "results.md", "results.tex", "figures/samples.png")
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    for name in made:
        (folder / name).unlink()
    write_report(read_detected(folder))
    for name in made:
        assert (folder / name).read_bytes() == (finished[0] / name).read_bytes(), name


def test_i2am_report_takes_experiments(
    finished: tuple[Path, dict[str, Any]], coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Tables in every format and the figure, of two folders of one name, with the dataset gone."""
    folders = [tmp_path / place / "run" for place in "ab"]
    for folder in folders:
        shutil.copytree(finished[0], folder)
    (folders[1] / "panels.safetensors").unlink()
    given = f"detected=[{folders[0]},{folders[1]}]"
    options = [given, "formats=[png,svg]", "dpi=60", f"output={tmp_path / 'report'}"]
    with elsewhere(coco):
        run_report(compose("report", options))
    assert "4 tables and 1 figures, listed in" in capsys.readouterr().out
    index = json.loads((tmp_path / "report" / "index.json").read_text())
    tables = [entry["files"] for entry in index["tables"]]
    assert tables[0] == [f"tables/detection-run-1.{ending}" for ending in ("md", "tex", "json")]
    (figure,) = index["figures"]
    assert figure["files"] == ["figures/detection-run-1.png", "figures/detection-run-1.svg"]
    assert index["left_out"] == {"samples of run-2": "'i2am detect' with pictures=N"}
    assert index["detections"]["run-2"]["folder"] == str(folders[1])
    assert index["detections"]["run-2"]["settings"]["root"] == str(coco)
    written = json.loads((tmp_path / "report" / tables[2][2]).read_text())
    means = {row["label"]: row["cells"][2] for row in written["rows"]}
    assert means["I²AM"]["value"] == finished[1]["miou"]["generated"]["i2am"]["mean"]
    assert "% run-2: '" in (tmp_path / "report" / tables[2][1]).read_text()
    page = (tmp_path / "report" / "report.html").read_text()
    for text in ("run-1: Object detection", "run-2: Threshold of the map", "run-1: Samples"):
        assert f"<h2>{text}" in page
    assert page.count("data:image/png") == 1


@contextmanager
def elsewhere(folder: Path) -> Iterator[None]:
    """A folder is not where it was."""
    away = folder.rename(folder.with_name("away"))
    try:
        yield
    finally:
        away.rename(folder)


def unfinished(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"finished": None}))


def of_another_kind(folder: Path) -> None:
    (folder / "results.json").write_text('{"metrics": {}}')


def of_another_version(folder: Path) -> None:
    (folder / "results.json").write_text('{"kind": "detection", "schema": 7}')


def cut_off(folder: Path) -> None:
    archive = folder / "panels.safetensors"
    archive.write_bytes(archive.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "option", "message"),
    [
        (shutil.rmtree, "detected", r"run, without results\.json, and expected .* 'i2am detect'"),
        (of_another_kind, "detected", r"whose results are no detection .*belong in runs"),
        (of_another_version, "detected", r"has schema 7; this version reads schema 1"),
        (unfinished, "detected", r"did not come to its end\. Give its command again"),
        (cut_off, "detected", r"panels\.safetensors cannot be read"),
        (unfinished, "runs", r"which are no evaluation\. .*those of 'i2am detect' in detected"),
    ],
)  # fmt: skip
def test_the_report_refuses_other_folders(
    finished: tuple[Path, dict[str, Any]], damage: Callable[[Path], None], option: str, message: str, tmp_path: Path
) -> None:
    """Each fault is said with what was expected, and no report is begun."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    damage(folder)
    options = [f"{option}=[{folder}]", f"output={tmp_path / 'report'}"]
    with pytest.raises(RunFolderError, match=message):
        report(compose("report", options))
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (["root=/nowhere"], DataError, r"annotations/instances_val2017\.json: No such file"),
        (["split=train2017"], DataError, r"instances_train2017\.json: No such file"),
        (["pipeline=nobody/none"], CheckpointError, r"nobody/none; .*hf download"),
        (["width=40"], ConfigError, r"width=40 is not possible: expected a multiple of 16"),
        (["detectors=[torchvision:yolov3]"], CheckpointError, r"no detector 'yolov3'"),
        (["detectors=[torchvision:yolov3]", "pipeline=nobody/none"], CheckpointError, r"no detector 'yolov3'"),
        (["delta=1"], ConfigError, r"delta=1\.0 is not possible: .* \[0, 1\)"),
        (["root=null", "annotations=some.json"], ConfigError, r"annotations=.* null without root"),
        (["detectors=[a/b,a/b]"], ConfigError, r"names nothing twice"),
    ],
)  # fmt: skip
def test_bad_input_leaves_nothing_behind(
    change: list[str],
    kind: type[I2AMError],
    message: str,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each fault is said before anything is made."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    changed = {word.partition("=")[0] for word in change}
    given = [word for word in options if word.partition("=")[0] not in changed]
    with pytest.raises(kind, match=message):
        detect([*given, *change], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_prints_the_table(
    options: list[str], yolos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a user sees on the made set, without COCO: table, notes, place; cups are no category of its objects."""
    monkeypatch.setattr("i2am_train.config.locations._made_data", lambda name: tmp_path / name)
    words: Callable[[str], bool] = lambda word: not word.startswith("root=")  # noqa: E731
    folder = tmp_path / "run"
    given = [*filter(words, options), "shapes=3", "samples=2", "guidance=1", f"output={folder}"]
    run_detect(compose("detect", [*given, f"detectors=[{yolos}]", "match_category=true"]))
    printed = capsys.readouterr().out
    for text in ("Object detection", "I²AM", "made pictures", "of the object's category", str(folder)):
        assert text in " ".join(printed.split())
    assert json.loads((folder / "results.json").read_text())["miou"]["real"][str(yolos)]["n"] == 0
    assert (tmp_path / "shapes-coco-3" / "val2017").is_dir()
