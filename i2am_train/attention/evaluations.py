"""The evaluations of a trace: when each was, which make one sampling step, and whether all make one sampling run.

A timestep that an accelerator holds stays there while the model samples, since to read it would wait; what depends on
it is looked at when the maps are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from i2am_train.attention.recipe import Recipe
from i2am_train.errors import CaptureError


@dataclass(frozen=True)
class Evaluation:
    """When an evaluation took place, and whether it was recorded or skipped."""

    step_index: int | None
    timestep: float | Tensor | None
    """A tensor while an accelerator holds the number."""
    run: int
    """Which of the runs that could be seen; 0: none could."""
    embedding: Tensor | None
    """Of the time, where the model is told no number."""
    recorded: bool = True
    named: bool = False
    """Whether somebody said which half of guidance it was."""

    @property
    def number(self) -> float | None:
        """The timestep, read if an accelerator holds it."""
        return float(self.timestep) if isinstance(self.timestep, Tensor) else self.timestep

    @property
    def waits(self) -> bool:
        """Whether its order can be told only by reading what an accelerator holds."""
        embedded = self.embedding is not None and self.embedding.device.type != "cpu"
        return self.step_index is None and (embedded or isinstance(self.timestep, Tensor))

    def begins_run_after(self, before: Sequence[Evaluation]) -> bool:
        """Whether this cannot belong to the sampling run that others made.

        A run goes from noise to picture. Samplers of higher order evaluate a timestep twice, but never the first; a
        pipeline that is seen to go on may do as it likes.
        """
        last = before[-1]
        if self.step_index is not None and last.step_index is not None:
            return self.step_index < last.step_index
        if self.run and self.run == last.run:
            return False
        if self.timestep is None or last.timestep is None:
            first = before[0].embedding
            return self.embedding is not None and first is not None and self.embedding.equal(first)
        again = bool(self.timestep == last.timestep) and (bool(self.run) or len(before) == 1)
        return bool(self.timestep > last.timestep) or again

    def is_step_of(self, other: Evaluation) -> bool:
        """Whether both belong to one sampling step (samplers of higher order evaluate a step twice)."""
        if self.step_index is not None or other.step_index is not None:
            return self.step_index == other.step_index
        return self.timestep is not None and bool(self.timestep == other.timestep)


def read_evaluations(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The same with what an accelerator holds of them on the CPU: one copy of timesteps, one of embeddings."""
    held = [each.timestep for each in evaluations if isinstance(each.timestep, Tensor)]
    numbers = iter(torch.cat(held).tolist() if held else [])
    embedded = [each.embedding for each in evaluations if each.embedding is not None]
    rows: Iterator[Tensor] = iter(torch.stack(embedded).cpu() if embedded else [])
    return [
        replace(
            each,
            timestep=float(next(numbers)) if isinstance(each.timestep, Tensor) else each.timestep,
            embedding=None if each.embedding is None else next(rows),
        )
        for each in evaluations
    ]


def check_order(calls: Sequence[Evaluation], recipe: Recipe, *, since: int = 0) -> None:
    """Refuse calls, from the given place on, that cannot be those of one sampling run.

    Raises:
        CaptureError: a second run begins, a picture is cut into tiles, or a call without guidance is taken for half of
            one with it.

    >>> calls = [Evaluation(None, timestep, 0, None) for timestep in (981.0, 961.0)]
    >>> check_order(calls, Recipe("", ()))
    >>> check_order([*calls, calls[0]], Recipe("", ()))
    Traceback (most recent call last):
    ...
    i2am_train.errors.CaptureError: A second sampling run began inside one trace (timestep 981 after timestep 961), ...
    """
    before = [each for each in calls[:since] if each.recorded]
    for evaluation in calls[since:]:
        if before:
            _check_next(evaluation, before, recipe)
        if evaluation.recorded:
            before.append(evaluation)


def _check_next(evaluation: Evaluation, before: Sequence[Evaluation], recipe: Recipe) -> None:
    """Refuses a call that does not go on from those that were recorded before."""
    same_step = evaluation.is_step_of(before[-1])
    if not evaluation.recorded:
        if recipe.rows == "first_call" and not evaluation.named and not same_step:
            raise CaptureError(
                f"The recipe '{recipe.name}' expects two calls in each step under guidance, and the model was "
                f"called once at {_moment(before[-1])}. Without guidance set guided=False."
            )
        return
    if recipe.once_per_step and same_step:
        raise CaptureError(
            f"The model was called twice at timestep {evaluation.number}: {recipe.name} "
            "cuts large pictures into tiles, and maps of tiles are not maps of the picture. "
            "Switch tiling off (raise the size of its tiles), or explain a smaller picture."
        )
    if evaluation.begins_run_after(before):
        raise CaptureError(
            f"A second sampling run began inside one trace ({_moment(evaluation)} after "
            f"{_moment(before[-1])}), or unconditional calls are taken for "
            "conditional ones. Use one trace per run; a sampler of your own that goes back in "
            "time announces its steps (i2am_train.attention.announce)."
        )


def _moment(evaluation: Evaluation) -> str:
    """When an evaluation was, for messages."""
    if evaluation.step_index is not None:
        return f"step {evaluation.step_index}"
    return "a step" if evaluation.number is None else f"timestep {evaluation.number:g}"


def group_steps(evaluations: Sequence[Evaluation]) -> list[list[int]]:
    """Positions of the evaluations of each sampling step."""
    steps: list[list[int]] = []
    for position, evaluation in enumerate(evaluations):
        if steps and evaluation.is_step_of(evaluations[steps[-1][-1]]):
            steps[-1].append(position)
        else:
            steps.append([position])
    return steps
