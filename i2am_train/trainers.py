"""Lightning's trainers, and the modules that they train or test, as the options ask for them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import getattr_static, signature
from pathlib import Path
from types import FunctionType
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, TQDMProgressBar

from i2am_train.callbacks.checkpoints import CHECKPOINTS_FOLDER, AtomicCheckpointIO, CheckpointCallback
from i2am_train.callbacks.evaluation import EvaluationCallback, GenerationCallback
from i2am_train.callbacks.interruption import FiniteGuard, InterruptionCallback, StopAfterSteps
from i2am_train.callbacks.loggers import StepSeconds, make_loggers
from i2am_train.callbacks.weights import AveragedWeights, BestModelCallback, SnapshotCallback
from i2am_train.config.evaluation import EvaluateConfig
from i2am_train.config.training import OptimizationConfig, TrainConfig
from i2am_train.data.module import TryOnDataModule
from i2am_train.doors import calls, make, path_and_keywords, resolve
from i2am_train.errors import ConfigError
from i2am_train.evaluation.evaluator import EvaluationSettings
from i2am_train.losses.objective import Objective, make_objective
from i2am_train.metrics.registry import metric_info
from i2am_train.models.by_name import by_number, load_model
from i2am_train.models.tryon import TryOnModel
from i2am_train.ops.numerics import check_bfloat16, check_device, chosen_precision
from i2am_train.runs import BEST_FOLDER, SNAPSHOTS_FOLDER
from i2am_train.training.module import TryOnModule
from i2am_train.training.optimization import eight_bit_adamw
from i2am_train.training.preflight import Measured, StepTimer, accumulation, memory_advice
from i2am_train.training.sharding import ShardedStrategy, ShardedTryOnModule

# Lightning sets this level when it is imported, so it can only be changed afterwards; its remarks on devices and its
# advertisements would bury a command's own output.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

_CALLBACK = (
    "a callback of Lightning: a class derived from lightning.Callback, a function that returns one (both may take "
    "keywords), or an object of such a class"
)


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
    if config.optimization.precision == "bf16-mixed":
        check_bfloat16(tried.strategy.root_device, "optimization.precision=bf16-mixed")
    chosen_precision(config.sampling.precision, tried.strategy.root_device)
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
        f"device={config.device}, devices={config.devices}, strategy={config.strategy}",
        "device=auto devices=1 strategy=auto takes what this machine has.",
    )


def _try_trainer(hardware: dict[str, Any], options: str, advice: str) -> L.Trainer:
    try:
        tried = L.Trainer(**hardware, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    except (ImportError, MisconfigurationException, TypeError, ValueError) as error:
        raise ConfigError(f"Lightning refuses {options}: {' '.join(str(error).split())} {advice}") from error
    return tried


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
    }


def release_signals(trainer: L.Trainer) -> None:
    """Gives Ctrl-C and other signals back to whoever had them before training."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, InterruptionCallback):
            callback.restore()


