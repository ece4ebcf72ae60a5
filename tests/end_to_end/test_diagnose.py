"""``i2am diagnose`` on a small model that is not trained: its files, a stop after one batch, and what it refuses."""

import json
from pathlib import Path

import pytest
import yaml

from i2am_train.config.store import compose
from i2am_train.errors import CaptureError, I2AMError
from i2am_train.workflows import faithful
from tests.support.remakes import stopped_in_second_batch

LAYER, OTHER = "up_blocks.2.attentions.1", "up_blocks.1.attentions.1"


@pytest.fixture
def options(overrides: list[str], small_checkpoint: Path) -> list[str]:
    """Three samples in batches of two, two layers of four and two heads."""
    return [
        *(word for word in overrides if word.startswith("data.")),
        f"checkpoint={small_checkpoint}",
        *("samples=3", "batch_size=2", "layers=[2,5]", "sampling.steps=2", "device=cpu", "progress_bar=false"),
    ]


def test_a_model_that_is_not_trained(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on after a stop, and finds nothing to repair."""
    asked = stopped_in_second_batch(monkeypatch, "diagnosis")
    folder = tmp_path / "run"
    config = compose("diagnose", [*options, f"output={folder}"])
    with pytest.raises(KeyboardInterrupt, match="stop"):
        faithful.diagnose(config)
    for _ in range(2):
        faithful.diagnose(config)
    assert [len(names) for names in asked] == [2, 1, 1]
    printed = " ".join(capsys.readouterr().out.split())
    assert "Each of the 3 images is made 13 times, in 2 steps: 39 images on cpu." in printed
    assert printed.count("Nothing to repair here: the image depends on no layer's choice") == 2
    assert "A model that is not trained is like that" in printed
    results = json.loads((folder / "diagnosis.json").read_text())
    assert results["proposal"]["layers"] == []
    assert results["layers"] == [OTHER, LAYER]
    assert not results["findings"][LAYER]["used"]
    scores = results["scores"]
    heads = [key.removeprefix("use/") for key in scores if key.startswith("use/") and "#" in key]
    assert heads == [f"{OTHER}#{head}" for head in range(4)] + [f"{LAYER}#{head}" for head in range(2)]
    values = [row[f"violations/{LAYER}"] for row in results["samples"]]
    assert scores[f"violations/{LAYER}"]["mean"] == pytest.approx(sum(values) / 3)
    written = {path.name for path in folder.iterdir()}
    assert {"diagnosis.json", "diagnosis.md", "diagnosis.png", "diagnosis.html"} <= written
    assert not {"partial", "repair.yaml"} & written
    page = (folder / "diagnosis.html").read_text()
    assert "Nothing to repair here" in page
    assert "data:image/png;base64," in page
    assert "http" not in page.partition("<body>")[0].replace("http-equiv", "")


def test_the_proposal_is_an_experiment(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rule that calls every layer used proposes the scattered ones, in a file that a training takes."""
    folder = tmp_path / "run"
    words = [*options, "samples=2", "heads=false", "least_use=0", f"output={folder}"]
    faithful.diagnose(compose("diagnose", words))
    results = json.loads((folder / "diagnosis.json").read_text())
    proposed = results["proposal"]["layers"]
    assert proposed, "attention of random weights is out of order"
    printed = capsys.readouterr().out
    assert f"i2am train experiment={folder / 'repair.yaml'} init=" in printed
    assert "images is made 7 times" in printed
    objective = compose("train", [f"experiment={folder / 'repair.yaml'}"]).objective
    numbers = {OTHER: "2", LAYER: "5"}
    assert objective.layers == {numbers[name]: 1.0 for name in proposed}
    assert objective.terms == compose("train", ["experiment=refined"]).objective.terms
    text = (folder / "repair.yaml").read_text()
    assert text.startswith("# Proposed by `i2am diagnose` of ")
    assert results["proposal"]["reason"] in text.replace("\n# ", " ")
    assert list(yaml.safe_load(text)["objective"]["layers"].values()) == [1.0] * len(proposed)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("layers=[else]", "No attention layer is called 'else'"),
        ("layers=[]", "null for all, or a list that is not empty"),
        ("least_use=2", "least_use=2"),
        ("heads=some", "heads=some"),
        ("samples=0", "samples=0 is not possible"),
        ("samples=99", "99"),
        ("checkpoint=nowhere", "nowhere"),
    ],
)
def test_what_is_refused(options: list[str], tmp_path: Path, wrong: str, message: str) -> None:
    """Before anything is written."""
    words = [word for word in options if word.partition("=")[0] != wrong.partition("=")[0]]
    with pytest.raises((I2AMError, CaptureError), match=message):
        faithful.diagnose(compose("diagnose", [*words, wrong, f"output={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()
