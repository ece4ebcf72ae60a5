"""``i2am faithful`` on a small model: its files, a stop after one batch, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from i2am_train.attention.recipe import paper_number
from i2am_train.config.store import compose
from i2am_train.errors import CaptureError, ConfigError, I2AMError
from i2am_train.reporting.report_files import plan_tables
from i2am_train.workflows import evaluate, faithful
from tests.support.remakes import stopped_in_second_batch

LAYER = "up_blocks.2.attentions.1"


@pytest.fixture
def options(overrides: list[str], small_checkpoint: Path) -> list[str]:
    """Three samples in batches of two, one layer, one share."""
    return [
        *(word for word in overrides if word.startswith("data.")),
        f"checkpoint={small_checkpoint}",
        *("samples=3", "batch_size=2", "layers=[5]", "attribution.layers=[5]", "shares=[0.5]", "random_draws=1"),
        *("controls=[random,gradient]", "sampling.steps=1"),
        *("device=cpu", "progress_bar=false"),
    ]


def test_it_goes_on_and_writes_what_it_found(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is stopped after its first batch makes the second only; a finished one makes nothing."""
    asked = stopped_in_second_batch(monkeypatch, "faithfulness")
    config = compose("faithful", [*options, f"output={tmp_path / 'run'}"])
    with pytest.raises(KeyboardInterrupt, match="stop"):
        faithful.run(config)
    for _ in range(2):
        faithful.run(config)
    assert [len(names) for names in asked] == [2, 1, 1]
    printed = capsys.readouterr().out
    assert "Each of the 3 images is made 13 times, in 1 steps: 39 images on cpu." in printed
    assert "5 (up_blocks.2.attentions.1)" in printed
    results = json.loads((tmp_path / "run" / "faithfulness.json").read_text())
    assert results["layers"] == [LAYER]
    assert [row["index"] for row in results["samples"]] == [0, 1, 2]
    use = results["scores"][f"use/{LAYER}"]
    values = [row[f"use/{LAYER}"] for row in results["samples"]]
    assert use["mean"] == pytest.approx(sum(values) / 3)
    assert {"deletion/gradient", "deletion_stlpips/score", "insertion/top@0.5"} <= results["scores"].keys()
    assert use["low"] <= use["mean"] <= use["high"]
    assert results["layers"] == [LAYER]
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"faithfulness.json", "faithfulness.md", "faithfulness.png"} <= written
    assert "partial" not in written


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("shares=[0.5,0.25]", "shares=.*different numbers in ascending order"),
        ("shares=[0.5,1.5]", "more than 0 and at most 1"),
        ("shares=[]", "different numbers in ascending order"),
        ("fill=black", "white, mean, blur"),
        ("random_draws=0", "random_draws=0 is not possible"),
        ("layers=[else]", "No attention layer is called 'else'"),
        ("samples=99", "99"),
        ("checkpoint=nowhere", "nowhere"),
    ],
)
def test_what_is_refused(options: list[str], tmp_path: Path, wrong: str, message: str) -> None:
    """Before anything is written."""
    words = [word for word in options if word.partition("=")[0] != wrong.partition("=")[0]]
    with pytest.raises((I2AMError, CaptureError), match=message):
        faithful.run(compose("faithful", [*words, wrong, f"output={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("default")  # Lightning's and torch's own deprecations
def test_an_evaluation_says_the_same(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its first samples have the figures of `i2am faithful`, the others none; tables and files have them."""
    of_faithful = {"samples", "batch_size", "layers", "shares", "controls", "random_draws", "attribution.layers"}
    common = [word for word in options if word.partition("=")[0] not in of_faithful]
    judged = ["evaluation=faithful", "evaluation.samples=3", "evaluation.batch_size=2", "evaluation.faithful_samples=2"]
    judged += ["evaluation.metrics=[ssim]", "evaluation.panel_samples=0", "attribution.layer=5", "tracking=files"]
    folder = tmp_path / "evaluation"
    evaluate.run(compose("evaluate", [*common, *judged, f"output={folder}"]))
    printed = capsys.readouterr().out
    assert "Each of the first 2 samples is made 11 times more" in printed
    assert "Use" in printed
    assert "2 samples" in printed
    probed = ["samples=2", "batch_size=2", "layers=[5]", "shares=[0.25]", "controls=[random]", "random_draws=1"]
    probed.append(f"output={tmp_path / 'run'}")
    faithful.run(compose("faithful", [*common, *probed]))
    expected = json.loads((tmp_path / "run" / "faithfulness.json").read_text())["samples"]
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for row, same in zip(rows, expected, strict=False):
        assert {name: row[name] for name in same} == same
        assert row["use"] == same[f"use/{LAYER}"]
        assert row["where"] == same[f"where/{LAYER}"]
        assert row["where_all"] == same["where/all"]
        assert row["deletion"] == same["deletion/score"]
    assert rows[2]["use"] is None
    assert rows[2]["ssim"] is not None
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"]["deletion"] == pytest.approx(sum(row["deletion"] for row in rows[:2]) / 2)
    assert results["intervals"]["deletion"]["n"] == 2
    assert results["skipped"]["use"] == 1
    (table,) = [one for one in plan_tables([folder], (), mixed=False).tables if one.name == "faithfulness"]
    assert [heading.label for heading in table.headings] == [
        "Use",
        "Where",
        "Where, all layers",
        "Deletion",
        "Deletion, perceptual",
    ]
    assert table.rows[0].cells[0].value == results["metrics"]["use"]


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """A person, the region to fill in, a garment of another aspect and its own region, for StableVITON's shape."""
    drawn = {
        "image": ("RGB", (60, 80), "#c9d6df", [((18, 22, 44, 58), "#884444")]),
        "mask": ("L", (60, 80), 0, [((16, 20, 46, 60), 255)]),
        "reference": ("RGB", (90, 70), "white", [((30, 10, 60, 60), "#2a7f62"), ((40, 20, 50, 30), "#ff5f4a")]),
        "reference_mask": ("L", (90, 70), 0, [((30, 10, 60, 60), 255)]),
    }
    words = ["model=factory", "factory=tests.support.stableviton_like:build", "size=[64,48]", "sampling.steps=2"]
    for name, (mode, size, back, shapes) in drawn.items():
        picture = Image.new(mode, size, back)
        for box, colour in shapes:
            ImageDraw.Draw(picture).rectangle(box, fill=colour)
        picture.save(tmp_path / f"{name}.png")
        words.append(f"{name}={tmp_path / name}.png")
    words += ["layers=[5]", "attribution.layers=[5]", "shares=[0.5]", "random_draws=1", "progress_bar=false"]
    return [*words, f"output={tmp_path / 'run'}"]


def test_other_peoples_models(pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By their recipe: all that needs neither gradient nor truth; a second call reads what the first found."""
    config = compose("faithful", pictures)
    faithful.run(config)
    printed = capsys.readouterr().out
    assert "Left out of the controls, without gradients and truth: gradient, gradient_attention, truth." in printed
    assert "Without " not in printed
    results = json.loads((tmp_path / "run" / "faithfulness.json").read_text())
    (layer,), (row,) = results["layers"], results["samples"]
    assert paper_number(layer) == 5
    assert row[f"use/{layer}"] > 0
    assert row["deletion/top@0.5"] > 0
    assert {"deletion/middle", "deletion/random", "deletion_stlpips/score"} <= row.keys()
    assert not {"deletion/gradient", "deletion/truth", "where/truth"} & row.keys()
    faithful.run(config)
    assert "is made up to" not in capsys.readouterr().out


def test_regions(pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without one of the reference all of it counts, and it is said; without one to compare in, nothing is made.

    Layers with reference grids of their own are asked together.
    """
    words = [word for word in pictures if not word.startswith(("reference_mask=", "attribution"))]
    faithful.run(compose("faithful", [*words, "controls=[]"]))
    assert "Without reference_mask= all of the reference counts." in capsys.readouterr().out
    words = [word for word in words if not word.startswith(("image=", "mask=", "output="))]
    with pytest.raises(ConfigError, match="this request has no mask"):
        faithful.run(compose("faithful", [*words, f"output={tmp_path / 'other'}"]))
    assert not (tmp_path / "other").exists()


def test_chance_is_refused(pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline whose pictures differ at the same seed would make every change an effect."""
    remade = faithful.remake_of_picture

    def by_chance(*args, **kwargs):  # type: ignore[no-untyped-def]
        return replace(remade(*args, **kwargs), make=lambda pictures: torch.rand(1, 3, 64, 48))

    monkeypatch.setattr(faithful, "remake_of_picture", by_chance)
    with pytest.raises(ConfigError, match="made twice from the same seed, differs"):
        faithful.run(compose("faithful", pictures))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=factory"], "model=factory needs factory=, reference="),
        (["model=catvton"], "checkpoint is required"),
        (["reference=a.png"], "reference=... is for other people's models"),
    ],
)
def test_whose_model(words: list[str], message: str, tmp_path: Path) -> None:
    """Options of one way of asking are refused with the other, and missing ones are named."""
    with pytest.raises(ConfigError, match=message):
        faithful.run(compose("faithful", [*words, f"output={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()
