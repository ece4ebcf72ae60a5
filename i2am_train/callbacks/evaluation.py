"""The callbacks that judge a model: during training, on a fixed validation subset, and for ``i2am evaluate``.

Scores, image metrics and attribution panels come from one sampling pass per batch. Validation draws nothing from the
training's random streams and Lightning puts the module back in training mode, so weights are the same with and without
it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image

from i2am_train.attention.compiled import eager_while_listening
from i2am_train.config.evaluation import AttributionConfig, EvaluationConfig
from i2am_train.config.models import SamplingConfig
from i2am_train.evaluation.evaluator import (
    EvaluationResult,
    EvaluationSettings,
    Evaluator,
    GeneratedSamples,
    from_all_processes,
    score_row,
)
from i2am_train.evaluation.explaining import explain_batch
from i2am_train.evaluation.faithfulness import judged_faithfulness
from i2am_train.models.graphs import release_graphs
from i2am_train.reporting.faithfulness import faithfulness_figure, measured
from i2am_train.reporting.figures.arms import sample_figure
from i2am_train.reporting.figures.canvas import save_figure
from i2am_train.results.run_files import SamplePanels, write_panels
from i2am_train.tracking.names import ATTRIBUTION_GENERATED, ATTRIBUTION_REFERENCE, EPOCH, TABLE, VALIDATION
from i2am_train.tracking.scores import generated_overlays, reference_overlays, sample_table
from i2am_train.training.module import TryOnModule


class EvaluationCallback(L.Callback):
    """Samples, scores, draws and logs at each validation.

    ``folder`` receives the panels of the first ``panel_samples`` of each validation epoch (``epoch-0003/...``), W&B
    also a table of the first ``table_samples``. ``result`` is the last evaluation.
    """

    def __init__(
        self, settings: EvaluationSettings, folder: Path, *, panel_samples: int, table_samples: int = 0
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.panel_samples = panel_samples
        self.table_samples = table_samples
        self.result: EvaluationResult | None = None
        self._evaluator: Evaluator | None = None
        self._panels: dict[int, SamplePanels] = {}
        self._wanted: set[int] = set()
        self._faithful: set[int] = set()

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._evaluator is None or self._evaluator.device != pl_module.device:
            self._evaluator = Evaluator(self.settings, pl_module.device)
        self._evaluator.reset()
        self._panels = {}
        loader: Any = trainer.val_dataloaders
        dataset = loader.dataset
        first = min(max(self.panel_samples, self.table_samples), len(dataset))
        self._wanted = {dataset.global_index(position) for position in range(first)}
        judged = min(self.settings.faithful_samples, len(dataset))
        self._faithful = {dataset.global_index(position) for position in range(judged)}

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        assert isinstance(pl_module, TryOnModule) and self._evaluator is not None
        with eager_while_listening():  # compiled blocks would be compiled again for a few pictures of other shapes
            made = self._evaluator.update(pl_module.model, batch, self._faithful)
        self._panels |= {one.index: one.panels() for one in made if one.index in self._wanted}

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._evaluator is not None
        self.result = result = self._evaluator.compute()
        assert isinstance(pl_module, TryOnModule)
        release_graphs(pl_module.model.unet)  # training needs the memory
        panels = list(from_all_processes(self._panels).values())
        # Every process has the same values; sync_dist only tells Lightning that this is known.
        pl_module.log_dict({VALIDATION + name: value for name, value in result.metrics.items()}, sync_dist=True)
        for warning in result.warnings:
            trainer.print(f"Warning: {warning}")
        if not trainer.is_global_zero:
            return
        step = trainer.global_step - 1  # Lightning's, counted from 0, as for the scores
        if drawn := panels[: self.panel_samples]:
            self._draw(trainer, drawn, step)
        shares = self.settings.faithfulness.shares
        if self._faithful:
            found = measured("validation", result.rows, shares)
            path = save_figure(faithfulness_figure(found), self._folder(trainer) / "faithfulness.png", dpi=110)
            _log_picture(trainer, "faithfulness", path, step)
        tabled = panels[: self.table_samples]
        if tabled and any(isinstance(one, WandbLogger) for one in trainer.loggers):
            table = sample_table(result.rows, tabled, epoch=trainer.current_epoch, step=step)
            _log_to_wandb(trainer, {TABLE: table}, step)

    def _folder(self, trainer: L.Trainer) -> Path:
        return self.folder / f"epoch-{trainer.current_epoch:04d}"

    def _draw(self, trainer: L.Trainer, panels: Sequence[SamplePanels], step: int) -> None:
        folder = self._folder(trainer)
        write_panels(folder, panels)
        path = save_figure(sample_figure({"model": panels}), folder / "panel.png", dpi=110)
        rows = np.stack([np.hstack([one.garment, one.person, one.generated]) for one in panels])
        _log_picture(trainer, "attribution", path, step)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("val/samples", list(rows), step=step, caption=[one.name for one in panels])
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_images("val/samples", rows, step, dataformats="NHWC")
        delta = self.settings.attribution.delta
        overlays = {
            ATTRIBUTION_GENERATED: generated_overlays(panels, delta),
            ATTRIBUTION_REFERENCE: reference_overlays(panels, delta),
        }
        _log_to_wandb(trainer, overlays, step)


def _log_picture(trainer: L.Trainer, name: str, path: Path, step: int) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(VALIDATION + name, [str(path)], step=step)
        elif isinstance(logger, TensorBoardLogger):
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            logger.experiment.add_image(VALIDATION + name, pixels, step, dataformats="HWC")


def _log_to_wandb(trainer: L.Trainer, values: Mapping[str, Any], step: int) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            named = {VALIDATION + name: value for name, value in values.items()}
            logger.log_metrics({**named, EPOCH: trainer.current_epoch}, step=step)


class GenerationCallback(L.Callback):
    """Of ``i2am evaluate``: images and attention scores, of the first samples faithfulness and panels, into `samples`.

    Each batch is kept as soon as it is made. Several processes share the folder: each makes its own batches, and they
    wait for each other at the end.
    """

    def __init__(
        self,
        samples: GeneratedSamples,
        sampling: SamplingConfig,
        attribution: AttributionConfig,
        evaluation: EvaluationConfig,
    ) -> None:
        self.samples = samples
        self.sampling = sampling
        self.attribution = attribution
        self.evaluation = evaluation

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        assert isinstance(pl_module, TryOnModule)
        made = explain_batch(pl_module.model, batch, self.sampling, self.attribution)
        causes = judged_faithfulness(
            pl_module.model,
            batch,
            self.sampling,
            self.attribution,
            self.evaluation.faithfulness,
            range(self.evaluation.faithful_samples),
        )
        self.samples.write(
            [{**score_row(one), **causes.get(one.index, {})} for one in made],
            [one.images["generated"] for one in made],
            [one.panels() for one in made if one.index < self.evaluation.panel_samples],
        )

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier()  # the first process will read what all have written
