"""How the steps of ``train_tiny_model`` are taken: optimizers, precision, the step that a GPU is given whole, resuming.

The networks are small, so that a GPU would wait for Python most of the time. Hence Muon for all matrices of a shape at
once, and a step that is captured once in a CUDA graph, then replayed. The code is the same on a CPU.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from tqdm import tqdm

from i2am_train.environment import machine
from i2am_train.errors import CheckpointError, TrainingError
from i2am_train.files import write_text, written


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices ``[count, rows, columns]`` with all singular values pushed to 0.7 to 1.2, in bfloat16.

    Five Newton-Schulz iterations with the coefficients of Jordan et al. 2024 (Muon), on the shorter side.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    result = matrices.bfloat16().mT if tall else matrices.bfloat16()
    result = result / result.flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-7)
    for _ in range(5):
        gram = result @ result.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        result = torch.baddbmm(result, gram, result, beta=3.4445)
    return result.mT if tall else result


class Muon(torch.optim.Optimizer):
    """``torch.optim.Muon`` with ``match_rms_adamw`` (Liu et al. 2025), for all matrices of one shape together.

    Its updates are torch's up to the rounding of the last addition, and it takes torch's states. torch's own cannot be
    captured, because it reads the learning rate on the CPU, and launches its 25 kernels for each matrix (6,000 here).
    The learning rate is a float or a tensor of one number on the matrices' device.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": 0.01, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step along the gradients; a matrix without a gradient stays."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            for matrix in matrices:
                if not self.state[matrix]:
                    self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
            gradients = [matrix.grad for matrix in matrices]
            averages = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
            torch._foreach_lerp_(averages, gradients, 1 - momentum)
            ahead = torch._foreach_lerp(gradients, averages, momentum)  # Nesterov's
            torch._foreach_mul_(matrices, 1 - rate * group["weight_decay"])
            alike = defaultdict(list)
            for matrix, update in zip(matrices, ahead, strict=True):
                alike[matrix.shape].append((matrix, update))
            for shape, members in alike.items():
                targets, updates = zip(*members, strict=True)
                scale = -0.2 * math.sqrt(max(shape)) * rate  # an update's root mean square is then AdamW's, about 0.2
                torch._foreach_add_(targets, (orthogonalised(torch.stack(updates)).float() * scale).unbind())


class Optimizers:
    """Muon for every matrix and convolution, AdamW for biases, norms and other vectors.

    On this data Muon brings the VAE as far in 300 steps as AdamW in 2,000. A convolution is the matrix of its output
    channels by everything else, a view that shares its memory.
    """

    def __init__(self, module: nn.Module, matrix_rate: float, vector_rate: float) -> None:
        self.parameters = list(module.parameters())
        self.views = [
            (weight, nn.Parameter(weight.data.view(len(weight), -1)))
            for weight in self.parameters
            if weight.ndim in (2, 4)
        ]
        vectors = [weight for weight in self.parameters if weight.ndim not in (2, 4)]
        self.parts = (
            Muon([view for _, view in self.views], lr=matrix_rate),
            torch.optim.AdamW(vectors, lr=vector_rate, betas=(0.9, 0.98), fused=True),
        )
        self.rates = (matrix_rate, vector_rate)

    def step(self, loss: Tensor, factor: Tensor) -> None:
        """One step down the loss at ``factor`` (one float32 number, on the loss' device) times the learning rates."""
        capturing = factor.is_cuda and torch.cuda.is_current_stream_capturing()
        for weight in self.parameters:
            weight.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for weight, view in self.views:
            view.grad = None if weight.grad is None else weight.grad.reshape(view.shape)
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group.update(lr=factor * rate, capturable=capturing)
            part.step()

    def state_dict(self) -> list[dict[str, Any]]:
        """State of both optimizers, for resuming."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """What :meth:`state_dict` gave, on whichever device."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


