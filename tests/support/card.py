"""A graphics card that is not there: tensors said to be on ``cuda`` compute on the CPU, with values, and never mix.

Torch's own ``FakeTensorMode`` knows the rules of devices too, and has no values, so that no command gets through it.
Here a tensor's storage is marked when the tensor is moved to, or made on, a CUDA device. Two modes do the rest: one
answers questions after the device and obeys those who name one, the other looks at every operation, forward and
backward, refuses what a card would refuse, and marks what comes out. ``test_card.py`` compares its refusals with those
of ``FakeTensorMode``.

What it does not show: kernels of the card (whether there is one, and its rounding), streams, pinned and graphics
memory, files that remember their device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import MethodWrapperType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # a mode imports it, which must see torch.cuda as it is
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.launches import launches

CARD, CPU = torch.device("cuda:0"), torch.device("cpu")

aten = torch.ops.aten

COPIES = {aten.copy_.default, aten._to_copy.default}
"""Go from one device to another."""
CPU_INDICES = {aten.index.Tensor, aten._unsafe_index.Tensor}
"""A tensor on the card may be indexed from the CPU."""
CPU_INDICES_AND_VALUE = {
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
}
CPU_NUMBERS = {aten.fill.Tensor, aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}
"""Take a tensor of one number from the CPU, as pointwise operations and those of lists do."""


def waiting(operation: str) -> None:
    """Called where the host would wait for the card and no operation tells; `tests.support.host_waits` listens."""


def on_card(value: object) -> bool:
    """Whether a tensor is on the card, or said to be."""
    return isinstance(value, Tensor) and (value.is_cuda or _marked(value))


def _marked(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return _has_mark(tensor)


def _has_mark(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and getattr(tensor.untyped_storage(), "card", False)


def _mark(values: Any, where: bool = True) -> Any:
    """Says of all tensors that they are on the card, or on the CPU."""
    with torch._C.DisableTorchFunction():
        for tensor in _tensors([values]):
            if tensor.device.type == "cpu":
                tensor.untyped_storage().card = where  # type: ignore[attr-defined]
    return values


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _is_card(device: Any) -> bool:
    return not isinstance(device, int) and torch.device(device).type == "cuda"


class _Move(torch.autograd.Function):
    """A copy on the other device, whose gradient goes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, where: bool) -> Tensor:
        ctx.where = where
        return _mark(tensor.clone(memory_format=torch.preserve_format), where)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        waiting("copy of a gradient")
        return _mark(gradient.clone(), not ctx.where), None


def _moved(tensor: Tensor, device: Any, asynchronous: bool = False) -> Tensor:
    """The tensor on a device; itself if it is there."""
    where = _is_card(device)
    if torch.device(device).type not in ("cpu", "cuda") or _marked(tensor) == where:
        return tensor
    if not asynchronous:
        waiting("copy to the card" if where else "copy from the card")
    return _Move.apply(tensor, where)


def _read(tensor: Tensor) -> Any:
    if _marked(tensor):
        waiting("Tensor.tolist")
    return tensor.tolist()


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args and isinstance(args[0], Tensor):
        like, *rest = args
        return _to(tensor, CARD if _marked(like) else like.device, like.dtype, *rest, **kwargs)
    copy = kwargs.pop("copy", False)
    device, dtype, asynchronous, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    options = {} if memory_format is None else {"memory_format": memory_format}
    elsewhere = device is not None and device.type not in ("cpu", "cuda")  # meta
    before = _marked(tensor)
    # Without the device where the storage stays: a change of the type alone is no copy between devices.
    where = {"device": device} if elsewhere else {}
    made = tensor.to(dtype=dtype or tensor.dtype, copy=copy, **where, **options)
    if device is None or elsewhere:
        return _mark(made, before) if made is not tensor else made
    return _moved(_mark(made, before) if made is not tensor else made, device, asynchronous)


