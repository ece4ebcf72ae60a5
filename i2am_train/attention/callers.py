"""What whoever calls the denoiser says of the call: guidance, how many samples there are, which run it is.

A denoiser sees a batch; whether half of its rows are unconditional is known to the pipeline that made
it. Pipelines say so by a name that nearly all of them use, and the Python frames above the denoiser's
forward are read for it, nearest first: so also the pipeline is asked that shares the denoiser with the
traced one, or that calls a denoiser which is traced alone. Nothing is attached and nothing changed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor, nn

from i2am_train.types import Branch

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

    ``guided`` says whether the sampling run uses guidance, ``samples`` how many pictures it makes;
    None: not said. ``crops`` says that the pipeline works on a part of the picture and pastes it in.
    ``run`` is the pipeline's ``__call__``, one for each run.
    """

    guided: bool | None = None
    samples: int | None = None
    crops: bool = False
    run: FrameType | None = None


UNKNOWN = Caller()
"""Nobody who says anything."""


def find_caller() -> Caller:
    """The nearest function above that says whether it uses guidance; `UNKNOWN` without one."""
    for frame in _outwards(sys._getframe(1)):
        guided = _guided(frame.f_locals)
        if guided is not None:
            return _described(frame, guided)
    return UNKNOWN


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
    return next(
        (
            above
            for above in _outwards(frame)
            if above.f_code.co_name == "__call__" and above.f_locals.get("self") is pipeline
        ),
        None,
    )


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

    Pipelines of diffusers that make a call for each half run it in
    ``denoiser.cache_context("cond")`` or ``("uncond")``. What the contexts do is left as it is.
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
