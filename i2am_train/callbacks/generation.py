"""The callback of ``i2am evaluate``: samples the batches of a test run and keeps each as soon as it is made."""

from typing import Any

import lightning as L

from i2am_train.config.evaluation import AttributionConfig
from i2am_train.config.models import SamplingConfig
from i2am_train.evaluation.evaluator import GeneratedSamples, score_row
from i2am_train.evaluation.explaining import explain_batch
from i2am_train.training.module import TryOnModule


class GenerationCallback(L.Callback):
    """Images, attention scores and the panels of the first ``panel_samples``, into ``samples``.

    Several processes share the folder: each makes its own batches, and they wait for each other at the end.
    """

    def __init__(
        self, samples: GeneratedSamples, sampling: SamplingConfig, attribution: AttributionConfig, *, panel_samples: int
    ) -> None:
        self.samples = samples
        self.sampling = sampling
        self.attribution = attribution
        self.panel_samples = panel_samples

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        assert isinstance(pl_module, TryOnModule)
        with trainer.precision_plugin.forward_context():
            made = explain_batch(pl_module.model, batch, self.sampling, self.attribution)
        self.samples.write(
            [score_row(one) for one in made],
            [one.images["generated"] for one in made],
            [one.panels() for one in made if one.index < self.panel_samples],
        )

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier()  # the first process will read what all have written
