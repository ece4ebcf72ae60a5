"""From a configuration to objects: the one place where everything meets. It holds no logic of its own."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateMonitor,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from i2am_train.callbacks.averaging import AveragedWeights
from i2am_train.callbacks.checkpoints import FOLDER as CHECKPOINTS
from i2am_train.callbacks.checkpoints import CheckpointCallback, steps_done
from i2am_train.callbacks.evaluation import EvaluationCallback
from i2am_train.callbacks.generation import GenerationCallback
from i2am_train.callbacks.guard import FiniteGuard
from i2am_train.callbacks.interruption import InterruptionCallback, StopAfterSteps
from i2am_train.callbacks.snapshots import BestModelCallback, SnapshotCallback
from i2am_train.callbacks.wandb_logger import TrackedLogger
from i2am_train.config.attention import AttributionConfig
from i2am_train.config.build import plain
from i2am_train.config.data import DataConfig
from i2am_train.config.evaluation import EvaluateConfig
from i2am_train.config.locations import checkpoint_folder, dataset_folder
from i2am_train.config.models import SamplingConfig
from i2am_train.config.training import OptimizationConfig, TrainConfig
from i2am_train.data.cache import LatentCache
from i2am_train.data.module import TryOnDataModule
from i2am_train.data.opening import Reading
from i2am_train.data.synthetic.dataset import make_dataset
from i2am_train.errors import CheckpointError, ConfigError
from i2am_train.evaluation.evaluator import EvaluationSettings
from i2am_train.evaluation.scoring import ScoringOptions
from i2am_train.fingerprints import data_state
from i2am_train.losses.objective import Objective, make_objective
from i2am_train.metrics.registry import metric_info
from i2am_train.models.pretrained import INDEX_FILE
from i2am_train.models.tryon import TryOnModel
from i2am_train.processes import first_process, wait_for
from i2am_train.runs import (
    BEST_FOLDER,
    MODEL_FOLDER,
    SNAPSHOTS_FOLDER,
    RunFolder,
    require_apart,
)
from i2am_train.tracking.artifacts import log_model, use_dataset
from i2am_train.tracking.names import TRAIN_JOB
from i2am_train.tracking.session import open_run
from i2am_train.training.checkpoint_io import AtomicCheckpointIO
from i2am_train.training.csv_history import ContinuedCSVLogger
from i2am_train.training.encode_dataset import cache_key
from i2am_train.training.module import TryOnModule
from i2am_train.training.optimization import eight_bit_adamw
from i2am_train.training.preflight import accumulation, memory_advice
from i2am_train.training.rehearsal import Measured, StepTimer
from i2am_train.training.sharding import ShardedStrategy, ShardedTryOnModule
from i2am_train.types import Device, Pairing

# Lightning sets this level when it is imported, so it can only be changed afterwards; its remarks on devices and its
# advertisements would bury a command's own output.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

ADAPTER_FOLDER = "lora"
"""Where it keeps the adapters alone, if it trained any."""


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


def prepare_data(data: DataConfig, *outputs: Path | None) -> Path:
    """The dataset's folder; the embedded dataset is made if it is not there yet.

    Raises:
        RunFolderError: one of the folders that the command writes lies in it, or it in one of them.
    """
    synthetic = data.synthetic
    root = data.root or dataset_folder(data.size, synthetic.train, synthetic.test, synthetic.seed)
    require_apart(root, *outputs, data.cache_copies)
    if data.root is not None:
        return root
    if not first_process():
        wait_for(root)
    elif not root.is_dir():
        make_dataset(
            root, synthetic.train, synthetic.test, data.size, synthetic.seed, progress=True
        )
    return root


def reading_of(data: DataConfig) -> Reading:
    """How the dataset folder is read."""
    return Reading(data.layout, tuple(data.categories), data.fit)


def open_cache(data: DataConfig, root: Path, model: TryOnModel) -> LatentCache | None:
    """The cache of ``data.cache``, checked to be what this model would make of this dataset; None without one."""
    if data.cache is None:
        return None
    cache = LatentCache(data.cache, data.cache_copies)
    cache.require(cache_key(model, data_state(root), reading_of(data)), augment=data.augment)
    return cache


def make_datamodule(
    data: DataConfig,
    root: Path,
    *,
    seed: int,
    eval_batch_size: int,
    validation_samples: int = 0,
    test_samples: int | None = None,
    pairing: Pairing = Pairing.PAIRED,
    cache: LatentCache | None = None,
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
        cache=cache,
    )


def make_settings(
    sampling: SamplingConfig, attribution: AttributionConfig, metrics: list[str]
) -> EvaluationSettings:
    """What an evaluation samples and scores."""
    return EvaluationSettings(sampling=sampling, attribution=attribution, metrics=tuple(metrics))


def make_scoring(config: EvaluateConfig) -> ScoringOptions:
    """How an evaluation scores finished images."""
    evaluation = config.evaluation
    return ScoringOptions(
        metrics=tuple(evaluation.metrics),
        kernel_subset_size=evaluation.kernel_subset_size,
        kernel_subsets=evaluation.kernel_subsets,
        batch_size=evaluation.batch_size,
        device=chosen_device(config.device),
        progress=config.progress_bar,
    )


def make_loggers(config: TrainConfig, folder: Path) -> list[Logger]:
    """CSV, TensorBoard and W&B; files lie in the run folder.

    What a killed attempt logged after its last checkpoint is dropped; W&B keeps it, and shows those steps twice.
    """
    tracking = config.tracking
    done = steps_done(folder)
    loggers: list[Logger] = []
    if tracking.csv:
        loggers.append(ContinuedCSVLogger(folder, done))
    if tracking.tensorboard:
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version="", purge_step=done))
    if tracking.wandb != "disabled":
        loggers.append(TrackedLogger(folder, tracking.project, partial(start_run, config, folder)))
    return loggers


def start_run(config: TrainConfig, folder: Path) -> Any:
    """The W&B run of a training, with configuration, provenance and dataset."""
    manifest = RunFolder(folder, resumed=False).manifest
    manifest.pop("settings", None)
    run = open_run(
        config.tracking,
        folder,
        name=folder.name,
        job_type=TRAIN_JOB,
        arm=config.name,
        config={**plain(config), "provenance": manifest},
        tags=[config.name, f"seed{config.seed}"],
    )
    use_dataset(run, prepare_data(config.data), manifest["data"])
    return run


def record_model(trainer: L.Trainer, config: TrainConfig, folder: Path) -> None:
    """Logs the finished model as an artifact of the W&B run."""
    manifest = RunFolder(folder, resumed=False).manifest
    results = [c.result for c in trainer.callbacks if isinstance(c, EvaluationCallback)]  # type: ignore[attr-defined]
    metadata = {
        "metrics": results[0].metrics if results and results[0] else {},
        "step": trainer.global_step,
        "data": manifest["data"],
        "git": manifest["git"],
    }
    for logger in trainer.loggers:
        if isinstance(logger, TrackedLogger):
            log_model(
                logger.experiment,
                folder,
                folder / MODEL_FOLDER,
                metadata,
                upload=config.tracking.upload_model,
            )


def finish_tracking(trainer: L.Trainer, *, failed: bool = False) -> None:
    """Ends the W&B run; the next training in this process would otherwise be written into it."""
    for logger in trainer.loggers:
        if isinstance(logger, TrackedLogger):
            logger.end(failed=failed)


def check_trainer(config: TrainConfig) -> int:
    """Fails as the trainer would on this machine, before anything is written; the number of processes.

    Raises:
        ConfigError: no such accelerator, strategy, number of devices or optimizer, or not on this machine; the global
            batch does not fit the number of devices.
    """
    trainer = config.trainer
    if config.optimization.optimizer == "adamw8bit":
        eight_bit_adamw()
    tried = _try_trainer(
        _hardware(config),
        f"trainer.accelerator={trainer.accelerator}, trainer.devices={trainer.devices}, "
        f"trainer.strategy={trainer.strategy}, optimization.precision={config.optimization.precision}",
        "trainer.accelerator=auto takes what this machine has.",
    )
    accumulation(config, tried.world_size)
    return tried.world_size


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


def _try_trainer(hardware: dict[str, Any], options: str, advice: str) -> L.Trainer:
    try:
        return L.Trainer(
            **hardware, logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
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


def chosen_device(name: Device) -> torch.device:
    """The device that a command without a trainer computes on.

    Raises:
        ConfigError: there is no CUDA device.
    """
    check_device(name)
    use_gpu = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")


def _hardware(config: TrainConfig) -> dict[str, Any]:
    """Those of the trainer's arguments that a machine may lack."""
    trainer = config.trainer
    return {
        "accelerator": trainer.accelerator,
        "devices": trainer.devices,
        "strategy": ShardedStrategy() if trainer.sharded else trainer.strategy,
        # Weights that are gathered for validation are trained afterwards.
        "inference_mode": not trainer.sharded,
        "num_nodes": trainer.num_nodes,
        "precision": config.optimization.precision,
        "limit_train_batches": trainer.limit_train_batches,
        "limit_val_batches": trainer.limit_val_batches,
    }


