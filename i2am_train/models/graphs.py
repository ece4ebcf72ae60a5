"""The denoiser as CUDA graphs: captured once for each shape of a batch, then replayed, listeners included.

A U-Net of Stable Diffusion's size is thousands of small kernels. At batch 1 a GPU is done with them long before Python
has launched them; a graph launches them all at once. The capture is cut where a layer that somebody listens to has
attended. Between two pieces its queries and keys are delivered, in memory that all layers share, so that `trace` and
`ScoreTap` hear every evaluation as they would without, and do with it what they like.

The first call of a shape runs as it is; the graph that is then made must give the same values before it is used. Where
that cannot be, one line says why, and the network runs as it is.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from i2am_train.attention.frames import Frame
from i2am_train.attention.hooks import AttentionInputs
from i2am_train.attention.listener import Listener, listeners_of
from i2am_train.attention.lookup import SiteModule
from i2am_train.types import Backend

KEPT = 4
"""Graphs of one network: two shapes of a batch (the last one is smaller), traced and plain. The oldest is dropped."""
TOLERANCE = 0.02
"""Of the norm of what a graph gives, to that of the call that it stands for: kernels may round in another order."""
_ALIGNMENT = 256


Call = Callable[..., Tensor]
"""A network's call: its inputs, tensors alone; gives the first that it returns."""


def replayed(network: nn.Module) -> Call:
    """The call of a network for one run of a sampler, replayed where inputs and network lie on a GPU.

    It is made as it is on a CPU or another GPU than the current one; with gradients; inside another capture; where a
    listener changes keys; and where a replay would leave something out: hooks that are not a listener's, replaced
    forwards (offloading), compiled blocks. Torch's modes, which watch operations, see no replay. What it gives is the
    caller's own memory. Between two runs all may change: weights in place; listeners, which have graphs of their own;
    weights' places and what Python decides by (attention processors, scales of adapters), after which all is captured
    anew. Inside a run nothing may. Random numbers are not drawn anew. Weights that autocast rounds are rounded in every
    replay.

    >>> class Doubled(nn.Module):
    ...     def forward(self, sample, return_dict=True):
    ...         return (2 * sample,)
    >>> replayed(Doubled())(torch.ones(2))
    tensor([2., 2.])
    """
    listeners = listeners_of(network)
    places = {tensor.device for tensor in network.parameters()}
    here = len(places) == 1 and (place := places.pop()).type == "cuda" and place.index == torch.cuda.current_device()
    if not here or torch.is_grad_enabled() or not _can_be_replayed(network, listeners):
        return partial(_called, network)
    kept = _KEPT.setdefault(network, _Graphs())
    kept.forget_changed(_state_of(network))
    settings = _settings(listeners)
    return partial(_replayed, kept, network, listeners, settings)


