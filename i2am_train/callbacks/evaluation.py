"""The callback that judges the model during training, on a fixed validation subset.

Scores, image metrics and attribution panels come from one sampling pass per batch. The callback draws nothing from the
training's random streams and puts the module back in training mode (Lightning does), so weights are the same with and
without it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from i2am_train.data.dataset import TryOnBatch
from i2am_train.evaluation.evaluator import EvaluationResult, EvaluationSettings, Evaluator, from_all_processes
from i2am_train.reporting.figures.arms import sample_figure
from i2am_train.reporting.figures.canvas import save_figure
from i2am_train.results.run_files import SamplePanels, write_panels
from i2am_train.tracking.names import ATTRIBUTION_GENERATED, ATTRIBUTION_REFERENCE, EPOCH, TABLE, VALIDATION
from i2am_train.tracking.scores import generated_overlays, reference_overlays, sample_table
from i2am_train.training.module import TryOnModule


class EvaluationCallback(L.Callback):
    """Samples, scores, draws and logs.

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

    # -- Lightning's hooks -----------------------------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer.val_dataloaders, pl_module)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._update(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        result = self._finish()
        # Every process has the same values; sync_dist only tells Lightning that this is known.
        pl_module.log_dict({VALIDATION + name: value for name, value in result.metrics.items()}, sync_dist=True)
        for warning in result.warnings:
            trainer.print(f"Warning: {warning}")
        if trainer.is_global_zero and self._panels:
            step = trainer.global_step - 1  # Lightning's, counted from 0, as for the scores
            self._draw(trainer, self.folder / f"epoch-{trainer.current_epoch:04d}", step)
            self._tabulate(trainer, result, step)

    # -- the work --------------------------------------------------------------------------------------------------

    def _start(self, loader: Any, module: L.LightningModule) -> None:
        if self._evaluator is None or self._evaluator.device != module.device:
            self._evaluator = Evaluator(self.settings, module.device)
        self._evaluator.reset()
        self._panels = {}
        dataset = loader.dataset
        first = min(max(self.panel_samples, self.table_samples), len(dataset))
        self._wanted = {dataset.global_index(position) for position in range(first)}

    def _update(self, trainer: L.Trainer, module: L.LightningModule, batch: TryOnBatch) -> None:
        assert isinstance(module, TryOnModule) and self._evaluator is not None
        with trainer.precision_plugin.forward_context():
            made = self._evaluator.update(module.model, batch)
        self._panels |= {one.index: one.panels() for one in made if one.index in self._wanted}

    def _finish(self) -> EvaluationResult:
        assert self._evaluator is not None
        self.result = self._evaluator.compute()
        self._panels = from_all_processes(self._panels)
        return self.result

    def _draw(self, trainer: L.Trainer, folder: Path, step: int) -> None:
        panels = list(self._panels.values())[: self.panel_samples]
        if not panels:
            return
        write_panels(folder, panels)
        path = save_figure(sample_figure({"model": panels}), folder / "panel.png", dpi=110)
        _log_picture(trainer, "val/attribution", path, step)
        _log_samples(trainer, panels, step)
        delta = self.settings.attribution.delta
        overlays = {
            ATTRIBUTION_GENERATED: generated_overlays(panels, delta),
            ATTRIBUTION_REFERENCE: reference_overlays(panels, delta),
        }
        _log_to_wandb(trainer, overlays, step)

    def _tabulate(self, trainer: L.Trainer, result: EvaluationResult, step: int) -> None:
        if self.table_samples and any(isinstance(one, WandbLogger) for one in trainer.loggers):
            panels = list(self._panels.values())[: self.table_samples]
            table = sample_table(result.rows, panels, epoch=trainer.current_epoch, step=step)
            _log_to_wandb(trainer, {TABLE: table}, step)


def _log_to_wandb(trainer: L.Trainer, values: Mapping[str, Any], step: int) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            named = {VALIDATION + name: value for name, value in values.items()}
            logger.log_metrics({**named, EPOCH: trainer.current_epoch}, step=step)


def _log_picture(trainer: L.Trainer, name: str, path: Path, step: int) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)], step=step)
        elif isinstance(logger, TensorBoardLogger):
            from PIL import Image

            picture = np.asarray(Image.open(path).convert("RGB"))
            logger.experiment.add_image(name, picture, step, dataformats="HWC")


def _log_samples(trainer: L.Trainer, panels: Sequence[SamplePanels], step: int) -> None:
    rows = np.stack([np.hstack([one.garment, one.person, one.generated]) for one in panels])
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image("val/samples", list(rows), step=step, caption=[one.name for one in panels])
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_images("val/samples", rows, step, dataformats="NHWC")
