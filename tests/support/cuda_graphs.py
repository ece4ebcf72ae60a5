"""CUDA graphs on a card that is not there: a capture notes every operation, a replay computes them again.

As on a card, what is captured is not computed, a replay reads and writes the memory of the capture and runs no Python,
and a capture refuses whatever waits for a value: one that is read by Python, a shape that depends on values, a tensor
on the CPU. Seeded random numbers, which a card could draw anew, are refused, because nothing here should draw any
(attention counts as such for its dropout, which is 0 here).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from tests.support.card import CPU_INDICES, CPU_INDICES_AND_VALUE, on_card

aten = torch.ops.aten

WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
}
"""Operations whose result Python needs before it can go on."""


class CapturedGraph(TorchDispatchMode):
    """Stands in for ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Callable[..., Any], Any, Any, list[Any]]] = []
        self.replays = 0
        self._made: set[int] = set()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        drawing = torch.Tag.nondeterministic_seeded in func.tags and "_scaled_dot_product" not in func.name()
        by_mask = func in CPU_INDICES | CPU_INDICES_AND_VALUE and any(
            value is not None and value.dtype is torch.bool for value in args[1]
        )
        if func in WAITING or drawing or by_mask:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for tensor in given:
            if not on_card(tensor) and _memory(tensor) not in self._made:
                raise RuntimeError(f"a capture reads a tensor on the CPU: {func}, {tuple(tensor.shape)}")
        with torch._C.DisableTorchFunction():
            for tensor in given if func._schema.is_mutable else ():
                if (memory := _memory(tensor)) not in self._made and memory not in self._before:
                    self._before[memory] = (tensor.untyped_storage(), tensor.untyped_storage().clone())
            results = func(*args, **kwargs)
            made = [value for value in tree_leaves(results) if isinstance(value, Tensor)]
            known = {_memory(tensor) for tensor in given}
            self._made |= {_memory(tensor) for tensor in made} - known
        self.operations.append((func, args, kwargs, made))
        return results

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[arg-type]
        for storage, before in self._before.values():
            storage.copy_(before)

    def replay(self) -> None:
        """Computes all operations again, into the memory of the capture."""
        self.replays += 1
        # Nothing of this is Python's on a card, so nobody looks at it.
        with torch.no_grad(), torch._C.DisableTorchFunction(), _disable_current_modes():
            for func, args, kwargs, made in self.operations:
                again = [value for value in tree_leaves(func(*args, **kwargs)) if isinstance(value, Tensor)]
                for old, new in zip(made, again, strict=True):
                    if _memory(old) != _memory(new):
                        old.copy_(new)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def graphs_there() -> Iterator[list[CapturedGraph]]:
    """``torch.cuda.graph`` and streams on the card of ``tests.support.card``; gives the graphs that are made."""
    made: list[CapturedGraph] = []
    capturing = [False]

    def make() -> CapturedGraph:
        made.append(CapturedGraph())
        return made[-1]

    @contextmanager
    def capture(graph: CapturedGraph, pool: object = None, stream: object = None, **_: str) -> Iterator[None]:
        capturing[0] = True
        try:
            with graph:
                yield
        finally:
            capturing[0] = False

    stream = SimpleNamespace(is_capturing=lambda: capturing[0])
    answers = {
        "CUDAGraph": make,
        "graph": capture,
        "graph_pool_handle": lambda: (0, 1),
        "Stream": lambda *_: stream,
        "stream": lambda *_: nullcontext(),
        "current_stream": lambda *_: stream,
        "is_current_stream_capturing": lambda: capturing[0],
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(torch.accelerator, "current_stream", lambda *_: stream))
        yield made
