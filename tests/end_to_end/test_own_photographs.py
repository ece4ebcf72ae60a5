"""From photographs to a trained model, as data/README.md tells it: the embedded data stripped to photographs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from i2am_train.cli import main
from i2am_train.config.store import compose
from i2am_train.data.synthetic import make_dataset
from i2am_train.types import GridSize
from i2am_train.workflows import data, evaluate, models, train

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("default"),  # Lightning's and torch's own deprecations
]


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
    options = [option for option in training if not option.startswith(("data.root", "validation.samples"))]
    config = compose("train", [
        "experiment=refined", *options, f"data.root={photographs}", "validation.samples=2", "data.augment=true",
        f"output={tmp_path / 'run'}",
    ])  # fmt: skip
    train.run(config)
    before, after = (
        load_file(next(folder.glob("unet/*.safetensors"))) for folder in (small_checkpoint, tmp_path / "run" / "model")
    )
    assert any(not before[name].equal(after[name]) for name in before)


def test_a_refused_picture_is_reported_by_the_command(photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    with pytest.raises(SystemExit, match="2"):
        main(["data", "derive", f"root={photographs}"])
    assert "where bodies are is not known. Nothing was written." in capsys.readouterr().err
    assert not (photographs / "train/cloth-mask").exists()


SMALL = (
    "data.height=128", "data.width=64", "data.batch_size=2", "data.workers=0", "optimization.global_batch=2",
    "optimization.precision=32-true", "trainer.accelerator=cpu", "trainer.progress_bar=false", "evaluation=offline",
)  # fmt: skip
"""What the README's lines need beside themselves on this machine and at this size."""


def test_the_lines_of_the_readme(
    photographs: Path, make_parts: Callable[..., Any], original_layout: Callable[..., Any],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    # Proves README's "Train on my photographs" up to an exported pipeline; small networks stand for v1-5-pruned and
    # DINOv2-g under their names, and parsing maps and keypoints for what the hub's two models make of photographs.
    monkeypatch.chdir(tmp_path)
    photographs.rename("my_set")
    for split in ("train", "test"):
        names = sorted(file.name for file in Path("my_set", split, "image").iterdir())
        Path(f"my_set/{split}_pairs.txt").write_text("".join(f"{n} {n}\n" for n in names))
    weights = original_layout(make_parts("unet"), make_parts("vae"))
    save_file({n: value.contiguous() for n, value in weights.items()}, "v1-5-pruned.safetensors")
    make_parts("dinov2").save_pretrained("facebook/dinov2-giant")
    assert run("derive", "root=my_set", "preview=true") == 0
    assert run("check", "root=my_set") == 0
    parts = ["unet=v1-5-pruned.safetensors", "encoder=facebook/dinov2-giant", "output=models/start"]
    models.init(compose("init", [*parts, "height=128", "width=64"]))
    own = ["init=models/start", "data.root=my_set", "data.fit=pad", *SMALL, "validation=none"]
    train.run(compose("train", ["experiment=paper_custom", *own, "dry_run=true"]))
    assert "Nothing was written." in capsys.readouterr().out
    assert not Path("runs").exists()
    train.run(compose("train", ["experiment=paper_refined", *own, "optimization.steps=2", "tracking=files"]))
    judged = ["checkpoint=runs/paper_refined-seed0", "data=viton_hd", "data.root=my_set", "data.fit=pad", *SMALL[:2]]
    few = ["sampling.steps=1", "attribution.time_groups=1", "evaluation.metrics=[ssim]", "device=cpu"]
    evaluate.run(compose("evaluate", [*judged, *few, "data.workers=0", "tracking=files"]))
    assert Path("runs/paper_refined-seed0/evaluation-paired/results.json").is_file()
    models.export(compose("export", ["checkpoint=runs/paper_refined-seed0", "output=exported"]))
    assert Path("exported/model_index.json").is_file()
