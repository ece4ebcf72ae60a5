"""CUDA graphs on a card that is not there: a capture notes every operation, a replay computes them again.

As on a card, what is captured is not computed, a replay reads and writes the memory of the capture and runs no Python,
and a capture refuses whatever waits for a value: one that is read by Python, a shape that depends on values, a tensor
on the CPU. Seeded random numbers, which a card could draw anew, are refused, because nothing here should draw any
(attention counts as such for its dropout, which is 0 here).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from weakref import WeakSet

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


@dataclass
class Captured:
    """What is remembered of a graph, also when it is gone."""

    replays: int = 0


class CapturedGraph(TorchDispatchMode):
    """Stands in for ``torch.cuda.CUDAGraph``."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine, self.seen = machine, Captured()
        self.operations: list[tuple[Callable[..., Any], Any, Any, list[Any]]] = []
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

    def capture_begin(self, pool: int | None = None, capture_error_mode: str = "global") -> None:
        """Raises where torch's allocator would: of a pool that has lost its graphs, one that a failed capture left
        open, or one that another stream used."""
        machine = self.machine
        pool = machine.new_pool() if pool is None else pool
        if machine.stream is machine.default:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        members, stream = machine.pools.setdefault(pool, (WeakSet(), machine.stream))
        if machine.open_pools & {pool}:
            raise RuntimeError(f"beginAllocateToPool: already recording to mempool_id {pool}")
        if pool in machine.used and not members:
            raise RuntimeError("INTERNAL ASSERT FAILED: it->second->use_count > 0")
        if stream is not machine.stream:
            raise RuntimeError("memory of a pool is used again on its own stream alone")
        members.add(self)
        machine.used.add(pool)
        machine.open_pools.add(pool)
        self.pool = pool
        self.__enter__()

    def capture_end(self) -> None:
        """Ends it."""
        self.__exit__(None, None, None)
        self.machine.open_pools.discard(self.pool)

    def replay(self) -> None:
        """Computes all operations again, into the memory of the capture."""
        self.seen.replays += 1
        # Nothing of this is Python's on a card, so nobody looks at it.
        with torch.no_grad(), torch._C.DisableTorchFunction(), _disable_current_modes():
            for func, args, kwargs, made in self.operations:
                again = [value for value in tree_leaves(func(*args, **kwargs)) if isinstance(value, Tensor)]
                for old, new in zip(made, again, strict=True):
                    if _memory(old) != _memory(new):
                        old.copy_(new)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Machine:
    """What torch's allocator and streams remember."""

    def __init__(self) -> None:
        self.graphs: list[Captured] = []
        self.pools: dict[int, tuple[WeakSet[CapturedGraph], object]] = {}
        self.used: set[int] = set()
        self.open_pools: set[int] = set()
        self.stream = self.default = self.new_stream()
        self._count = 0

    def new_stream(self, *_: object) -> SimpleNamespace:
        return SimpleNamespace(is_capturing=self.capturing)

    def new_pool(self) -> int:
        self._count += 1
        return self._count

    def new_graph(self) -> CapturedGraph:
        graph = CapturedGraph(self)
        self.graphs.append(graph.seen)
        return graph

    def capturing(self) -> bool:
        return bool(self.open_pools)

    @contextmanager
    def on_stream(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def captured(self, graph: CapturedGraph, pool: int | None = None, stream: Any = None) -> Iterator[None]:
        with self.on_stream(stream or self.new_stream()):
            graph.capture_begin(pool)
            try:
                yield
            finally:
                graph.capture_end()


@contextmanager
def graphs_there() -> Iterator[list[Captured]]:
    """``torch.cuda.graph`` and streams on the card of ``tests.support.card``; gives the graphs that are made."""
    machine = Machine()
    answers = {
        "CUDAGraph": machine.new_graph,
        "graph": machine.captured,
        "graph_pool_handle": machine.new_pool,
        "Stream": machine.new_stream,
        "stream": machine.on_stream,
        "current_stream": lambda *_: machine.stream,
        "is_current_stream_capturing": machine.capturing,
        "empty_cache": lambda: None,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(torch.accelerator, "current_stream", lambda *_: machine.stream))
        yield machine.graphs
