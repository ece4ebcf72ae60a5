"""A training step on a card hands over its work and goes on: the host waits for the card where it logs, and there only.

The card that is not there counts the waits (`tests.support.host_waits`).
"""

import json
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import lightning as L
import pytest
import torch

from i2am_train import trainers
from i2am_train.config.evaluation import EvaluateConfig
from i2am_train.config.models import SamplingConfig
from i2am_train.config.store import compose
from i2am_train.errors import ConfigError, TrainingError
from i2am_train.models.by_name import with_precision
from i2am_train.types import SamplingPrecision
from i2am_train.workflows import train as workflow
from tests.support.card import card
from tests.support.host_waits import HostWait, host_waits

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("default")]  # Lightning's own deprecations


class WaitsOfSteps(L.Callback):
    """Which waits belong to which step; what happens between a step's end and the next one's beginning, to the next."""

    def __init__(self, waits: list[HostWait]) -> None:
        self.waits = waits
        self.by_step: dict[int, list[HostWait]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in self.by_step or not trainer.global_step:
            return  # gradients are still being added up
        self.by_step[trainer.global_step] = list(self.waits)
        self.waits.clear()


def train_on_card(options: list[str], monkeypatch: pytest.MonkeyPatch, *own: L.Callback) -> dict[int, list[HostWait]]:
    make = trainers.make_trainer
    with card(), host_waits() as waits:
        watch = WaitsOfSteps(waits)

        def watched(*arguments: Any) -> Any:
            trainer: Any = make(*arguments)
            trainer.callbacks[:0] = own
            trainer.callbacks.append(watch)
            return trainer

        monkeypatch.setattr(workflow, "make_trainer", watched)
        workflow.train(compose("train", options))
    return watch.by_step


@pytest.mark.parametrize(
    "extra",
    [
        ["optimization.precision=bf16-mixed", "optimization.ema_decay=0.9", "optimization.snr_gamma=5",
         "objective.terms.dcml.schedule=late", "objective.terms.dcml.share=0.5"],
        ["optimization.accumulate=2", "optimization.gradient_checkpointing=true",
         "objective.terms={supervised: {weight: 1}, atv: {weight: 1}, leffa: {weight: 1}, matches: {weight: 1}}"],
    ],
    ids=["refined", "others"],
)  # fmt: skip
def test_a_step_waits_where_it_logs_and_there_only(
    training: list[str], extra: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [
        *training, "experiment=refined", "data.batch_size=2", "optimization.steps=5", "validation.samples=0",
        "trainer.log_every_n_steps=4", *extra, f"output={tmp_path / 'run'}",
    ]  # fmt: skip
    by_step = train_on_card(options, monkeypatch)
    assert by_step.keys() == set(range(1, 6))
    for step in (2, 3):  # the first sets up, the fourth is looked at and then logged; epochs end later
        assert not by_step[step]
    assert by_step[4], "the counter sees the guard"
    assert by_step[5], "the counter sees the log"


def test_a_fault_is_kept_on_the_card_and_no_later_step_changes_a_weight(
    training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of step 2 is spoiled, and the host looks after step 4: the weights are those after step 1."""

    class Spoil(L.Callback):
        def on_after_backward(self, trainer: Any, module: Any) -> None:
            if trainer.global_step == 1:
                module.model.unet.conv_in.weight.grad[0, 0, 0, 0] = torch.inf

    options = [
        *training, "experiment=refined", "data.batch_size=2", "validation.samples=0", "optimization.steps=6",
        "optimization.warmup_steps=0", "trainer.log_every_n_steps=4",
    ]  # fmt: skip
    with pytest.raises(TrainingError, match=r"The gradient became inf in step 2, on samples \d{5}"):
        train_on_card([*options, f"output={tmp_path / 'run'}"], monkeypatch, Spoil())
    kept = torch.load(tmp_path / "run/checkpoints/not-finite.ckpt", weights_only=False)["state_dict"]
    assert json.loads((tmp_path / "run/rank0-diagnosis.json").read_text())["step"] == 1
    monkeypatch.undo()

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == 1:
                self.weights = {name: value.detach().clone() for name, value in module.named_parameters()}

    train_on_card([*options, f"output={tmp_path / 'sound'}"], monkeypatch, keep := Keep())
    for name, value in kept.items():
        assert torch.equal(value.cpu(), keep.weights[name].cpu()), name


def test_a_card_without_bfloat16_is_named_before_anything_is_written(training: list[str], tmp_path: Path) -> None:
    options = [*training, "optimization.precision=bf16-mixed", f"output={tmp_path / 'run'}"]
    lacks = pytest.raises(ConfigError, match=r"precision=bf16-mixed is not possible: A card .* no bfloat16")
    with card(), patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: False), lacks:
        workflow.train(compose("train", options))
    assert not (tmp_path / "run").exists()


def test_images_are_made_in_bfloat16_where_the_card_has_it() -> None:
    asked = {
        name: EvaluateConfig(checkpoint="tiny", sampling=SamplingConfig(precision=name))
        for name in get_args(SamplingPrecision)
    }
    with card():
        made = {name: with_precision(config).sampling.precision for name, config in asked.items()}
        assert made == {"auto": "bf16-mixed", "32-true": "32-true", "bf16-mixed": "bf16-mixed", "16-mixed": "16-mixed"}
        lacks = pytest.raises(ConfigError, match=r"sampling.precision=bf16-mixed is not possible: A card")
        with patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: False), lacks:
            assert with_precision(asked["auto"]).sampling.precision == "32-true"
            with_precision(asked["bf16-mixed"])
