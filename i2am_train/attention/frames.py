"""Frames: one denoiser evaluation, and what sampler and caller say of it.

The sampler owns time. It announces the step and the conditional rows around each evaluation, and whoever listens reads
them; nothing counts calls or guesses which half of the batch is conditional.

Where nobody announces, the pipeline is asked. A denoiser sees a batch; whether half of its rows are unconditional is
known to the pipeline that made it. Pipelines say so by a name that nearly all of them use, and the Python frames above
the denoiser's forward are read for it, nearest first: so also the pipeline is asked that shares the denoiser with the
traced one, or that calls a denoiser which is traced alone. Nothing is attached and nothing changed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from torch import Tensor, nn

from i2am_train.types import Branch, GridSize

_GUIDED = "do_classifier_free_guidance"
"""What pipelines of diffusers, and those written after them, call it: a property or a local variable."""
_GUIDED_BY_CALLS = "do_true_cfg"
"""Its name where each half is a call of its own (Flux)."""
_LDM_SCALE, _LDM_CONDITION = "unconditional_guidance_scale", "unconditional_conditioning"
"""Arguments of the samplers of latent-diffusion, which guide with a scale other than 1 and a condition."""
_LATENTS, _LDM_LATENTS = "latents", "x"
"""The samples of a run, one row each, in diffusers and in latent-diffusion."""
_CROP = "padding_mask_crop"
"""Margin of the part of the picture that an inpainting pipeline of diffusers works on, or None."""


@dataclass(frozen=True)
class Caller:
    """Who made a call of the denoiser, as far as it can be seen.

    ``guided`` says whether the sampling run uses guidance, ``samples`` how many pictures it makes; None: not said.
    ``crops`` says that the pipeline works on a part of the picture and pastes it in. ``run`` is the pipeline's
    ``__call__``, one for each run.
    """

    guided: bool | None = None
    samples: int | None = None
    crops: bool = False
    run: FrameType | None = None


def find_caller() -> Caller:
    """The nearest function above that says whether it uses guidance; an empty `Caller` without one."""
    for frame in _outwards(sys._getframe(1)):
        guided = _guided(frame.f_locals)
        if guided is not None:
            return _described(frame, guided)
    return Caller()


def _described(frame: FrameType, guided: bool) -> Caller:
    own = frame.f_locals
    latents = own.get(_LDM_LATENTS if _LDM_SCALE in own else _LATENTS)
    run = frame if frame.f_code.co_name == "__call__" else _call_of(own.get("self"), frame.f_back)
    return Caller(
        guided=guided,
        samples=len(latents) if isinstance(latents, Tensor) else None,
        crops=run is not None and run.f_locals.get(_CROP) is not None,
        run=run,
    )


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """Frames of Python functions outside torch and this package's capture, innermost first."""
    while frame is not None:
        if not str(frame.f_globals.get("__name__", "")).startswith(("torch.", __package__)):
            yield frame
        frame = frame.f_back


def _call_of(pipeline: Any, frame: FrameType | None) -> FrameType | None:
    """The ``__call__`` of a pipeline from whose methods the denoiser was called."""
    for above in _outwards(frame):
        if above.f_code.co_name == "__call__" and above.f_locals.get("self") is pipeline:
            return above
    return None


def _guided(known: Mapping[str, Any]) -> bool | None:
    """What a function's variables say, or the object that it is a method of."""
    for name in (_GUIDED, _GUIDED_BY_CALLS):
        if isinstance(known.get(name), bool):
            return bool(known[name])
    if _LDM_SCALE in known and _LDM_CONDITION in known:
        return known[_LDM_CONDITION] is not None and known[_LDM_SCALE] != 1
    try:
        said = getattr(known.get("self"), _GUIDED, None)
    except TypeError:  # a property of a pipeline that was never called, and has no scale yet
        return None
    return said if isinstance(said, bool) else None


