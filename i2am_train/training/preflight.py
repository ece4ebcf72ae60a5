"""What is checked before a training run begins, what a few of its steps take, and advice where memory was too small.

The figures are for ``i2am train dry_run=true``: sizes, memory, time.
"""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import nn

from i2am_train.attention.compiled import compiled_graphs
from i2am_train.config.training import TrainConfig
from i2am_train.errors import ConfigError, TrainingError
from i2am_train.files import free_space
from i2am_train.metrics.registry import METRICS, metric_names
from i2am_train.models.tryon import TryOnModel

_STEPS = 3
"""Optimizer steps of a rehearsal; the first one warms up and is not counted."""


def check_best(config: TrainConfig) -> None:
    """Fails where the best model was asked for by a score that validation does not make.

    Raises:
        ConfigError: no such score, neither end of it is better, or there is no validation.

    >>> from i2am_train.config.training import TrainerConfig, ValidationConfig
    >>> check_best(TrainConfig(trainer=TrainerConfig(keep_best="iou"), validation=ValidationConfig(samples=0)))
    Traceback (most recent call last):
        ...
    i2am_train.errors.ConfigError: trainer.keep_best=iou needs validation, and validation.samples is 0. Set it to 2 ...
    """
    best = config.trainer.keep_best
    if best is None:
        return
    asked, faithful = metric_names(config.evaluation.metrics), config.validation.faithful_samples > 0
    scores = [
        name
        for name, info in METRICS.items()
        if info.higher_is_better is not None
        and (name in asked or info.group == "attention" or (info.group == "faithfulness" and faithful))
    ]
    if not config.validation.samples:
        raise ConfigError(
            f"trainer.keep_best={best} needs validation, and validation.samples is 0. Set it to 2 or more, or "
            "trainer.keep_best to null."
        )
    if best not in scores:
        known = best in METRICS and METRICS[best].higher_is_better is not None
        add = (
            "set validation.faithful_samples"
            if known and METRICS[best].group == "faithfulness"
            else "add it to evaluation.metrics"
        )
        more = f" For {best}, {add}." if known else ""
        raise ConfigError(
            f"trainer.keep_best={best} is no score that validation makes with a better end. Choose one of "
            f"{', '.join(scores)}.{more}"
        )


def check_batches(config: TrainConfig, training: int, processes: int) -> None:
    """Fails where an epoch of ``training`` samples, which ``processes`` share, would have no batch.

    Raises:
        ConfigError: the share of batches that was asked for is less than one.

    >>> check_batches(TrainConfig(), training=4, processes=1)
    Traceback (most recent call last):
        ...
    i2am_train.errors.ConfigError: An epoch would have no batch: trainer.limit_train_batches=None ...
    """
    limit, batches = config.trainer.limit_train_batches, training // (config.data.batch_size * processes)
    if batches == 0 or (isinstance(limit, float) and int(batches * limit) == 0):
        raise ConfigError(
            f"An epoch would have no batch: trainer.limit_train_batches={limit} of {batches} batches a process. "
            "Set it to a whole number of batches or a larger share, or to null for all; or lower data.batch_size."
        )


def check_disk(config: TrainConfig, model: TryOnModel) -> None:
    """Fails where the disk is too full for what the run will keep, before hours are lost.

    Raises:
        ConfigError: less space is free than models and checkpoints will take.
    """
    trainer, optimization = config.trainer, config.optimization
    snapshots = optimization.steps // (trainer.snapshot_every_n_steps or optimization.steps + 1)
    models = 1 + snapshots + (trainer.keep_best is not None)
    averaged = optimization.ema_decay is not None
    needed = models * _weight_bytes(model)
    # One more than is kept: a checkpoint is whole before the oldest goes.
    needed += (trainer.keep_checkpoints + 1) * _checkpoint_bytes(model, averaged=averaged)
    existing, free = free_space(config.folder)
    if needed > free:
        raise ConfigError(
            f"{existing} has {free / 2**30:.1f} GiB free, and this run will keep about {needed / 2**30:.1f} GiB "
            f"({models} models, {trainer.keep_checkpoints + 1} checkpoints). Give output=FOLDER on another disk, keep "
            "fewer (trainer.snapshot_every_n_steps, trainer.keep_checkpoints), or make room."
        )


def accumulation(config: TrainConfig, processes: int) -> int:
    """Batches per optimizer step and process.

    Raises:
        ConfigError: the global batch is not a multiple of what all processes read at once.

    >>> from i2am_train.config.data import DataConfig
    >>> from i2am_train.config.training import OptimizationConfig
    >>> config = TrainConfig(data=DataConfig(batch_size=4), optimization=OptimizationConfig(global_batch=64))
    >>> accumulation(config, processes=2)  # 64 = 4 x 2 x 8
    8
    """
    wanted, at_once = config.optimization.global_batch, config.data.batch_size * processes
    if wanted is None:
        return config.optimization.accumulate
    if wanted % at_once:
        raise ConfigError(
            f"optimization.global_batch={wanted} is not a multiple of data.batch_size={config.data.batch_size} times "
            f"{processes} processes. Set data.batch_size to a divisor of {wanted / processes:g}, or change the number "
            "of devices."
        )
    return wanted // at_once


