"""From a configuration to objects: the one place where everything meets. It holds no logic of its own."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateMonitor,
    ModelCheckpoint,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from i2am_train.callbacks.evaluation import EvaluationCallback
from i2am_train.callbacks.generation import GenerationCallback
from i2am_train.callbacks.snapshots import FOLDER as SNAPSHOTS
from i2am_train.callbacks.snapshots import AveragedWeights, SnapshotCallback
from i2am_train.callbacks.stopping import StopAfterSteps
from i2am_train.config.build import plain
from i2am_train.config.locations import checkpoint_folder, dataset_folder
from i2am_train.config.schema import (
    AttributionConfig,
    DataConfig,
    Device,
    EvaluateConfig,
    ObjectiveConfig,
    OptimizationConfig,
    SamplingConfig,
    TrackingConfig,
    TrainConfig,
)
from i2am_train.datasets.datamodule import TryOnDataModule
from i2am_train.datasets.opening import Reading
from i2am_train.datasets.synthetic import make_dataset
from i2am_train.errors import CheckpointError, ConfigError
from i2am_train.evaluation.evaluator import EvaluationSettings
from i2am_train.evaluation.scoring import ScoringOptions
from i2am_train.losses.base import LossVariant
from i2am_train.losses.objective import AttentionObjective, TermWeights
from i2am_train.models.tryon import INDEX_FILE, TryOnModel
from i2am_train.training.checkpoint_io import AtomicCheckpointIO
from i2am_train.training.csv_history import ContinuedCSVLogger
from i2am_train.training.module import TryOnModule
from i2am_train.training.step import TrainingObjective
from i2am_train.types import Pairing

# Lightning sets this level when it is imported, so it can only be changed afterwards; its remarks on devices and its
# advertisements would bury a command's own output.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

MODEL_FOLDER = "model"
"""Where a finished run keeps its model, inside the run folder."""


def model_folder(name: str) -> Path:
    """The model's folder that ``init`` or ``checkpoint`` means: shipped, a model's own, or a finished run's."""
    folder = checkpoint_folder(name)
    inside = folder / MODEL_FOLDER
    if not (folder / INDEX_FILE).is_file() and (folder / "settings.json").is_file():
        if not (inside / INDEX_FILE).is_file():
            raise CheckpointError(
                f"The run in {folder} is not finished: it has no {MODEL_FOLDER}/. "
                "Give its training command again to finish it."
            )
        return inside
    return folder


def load_model(name: str, data: DataConfig) -> TryOnModel:
    """The checkpoint's model, checked to be of the images' size."""
    folder = model_folder(name)
    model = TryOnModel.from_pretrained(folder)
    if model.image_size != data.size:
        raise CheckpointError(
            f"The model in {folder} was made for images of {model.image_size}, and the data is set to "
            f"{data.size}. Set data.height={model.image_size.height} data.width={model.image_size.width}, "
            "or choose another checkpoint."
        )
    return model


def prepare_data(data: DataConfig) -> Path:
    """The dataset's folder; the embedded dataset is made if it is not there yet."""
    if data.root is not None:
        return data.root
    synthetic = data.synthetic
    root = dataset_folder(data.size, synthetic.train, synthetic.test, synthetic.seed)
    if not root.is_dir():
        make_dataset(
            root, synthetic.train, synthetic.test, data.size, synthetic.seed, progress=True
        )
    return root


def reading_of(data: DataConfig) -> Reading:
    """How the dataset folder is read."""
    return Reading(data.layout, tuple(data.categories), data.fit)


def make_datamodule(
    data: DataConfig,
    root: Path,
    *,
    seed: int,
    eval_batch_size: int,
    validation_samples: int = 0,
    test_samples: int | None = None,
    pairing: Pairing = Pairing.PAIRED,
) -> TryOnDataModule:
    """Loaders of training, validation and test samples."""
    return TryOnDataModule(
        root,
        data.size,
        batch_size=data.batch_size,
        eval_batch_size=eval_batch_size,
        workers=data.workers,
        augment=data.augment,
        seed=seed,
        validation_samples=validation_samples,
        test_samples=test_samples,
        test_pairing=pairing,
        reading=reading_of(data),
    )


