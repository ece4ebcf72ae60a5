"""Every form of every attention loss meets the same demands; a new term is one more entry."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from i2am_train.losses.attention import Attention
from i2am_train.losses.literature import atv, entropy, leffa, mass, matches, supervised
from i2am_train.losses.paper import VARIANTS, dcml
from i2am_train.types import GridSize, LossVariant
from tests.support.attentions import whole_attention

GENERATED, REFERENCE = GridSize(4, 3), GridSize(7, 5)
SAMPLES = 3
Term = Callable[[Tensor, Tensor, LossVariant], Tensor]


def of(scores: Tensor, mask: Tensor, variant: LossVariant = LossVariant.REWARD) -> Attention:
    return whole_attention(scores, mask, GENERATED, REFERENCE, centers=VARIANTS[variant].centers)


def dcml_of(scores: Tensor, mask: Tensor, variant: LossVariant) -> Tensor:
    return VARIANTS[variant].dcml(of(scores, mask, variant))


def tv_of(scores: Tensor, mask: Tensor, variant: LossVariant) -> Tensor:
    return VARIANTS[variant].tv(of(scores, mask, variant))


def cwg_of(scores: Tensor, mask: Tensor, variant: LossVariant) -> Tensor:
    return VARIANTS[variant].cwg(of(scores, mask, variant))


def without_variants(function: Callable[..., Tensor], **keywords: Any) -> Term:
    return lambda scores, mask, variant: function(of(scores, mask), **keywords)


TERMS: dict[str, Term] = {"dcml": dcml_of, "tv": tv_of, "cwg": cwg_of}
OTHERS: dict[str, Term] = {
    "dcml-capped": without_variants(dcml, force="capped"),
    "dcml-extent": without_variants(dcml, force="extent", margin=0.8),
    "supervised": without_variants(supervised),
    "matches": without_variants(matches),
    "matches-mean": without_variants(matches, per_head=False, sigma=1.0),
    "leffa": without_variants(leffa),
    "entropy": without_variants(entropy),
    "mass": without_variants(mass),
    "atv": without_variants(atv),
}
CASES = [
    *(pytest.param(TERMS[t], v, id=f"{t}-{v}") for t, v in product(TERMS, LossVariant)),
    *(pytest.param(term, LossVariant.REWARD, id=name) for name, term in OTHERS.items()),
]
OF_PAIRS = (dcml_of, tv_of, OTHERS["dcml-capped"], OTHERS["dcml-extent"], OTHERS["atv"])
every_loss = pytest.mark.parametrize(("term", "variant"), CASES)


def looks_at_others(term: Term, variant: LossVariant) -> bool:
    """The authors' first CWG alone is a quotient of whole batches (tests/parity/test_losses_loops.py)."""
    return term is cwg_of and variant is LossVariant.AUTHORS_V1


@pytest.fixture
def logits() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(SAMPLES, GENERATED.tokens, REFERENCE.tokens, generator=generator) * 2


@pytest.fixture
def mask() -> Tensor:
    inside = torch.ones(SAMPLES, GENERATED.tokens, dtype=torch.bool)
    inside[1, ::4] = False
    return inside


@every_loss
def test_one_finite_value_per_sample(term: Term, variant: LossVariant, logits: Tensor, mask: Tensor) -> None:
    """Unreduced, in the format of the scores."""
    value = term(logits.softmax(-1), mask, variant)
    assert value.shape == (SAMPLES,)
    assert value.dtype is torch.float32
    assert value.isfinite().all()
    assert value.unique().numel() == SAMPLES


@every_loss
def test_the_gradient_arrives(term: Term, variant: LossVariant, logits: Tensor, mask: Tensor) -> None:
    """At the logits of every sample, finite."""
    logits.requires_grad_()
    term(logits.softmax(-1), mask, variant).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad.abs().sum(dim=(1, 2)) > 0).all()


@every_loss
def test_an_empty_mask_is_zero_without_a_gradient(
    term: Term, variant: LossVariant, logits: Tensor, mask: Tensor
) -> None:
    """Exactly 0, no NaN, and the other samples do not notice."""
    empty = mask.clone()
    empty[1] = False
    logits.requires_grad_()
    value = term(logits.softmax(-1), empty, variant)
    value.sum().backward()
    assert value[1].item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad[1], torch.zeros_like(logits.grad[1]))
    if not looks_at_others(term, variant):
        assert torch.equal(value[[0, 2]], term(logits.softmax(-1), mask, variant)[[0, 2]])


@every_loss
def test_a_single_patch_has_no_pairs(term: Term, variant: LossVariant, logits: Tensor, mask: Tensor) -> None:
    """Terms of pairs and neighbours are 0, those of patches finite."""
    single = torch.zeros_like(mask)
    single[:, 4] = True
    value = term(logits.softmax(-1), single, variant)
    assert value.isfinite().all()
    if term in OF_PAIRS:
        assert value.tolist() == [0.0] * SAMPLES


@every_loss
def test_half_precision_is_computed_in_float32(term: Term, variant: LossVariant, logits: Tensor, mask: Tensor) -> None:
    """bfloat16 scores, and autocast around float32 ones, give the float32 value."""
    scores = logits.softmax(-1)
    value = term(scores.bfloat16(), mask, variant)
    assert value.dtype is torch.float32
    torch.testing.assert_close(value, term(scores.bfloat16().float(), mask, variant))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = term(scores, mask, variant)
    assert torch.equal(cast, term(scores, mask, variant))


@every_loss
def test_float64_stays_float64(term: Term, variant: LossVariant, logits: Tensor, mask: Tensor) -> None:
    """So that golden values and gradient checks mean something."""
    assert term(logits.double().softmax(-1), mask, variant).dtype is torch.float64


@every_loss
def test_splitting_a_batch_changes_nothing(term: Term, variant: LossVariant, logits: Tensor, mask: Tensor) -> None:
    """No average over the batch hides inside."""
    scores = logits.softmax(-1)
    whole = term(scores, mask, variant)
    parts = [term(scores[i : i + 1], mask[i : i + 1], variant) for i in range(SAMPLES)]
    assert torch.allclose(torch.cat(parts), whole) is not looks_at_others(term, variant)


@every_loss
def test_the_derivative_is_the_slope(term: Term, variant: LossVariant, logits: Tensor, mask: Tensor) -> None:
    """A small step along the gradient changes the value as the gradient says (float64)."""
    free = logits.double().requires_grad_()
    value = term(free.softmax(-1), mask, variant).sum()
    (gradient,) = torch.autograd.grad(value, free)
    step = 1e-6 * gradient / gradient.norm()
    with torch.no_grad():
        ahead = term((free + step).softmax(-1), mask, variant).sum()
        behind = term((free - step).softmax(-1), mask, variant).sum()
    slope = (ahead - behind) / 2e-6
    torch.testing.assert_close(slope, gradient.norm(), rtol=1e-5, atol=1e-9)