# -- a rehearsal ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the steps of a rehearsal took."""

    seconds: float
    """Of an optimizer step."""
    first_seconds: float
    """Of the first one, with loading, warming up and compilation."""
    graphs: int
    """What torch.compile made of the networks; 0 without it."""
    peak_bytes: int
    """Most memory in use: of the GPU, or of the process without one."""
    device: str
    processes: int
    accumulate: int
    steps_per_epoch: int


class StepTimer(L.Callback):
    """Stops after three optimizer steps and keeps the time of each."""

    def __init__(self) -> None:
        self.start = 0.0
        self.ends: list[float] = []
        self.graphs = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the time, and counts what was compiled before."""
        self.start, self.graphs = time.perf_counter(), compiled_graphs()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Takes the time where a step has ended."""
        if trainer.global_step > len(self.ends):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
        trainer.should_stop = trainer.global_step >= _STEPS

    def measured(self, trainer: L.Trainer) -> Measured:
        """What was seen, after the run."""
        steps = max(1, len(self.ends) - 1)
        on_gpu = trainer.strategy.root_device.type == "cuda"
        return Measured(
            seconds=(self.ends[-1] - self.ends[0]) / steps,
            first_seconds=self.ends[0] - self.start,
            graphs=compiled_graphs() - self.graphs,
            peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else _peak_of_process(),
            device=torch.cuda.get_device_name() if on_gpu else "CPU",
            processes=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches,
            steps_per_epoch=max(1, int(trainer.num_training_batches) // trainer.accumulate_grad_batches),
        )


def _peak_of_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def _weight_bytes(model: TryOnModel) -> int:
    """Size of a saved model."""
    return sum(parameter.numel() for parameter in model.parameters()) * 4


def _checkpoint_bytes(model: TryOnModel, *, averaged: bool) -> int:
    """Size of a Lightning checkpoint: trained weights, AdamW's two moments, and their average if there is one."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained * 4 * (4 if averaged else 3)


def describe_run(config: TrainConfig, model: TryOnModel, measured: Measured) -> Iterator[tuple[str, str]]:
    """What a run takes, from its rehearsal: terms and texts."""
    for name, network in model.named_children():
        if any(True for _ in network.parameters()):
            yield name, _parameters(network)
    steps, per_epoch = config.optimization.steps, measured.steps_per_epoch
    batch = config.data.batch_size * measured.processes * measured.accumulate
    yield (
        "global batch",
        f"{batch} = {config.data.batch_size} x {measured.processes} processes x {measured.accumulate} accumulated",
    )
    yield "steps", f"{steps} in {steps / per_epoch:.1f} epochs of {per_epoch}"
    yield ("time", f"{_duration(steps * measured.seconds)} ({measured.seconds:.2f} s a step), validation not counted")
    if config.optimization.compile:
        yield ("compilation", f"{measured.graphs} graphs; the first step took {_duration(measured.first_seconds)}")
    each = ", in the first process" if measured.processes > 1 else ""
    yield "memory", f"{measured.peak_bytes / 2**30:.1f} GiB at most on {measured.device}{each}"
    averaged = config.optimization.ema_decay is not None
    yield "model", f"{_weight_bytes(model) / 2**30:.2f} GiB on disk"
    yield "checkpoint", f"{_checkpoint_bytes(model, averaged=averaged) / 2**30:.2f} GiB on disk"


def _parameters(network: nn.Module) -> str:
    total = sum(parameter.numel() for parameter in network.parameters())
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    return f"{total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M of them trained"


def _duration(seconds: float) -> str:
    """
    >>> _duration(42), _duration(3700)
    ('42 s', '1 h 2 min')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


# -- while it runs ----------------------------------------------------------------------------------------------------


@contextmanager
def memory_advice(trainer: L.Trainer) -> Iterator[None]:
    """Says which options need less memory where there was too little.

    Raises:
        TrainingError: in place of torch's error.

    >>> from types import SimpleNamespace
    >>> with memory_advice(SimpleNamespace(global_step=7)):
    ...     raise torch.OutOfMemoryError("CUDA out of memory.")
    Traceback (most recent call last):
        ...
    i2am_train.errors.TrainingError: Out of memory in step 8: CUDA out of memory. Lower data.batch_size ...
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise TrainingError(
            f"Out of memory in step {trainer.global_step + 1}: {str(error).splitlines()[0]} Lower data.batch_size "
            "(with optimization.global_batch the result stays the same), set optimization.gradient_checkpointing=true, "
            "train fewer or smaller numbers (optimization.precision=bf16-mixed, optimization.optimizer=adamw8bit, "
            "optimization.trainable=cross_attention), or share the weights between GPUs (trainer=fsdp). The same "
            "command goes on from the last checkpoint."
        ) from error


def check_trained(trainer: L.Trainer, config: TrainConfig) -> None:
    """Fails where training ended early without a word, before a model that is not trained is taken for one that is.

    Raises:
        TrainingError: fewer steps were taken than asked for.

    >>> from types import SimpleNamespace
    >>> check_trained(SimpleNamespace(global_step=7), TrainConfig())
    Traceback (most recent call last):
        ...
    i2am_train.errors.TrainingError: Training ended after 7 of ... steps, and why is not known: ...
    """
    if trainer.global_step < config.optimization.steps:
        raise TrainingError(
            f"Training ended after {trainer.global_step} of {config.optimization.steps} steps, and why is not known: "
            "an epoch may have had no batches. No model was saved. Check data and the trainer's options; the same "
            "command goes on from the last checkpoint."
        )
