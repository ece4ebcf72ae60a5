"""What is checked before a training run begins, and said when the machine turns out too small after all."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import torch

from i2am_train.config.training import TrainConfig
from i2am_train.errors import ConfigError, TrainingError
from i2am_train.files import free_space
from i2am_train.metrics.registry import METRICS, metric_names
from i2am_train.models.tryon import TryOnModel
from i2am_train.training.rehearsal import checkpoint_bytes, weight_bytes


def check_best(config: TrainConfig) -> None:
    """Fails where the best model was asked for by a score that validation does not make.

    Raises:
        ConfigError: no such score, neither end of it is better, or there is no validation.
    """
    best = config.trainer.keep_best
    if best is None:
        return
    asked = metric_names(config.evaluation.metrics)
    scores = [
        name
        for name, info in METRICS.items()
        if info.higher_is_better is not None and (info.group == "attention" or name in asked)
    ]
    if not config.validation.samples:
        raise ConfigError(
            f"trainer.keep_best={best} needs validation, and validation.samples is 0. Set it to 2 or more, or "
            "trainer.keep_best to null."
        )
    if config.trainer.limit_val_batches == 0:
        raise ConfigError(
            f"trainer.keep_best={best} needs validation, and trainer.limit_val_batches is 0. Set it to null, or "
            "trainer.keep_best to null."
        )
    if best not in scores:
        more = (
            f" For {best}, add it to evaluation.metrics."
            if best in METRICS and METRICS[best].higher_is_better is not None
            else ""
        )
        raise ConfigError(
            f"trainer.keep_best={best} is no score that validation makes with a better end. Choose one of "
            f"{', '.join(scores)}.{more}"
        )


def check_batches(config: TrainConfig, training: int, validation: int, processes: int) -> None:
    """Fails where an epoch would have no batch, so that nothing would be trained, or nothing validated.

    Args:
        config: of the run.
        training: samples of the training set.
        validation: samples held out for validation; 0: none is wanted.
        processes: that share them.

    Raises:
        ConfigError: the share of batches that was asked for is less than one.
    """
    shares = [
        ("train", training // (config.data.batch_size * processes)),
        ("val", math.ceil(math.ceil(validation / processes) / config.evaluation.batch_size)),
    ]
    for kind, batches in shares:
        limit = getattr(config.trainer, f"limit_{kind}_batches")
        if kind == "val" and not validation:
            continue
        if batches == 0 or (isinstance(limit, float) and limit > 0 and int(batches * limit) == 0):
            raise ConfigError(
                f"An epoch would have no batch: trainer.limit_{kind}_batches={limit} of {batches} batches a process. "
                "Set it to a whole number of batches or a larger share, or to null for all; or lower data.batch_size."
            )


def check_trained(trainer: L.Trainer, config: TrainConfig) -> None:
    """Fails where training ended early without a word, before a model that is not trained is taken for one that is.

    Raises:
        TrainingError: fewer steps were taken than asked for.
    """
    if trainer.global_step < config.optimization.steps:
        raise TrainingError(
            f"Training ended after {trainer.global_step} of {config.optimization.steps} steps, and why is not known: "
            "an epoch may have had no batches. No model was saved. Check data and the trainer's options; the same "
            "command goes on from the last checkpoint."
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
    needed = models * weight_bytes(model)
    # One more than is kept: a checkpoint is whole before the oldest goes.
    needed += (trainer.keep_checkpoints + 1) * checkpoint_bytes(model, averaged=averaged)
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


@contextmanager
def memory_advice(trainer: L.Trainer) -> Iterator[None]:
    """Says which options need less memory where there was too little.

    Raises:
        TrainingError: in place of torch's error.
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