def release_signals(trainer: L.Trainer) -> None:
    """Gives Ctrl-C and other signals back to whoever had them before training."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, InterruptionCallback):
            callback.restore()


def measure_steps(
    config: TrainConfig, module: TryOnModule, datamodule: TryOnDataModule
) -> Measured:
    """Takes a few steps of a training run and writes nothing."""
    timer = StepTimer()
    trainer = L.Trainer(
        **_hardware(config) | {"limit_val_batches": 0},
        max_epochs=-1,
        gradient_clip_val=config.optimization.gradient_clip,
        callbacks=[timer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.accumulate_grad_batches = accumulation(config, trainer.world_size)
    try:
        with memory_advice(trainer):
            trainer.fit(module, datamodule)
    finally:
        module.teardown("fit")
    return timer.measured(trainer)


def make_trainer(config: TrainConfig, folder: Path, own: Sequence[Callback] = ()) -> L.Trainer:
    """Lightning's trainer with loggers, checkpoints, averaging, the evaluation callback, and the user's ``own``."""
    callbacks: list[Callback] = [
        StopAfterSteps(config.optimization.steps),
        CheckpointCallback(
            folder / CHECKPOINTS,
            config.trainer.checkpoint_every_n_steps,
            config.trainer.keep_checkpoints,
        ),
        FiniteGuard(folder, gradients=config.optimization.precision != "16-mixed"),
    ]
    loggers = make_loggers(config, folder)
    if config.validation.samples:
        metrics = make_settings(config.sampling, config.attribution, config.evaluation.metrics)
        callbacks.append(
            EvaluationCallback(
                metrics,
                folder / "validation",
                panel_samples=config.validation.panel_samples,
                table_samples=config.tracking.table_samples
                if config.tracking.wandb != "disabled"
                else 0,
            )
        )
    if (best := config.trainer.keep_best) is not None:
        better = bool(metric_info(best).higher_is_better)
        callbacks.append(BestModelCallback(folder / BEST_FOLDER, best, higher_is_better=better))
    averaging = None
    if config.optimization.ema_decay is not None:
        averaging = AveragedWeights(decay=config.optimization.ema_decay)
        callbacks.append(averaging)
    if config.trainer.snapshot_every_n_steps is not None:
        callbacks.append(
            SnapshotCallback(
                folder / SNAPSHOTS_FOLDER,
                config.trainer.snapshot_every_n_steps,
                config.optimization.steps,
                averaging,
            )
        )
    callbacks += own
    if config.trainer.progress_bar:
        callbacks.append(TQDMProgressBar(leave=True))
    # After all that have a state, so that it saves what they made of the step.
    callbacks.append(InterruptionCallback(folder / CHECKPOINTS))
    if loggers:  # after what may stop the run before a step, whose rate is logged when it is taken
        callbacks.append(LearningRateMonitor("step"))
    trainer = config.trainer
    hardware = _hardware(config)
    if not config.validation.samples:
        hardware["limit_val_batches"] = 0
    made = L.Trainer(
        **hardware,
        max_epochs=-1,  # StopAfterSteps ends it
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
    made.accumulate_grad_batches = accumulation(config, made.world_size)
    return made


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
    return TryOnModule(model, Objective(), OptimizationConfig())


def make_module(config: TrainConfig) -> TryOnModule:
    """The model of ``init`` with its objective."""
    objective = make_objective(config.objective)
    model = load_model(config.init, config.data)
    if config.optimization.from_scratch:
        model.redraw_denoiser()
    kind = ShardedTryOnModule if config.trainer.sharded else TryOnModule
    return kind(
        model,
        objective,
        config.optimization,
        config.seed,
        cached=config.data.cache is not None,
    )
