"""A traced evaluation makes the host wait for the card as often as a plain one: never. All leaves it in `maps`."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2am_train.attention import Recipe, Site, Tokens, announce, trace
from i2am_train.attention.maps import AttributionMaps
from i2am_train.errors import CaptureError
from i2am_train.ops import attention as ops
from i2am_train.types import GridSize
from tests.support.card import card
from tests.support.host_waits import HostWait, host_waits

LATENT, REFERENCE, CHANNELS = GridSize(6, 4), GridSize(5, 4), 8


class Attention(nn.Module):
    """Two layers of it make the network below."""

    heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))

    def forward(self, hidden: Tensor, context: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        query, key, value = (
            made.unflatten(2, (2, -1)).transpose(1, 2)
            for made in (self.to_q(hidden), self.to_k(context), self.to_v(context))
        )
        mask = None if attention_mask is None else attention_mask[:, None, None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.ModuleList([Attention(), Attention()])

    def forward(self, sample: Tensor, timestep: Any, context: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = sample.flatten(2).mT
        for layer in self.attn:
            keys = torch.cat([hidden, context], dim=1) if context.shape[1] == hidden.shape[1] else context
            hidden = hidden + layer(hidden, keys, attention_mask=mask)
        return hidden.mT.reshape(sample.shape)


PLAIN = Site(r"attn\.\d", reference=Tokens(REFERENCE))
CROPPED = Site(r"attn\.\d", generated=Tokens(crop=(0, 1, 0, 0.5)), reference=Tokens(REFERENCE, crop=(0, 1, 0.5, 1)))
JOINT = Site(r"attn\.\d", reference=Tokens("latent", block=(1, 2)), joint=True)
CASES: dict[str, tuple[Site, dict[str, Any]]] = {
    "projections": (PLAIN, {}),
    "sdpa": (PLAIN, {"via": "sdpa"}),
    "a mask of the generated picture": (PLAIN, {"generated_mask": torch.rand(2, 12, 8) > 0.3}),
    "places by index": (CROPPED, {}),
    "both pictures' keys": (JOINT, {}),
}


@pytest.fixture(autouse=True)
def tried() -> Iterator[None]:
    """The kernels were tried before, which waits: once in a process."""
    before, ops._fits_card = ops._fits_card, functools.cache(lambda *_: True)
    yield
    ops._fits_card = before


def times(kind: str, device: str) -> list[Any]:
    if kind == "embedding":
        return [torch.full((2, 6), float(step), device=device) for step in range(3)]
    if kind == "number":
        return [961, 641, 321]
    return list(torch.tensor([961, 641, 321]).to(device))


def run(
    site: Site, options: dict[str, Any], device: str, kind: str = "tensor", mask: Tensor | None = None,
    again: bool = False,
) -> tuple[AttributionMaps, list[HostWait], list[HostWait]]:  # fmt: skip
    """Maps of three evaluations, with the waits of these and those of the maps."""
    model = Denoiser().to(device)
    tokens = LATENT.tokens if site is JOINT else REFERENCE.tokens
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 2, CHANNELS, *LATENT, generator=generator).to(device)
    context = torch.randn(2, tokens, CHANNELS, generator=generator).to(device)
    mask = None if mask is None else mask.to(device)
    steps = times("tensor" if kind == "announced" else kind, device)
    given = options | {"generated_mask": options["generated_mask"].clone()} if "generated_mask" in options else options
    with torch.no_grad(), trace(model, Recipe("", (site,), rows="all"), **given) as attention, host_waits() as waits:
        for index, timestep in enumerate(steps + steps[:1] if again else steps):
            if kind == "announced":
                with announce(step_index=index, conditional_rows=slice(0, 2)):
                    model(latents[index], timestep, context, mask)
            else:
                model(latents[index % 3], timestep, context, mask)
    with host_waits() as at_the_end:
        maps = attention.maps()
    return maps, waits, at_the_end


@pytest.mark.parametrize("kind", ["tensor", "number", "embedding", "announced"])
def test_a_traced_evaluation_does_not_wait_for_its_time(kind: str) -> None:
    expected, _, _ = run(PLAIN, {}, "cpu", kind)
    with card():
        maps, waits, at_the_end = run(PLAIN, {}, "cuda", kind)
    assert not waits, "\n".join(map(str, waits))
    assert len(at_the_end) == (1 if kind == "number" else 2)  # maps in one copy, times in another
    assert maps.store.timesteps == expected.store.timesteps


@pytest.mark.parametrize("name", CASES)
def test_a_traced_evaluation_does_not_wait_for_its_maps(name: str) -> None:
    """However tokens and weights are chosen; the maps are those of the CPU."""
    expected, _, _ = run(*CASES[name], "cpu")
    with card():
        maps, waits, at_the_end = run(*CASES[name], "cuda")
    assert not waits, "\n".join(map(str, waits))
    assert len(at_the_end) == 2
    for mine, other in zip(maps.store.layers, expected.store.layers, strict=True):
        for vector in ("to_generated", "to_reference", "mass"):
            one, two = getattr(mine, vector), getattr(other, vector)
            assert (one is None) == (two is None) == (vector == "mass" and name != "both pictures' keys")
            if one is not None:
                torch.testing.assert_close(one, two, rtol=1e-5, atol=0)


@pytest.mark.parametrize("via", ["projections", "sdpa"])
def test_a_mask_is_looked_at_when_the_maps_are_asked_for(via: str) -> None:
    everything = torch.ones(2, REFERENCE.tokens, dtype=torch.bool)
    with card():
        _, waits, _ = run(PLAIN, {"via": via}, "cuda", mask=everything)
        assert not waits, "\n".join(map(str, waits))
        with pytest.raises(CaptureError, match="under a mask"):
            run(PLAIN, {"via": via}, "cuda", mask=everything.index_fill(1, torch.tensor([3]), value=False))


@pytest.mark.parametrize("kind", ["tensor", "embedding"])
def test_a_second_run_is_found_when_the_maps_are_asked_for(kind: str) -> None:
    """At the call itself where the times are on the CPU."""
    with card(), pytest.raises(CaptureError, match="second sampling run"):
        run(PLAIN, {}, "cuda", kind, again=True)
    with pytest.raises(CaptureError, match="second sampling run"):
        run(PLAIN, {}, "cpu", kind, again=True)
