"""What a training run takes, from a few of its steps: sizes, memory, time. For ``i2am train dry_run=true``."""

import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import nn

from i2am_train.config.training import TrainConfig
from i2am_train.models.tryon import TryOnModel
from i2am_train.training.optimization import compiled_graphs

STEPS = 3
"""Optimizer steps of a rehearsal; the first one warms up and is not counted."""


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
    """Stops after ``STEPS`` optimizer steps and keeps the time of each."""

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
        trainer.should_stop = trainer.global_step >= STEPS

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


def weight_bytes(model: TryOnModel) -> int:
    """Size of a saved model."""
    return sum(parameter.numel() for parameter in model.parameters()) * 4


def checkpoint_bytes(model: TryOnModel, *, averaged: bool) -> int:
    """Size of a Lightning checkpoint: trained weights, AdamW's two moments, and their average if there is one."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained * 4 * (4 if averaged else 3)


def describe(config: TrainConfig, model: TryOnModel, measured: Measured) -> Iterator[tuple[str, str]]:
    """Terms and texts of a rehearsal."""
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
    yield "model", f"{weight_bytes(model) / 2**30:.2f} GiB on disk"
    yield "checkpoint", f"{checkpoint_bytes(model, averaged=averaged) / 2**30:.2f} GiB on disk"


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