@contextmanager
def half_precision(device: torch.device) -> Iterator[None]:
    """bfloat16 matrices and convolutions; on a CPU float32 attention, whose bfloat16 gradient is three times slower."""
    attention = nn.functional.scaled_dot_product_attention

    def in_float32(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            wide = attention(query.float(), key.float(), value.float(), *args, **kwargs)
        return wide.to(query.dtype)

    chosen = in_float32 if device.type == "cpu" else attention
    with (
        patch.object(nn.functional, "scaled_dot_product_attention", chosen),
        torch.autocast(device.type, torch.bfloat16),
    ):
        yield


class CapturedStep:
    """A training step, which a GPU is given whole: captured in a CUDA graph, then replayed.

    ``step`` takes tensors by name and gives tensors by name. All that changes from step to step is among its inputs,
    learning rates included, and it looks at no value. Inputs come from the CPU and are copied into the same memory
    each time; what it gives is overwritten by the next call. The first calls run as they are, since libraries set
    themselves up and optimizers make their states then. On a CPU every call does.
    """

    UNCAPTURED = 3
    """Calls before the capture; PyTorch's examples take as many."""

    def __init__(self, step: Callable[..., dict[str, Tensor]], device: torch.device) -> None:
        self.step, self.device = step, device
        self.inputs: dict[str, Tensor] = {}
        self.results: dict[str, Tensor] = {}
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Takes one step. On a GPU it has only begun when this returns: reading a result waits for it."""
        on_gpu = self.device.type == "cuda"
        if not self.inputs:
            self.inputs = {name: torch.empty_like(value, device=self.device) for name, value in inputs.items()}
        for name, value in inputs.items():
            # Pinned memory is kept by torch until it is copied, so that the next inputs can be drawn meanwhile.
            self.inputs[name].copy_(value.pin_memory() if on_gpu else value, non_blocking=on_gpu)
        self.calls += 1
        if not on_gpu or self.calls <= self.UNCAPTURED:
            return self.step(**self.inputs)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.results = self.step(**self.inputs)
        self.graph.replay()
        return self.results


def own_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Where steps can be captured: not on a GPU's default stream. All that touches their tensors belongs in here."""
    return torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext()


def restore(file: Path, parts: dict[str, Any]) -> int:
    """Puts a saved state into the parts; the number of steps that it has taken, 0 without a state."""
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True, map_location="cpu")
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return int(state["step"])
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"'{file}' holds the state of another model ({reason}). Give the --size that it was begun with, "
            "or another --work."
        ) from error


def take_steps(
    steps: int,
    advance: Callable[[int], dict[str, Tensor]],
    parts: dict[str, Any],
    file: Path,
    log: Path,
    save_every: int,
    saved: Callable[[], None] = lambda: None,
) -> None:
    """Takes the steps that are left of ``steps``, with progress, a log and figures of speed.

    Args:
        advance: takes the step of a number; gives numbers to log as tensors, ``loss`` among them.
        parts: what has a state, by its name in ``file``; restored before the first step, saved after every
            ``save_every``.
        log: gets a line of JSON for every 20th step, and where the state is saved.
        saved: called when the state has been saved.

    Raises:
        CheckpointError: the file has the state of another model.
        TrainingError: a number is not finite; it is not saved.
    """
    name, first = file.stem, restore(file, parts)
    rows = log.read_text().splitlines() if log.exists() else []
    write_text(log, "".join(f"{row}\n" for row in rows if json.loads(row)["step"] < first))  # the others come again
    started = time.monotonic()
    progress = tqdm(range(first, steps), initial=first, total=steps, desc=name, mininterval=10)
    for step in progress:
        results = advance(step)
        saving = (step + 1) % save_every == 0 or step + 1 == steps
        if step % 20 == 0 or saving:  # only here does the CPU wait for a GPU
            row = {key: round(value.item(), 4) for key, value in results.items()}
            if not all(map(math.isfinite, row.values())):
                raise TrainingError(
                    f"Step {step} of the {name} gives {row}. The same words go on from the last saved state, at most "
                    f"{save_every} steps before. If it comes again, start anew with lower learning rates."
                )
            progress.set_postfix(row)
            with log.open("a") as lines:
                lines.write(json.dumps({"step": step} | row) + "\n")
        if saving:
            with written(file) as unfinished:
                torch.save({key: part.state_dict() for key, part in parts.items()} | {"step": step + 1}, unfinished)
            saved()
    if steps > first:
        seconds, where = time.monotonic() - started, machine()
        print(
            f"{name}: {steps - first} steps in {seconds / 60:.1f} min, {(steps - first) / seconds:.2f} a second, on "
            f"{where['gpu'] if results['loss'].is_cuda else where['cpu']}"
        )