def _made_of_numbers(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if _marked(tensor):
        waiting("copy to the card by new_tensor")
    return _mark(tensor.new_tensor(*args, **kwargs), _marked(tensor))


def _array(tensor: Tensor, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _marked(tensor):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory."
        )
    return method(tensor, *args, **kwargs)


def _backward(tensor: Tensor, gradient: Any = None, *args: Any, **kwargs: Any) -> None:
    torch.autograd.backward(tensor, gradient, *args, **kwargs)


ANSWERS: dict[Any, Callable[..., Any]] = {
    Tensor.device.__get__: lambda t: CARD if _marked(t) else t.device,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: _marked,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda t: t.is_cpu and not _marked(t),  # type: ignore[attr-defined]
    Tensor.get_device: lambda t: 0 if _marked(t) else t.get_device(),
    Tensor.to: _to,
    Tensor.cpu: lambda t, **_: _moved(t, CPU),
    Tensor.cuda: lambda t, _=None, non_blocking=False, **__: _moved(t, CARD, non_blocking),
    Tensor.tolist: _read,
    Tensor.pin_memory: lambda t, *_: t,
    Tensor.numpy: lambda t, *args, **kwargs: _array(t, Tensor.numpy, *args, **kwargs),
    Tensor.__array__: lambda t, *args, **kwargs: _array(t, Tensor.__array__, *args, **kwargs),
    Tensor.new_tensor: _made_of_numbers,
    Tensor.__deepcopy__: lambda t, memo: _mark(t.__deepcopy__(memo), _marked(t)),
}
"""What is not simply computed."""

FROM_PYTHON = {torch.tensor, torch.as_tensor, torch.asarray}
"""Make a tensor of numbers that Python has, which are copied."""


class _Devices(TorchFunctionMode):
    """Python's side: what tensors say of themselves, and where callers want them."""

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self.rules = rules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.backward:
            # Python code that runs in there (checkpoints) asks for devices again.
            with self.rules.within(True), self:
                return _backward(*args, **kwargs)
        if (answer := ANSWERS.get(func)) is not None:
            return answer(*args, **kwargs)
        if isinstance(func, MethodWrapperType):  # another property, made anew at each access
            return func(*args)
        device = kwargs.get("device")
        if device is None:
            # What the function makes from nothing, it makes where its inputs are.
            with self.rules.within(any(map(_marked, _tensors([args, list(kwargs.values())])))):
                return func(*args, **kwargs)
        if torch.device(device).type not in ("cpu", "cuda"):
            return func(*args, **kwargs)
        source = args[0] if func in (torch.as_tensor, torch.asarray) else None
        if isinstance(source, Tensor):
            del kwargs["device"]
            return _moved(func(*args, **kwargs), device)
        if func in FROM_PYTHON and _is_card(device):
            waiting(f"copy to the card by {func.__name__}")
        with self.rules.within(None):
            made = func(*args, **kwargs | {"device": CPU})
        return _mark(made, _is_card(device))


class Rules(TorchDispatchMode):
    """Torch's side: every operation on tensors, in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        """How many were computed on the card."""
        self._where: bool | None = False

    @contextmanager
    def within(self, where: bool | None) -> Iterator[None]:
        """Where tensors made from nothing belong; None: whoever asks says it."""
        before, self._where = self._where, where
        try:
            yield
        finally:
            self._where = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            if self._where is None:
                return func(*args, **kwargs)
            given = [t for t in _tensors([args, list(kwargs.values())]) if t.device.type == "cpu"]
            marked = list(map(_has_mark, given))
            self.operations += any(marked)
            if func not in COPIES and any(marked) and not all(marked):
                _refuse_mixed(func, args, given, marked)
            made = func(*args, **kwargs)
            if func is aten.copy_.default:
                return made
            if (marked[0] if func in COPIES else any(marked)) or (not given and self._where):
                _mark(made)
            return made


def _refuse_mixed(func: Any, args: Any, given: list[Tensor], marked: list[bool]) -> None:
    if func in CPU_INDICES | CPU_INDICES_AND_VALUE and _marked(args[0]):
        values = args[2:3] if func in CPU_INDICES_AND_VALUE else ()
        given = [tensor for tensor in values if tensor.ndim]
        marked = [_marked(tensor) for tensor in given]
    elif torch.Tag.pointwise in func.tags or func in CPU_NUMBERS or "_foreach_" in func.name():
        marked = [mark or not t.ndim for t, mark in zip(given, marked, strict=True)]
    if not all(marked):
        places = ", ".join(f"{tuple(tensor.shape)} on {CARD if _marked(tensor) else CPU}" for tensor in given)
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {CARD} and {CPU}! "
            f"({func}: {places})"
        )


def _nothing(*_: Any, **__: Any) -> None:
    """For what a card does and nobody sees."""


PROPERTIES = SimpleNamespace(
    name="A card that is not there", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132
)

_group = torch._C._group_tensors_by_device_and_dtype


def _grouped(lists: list[list[Tensor | None]], with_indices: bool = False) -> dict[Any, Any]:
    """What optimizers and clipping ask, in C++: tensors by their device."""
    groups = _group(lists, with_indices)
    return {(CARD if _marked(found[0][0][0]) else device, dtype): found for (device, dtype), found in groups.items()}


MACHINE: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": _nothing,
    "device": lambda *_: nullcontext(),
    "get_device_name": lambda *_: PROPERTIES.name,
    "get_device_properties": lambda *_: PROPERTIES,
    "get_device_capability": lambda *_: (PROPERTIES.major, PROPERTIES.minor),
    "is_bf16_supported": lambda *_, **__: True,
    "is_current_stream_capturing": lambda: False,
    "synchronize": _nothing,
    "set_sync_debug_mode": _nothing,
    "empty_cache": _nothing,
    "max_memory_allocated": lambda *_: 0,
    "memory_allocated": lambda *_: 0,
    "memory_stats": lambda *_: {},
    "reset_peak_memory_stats": _nothing,
    "manual_seed": _nothing,
    "manual_seed_all": _nothing,
    "get_rng_state_all": list,
    "set_rng_state_all": _nothing,
}
"""What ``torch.cuda`` says of it."""


@contextmanager
def card() -> Iterator[Rules]:
    """This machine, with a card; gives what counts its operations."""
    from tests.support.cuda_graphs import graphs_there  # it asks this module what is on the card

    autocast = torch.amp.autocast_mode.autocast.__init__

    def autocast_there(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        autocast(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def of_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda kind="cuda": function("cpu" if kind == "cuda" else kind)

    rules = Rules()
    with ExitStack() as stack:
        stack.enter_context(launches())
        stack.enter_context(graphs_there())
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            stack.enter_context(patch.object(torch, name, of_cpu(getattr(torch, name))))
        stack.enter_context(patch.object(torch._C, "_group_tensors_by_device_and_dtype", _grouped))
        for name, answer in MACHINE.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(torch.amp.autocast_mode.autocast, "__init__", autocast_there))
        stack.enter_context(rules)
        stack.enter_context(_Devices(rules))
        yield rules


@contextmanager
def real_card() -> Iterator[SimpleNamespace]:
    """The card of this machine; counts allocations in place of operations."""
    torch.cuda.init()
    before = torch.cuda.memory_stats().get("allocation.all.allocated", 0)
    seen = SimpleNamespace(operations=0)
    yield seen
    seen.operations = torch.cuda.memory_stats().get("allocation.all.allocated", 0) - before