def make_objective(
    objective: ObjectiveConfig, optimization: OptimizationConfig
) -> TrainingObjective:
    """The losses of training."""
    return TrainingObjective(
        attention=AttentionObjective(
            weights=TermWeights(**objective.weights),
            variant=LossVariant(objective.variant),
            margin=objective.margin,
            sigma=objective.sigma,
            supervised_sigma=objective.sigma,
            detach_centers=objective.detach_centers,
        ),
        layer=objective.layer,
        snr_gamma=optimization.snr_gamma,
    )


def make_settings(
    sampling: SamplingConfig, attribution: AttributionConfig, metrics: list[str]
) -> EvaluationSettings:
    """What an evaluation samples and scores."""
    return EvaluationSettings(sampling=sampling, attribution=attribution, metrics=tuple(metrics))


def make_scoring(config: EvaluateConfig) -> ScoringOptions:
    """How an evaluation scores finished images."""
    evaluation = config.evaluation
    use_gpu = config.device != "cpu" and torch.cuda.is_available()
    return ScoringOptions(
        metrics=tuple(evaluation.metrics),
        kernel_subset_size=evaluation.kernel_subset_size,
        kernel_subsets=evaluation.kernel_subsets,
        batch_size=evaluation.batch_size,
        device=torch.device("cuda" if use_gpu else "cpu"),
        progress=config.progress_bar,
    )


def make_loggers(tracking: TrackingConfig, folder: Path, settings: dict[str, Any]) -> list[Logger]:
    """CSV, TensorBoard and W&B, all inside the run folder."""
    loggers: list[Logger] = []
    if tracking.csv:
        loggers.append(ContinuedCSVLogger(folder))
    if tracking.tensorboard:
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version=""))
    if tracking.wandb != "disabled":
        wandb = WandbLogger(
            name=tracking.name or folder.name,
            project=tracking.project,
            group=tracking.group,
            save_dir=folder,
            offline=tracking.wandb == "offline",
        )
        wandb.log_hyperparams(settings)
        loggers.append(wandb)
    return loggers


def finish_tracking(trainer: L.Trainer) -> None:
    """Ends the W&B run; the next training in this process would otherwise be written into it."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            logger.experiment.finish()


def check_trainer(config: TrainConfig) -> None:
    """Fails as the trainer would on this machine, before anything is written.

    Raises:
        ConfigError: no such accelerator, strategy or number of devices, or not on this machine.
    """
    trainer = config.trainer
    _try_trainer(
        _hardware(config),
        f"trainer.accelerator={trainer.accelerator}, trainer.devices={trainer.devices}, "
        f"trainer.strategy={trainer.strategy}, optimization.precision={config.optimization.precision}",
        "trainer.accelerator=auto takes what this machine has.",
    )


def check_test_trainer(config: EvaluateConfig) -> None:
    """Fails as the evaluation's trainer would on this machine, before anything is written.

    Raises:
        ConfigError: no such device, strategy or number of devices, or not on this machine.
    """
    check_device(config.device)
    _try_trainer(
        _test_hardware(config),
        f"device={config.device}, devices={config.devices}, strategy={config.strategy}, "
        f"precision={config.precision}",
        "device=auto devices=1 strategy=auto takes what this machine has.",
    )


def _try_trainer(hardware: dict[str, Any], options: str, advice: str) -> None:
    try:
        L.Trainer(**hardware, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    except (ImportError, MisconfigurationException, TypeError, ValueError) as error:
        raise ConfigError(
            f"Lightning refuses {options}: {' '.join(str(error).split())} {advice}"
        ) from error


def check_device(name: Device) -> None:
    """Fails where a command could not compute on ``device``.

    Raises:
        ConfigError: there is no CUDA device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device=cuda was asked for, and torch finds no CUDA device on this machine. Set device=cpu, or device=auto "
            "to take what there is."
        )


