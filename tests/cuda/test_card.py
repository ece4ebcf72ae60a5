"""The card itself: it refuses what torch's FakeTensorMode refuses and nothing else, and it computes."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tests.support.card import card
from tests.support.host_waits import host_waits

Operation = Callable[[Callable[..., Tensor], Callable[..., Tensor]], Any]


def written(target: Tensor, index: Any, value: Tensor) -> Tensor:
    target[index] = value
    return target


OPERATIONS: dict[str, Operation] = {
    # each of tensors made here and there (``h`` and ``t``)
    "sum": lambda h, t: h(3, 2) + t(3, 2),
    "number": lambda h, t: h(3, 2) * t(),
    "where": lambda h, t: torch.where(h(3, 2) > 0, t(3, 2), 0.0),
    "where number": lambda h, t: torch.where(h(3, 2) > 0, h(3, 2), t()),
    "comparison": lambda h, t: h(3, 2) > t(3, 2),
    "product": lambda h, t: h(3, 2) @ t(2, 3),
    "embedding": lambda h, t: F.embedding(h(3).long(), t(5, 2)),
    "attention": lambda h, t: F.scaled_dot_product_attention(h(1, 2, 3, 4), h(1, 2, 3, 4), t(1, 2, 3, 4)),
    "cat": lambda h, t: torch.cat([h(3, 2), t(3, 2)]),
    "stack": lambda h, t: torch.stack([h(3, 2), t(3, 2)]),
    "stack of numbers": lambda h, t: torch.stack([h(3, 2).sum(), t(3, 2).sum()]),
    "by index": lambda h, t: h(3, 2)[t(2).long()],
    "by mask": lambda h, t: h(3, 2).masked_fill(t(3, 2) > 0, 1.0),
    "write by index": lambda h, t: written(h(3, 2), t(2).long(), h(2, 2)),
    "write values": lambda h, t: written(h(3, 2), h(2).long(), t(2, 2)),
    "write part": lambda h, t: written(h(3, 2), slice(1, 3), t(2, 2)),
    "gather": lambda h, t: h(3, 2).gather(0, t(3, 2).long()),
    "fill": lambda h, t: h(3, 2).masked_fill(h(3, 2) > 0, t()),
    "in place": lambda h, t: h(3, 2).add_(t(3, 2)),
    "copy": lambda h, t: h(3, 2).copy_(t(3, 2)),
    "like": lambda h, t: h(3, 2) + torch.zeros_like(h(3, 2)) + h(1).new_ones(2),
    "loss": lambda h, t: F.mse_loss(h(3, 2), t(3, 2)),
    "lists": lambda h, t: torch._foreach_add([h(3, 2)], [t(3, 2)]),
    "moved": lambda h, t: h(3, 2) + t(3, 2).to(h(1).device),
    "moved by another": lambda h, t: h(3, 2) + t(3, 2).to(h(1)),
    "made there": lambda h, t: torch.arange(2.0, device=h(1).device) + h(3, 2),
    "made here": lambda h, t: torch.arange(2.0, device=h(1).device) + t(3, 2),
}
STRICTER = {
    ("stack of numbers", "cpu", "cuda"),
    ("stack of numbers", "cuda", "cpu"),
    ("by index", "cpu", "cuda"),
    ("write by index", "cpu", "cuda"),
}
"""A card refuses these; FakeTensorMode takes single numbers and indices from everywhere."""


@functools.cache
def fake_tensors_need_no_driver() -> bool:
    with FakeTensorMode():
        try:
            torch.zeros(2, device="cuda").copy_(torch.zeros(2))
        except RuntimeError:
            return False
    return True


def outcome(operation: Operation, first: str, second: str) -> str | None:
    """The device of what comes out; None where it is refused."""

    def maker(device: str) -> Callable[..., Tensor]:
        return lambda *shape: torch.zeros(shape, device=device)

    try:
        made = operation(maker(first), maker(second))
    except (RuntimeError, IndexError):  # torch's own two kinds
        return None
    return str((made[0] if isinstance(made, list | tuple) else made).device.type)


@pytest.mark.parametrize("first", ["cpu", "cuda"])
@pytest.mark.parametrize("second", ["cpu", "cuda"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_same_rules_as_torch(name: str, first: str, second: str) -> None:
    operation = OPERATIONS[name]
    with card():
        found = outcome(operation, first, second)
    if (name, first, second) in STRICTER:
        assert found is None
        return
    if "cuda" in (first, second) and not fake_tensors_need_no_driver():
        pytest.skip("this torch's FakeTensorMode asks the driver of a card")
    with FakeTensorMode():
        expected = outcome(operation, first, second)
    assert found == expected


def test_values_gradients_and_weights_stay_there() -> None:
    """A training step on the card: the same numbers as on the CPU, everything that it makes lies there."""
    torch.manual_seed(0)
    ours, inputs = torch.nn.Linear(4, 2), torch.randn(3, 4)
    theirs = torch.nn.Linear(4, 2)
    theirs.load_state_dict(ours.state_dict())
    ours(inputs).square().mean().backward()
    with card():
        theirs.to("cuda")
        theirs(inputs.to("cuda")).square().mean().backward()
        torch.optim.AdamW(theirs.parameters()).step()
        for parameter in theirs.parameters():
            assert parameter.is_cuda
            assert parameter.grad is not None
            assert parameter.grad.is_cuda
        assert next(iter(theirs.state_dict().values())).device.type == "cuda"
        theirs.to("cpu")
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_a_gradient_goes_back_where_the_tensor_came_from() -> None:
    start = torch.ones(3, requires_grad=True)
    with card():
        (start.to("cuda") * 2).sum().backward()
        assert start.grad is not None
        assert not start.grad.is_cuda


def test_arrays_are_made_of_tensors_on_the_cpu_only() -> None:
    with card():
        there = torch.ones(3, device="cuda")
        for make in (there.numpy, lambda: np.asarray(there)):
            with pytest.raises(TypeError, match="can't convert cuda:0"):
                make()
        assert there.cpu().numpy().tolist() == there.tolist() == [1, 1, 1]


WAITS: dict[str, tuple[Callable[[Tensor, Tensor], Any], str | None]] = {
    # of a tensor there and a mask there: what the host does, and the wait that it is (None: it does not wait)
    "number": (lambda t, m: float(t.sum()), "aten._local_scalar_dense.default"),
    "item": (lambda t, m: t[0].item(), "aten._local_scalar_dense.default"),
    "condition": (lambda t, m: bool(m.all()), "aten._local_scalar_dense.default"),
    "index of an element": (lambda t, m: [1, 2, 3, 4][m.sum()], "aten._local_scalar_dense.default"),
    "list": (lambda t, m: t.tolist(), "Tensor.tolist"),
    "places": (lambda t, m: m.nonzero(), "aten.nonzero.default"),
    "by mask": (lambda t, m: t[m], "aten.index.Tensor"),
    "by index of the CPU": (lambda t, m: t[torch.tensor([0, 2])], "aten.index.Tensor"),
    "picked": (lambda t, m: t.masked_select(m), "aten.masked_select.default"),
    "write by mask": (lambda t, m: written(t, m, t[:1]), "aten.index_put_.default"),
    "same": (lambda t, m: t.equal(t + 1), "aten.equal.default"),
    "repeated": (lambda t, m: t.repeat_interleave(m.long()), "aten.repeat_interleave.Tensor"),
    "down": (lambda t, m: t.cpu(), "copy from the card"),
    "down by name": (lambda t, m: t.to("cpu"), "copy from the card"),
    "down by copy": (lambda t, m: torch.zeros(3).copy_(t), "aten.copy_.default"),
    "up": (lambda t, m: torch.zeros(3).to("cuda"), "copy to the card"),
    "up by copy": (lambda t, m: t.copy_(torch.zeros(3)), "aten.copy_.default"),
    "numbers": (lambda t, m: torch.tensor([1.0, 2.0], device="cuda"), "copy to the card by tensor"),
    "numbers like": (lambda t, m: t.new_tensor([1.0, 2.0]), "copy to the card by new_tensor"),
    "asked for": (lambda t, m: torch.cuda.synchronize(), "torch.cuda.synchronize"),
    "up, not waiting": (lambda t, m: torch.zeros(3).to("cuda", non_blocking=True), None),
    "up by copy, not waiting": (lambda t, m: t.copy_(torch.zeros(3), non_blocking=True), None),
    "made there": (lambda t, m: torch.full((3,), 2.0, device="cuda") + torch.arange(3, device=t.device), None),
    "filled by mask": (lambda t, m: t.masked_fill(m, 0.0), None),
    "written number by mask": (lambda t, m: written(t, m, torch.tensor(0.0)), None),
    "shape": (lambda t, m: (len(t), t.shape, t.device, t.to("cuda") is t), None),
    "computed": (lambda t, m: (t @ t, t.where(m, 1.0), t[m.long()], t.double()), None),
    "on the CPU": (lambda t, m: float(torch.ones(3).sum()) + len(torch.ones(3)[torch.ones(3) > 0]), None),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_of_the_host(name: str) -> None:
    """Each is found, with the line that asked; what does not wait is not found."""
    act, expected = WAITS[name]
    with card():
        there = torch.ones(3, device="cuda")
        mask = there > 0
        with host_waits() as waits:
            act(there, mask)
    assert [wait.operation for wait in waits] == ([] if expected is None else [expected])
    assert all(wait.file == __file__ for wait in waits)
