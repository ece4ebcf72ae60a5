"""Frames: one denoiser evaluation, and what the sampler says about it.

The sampler owns time. It announces the step and the conditional rows around each evaluation, and
whoever listens reads them; nothing counts calls or guesses which half of the batch is conditional.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

from i2am_train.attention.callers import UNKNOWN, Caller
from i2am_train.types import Branch, GridSize


@dataclass(frozen=True)
class Announcement:
    """What a sampler says about the evaluation that it is about to make."""

    step_index: int
    conditional_rows: slice | None


_ANNOUNCED: ContextVar[Announcement | None] = ContextVar("announced_evaluation", default=None)


@contextmanager
def announce(*, step_index: int, conditional_rows: slice | None) -> Iterator[None]:
    """Tell listeners about the denoiser evaluations inside the block.

    ``step_index`` is the position in the sampling loop, 0 = noisiest. ``conditional_rows`` are the
    rows of the batch that see the reference (None: this evaluation is the unconditional one, and
    listeners skip it). Nothing else changes: without a listener this costs a context variable.

    >>> with announce(step_index=3, conditional_rows=slice(2, 4)):
    ...     announced_evaluation()
    Announcement(step_index=3, conditional_rows=slice(2, 4, None))
    """
    token = _ANNOUNCED.set(Announcement(step_index, conditional_rows))
    try:
        yield
    finally:
        _ANNOUNCED.reset(token)


def announced_evaluation() -> Announcement | None:
    """The announcement in force, or None."""
    return _ANNOUNCED.get()


@dataclass(frozen=True)
class Frame:
    """One evaluation of the denoiser, from entering its forward to leaving it.

    ``call`` counts evaluations since the listener was attached; ``timestep`` is what the root's
    forward was given (kept as it is: reading it would wait for the accelerator); ``latent`` and
    ``batch`` are the size and the rows of its input. ``caller`` is who made the call, and ``branch``
    the half of guidance that all of its rows belong to, where the caller names it.
    """

    call: int
    timestep: float | int | Tensor | None
    latent: GridSize
    batch: int
    announced: Announcement | None = None
    caller: Caller = UNKNOWN
    branch: Branch | None = None

    def read_timestep(self) -> float | None:
        """The scheduler's number as a float (the first row's if there is one per row), or None."""
        if isinstance(self.timestep, Tensor):
            is_number = self.timestep.numel() and not self._is_embedded
            return float(self.timestep.flatten()[0]) if is_number else None
        return None if self.timestep is None else float(self.timestep)

    def time_embedding(self) -> Tensor | None:
        """The first row's embedding of the time, where the model is given one in a number's place."""
        if not isinstance(self.timestep, Tensor) or not self._is_embedded:
            return None
        return self.timestep[0].detach()

    @property
    def _is_embedded(self) -> bool:
        """Whether the time is given as vectors, one for each row."""
        time = self.timestep
        return isinstance(time, Tensor) and time.ndim == 2 and time.shape[1] > 1

    @property
    def step_index(self) -> int | None:
        """Announced position in the sampling loop, or None."""
        return None if self.announced is None else self.announced.step_index
