"""ops/column_kernels.py in Triton's interpreter, and what ops/attention.py does where it cannot be used."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from i2am_train.ops import attention
from i2am_train.ops.attention import column_means, keys_per_head, reference_mass
from tests.support.card import card, on_card
from tests.support.host_waits import host_waits
from tests.support.interpreted_kernels import CASES

pytest.importorskip("triton", reason="Triton comes with torch for CUDA alone")


def test_kernels_equal_two_softmaxes_in_the_interpreter() -> None:
    """All cases in one process of their own, as Triton asks for its interpreter when it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.interpreted_kernels"],
        cwd=Path(__file__).parents[2], env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == CASES.keys()
    for line in found.values():
        assert max(line["kernels"]) < 1e-6, line
        assert line["logsumexp"] < 1e-7 * max(10, line["largest_logit"]), line
    assert found["logits of 200"]["largest_logit"] > 150


@pytest.fixture
def no_memory() -> Iterator[None]:
    """What was said or tried before is forgotten, and again afterwards."""
    for one in (attention._slower, attention._fits_card, attention._triton_kernels):
        one.cache_clear()
    yield
    for one in (attention._slower, attention._fits_card, attention._triton_kernels):
        one.cache_clear()


def tokens(heads: int, count: int, channels: int = 24, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(2, count, heads, channels, generator=generator).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_what_the_kernels_are_given(no_memory: None, dtype: torch.dtype, weighted: bool, key_heads: int) -> None:
    """On a card that is not there: strides of projections and of a batch's half, shared keys, two tiles; no wait."""
    generated, reference = tokens(4, 70, dtype=dtype), tokens(key_heads, 131, dtype=dtype)
    weights = torch.arange(70.0).repeat(2, 1) if weighted else None
    rows = slice(1, 2)
    expected = column_means(
        generated[rows], reference[rows], generated_weights=None if weights is None else weights[rows]
    )
    mass = reference_mass(generated, reference, slice(3, 50))
    with card(), warnings.catch_warnings():
        warnings.simplefilter("error")
        there = generated.to("cuda"), reference.to("cuda")
        weights = None if weights is None else weights[rows].to("cuda")
        assert attention._kernels_for(*there) is not None  # tries them once, and waits for that
        with host_waits() as waits:
            found = column_means(there[0][rows], there[1][rows], generated_weights=weights)
            mass_there = reference_mass(*there, slice(3, 50))
        assert not waits
        assert all(map(on_card, [*found, mass_there]))
        found = [values.cpu() for values in found]
        mass_there = mass_there.cpu()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
    torch.testing.assert_close(mass_there, mass, rtol=1e-5, atol=0)


def no_triton(name: str) -> Any:
    raise ImportError("No module named 'triton'")


def fails(*_: Any, **__: Any) -> None:
    raise RuntimeError("Failed to find C compiler")


def writes_nothing(*_: Any, **__: Any) -> None:
    """A kernel that leaves what was in memory."""


@pytest.mark.parametrize(
    ("channels", "dtype", "broken", "said"),
    [
        (264, torch.float32, None, "for heads of 264 channels: it takes up to 256."),
        (24, torch.float64, None, "for queries in torch.float64 and keys in torch.float64, which it does not take."),
        (24, torch.float32, fails, r"Triton cannot make it there \(RuntimeError: Failed to find C compiler\)"),
        (24, torch.float32, writes_nothing, "what Triton makes there gives wrong results"),
        (24, torch.float32, "no Triton", r"for all layers: Triton cannot be imported"),
    ],
)
def test_one_line_says_why_the_kernels_are_not_used(
    no_memory: None, monkeypatch: pytest.MonkeyPatch, channels: int, dtype: torch.dtype, broken: Any, said: str
) -> None:
    """Once, and the maps are those of the CPU, without a wait of the host."""
    generated, reference = tokens(2, 17, channels, dtype), tokens(2, 21, channels, dtype)
    expected = column_means(generated, reference)
    with card():
        if callable(broken):
            monkeypatch.setattr("i2am_train.ops.column_kernels.launch", broken)
        elif broken is not None:
            monkeypatch.setitem(sys.modules, "i2am_train.ops.column_kernels", None)
            monkeypatch.delattr("i2am_train.ops.column_kernels")
        there = generated.to("cuda"), reference.to("cuda")
        with pytest.warns(UserWarning, match=said) as told:
            column_means(*there)
        with host_waits() as waits:
            found = column_means(*there)
        assert not waits
        found = [values.cpu() for values in found]
    assert len(told) == 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


def test_keys_are_repeated_for_the_run_of_heads_that_share_them() -> None:
    generated, reference = tokens(4, 5), tokens(2, 7)
    means = column_means(generated, reference)
    logits = (
        generated @ torch.stack([reference[:, 0], reference[:, 0], reference[:, 1], reference[:, 1]], 1).mT / 24**0.5
    )
    torch.testing.assert_close(means.to_reference, logits.softmax(3).mean(2))
    assert keys_per_head(generated, 4) is generated
