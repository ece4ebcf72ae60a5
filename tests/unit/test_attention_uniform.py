"""Uniform attention of single heads, and score matrices by head, against attention written out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from i2am_train.attention import Recipe, Site, Tokens, announce, trace, uniform_attention
from i2am_train.attention.maps import load_maps, save_maps
from i2am_train.errors import CaptureError
from i2am_train.types import GridSize

GENERATED, REFERENCE, WIDTH = GridSize(3, 2), GridSize(2, 5), 4


class Look(nn.Module):
    """Four heads over one leading token and a reference of 2x5; ``shared`` keys serve two heads each."""

    heads = 4

    def __init__(self, kernel: bool, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kernel, self.key_heads = kernel, 2 if shared else 4
        self.to_q = nn.Linear(6, self.heads * WIDTH, bias=False)
        self.to_k = nn.Linear(6, self.key_heads * WIDTH, bias=False)
        self.to_v = nn.Linear(6, self.key_heads * WIDTH, bias=False)

    def forward(self, x: Tensor, reference: Tensor) -> Tensor:
        """``[row, token, head, channel]``."""
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (made(reference).unflatten(-1, (self.key_heads, -1)).transpose(1, 2) for made in (self.to_k, self.to_v))
        if self.kernel:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=self.key_heads < 4).transpose(1, 2)
        return ((q @ k.mT / WIDTH**0.5).softmax(-1) @ v).transpose(1, 2)


class Net(nn.Module):
    """One layer; the first row of the batch is unconditional."""

    def __init__(self, **kind: bool) -> None:
        super().__init__()
        self.look = Look(**kind)

    def forward(self, sample: Tensor, reference: Tensor) -> Tensor:
        with torch.no_grad():
            return self.look(sample.flatten(2).mT, reference)


def recipe(via: str) -> Recipe:
    site = Site("look", generated=Tokens(GENERATED), reference=Tokens(REFERENCE, skip=1), via=via)
    return Recipe("", (site,), timestep=None)


@pytest.fixture
def given() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(3, 6, *GENERATED, generator=random), 3 * torch.randn(3, 11, 6, generator=random)


def run(net: Net, given: tuple[Tensor, Tensor]) -> Tensor:
    with announce(step_index=0, conditional_rows=slice(1, 3)):
        return net(*given)


def by_hand(net: Net, given: tuple[Tensor, Tensor], uniform: list[int]) -> Tensor:
    """Loops over rows and heads; keys of the ten patches become their mean, that of the leading token stays."""
    look, (sample, reference) = net.look, given
    share = look.heads // look.key_heads
    found = torch.zeros(3, GENERATED.tokens, 4, WIDTH)
    for row in range(3):
        q, k, v = look.to_q(sample[row].flatten(1).mT), look.to_k(reference[row]), look.to_v(reference[row])
        for head in range(4):
            at, of = slice(head * WIDTH, (head + 1) * WIDTH), slice(head // share * WIDTH, (head // share + 1) * WIDTH)
            keys = k[:, of].clone()
            if row > 0 and head in uniform:
                keys[1:] = keys[1:].mean(dim=0)
            found[row, :, head] = (q[:, at] @ keys.mT / 2).softmax(-1) @ v[:, of]
    return found.detach()


KINDS = [("projections", {"kernel": False}), ("sdpa", {"kernel": True}), ("sdpa", {"kernel": True, "shared": True})]


@pytest.mark.parametrize(("via", "kind"), KINDS)
@pytest.mark.parametrize("heads", [[2], [0, 3], [0, 1, 2, 3]])
def test_only_these_heads(via: str, kind: dict[str, bool], heads: list[int], given: tuple[Tensor, Tensor]) -> None:
    """Also where heads share their keys; all heads by number are all heads."""
    net = Net(**kind)
    with uniform_attention(net, recipe(via), heads=heads):
        found = run(net, given)
    torch.testing.assert_close(found, by_hand(net, given, heads))
    torch.testing.assert_close(run(net, given), by_hand(net, given, []))
    assert (found - run(net, given))[1:, :, heads].abs().amax(dim=(0, 1, 3)).min() > 0.05
    if len(heads) == 4:
        with uniform_attention(net, recipe(via)):
            torch.testing.assert_close(run(net, given), found)


@pytest.mark.parametrize(("via", "kind"), KINDS)
@pytest.mark.parametrize("heads", [[4], [-1], []])
def test_heads_that_are_not_there(via: str, kind: dict[str, bool], heads: list[int], given: Any) -> None:
    net = Net(**kind)
    refused = pytest.raises(CaptureError, match=r"heads=.* layer look has 4 heads, numbered from 0")
    with refused, uniform_attention(net, recipe(via), heads=heads):
        run(net, given)
    torch.testing.assert_close(run(net, given), by_hand(net, given, []))


def test_a_head_of_the_try_on_model(make_small_model: Callable[..., Any], read_batch: Callable[..., Any]) -> None:
    """Its keys' columns are their mean over the tokens, and the others' are not."""
    model = make_small_model().eval()
    tokens = model.encode_reference(read_batch([0, 1])["garment"])
    noisy, timesteps = torch.randn(2, 12, *model.latent_size), torch.tensor([700, 700])
    attention = model.unet.get_submodule("up_blocks.2.attentions.1.transformer_blocks.0.attn2")
    width = attention.to_k.out_features // attention.heads
    assert attention.heads > 1

    def mean_keys(_: nn.Module, __: Any, keys: Tensor) -> Tensor:
        keys = keys.clone()
        keys[:, :, width : 2 * width] = keys[:, :, width : 2 * width].mean(dim=1, keepdim=True)
        return keys

    with torch.no_grad():
        handle = attention.to_k.register_forward_hook(mean_keys)
        expected = model.unet(noisy, timesteps, tokens).sample
        handle.remove()
        with uniform_attention(model, layers=[5], heads=[1]), announce(step_index=0, conditional_rows=slice(0, 2)):
            found = model.unet(noisy, timesteps, tokens).sample
        plainly = model.unet(noisy, timesteps, tokens).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - plainly).abs().max() > 1e-6


@pytest.mark.parametrize(("via", "kind"), KINDS)
def test_matrices_by_head(via: str, kind: dict[str, bool], given: Any, tmp_path: Any) -> None:
    """Both softmaxes of each head; their means are what a trace without heads keeps; they survive the archive."""
    net, both = Net(**kind), []
    for matrix_heads in (True, False):
        with trace(net, recipe(via), matrix_layers=None, matrix_heads=matrix_heads) as attention:
            run(net, given)
        both.append(attention.maps())
    maps, means = both
    sample, reference = given
    share = 4 // net.look.key_heads
    for row in (0, 1):
        q = net.look.to_q(sample[row + 1].flatten(1).mT)
        k = net.look.to_k(reference[row + 1, 1:])
        for head in range(4):
            columns = k[:, head // share * WIDTH : (head // share + 1) * WIDTH]
            logits = (q[:, head * WIDTH : (head + 1) * WIDTH] @ columns.mT / 2).detach()
            torch.testing.assert_close(maps.scores("look", head=head)[row], logits.softmax(1))
            torch.testing.assert_close(maps.scores("look", "generated", head)[row], logits.softmax(0))
    for over in ("reference", "generated"):
        torch.testing.assert_close(maps.scores("look", over), means.scores("look", over))  # type: ignore[arg-type]
    again = load_maps(save_maps(maps, tmp_path / "maps.safetensors")).maps
    assert torch.equal(again.scores("look", head=3), maps.scores("look", head=3))
    with pytest.raises(CaptureError, match=r"no scores of head 4 of layer look: kept were 4 heads, numbered from 0"):
        maps.scores("look", head=4)
    with pytest.raises(CaptureError, match=r"the mean of its heads only\. Trace with matrix_heads=True"):
        means.scores("look", head=0)
