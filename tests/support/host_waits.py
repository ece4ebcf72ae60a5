"""Where Python waits for the graphics card: each wait is noted with the line of code that asked.

On a card a wait is a bubble: the host stands until all that was launched has run, and launches nothing meanwhile. It
waits where a value becomes a number or a list, where a shape depends on values (a boolean index, ``nonzero``), and
where a tensor is copied to or from the card without ``non_blocking``. The same rules as those of
``torch.cuda.set_sync_debug_mode``, which needs a card; here also on the one that is not there (`tests.support.card`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import card
from tests.support.card import CPU_INDICES, CPU_INDICES_AND_VALUE, on_card

aten = torch.ops.aten

READS = {
    aten._local_scalar_dense.default,
    aten.item.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.unique_dim.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
}
"""Operations that give a number, or a tensor whose shape depends on values."""

PASSED_OVER = ("torch.", "tests.support.card.", "tests.support.host_waits.", "contextlib.", "jaxtyping.", "beartype.")
"""Modules whose code asks in somebody's name."""


class HostWait(NamedTuple):
    """One wait: the operation, and the innermost line outside torch and these supports.

    >>> print(HostWait("aten.equal.default", "i2am_train/attention/trace.py", 95))
    aten.equal.default at i2am_train/attention/trace.py:95
    """

    operation: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.operation} at {self.file}:{self.line}"


class _Watch(TorchDispatchMode):
    """Looks at every operation, and computes it as it would be."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            waits = _waits(func, args, kwargs)
        if waits:
            self._note(str(func))
        return func(*args, **kwargs)


def _waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    if func in READS:
        return any(map(on_card, args))
    if func in CPU_INDICES | CPU_INDICES_AND_VALUE:
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        filled = func in CPU_INDICES_AND_VALUE and args[2].numel() == 1 and not on_card(args[2])  # masked_fill
        from_cpu = any(index is not None and not on_card(index) for index in args[1])
        return on_card(args[0]) and ((by_mask and not filled) or from_cpu)
    if func is aten.repeat_interleave.Tensor:
        return on_card(args[0]) and kwargs.get("output_size") is None
    if func is aten.copy_.default:
        asynchronous = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        return on_card(args[0]) != on_card(args[1]) and not asynchronous
    if (
        func is aten._to_copy.default and kwargs.get("device") is not None
    ):  # of a real card; `card` tells of the other's
        moves = "cuda" in (args[0].device.type, kwargs["device"].type) and args[0].device.type != kwargs["device"].type
        return moves and not kwargs.get("non_blocking", False)
    return False


@contextmanager
def host_waits() -> Iterator[list[HostWait]]:
    """Notes every wait for the card inside the block, in order; enter the card (``card()``) first.

    ::

        with card(), host_waits() as waits:
            ...
        assert not waits, "\\n".join(map(str, waits))
    """
    waits: list[HostWait] = []

    def note(operation: str) -> None:
        waits.append(HostWait(operation, *_asked()))

    def synchronized(*_: Any) -> None:
        note("torch.cuda.synchronize")

    with ExitStack() as stack:
        stack.enter_context(patch.object(card, "waiting", note))
        stack.enter_context(patch.object(torch.cuda, "synchronize", synchronized))
        stack.enter_context(_Watch(note))
        yield waits


def _asked() -> tuple[str, int]:
    """File and line of the innermost Python code that is neither torch's nor this support's."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if not f"{frame.f_globals.get('__name__')}.".startswith(PASSED_OVER):
            break
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def of_package(waits: list[HostWait]) -> list[HostWait]:
    """Those that the package's own code asked for."""
    return [wait for wait in waits if "/i2am_train/" in wait.file]