def _replayed(
    kept: _Graphs, network: nn.Module, listeners: Sequence[Listener], settings: tuple[Any, ...], *inputs: Tensor
) -> Tensor:
    rounding = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    key = (*((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs), rounding, *settings)
    if key in kept.captured:
        captured = kept.captured[key]
        return _called(network, *inputs) if captured is None else captured.replay(listeners, inputs)
    expected = _called(network, *inputs)
    if bool(expected.isfinite().all()):  # else whoever asked will say so; waits, once for each graph
        kept.keep(key, _checked(network, inputs, listeners, kept, expected))
    return expected


def release_graphs(network: nn.Module) -> None:
    """Frees the memory of the network's graphs; harmless without any.

    >>> release_graphs(nn.Linear(2, 3))
    """
    _KEPT.pop(network, None)


def _called(network: nn.Module, *inputs: Tensor) -> Tensor:
    result: Tensor = network(*inputs, return_dict=False)[0]
    return result


def _can_be_replayed(network: nn.Module, listeners: Sequence[Listener]) -> bool:
    if torch.cuda.is_current_stream_capturing() or any(each.change_keys is not None for each in listeners):
        return False
    if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return False
    own = {number for each in listeners for number in each.hook_ids}
    for module in network.modules():
        if module._compiled_call_impl is not None or "forward" in vars(module):
            return False
        if not own.issuperset(module._forward_hooks) or not own.issuperset(module._forward_pre_hooks):
            return False
    return True


def _settings(listeners: Sequence[Listener]) -> tuple[Any, ...]:
    """What a graph is made for besides its inputs: the process's choice of kernels, and what is heard."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        *(
            getattr(torch.backends.cuda.matmul, f"allow_{name}_reduced_precision_reduction")
            for name in ("fp16", "bf16")
        ),
        *(getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")),
        *(
            getattr(torch.backends.cuda, f"{name}_sdp_enabled")()
            for name in ("flash", "mem_efficient", "math", "cudnn")
        ),
        tuple((each.kind, tuple(map(_heard, each.sites))) for each in listeners),
    )


def _heard(site: SiteModule) -> Any:
    """What a delivery depends on besides the network: which call or projections, heads and scale."""
    how = site.site
    call = how.call_in(site.module) if how.via is Backend.SDPA else None
    return id(site.module), how.via, call, how.generated_projection, how.reference_projection, how.heads, how.scale


class _Same:
    """An object, equal to itself alone while it lives; it is not kept alive, as it may hold the network."""

    def __init__(self, value: object) -> None:
        self.function = getattr(value, "__func__", None)  # a bound method is made anew at each look
        owner = value if self.function is None else value.__self__  # type: ignore[attr-defined]
        try:
            self.look: Callable[[], object] = weakref.ref(owner)
        except TypeError:  # numbers, slots and the like hold nothing
            self.look = lambda: owner

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or self.function is not other.function:
            return False
        return (own := self.look()) is not None and own is other.look()


def _state_of(network: nn.Module) -> list[Any]:
    """What a graph holds on to: where weights lie, and what Python decides by."""
    state: list[Any] = [tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())]
    for module in network.modules():
        state += [_decided_by(value) for name, value in vars(module).items() if name not in _TORCH]
    return state


_TORCH = frozenset(vars(nn.Module())) - {"training"}
"""What every module has: its parts, and hooks, which are looked at elsewhere."""


def _decided_by(value: Any, depth: int = 2) -> Any:
    """A copy of numbers, words and what is made of them; anything else itself, with its own attributes."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth and isinstance(value, dict):
        return [(name, _decided_by(one, depth - 1)) for name, one in value.items()]
    if depth and isinstance(value, list | tuple):
        return [_decided_by(one, depth - 1) for one in value]
    if depth and not isinstance(value, nn.Module | Tensor | type) and hasattr(value, "__dict__"):
        return [_Same(value), *(_decided_by(one, depth - 1) for one in vars(value).values())]
    return _Same(value)


class _Graphs:
    """Those of one network. They share memory, as only one of them runs at a time; for that the captures need a pool
    and a stream of their own."""

    def __init__(self) -> None:
        self.captured: dict[Any, _CapturedCall | None] = {}
        """None: it cannot be."""
        self._state: list[Any] = []
        self._begin_anew()

    def _begin_anew(self) -> None:
        """A pool that lost its graphs, or a capture half way, takes no more."""
        self.captured.clear()
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def forget_changed(self, state: list[Any]) -> None:
        """Graphs of another state than this would go on in it."""
        if state != self._state:
            self._begin_anew()
            self._state = state

    def keep(self, key: Any, captured: _CapturedCall | None) -> None:
        """In the place of the oldest; one that failed takes the others with it, which are made anew when asked for."""
        if captured is None:
            failed = [other for other, graph in self.captured.items() if graph is None]
            self._begin_anew()
            self.captured |= dict.fromkeys(failed)
        while len(self.captured) >= KEPT:
            del self.captured[next(iter(self.captured))]
        self.captured[key] = captured


_KEPT: WeakKeyDictionary[nn.Module, _Graphs] = WeakKeyDictionary()


def _checked(
    network: nn.Module, inputs: Sequence[Tensor], listeners: Sequence[Listener], kept: _Graphs, expected: Tensor
) -> _CapturedCall | None:
    """A graph that gives what is expected of these inputs, or None, with a line that says why."""
    try:
        captured = _CapturedCall(network, inputs, listeners, kept)
        captured.spoil()
        found = captured.replay((), inputs)
        if bool((found - expected).float().norm() <= TOLERANCE * expected.float().norm()):
            return captured
        reason = "a replay gives other values"
    except RuntimeError as error:  # what the driver says, out of memory included
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"Images are sampled without CUDA graphs, so more slowly ({reason}). sampling.cuda_graphs=false does not try.",
        stacklevel=2,
    )
    return None


