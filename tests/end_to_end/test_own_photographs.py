"""From photographs to a trained model, as data/README.md tells it: the embedded data stripped to photographs."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from i2am_train.commands import data, train
from i2am_train.config.store import compose
from i2am_train.datasets.synthetic import make_dataset
from i2am_train.types import GridSize

pytestmark = pytest.mark.filterwarnings("default")  # Lightning's and torch's own deprecations


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Photographs, parsing maps and keypoints in our layout, and nothing else."""
    root = tmp_path / "photographs"
    make_dataset(root, 16, 4, GridSize(64, 48), 2, annotations=True, workers=1, progress=False)
    kept = {"image", "cloth", "image-parse-v3", "openpose_json"}
    for folder in [*root.glob("train/*"), *root.glob("test/*")]:
        if folder.name not in kept:
            shutil.rmtree(folder)
    return root


def run(command: str, *options: str) -> int:
    """A command of ``i2am data`` with composed options; its exit status."""
    return getattr(data, command)(compose(f"data_{command}", options)) or 0


def test_photographs_train_a_refined_model(
    photographs: Path, small_checkpoint: Path, training: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    # Proves the way in the documentation: derive, check, train with the attention losses, and weights that moved.
    assert run("derive", f"root={photographs}", "preview=true") == 0
    report = json.loads((photographs / "derived.json").read_text())
    assert report["made"]["agnostic-mask"] == 20
    assert len(list((photographs / "previews").glob("*/*.jpg"))) == 20
    assert run("check", f"root={photographs}", "height=64", "width=48") == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out
    options = [
        option for option in training if not option.startswith(("data.root", "validation.samples"))
    ]
    config = compose("train", [
        "experiment=refined", *options, f"data.root={photographs}", "validation.samples=2", "data.augment=true",
        f"output={tmp_path / 'run'}",
    ])  # fmt: skip
    train.run(config)
    before, after = (
        load_file(next(folder.glob("unet/*.safetensors")))
        for folder in (small_checkpoint, tmp_path / "run" / "model")
    )
    assert any(not before[name].equal(after[name]) for name in before)


def test_a_refused_picture_is_reported_by_the_command(
    photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Proves exit status 1, the paragraph and the report's place.
    (photographs / "train/openpose_json/00003_00_keypoints.json").unlink()
    assert run("derive", f"root={photographs}", f"json={photographs.parent / 'report.json'}") == 1
    printed = capsys.readouterr().out
    assert "1 refused" in printed
    assert "train 00003_00:" in printed
    refused = json.loads((photographs.parent / "report.json").read_text())["refused"]
    assert [one["name"] for one in refused] == ["00003_00"]


def test_a_dataset_without_poses_is_one_paragraph(
    photographs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Proves exit status 2 of the program, and that nothing was written.
    shutil.rmtree(photographs / "train/openpose_json")
    monkeypatch.setattr(sys, "argv", ["i2am data", "derive", f"root={photographs}"])
    with pytest.raises(SystemExit, match="2"):
        data.main()
    assert "where bodies are is not known. Nothing was written." in capsys.readouterr().err
    assert not (photographs / "train/cloth-mask").exists()
