"""models/by_name.py: which layer is repaired and judged where options leave it to the model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from i2am_train.config.evaluation import EvaluateConfig
from i2am_train.config.explanation import ExplainConfig, FaithfulConfig
from i2am_train.config.options import plain
from i2am_train.config.training import AblateConfig, TrainConfig
from i2am_train.errors import CheckpointError, ConfigError
from i2am_train.models.by_name import with_layers
from i2am_train.models.tryon import TryOnModel

REFINED = {"cwg": {"weight": 0.1}}
BY_LAYER = {5: {"5": 1.0}, "up_blocks.2.attentions.1": {"5": 1.0}, None: {"2": 1.0}}
"""What ``objective.layers`` become of the layer in a model's index; None: a file without it."""


@pytest.fixture
def at(small_checkpoint: Path, tmp_path: Path) -> Callable[[Any], str]:
    """Folder of the small model whose index says a layer; None: says none, as files did before."""

    def make(layer: Any) -> str:
        folder = tmp_path / f"at-{layer}"
        shutil.copytree(small_checkpoint, folder)
        index = json.loads((folder / "model_index.json").read_text())
        del index["layer"]
        (folder / "model_index.json").write_text(json.dumps(index if layer is None else {**index, "layer": layer}))
        return str(folder)

    return make


@pytest.mark.parametrize("layer", BY_LAYER)
def test_model_says(at: Callable[[Any], str], layer: Any) -> None:
    """Every command takes the layer of the index, by the paper's number; a file without it means the paper's."""
    folder, layers = at(layer), BY_LAYER[layer]
    (number,) = map(int, layers)
    for config in (
        TrainConfig(init=folder),
        AblateConfig(init=folder),
        TrainConfig(init=folder, objective={"terms": REFINED}),
    ):
        found = with_layers(config)
        assert (found.objective.layers, found.attribution.layer) == (layers, number)
    judging = (EvaluateConfig(checkpoint=folder), ExplainConfig(checkpoint=folder), FaithfulConfig(checkpoint=folder))
    assert [with_layers(config).attribution.layer for config in judging] == [number] * 3


@pytest.mark.parametrize(
    ("objective", "judged"),
    [
        ({"layers": 6, "terms": REFINED}, 6),
        ({"layers": {3: 0.5, 8: 1.0, 9: 1.0}, "terms": REFINED}, 8),
        ({"layers": "up_blocks.3.attentions.0", "terms": REFINED}, 7),
        ({"layers": 6}, 5),
        ({"layers": 6, "terms": {"cwg": {"weight": 0}}}, 5),
    ],
)
def test_trained_layer_is_judged(at: Callable[[Any], str], objective: dict[str, Any], judged: int) -> None:
    """The first of the greatest weight; without an active term nothing is repaired, and the model's own is judged."""
    config = TrainConfig(init=at(5), objective=objective)
    found = with_layers(config)
    assert found.attribution.layer == judged
    assert found.objective == config.objective
    assert with_layers(found) == found


def test_set_layers_stay(at: Callable[[Any], str]) -> None:
    """What options say is not the model's to say; a study's objective.layers go before the model."""
    folder, set_to = at(5), {"layer": 7}
    for config in (
        TrainConfig(init=folder, attribution=set_to, objective={"layers": 3, "terms": REFINED}),
        AblateConfig(init=folder, attribution=set_to, objective={"layers": 3}),
        EvaluateConfig(checkpoint=folder, attribution=set_to),
        ExplainConfig(checkpoint=[folder, "tiny"], attribution=set_to),
    ):
        assert with_layers(config).attribution.layer == 7
    study = with_layers(AblateConfig(init=folder, objective={"layers": [3, 4]}))
    assert (study.attribution.layer, study.objective.layers) == (3, {"3": 1.0, "4": 1.0})


def test_judged_layer_among_those_of_use(at: Callable[[Any], str]) -> None:
    """The word attribution.layer in faithfulness.layers means the layer that is judged, wherever it comes from."""
    again = {"faithfulness": {"layers": ["attribution.layer", 9]}}
    for config in (
        EvaluateConfig(checkpoint=at(5), evaluation=again),
        TrainConfig(objective={"layers": 5, "terms": REFINED}, evaluation=again),
    ):
        assert with_layers(config).evaluation.faithfulness.layers == [5, 9]
    faithful = FaithfulConfig(checkpoint="tiny", layers=["attribution.layer"], attribution={"layer": 6})
    assert with_layers(faithful).layers == [6]


def test_models_of_others_are_judged_at_the_papers() -> None:
    """They have no index of ours; a factory may have no folder at all."""
    config = ExplainConfig(model="factory", factory="a:b", reference="c.png")
    assert with_layers(config).attribution.layer == 2
    assert plain(with_layers(EvaluateConfig(images="a", reference="b")))["attribution"]["layer"] == 2


def test_checkpoints_of_different_layers(at: Callable[[Any], str]) -> None:
    """One page shows one layer, and which is not guessed."""
    folder = at(5)
    with pytest.raises(ConfigError, match=rf"\({folder} at layer 5, tiny at layer 6\).* Set attribution\.layer"):
        with_layers(ExplainConfig(checkpoint=[folder, "tiny"]))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (12, "layer=12 is not possible: expected one of the paper's layers 1...9"),
        (
            "up_blocks.7",
            r"layer=up_blocks\.7, .* This model has: up_blocks\.1\.attentions\.0 \(1\), .*Set layer in that",
        ),
    ],
)
def test_layer_that_the_model_lacks(at: Callable[[Any], str], layer: Any, message: str) -> None:
    """Refused when the model is opened, with what there is."""
    with pytest.raises(CheckpointError, match=message):
        TryOnModel.from_pretrained(at(layer))


def test_layer_travels(at: Callable[[Any], str], tmp_path: Path) -> None:
    """Saved again, the index says it still; one that did not say it says the paper's."""
    for layer, written in (("up_blocks.2.attentions.1", "up_blocks.2.attentions.1"), (None, 2)):
        TryOnModel.from_pretrained(at(layer)).save_pretrained(tmp_path / f"again-{layer}")
        assert json.loads((tmp_path / f"again-{layer}" / "model_index.json").read_text())["layer"] == written