def measure_steps(config: TrainConfig, module: TryOnModule, datamodule: TryOnDataModule) -> Measured:
    """Takes a few steps of a training run and writes nothing."""
    timer = StepTimer()
    trainer = L.Trainer(
        **_hardware(config),
        limit_val_batches=0,
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


def imported_callbacks(entries: Sequence[str | Mapping[str, Any]]) -> list[Callback]:
    """The callbacks that the option ``callbacks`` names, in its order.

    Entries are ``package.module:name``, or a mapping of it (``fn``) and keywords.

    Raises:
        ConfigError: as `check_callbacks`; or making a callback fails, or gives something else.

    >>> imported_callbacks(["lightning.pytorch.callbacks:Timer"])
    Traceback (most recent call last):
        ...
    i2am_train.errors.ConfigError: callbacks[0]=lightning.pytorch.callbacks:Timer was read from a file, ...
    """
    made = []
    for named, found, keywords in _found_callbacks(entries):
        callback = found if isinstance(found, Callback) else make(found, named, **keywords)
        if not isinstance(callback, Callback):
            raise ConfigError(f"{named} returned a {type(callback).__name__}. Expected {_CALLBACK}.")
        if wrong := _wrong_hook(type(callback)):
            raise ConfigError(f"{named} {wrong}. Expected {_CALLBACK}.")
        made.append(callback)
    return made


def check_callbacks(entries: Sequence[str | Mapping[str, Any]]) -> None:
    """Fails as `imported_callbacks` would, without making a callback.

    Raises:
        ConfigError: an entry cannot be imported, or is no callback and cannot be called for one.

    >>> check_callbacks([{"every": 5}])
    Traceback (most recent call last):
        ...
    i2am_train.errors.ConfigError: callbacks[0]={'every': 5} is not possible: expected package.module:name, or ...
    """
    list(_found_callbacks(entries))


def _found_callbacks(entries: Sequence[str | Mapping[str, Any]]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each entry's name in messages, object and keywords."""
    for index, entry in enumerate(entries):
        option = f"callbacks[{index}]"
        path, keywords = path_and_keywords(entry, option)
        found = resolve(path, option, _CALLBACK, partial(_callback_fault, keywords))
        yield f"{option}={path}", found, keywords


def _callback_fault(keywords: Mapping[str, Any], found: Any) -> str | None:
    if isinstance(found, Callback):
        return "is an object already and takes no keywords" if keywords else None
    if isinstance(found, type) and not issubclass(found, Callback):
        return "is a class that does not derive from lightning.Callback"
    return (isinstance(found, type) and _wrong_hook(found)) or calls(**keywords)(found)


def _wrong_hook(kind: type[Callback]) -> str | None:
    """Which method cannot be called as Lightning calls it, as the end of a sentence."""
    hooks = {name: hook for name, hook in vars(Callback).items() if not name.startswith("_")}
    for name, usual in hooks.items():
        if isinstance(usual, FunctionType) and isinstance(getattr_static(kind, name), FunctionType):
            arguments = [one.name for one in signature(usual).parameters.values() if one.default is one.empty]
            by_name = {"stage": None} if arguments[-1] == "stage" else {}  # of setup and teardown
            if wrong := calls(*(one for one in arguments if one not in by_name), **by_name)(getattr(kind, name)):
                return f"has a method {name} that {wrong}"
    return None


def make_trainer(config: TrainConfig, folder: Path, own: Sequence[Callback] = ()) -> L.Trainer:
    """Lightning's trainer with loggers, checkpoints, averaging, the evaluation callback, and the user's ``own``."""
    callbacks: list[Callback] = [
        StopAfterSteps(config.optimization.steps),
        CheckpointCallback(
            folder / CHECKPOINTS_FOLDER, config.trainer.checkpoint_every_n_steps, config.trainer.keep_checkpoints
        ),
        FiniteGuard(
            folder, gradients=config.optimization.precision != "16-mixed", every=config.trainer.log_every_n_steps
        ),
    ]
    loggers = make_loggers(config, folder)
    if config.validation.samples:
        settings = EvaluationSettings.of(config)
        callbacks.append(
            EvaluationCallback(
                settings,
                folder / "validation",
                panel_samples=config.validation.panel_samples,
                table_samples=config.tracking.table_samples if config.tracking.wandb != "disabled" else 0,
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
                folder / SNAPSHOTS_FOLDER, config.trainer.snapshot_every_n_steps, config.optimization.steps, averaging
            )
        )
    callbacks += own
    if config.trainer.progress_bar:
        callbacks.append(TQDMProgressBar(leave=True))
    # After all that have a state, so that it saves what they made of the step.
    callbacks.append(InterruptionCallback(folder / CHECKPOINTS_FOLDER))
    if loggers:  # after what may stop the run before a step, whose rate is logged when it is taken
        callbacks += [LearningRateMonitor("step"), StepSeconds()]
    trainer = config.trainer
    made = L.Trainer(
        **_hardware(config),
        limit_val_batches=None if config.validation.samples else 0,
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
    return {"accelerator": config.device, "devices": config.devices, "strategy": config.strategy}


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
    """The model of ``init`` with its objective; what it trains becomes the layer that the model is judged at."""
    objective = make_objective(config.objective)
    model = load_model(config.init, config.data)
    if config.optimization.from_scratch:
        model.redraw_denoiser()
    if objective.terms:
        model.config = replace(model.config, layer=by_number(config.objective.first_layer))
    kind = ShardedTryOnModule if config.trainer.sharded else TryOnModule
    return kind(model, objective, config.optimization, config.seed, cached=config.data.cache is not None)