class _CapturedCall:
    """One call of a network in pieces, each a graph; after all but the last, somebody is told of a layer."""

    def __init__(
        self, network: nn.Module, inputs: Sequence[Tensor], listeners: Sequence[Listener], kept: _Graphs
    ) -> None:
        self._pool = kept.pool
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._told: list[tuple[int, int, AttentionInputs]] = []
        """Number of a listener, of one of its sites, and what the site attends with."""
        self._mailbox: Tensor | None = None
        self._is_open = False
        with torch.inference_mode(False), torch.no_grad():  # to be written later, in whichever mode
            self._inputs = [tensor.clone() for tensor in inputs]
        rounding = torch.autocast(
            "cuda",
            torch.get_autocast_dtype("cuda"),
            enabled=torch.is_autocast_enabled("cuda"),
            cache_enabled=False,  # what it kept of the weights would be gone before a replay
        )
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the capture takes memory of its own
        with rounding, torch.cuda.stream(kept.stream), ExitStack() as diverted:
            for number, listener in enumerate(listeners):
                diverted.enter_context(listener.diverted(partial(self._cut, number, listener.sites)))
            self._begin()
            try:
                self._output = _called(network, *self._inputs)
            finally:
                if self._is_open:
                    self._end()

    def spoil(self) -> None:
        """Overwrites what the capture left, so that a replay that computes nothing shows."""
        self._output.fill_(torch.nan)
        if self._mailbox is not None:
            self._mailbox.fill_(255)

    def replay(self, listeners: Sequence[Listener], inputs: Sequence[Tensor]) -> Tensor:
        """The call with other values; ``listeners`` are those of the capture, in their order, or none."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        with ExitStack() as frames:
            for listener in listeners:
                frames.enter_context(listener.hearing(*inputs))
            for position, graph in enumerate(self._graphs):
                graph.replay()
                if listeners and position < len(self._told):
                    number, site, attended = self._told[position]
                    listeners[number].deliver(listeners[number].sites[site], attended)
        return self._output.clone()

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # Other threads (loaders that pin memory, NCCL's watchdog) may go on calling CUDA.
        graph.capture_begin(self._pool, capture_error_mode="thread_local")
        self._graphs.append(graph)
        self._is_open = True

    def _end(self) -> None:
        self._is_open = False
        self._graphs[-1].capture_end()

    def _cut(
        self, number: int, sites: Sequence[SiteModule], site: SiteModule, _: Frame, attended: AttentionInputs
    ) -> None:
        position = next(position for position, one in enumerate(sites) if one is site)
        self._told.append((number, position, self._posted(attended)))
        self._end()
        self._begin()

    def _posted(self, attended: AttentionInputs) -> AttentionInputs:
        """Copies in the mailbox: layers are told of one after the other, and none needs memory of its own."""
        parts = (attended.generated, attended.reference)
        starts = [0, -(-_bytes(parts[0]) // _ALIGNMENT) * _ALIGNMENT]
        needed = starts[1] + _bytes(parts[1])
        if self._mailbox is None or len(self._mailbox) < needed:
            self._mailbox = torch.empty(needed, dtype=torch.uint8, device=parts[0].device)
        copies = []
        for part, start in zip(parts, starts, strict=True):
            rows, heads, tokens, channels = part.shape
            flat = self._mailbox[start : start + _bytes(part)].view(part.dtype)
            copies.append(flat.view(rows, tokens, heads, channels).transpose(1, 2).copy_(part))
        return AttentionInputs(copies[0], copies[1], attended.scale)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
