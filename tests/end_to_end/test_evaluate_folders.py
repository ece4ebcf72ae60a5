"""``i2am evaluate images=... reference=...`` as a user runs it: what it writes, repeats and refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from i2am_train.config.store import compose
from i2am_train.errors import ConfigError, DataError, RunFolderError
from i2am_train.workflows.evaluate import evaluate, print_scores


def fill(folder: Path, count: int, seed: int, size: tuple[int, int] = (40, 32)) -> Path:
    """Colour noise under the names 0.png, 1.png, ..."""
    folder.mkdir()
    draw = np.random.default_rng(seed)
    for index in range(count):
        pixels = draw.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    images, reference = fill(tmp_path / "images", 5, seed=0), fill(tmp_path / "real", 5, seed=1)
    return [f"images={images}", f"reference={reference}", "device=cpu", "progress_bar=false",
            "tracking=files"]  # fmt: skip


def scored(options: list[str], output: Path) -> dict[str, Any]:
    return evaluate(compose("evaluate", [*options, f"output={output}"]), output)


def test_what_is_written(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores with intervals, how images were compared, which images these were, and a row for each."""
    output = tmp_path / "out"
    results = scored(options, output)
    assert set(results["metrics"]) == {"ssim", "stlpips", "fd_efficientnet_lite0", "kd_efficientnet_lite0"}
    assert set(results["intervals"]) == {"ssim", "stlpips"}
    assert results["samples"] == 5
    assert results["protocol"]["images"] == {"generated": 5, "real": 5}
    assert results["protocol"]["kernel_subsets"] == {"size": 5, "number": 1, "seed": 0}
    assert "checkpoint" not in results["settings"]
    rows = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == list("01234")
    mean = sum(row["ssim"] for row in rows) / 5
    assert results["metrics"]["ssim"] == pytest.approx(mean)
    assert json.loads((output / "manifest.json").read_text())["finished"]
    names = {path.name for path in output.iterdir()}
    assert names == {"results.json", "samples.jsonl", "manifest.json", "settings.json"}
    print_scores(results)
    printed = capsys.readouterr().out
    assert "5 samples" in printed
    assert f"{results['metrics']['ssim']:.4f}" in printed
    assert f"[{results['intervals']['ssim']['low']:.4f}, " in printed


def test_asked_again(options: list[str], tmp_path: Path) -> None:
    """The same images are not scored twice; changed ones are refused, as their scores would be the old ones."""
    output = tmp_path / "out"
    metrics = "evaluation.metrics=[ssim]"
    scored([*options, metrics], output)
    written = (output / "results.json").stat().st_mtime_ns
    scored([*options, metrics], output)
    assert (output / "results.json").stat().st_mtime_ns == written
    fill(tmp_path / "more", 6, seed=2)
    (tmp_path / "more" / "5.png").rename(tmp_path / "images" / "5.png")
    (tmp_path / "more" / "4.png").rename(tmp_path / "real" / "5.png")
    with pytest.raises(RunFolderError, match=r"fingerprints\.images="):
        scored([*options, metrics], output)


def test_sets_of_different_counts(options: list[str], tmp_path: Path) -> None:
    """Unpaired, only distances between sets: in subsets of a chosen size, each set whole in the other."""
    (tmp_path / "images" / "0.png").unlink()
    chosen = ["evaluation.pairing=unpaired", "evaluation.kernel_subset_size=3", "evaluation.kernel_subsets=7"]
    results = scored([*options, *chosen], tmp_path / "out")
    assert set(results["metrics"]) == {"fd_efficientnet_lite0", "kd_efficientnet_lite0"}
    assert results["skipped"] == {"ssim": 4, "stlpips": 4}
    assert results["protocol"]["images"] == {"generated": 4, "real": 5}
    assert results["protocol"]["kernel_subsets"] == {"size": 3, "number": 7, "seed": 0}


def test_bad_input_leaves_nothing(options: list[str], tmp_path: Path) -> None:
    """Each refusal comes before the output folder."""
    grey = tmp_path / "grey"
    grey.mkdir()
    Image.fromarray(np.zeros((40, 32), np.uint8)).save(grey / "0.png")
    small = fill(tmp_path / "small", 5, seed=3, size=(32, 24))
    for error, message, more in (
        (DataError, "is grey", [f"images={grey}", "evaluation.pairing=unpaired"]),
        (DataError, r"4 of 5 images in .*real have no partner", [f"images={grey}"]),
        (DataError, r"Set resize=\[32,24\]", [f"images={small}"]),
        (DataError, "subsets of 6 images", ["evaluation.kernel_subset_size=6"]),
        (ConfigError, "No image metric is called 'ssin'", ["evaluation.metrics=[ssin]"]),
    ):
        with pytest.raises(error, match=message):
            scored([*options, *more], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_image_that_breaks_off_is_replaced_and_the_same_command_works(options: list[str], tmp_path: Path) -> None:
    """Only reading the pixels shows it, after the output folder was opened: that folder is given up."""
    whole = (tmp_path / "images" / "3.png").read_bytes()
    (tmp_path / "images" / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"3\.png"):
        scored(options, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "images" / "3.png").write_bytes(whole)
    assert scored(options, tmp_path / "out")["samples"] == 5