@contextmanager
def hear_branches(denoiser: nn.Module) -> Iterator[Callable[[], Branch | None]]:
    """Gives a function that says which half of guidance the call under way is, or None.

    Pipelines of diffusers that make a call for each half run it in ``denoiser.cache_context("cond")`` or
    ``("uncond")``. What the contexts do is left as it is.
    """
    method = getattr(denoiser, "cache_context", None)
    names: list[str | None] = []

    @contextmanager
    def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        assert method is not None
        names.append(name)
        try:
            with method(name, *args, **kwargs):
                yield
        finally:
            names.pop()

    if method is None:
        yield lambda: None
        return
    before = vars(denoiser).get("cache_context")
    setattr(denoiser, "cache_context", cache_context)  # noqa: B010 - in front of the class's method
    try:
        yield lambda: _branch(names[-1]) if names else None
    finally:
        delattr(denoiser, "cache_context")
        if before is not None:
            setattr(denoiser, "cache_context", before)  # noqa: B010


def _branch(name: str | None) -> Branch | None:
    """The half that a context's name stands for; None for both at once (``cond_uncond``) and others.

    >>> [_branch(name) for name in ("cond", "pred_uncond", "cond_uncond")]
    [<Branch.CONDITIONAL: 'conditional'>, <Branch.UNCONDITIONAL: 'unconditional'>, None]
    """
    if name in ("cond", "pred_cond"):
        return Branch.CONDITIONAL
    unconditional = name is not None and name.removeprefix("pred_").startswith("uncond")
    return Branch.UNCONDITIONAL if unconditional else None


@dataclass(frozen=True)
class Announcement:
    """What a sampler says about the evaluation that it is about to make."""

    step_index: int
    conditional_rows: slice | None


_ANNOUNCED: ContextVar[Announcement | None] = ContextVar("announced_evaluation", default=None)


@contextmanager
def announce(*, step_index: int, conditional_rows: slice | None) -> Iterator[None]:
    """Tell listeners about the denoiser evaluations inside the block.

    ``step_index`` is the position in the sampling loop, 0 = noisiest. ``conditional_rows`` are the rows of the batch
    that see the reference (None: this evaluation is the unconditional one, and listeners skip it). Nothing else
    changes: without a listener this costs a context variable.

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
    """The announcement in force (`announce`), or None.

    >>> announced_evaluation() is None
    True
    """
    return _ANNOUNCED.get()


@dataclass(frozen=True)
class Frame:
    """One evaluation of the denoiser, from entering its forward to leaving it.

    ``call`` counts evaluations since the listener was attached; ``timestep`` is what the root's forward was given (kept
    as it is: reading it would wait for the accelerator); ``latent`` and ``batch`` are the size and the rows of its
    input. ``caller`` is who made the call, and ``branch`` the half of guidance that all of its rows belong to, where
    the caller names it.

    >>> Frame(0, 981, GridSize(8, 6), batch=2, announced=Announcement(0, slice(0, 2))).step_index
    0
    """

    call: int
    timestep: float | int | Tensor | None
    latent: GridSize
    batch: int
    announced: Announcement | None = None
    caller: Caller = Caller()
    branch: Branch | None = None

    def read_timestep(self) -> float | Tensor | None:
        """The scheduler's number as a float (the first row's if there is one per row), or None.

        A number that an accelerator holds stays there, as a copy of one element: to read it would wait.

        >>> Frame(0, 981, GridSize(8, 6), batch=2).read_timestep()
        981.0
        """
        if isinstance(self.timestep, Tensor):
            if self._is_embedded or not self.timestep.numel():
                return None
            first = self.timestep.detach().flatten()[:1]
            return float(first) if first.device.type == "cpu" else first.clone()
        return None if self.timestep is None else float(self.timestep)

    def time_embedding(self) -> Tensor | None:
        """A copy of the first row's embedding of the time, where the model is given one in a number's place."""
        if not isinstance(self.timestep, Tensor) or not self._is_embedded:
            return None
        return self.timestep[0].detach().clone()

    def with_caller(self, branch: Callable[[], Branch | None]) -> Frame:
        """The frame with who made the call and the half of guidance that it is; an announced one needs neither."""
        return self if self.announced is not None else replace(self, caller=find_caller(), branch=branch())

    @property
    def _is_embedded(self) -> bool:
        """Whether the time is given as vectors, one for each row."""
        time = self.timestep
        return isinstance(time, Tensor) and time.ndim == 2 and time.shape[1] > 1

    @property
    def step_index(self) -> int | None:
        """Announced position in the sampling loop, or None."""
        return None if self.announced is None else self.announced.step_index