def _hardware(config: TrainConfig) -> dict[str, Any]:
    """Those of the trainer's arguments that a machine may lack."""
    trainer = config.trainer
    return {
        "accelerator": trainer.accelerator,
        "devices": trainer.devices,
        "strategy": trainer.strategy,
        "num_nodes": trainer.num_nodes,
        "precision": config.optimization.precision,
        "limit_train_batches": trainer.limit_train_batches,
        "limit_val_batches": trainer.limit_val_batches,
    }


def make_trainer(config: TrainConfig, folder: Path) -> L.Trainer:
    """Lightning's trainer with loggers, checkpoints, averaging and the evaluation callback."""
    settings = plain(config)
    callbacks: list[Callback] = [
        StopAfterSteps(config.optimization.steps),
        ModelCheckpoint(
            folder / "checkpoints",
            filename="last",
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        ),
    ]
    loggers = make_loggers(config.tracking, folder, settings)
    if loggers:
        callbacks.append(LearningRateMonitor("step"))
    if config.validation.samples:
        metrics = make_settings(config.sampling, config.attribution, config.evaluation.metrics)
        callbacks.append(
            EvaluationCallback(
                metrics, folder / "validation", panel_samples=config.validation.panel_samples
            )
        )
    averaging = None
    if config.optimization.ema_decay is not None:
        averaging = AveragedWeights(decay=config.optimization.ema_decay)
        callbacks.append(averaging)
    if config.trainer.snapshot_every_n_steps is not None:
        callbacks.append(
            SnapshotCallback(
                folder / SNAPSHOTS,
                config.trainer.snapshot_every_n_steps,
                config.optimization.steps,
                averaging,
            )
        )
    if config.trainer.progress_bar:
        callbacks.append(TQDMProgressBar(leave=True))
    trainer = config.trainer
    hardware = _hardware(config)
    if not config.validation.samples:
        hardware["limit_val_batches"] = 0
    return L.Trainer(
        **hardware,
        max_epochs=-1,  # StopAfterSteps ends it
        accumulate_grad_batches=config.optimization.accumulate,
        gradient_clip_val=config.optimization.gradient_clip,
        check_val_every_n_epoch=config.validation.every_epochs,
        num_sanity_val_steps=0,
        log_every_n_steps=trainer.log_every_n_steps,
        deterministic=trainer.deterministic,
        enable_progress_bar=trainer.progress_bar,
        enable_model_summary=False,
        use_distributed_sampler=False,  # the data module's own samplers split without repeating
        default_root_dir=folder,
        callbacks=callbacks,
        logger=loggers or False,
        plugins=[AtomicCheckpointIO()],
    )


def _test_hardware(config: EvaluateConfig) -> dict[str, Any]:
    return {
        "accelerator": config.device,
        "devices": config.devices,
        "strategy": config.strategy,
        "precision": config.precision,
    }


def make_test_trainer(config: EvaluateConfig, callback: GenerationCallback) -> L.Trainer:
    """A trainer that only tests: no loggers, no checkpoints."""
    callbacks: list[Callback] = [callback]
    if config.progress_bar:
        callbacks.append(TQDMProgressBar(leave=True))
    return L.Trainer(
        **_test_hardware(config),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=config.progress_bar,
        use_distributed_sampler=False,
        callbacks=callbacks,
    )


def make_untrained_module(model: TryOnModel) -> TryOnModule:
    """A model wrapped for testing, where objective and optimizer do not matter."""
    options = OptimizationConfig()
    return TryOnModule(model, make_objective(ObjectiveConfig(), options), options)


def make_module(config: TrainConfig) -> TryOnModule:
    """The model of ``init`` with its objective."""
    model = load_model(config.init, config.data)
    if config.optimization.from_scratch:
        model.redraw_denoiser()
    return TryOnModule(
        model,
        make_objective(config.objective, config.optimization),
        config.optimization,
        config.seed,
    )
