"""A model knows which of its layers is repaired and judged: from training to evaluation, export and study."""

import json
from pathlib import Path

import pytest

from i2am_train.config.store import compose
from i2am_train.errors import RunFolderError
from i2am_train.models.tryon import TryOnModel
from i2am_train.results.evaluations import incomparable, read_evaluations
from i2am_train.workflows.ablate import ablate
from i2am_train.workflows.evaluate import evaluate, print_scores
from i2am_train.workflows.models import export
from i2am_train.workflows.train import train
from tests.support.trainings import weights

pytestmark = pytest.mark.filterwarnings("default")  # Lightning's and torch's own deprecations

SHORT = ["optimization.steps=1", "optimization.warmup_steps=0", "validation.samples=0"]


def layer_of(model: Path) -> int:
    return int(json.loads((model / "model_index.json").read_text())["layer"])


@pytest.fixture(scope="module")
def judging(overrides: list[str]) -> list[str]:
    """Options of an evaluation: four samples, one image metric."""
    few = ["evaluation.samples=4", "evaluation.metrics=[ssim]", "evaluation.panel_samples=1"]
    return [*overrides, *few, "progress_bar=false", "device=cpu", "tracking=files"]


@pytest.fixture(scope="module")
def fifth(training: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose losses repaired layer 5."""
    output = tmp_path_factory.mktemp("runs") / "fifth"
    options = [*training, *SHORT, "experiment=refined", "objective.layers={3: 0.5, up_blocks.2.attentions.1: 1}"]
    return train(compose("train", [*options, f"output={output}"]))


def test_run_is_judged_where_it_was_trained(
    fifth: Path, judging: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Null gives the figures of the trained layer, records and prints it, and goes on; layer 2 has others."""
    recorded = json.loads((fifth / "settings.json").read_text())
    assert recorded["attribution"]["layer"] == layer_of(fifth / "model") == 5
    words = [*judging, f"checkpoint={fifth}"]
    found = evaluate(compose("evaluate", words), tmp_path / "own")
    other = evaluate(compose("evaluate", [*words, "attribution.layer=2"]), tmp_path / "second")
    assert (found["settings"]["attribution"]["layer"], other["settings"]["attribution"]["layer"]) == (5, 2)
    assert found["metrics"]["imacs_g"] == other["metrics"]["imacs_g"]
    assert found["metrics"]["correspondence_error"] != other["metrics"]["correspondence_error"]
    print_scores(found)
    assert "entropy of layer 5" in " ".join(capsys.readouterr().out.split())
    for same in (words, [*words, "attribution.layer=5"]):
        assert evaluate(compose("evaluate", same), tmp_path / "own") == found
    with pytest.raises(RunFolderError, match=r"attribution\.layer=5 \(there: 2\)"):
        evaluate(compose("evaluate", words), tmp_path / "second")
    (said,) = incomparable(read_evaluations([tmp_path / "own", tmp_path / "second"], mixed=True))
    assert said.startswith("attribution.layer: 5 ")
    assert "against 2 " in said


def test_training_goes_on_from_what_it_recorded(
    training: list[str], fifth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a model of layer 5, null repairs 5, and the same command finds its run; a baseline leaves the layer."""
    start = [*training, *SHORT, f"init={fifth}"]
    refined = [*start, "experiment=refined", f"output={tmp_path / 'refined'}"]
    folder = train(compose("train", refined))
    recorded = json.loads((folder / "settings.json").read_text())
    assert (recorded["objective"]["layers"], recorded["attribution"]["layer"]) == ({"5": 1.0}, 5)
    assert layer_of(folder / "model") == 5
    train(compose("train", refined))
    train(compose("train", [*refined, "objective.layers=5"]))
    assert capsys.readouterr().out.count("finished already") == 2
    baseline = train(compose("train", [*start, "objective.layers=7", f"output={tmp_path / 'baseline'}"]))
    recorded = json.loads((baseline / "settings.json").read_text())
    assert (recorded["objective"]["layers"], recorded["attribution"]["layer"]) == ({"7": 1.0}, 5)
    assert layer_of(baseline / "model") == 5
    assert not weights(baseline)["conv_in.weight"].equal(weights(fifth)["conv_in.weight"])


def test_export_keeps_the_layer(fifth: Path, tmp_path: Path) -> None:
    """In the index of the pipeline, from which our model reads it, too."""
    folder = tmp_path / "exported"
    export(compose("export", [f"checkpoint={fifth}", f"output={folder}"]))
    assert layer_of(folder) == TryOnModel.from_pretrained(folder).config.layer == 5


@pytest.mark.long
def test_arms_are_judged_alike(training: list[str], tmp_path: Path) -> None:
    """Each arm trains its own layer, or the study's; all are judged at the study's, and the study records it."""
    arm = tmp_path / "seventh.yaml"
    arm.write_text("objective: {layers: 7, terms: {cwg: {weight: 0.1}}}\n")
    options = [*training, *SHORT, f"arms=[base,refined,{arm}]", "reference=refined", "seeds=[0]", "device=cpu"]
    options += [f"output={tmp_path / 'study'}", "bootstrap_samples=100", "objective.layers=3", "evaluation.samples=2"]
    results = ablate(compose("ablate", options))
    assert results["settings"]["attribution"]["layer"] == 3
    cells = {cell["arm"]: tmp_path / "study" / cell["folder"] for cell in results["cells"]}
    for folder in cells.values():
        settings = json.loads((folder / "evaluation" / "settings.json").read_text())
        assert settings["attribution"]["layer"] == 3
    trained = {name: layer_of(folder / "model") for name, folder in cells.items() if name != "base"}
    assert trained == {"refined": 3, str(arm): 7}
    assert [one["losses"].get("layers") for one in results["arms"]] == [None, {"3": 1.0}, {"7": 1.0}]
    assert ablate(compose("ablate", options))["cells"] == results["cells"]
