"""Several small batches in one optimizer step are one large batch, with dropped conditions, too."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from torch import Tensor

from i2am_train.config.store import compose
from i2am_train.trainers import make_trainer
from i2am_train.training.step import draw
from i2am_train.workflows.train import prepare

pytestmark = pytest.mark.filterwarnings("default")  # Lightning's and torch's own deprecations


class Gradients(L.Callback):
    """Keeps the gradient of each optimizer step, and how many samples of each of its batches the terms count."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.counted: list[list[int]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, _: int) -> None:
        numbers = draw(
            module.seed, module.current_epoch, batch["index"].tolist(), latent=module.model.latent_size,
            timesteps=1000, condition_dropout=module.options.condition_dropout,
        )  # fmt: skip
        counted = module.objective.counted(~numbers.dropped, numbers.timesteps)
        self.counted.append(counted.sum(dim=1).tolist())

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        gradients = module.named_parameters()
        self.steps.append({n: p.grad.clone() for n, p in gradients if p.grad is not None})


def gradients(options: list[str], output: Path) -> Gradients:
    config = compose("train", [*options, f"output={output}"])
    module, datamodule = prepare(config)
    trainer, kept = make_trainer(config, output), Gradients()
    trainer.callbacks.append(kept)
    try:
        trainer.fit(module, datamodule)
    finally:
        module.teardown("fit")
    return kept


def test_two_batches_of_two_are_one_of_four(training: list[str], tmp_path: Path) -> None:
    """Equal gradients in both steps, though the halves have unequally many conditions, and of timesteps that count."""
    options = [
        *training, "experiment=refined", "objective.terms.cwg=50", "objective.terms.tv=50",
        "objective.terms.cwg.timesteps=[0,500]", "objective.layers=[2,5]", "validation.samples=0",
        "optimization.steps=2", "optimization.condition_dropout=0.5", "optimization.learning_rate=1e-12", "seed=22",
    ]  # fmt: skip
    whole = gradients([*options, "data.batch_size=4"], tmp_path / "whole")
    parts = gradients([*options, "data.batch_size=2", "optimization.accumulate=2"], tmp_path / "parts")
    assert parts.counted == [[2, 2, 1], [1, 1, 0], [2, 2, 2], [1, 1, 0]]
    assert len(whole.steps) == len(parts.steps) == 2
    for one, other in zip(whole.steps, parts.steps, strict=True):
        assert one.keys() == other.keys()
        for name, gradient in one.items():
            apart = float((other[name] - gradient).abs().max() / (1e-5 + gradient.abs().max()))
            assert apart < 1e-3, name
