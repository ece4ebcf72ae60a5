"""Golden files 01-05: centres and attention losses, values and gradients, to 1e-9 in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from i2am_train.losses.attention import Attention, attention_on_grids
from i2am_train.losses.paper import VARIANTS, cwg
from i2am_train.types import GridSize
from i2am_train.types import LossVariant as V

Golden = Callable[[str], dict[str, Any]]
ALIKE = {"rtol": 0.0, "atol": 1e-9}
TWO = GridSize(2, 2)
GENERATED, REFERENCE = GridSize(4, 3), GridSize(5, 4)


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def on_tokens(values: Any) -> Tensor:
    """A field ``[height, width, ...]`` as the second sample of a batch of two different ones."""
    return two_samples(tensor(values).flatten(0, 1))


def two_samples(values: Tensor) -> Tensor:
    return torch.stack([values.flip(0), values])


def mask_of(content: dict[str, Any], masked: str = "mask") -> Tensor:
    """That of a golden file, or one that lets everything count (``mask_all_ones``)."""
    mask = on_tokens(content["inputs"]["mask"]).bool()
    return torch.ones_like(mask) if masked == "mask_all_ones" else mask


def hand_scores(golden: Golden) -> Tensor:
    return tensor(golden("01")["inputs"]["A"]).reshape(1, 4, 4)


def everywhere(samples: int, tokens: int) -> Tensor:
    return torch.ones(samples, tokens, dtype=torch.bool)


def attention(scores: Tensor, mask: Tensor, generated: GridSize, reference: GridSize, variant: V) -> Attention:
    return attention_on_grids(scores, mask, generated, reference, centers=VARIANTS[variant].centers)


def of_hand(golden: Golden, variant: V) -> Attention:
    return attention(hand_scores(golden), everywhere(1, 4), TWO, TWO, variant)


def of_centers(centers: Tensor, mask: Tensor) -> Attention:
    """Centres as they stand in a file, for terms that do not look at scores."""
    samples, height, width = len(centers), *GENERATED
    return Attention(
        scores=centers.new_zeros(samples, height, width, *REFERENCE),
        centers=centers.reshape(samples, height, width, 2),
        mask=mask.reshape(samples, height, width),
        conditioned=torch.ones(samples, dtype=torch.bool),
    )


def scores_of(logits: Tensor, variant: V) -> Tensor:
    """The authors' first version drops the class token's column after the softmax."""
    if variant is V.AUTHORS_V1:
        return logits.softmax(dim=-1)[..., 1:]
    return logits[..., 1:].softmax(dim=-1)


@pytest.mark.parametrize(
    ("variant", "key"),
    [
        (V.PAPER, "C_paper_eq15 (factor 1/(h'w')=1/4, 1-based, [row,col])"),
        (V.AUTHORS_V2, "C_code_and_default (no factor, 0-based, [row,col])"),
        (V.HINGE, "C_code_and_default (no factor, 0-based, [row,col])"),
    ],
)
def test_centers_of_the_hand_example(golden: Golden, variant: V, key: str) -> None:
    """Equation 15 as written, and without its factor."""
    centers = of_hand(golden, variant).centers
    expected = tensor(golden("01")["expected"][key]).reshape(1, 2, 2, 2)
    torch.testing.assert_close(centers, expected, **ALIKE)


@pytest.mark.parametrize(
    ("variant", "key"),
    [
        (V.PAPER, "paper_eq16_17_on_C_paper_eq15"),
        (V.PAPER_WITHOUT_FACTOR, "paper_eq16_17_on_C_without_factor"),
        (V.AUTHORS_V1, "authors_code"),
        (V.AUTHORS_V2, "authors_code"),
        (V.HINGE, "default_hinge_mean"),
    ],
)
def test_dcml_of_the_hand_example(golden: Golden, variant: V, key: str) -> None:
    """The pencil value, and not the one that swaps x and y as equations 16 and 17 do."""
    expected = golden("01")["expected"]["DCML"]
    value = VARIANTS[variant].dcml(of_hand(golden, variant))
    torch.testing.assert_close(value, tensor([expected[key]]), **ALIKE)
    swapped = next(number for name, number in expected.items() if "literal_index" in name)
    assert abs(float(value) - swapped) > 0.1


@pytest.mark.parametrize(
    ("variant", "key"),
    [
        (V.PAPER_WITHOUT_FACTOR, "grad_paper_wrt_C_without_factor"),
        (V.AUTHORS_V1, "grad_authors_code"),
        (V.AUTHORS_V2, "grad_authors_code"),
        (V.HINGE, "grad_default"),
    ],
)
def test_dcml_gradient_of_the_hand_example(golden: Golden, variant: V, key: str) -> None:
    """The paper moves misordered centres only, the authors' code ordered ones only."""
    hand = of_hand(golden, variant)
    centers = hand.centers.requires_grad_()
    VARIANTS[variant].dcml(hand).sum().backward()
    expected = tensor(golden("01")["expected"]["DCML"][key]).reshape(1, 2, 2, 2)
    torch.testing.assert_close(centers.grad, expected, **ALIKE)


@pytest.mark.parametrize(
    ("term", "variant", "start"),
    [
        ("TV", V.PAPER, "paper_on_C_paper_eq15"),
        ("TV", V.PAPER_WITHOUT_FACTOR, "paper_on_C_without_factor"),
        ("TV", V.AUTHORS_V1, "authors_code_v1_l1"),
        ("TV", V.AUTHORS_V2, "authors_code_v2_l2"),
        ("TV", V.HINGE, "default"),
        ("CWG", V.PAPER, "paper_literal"),
        ("CWG", V.PAPER_WITHOUT_FACTOR, "paper_without_factor"),
        ("CWG", V.AUTHORS_V1, "authors_code_v1"),
        ("CWG", V.AUTHORS_V2, "authors_code_v2"),
        ("CWG", V.HINGE, "default"),
    ],
)
def test_tv_and_cwg_of_the_hand_example(golden: Golden, term: str, variant: V, start: str) -> None:
    """All five readings of equation 19, and of equations 20 and 21."""
    value = getattr(VARIANTS[variant], term.lower())(of_hand(golden, variant))
    (expected,) = (number for name, number in golden("01")["expected"][term].items() if name.startswith(start))
    torch.testing.assert_close(value, tensor([expected]), **ALIKE)


@pytest.mark.parametrize(
    ("variant", "key"),
    [
        (V.PAPER, "paper"),
        (V.AUTHORS_V1, "authors_code_v1"),
        (V.AUTHORS_V2, "authors_code_v2"),
        (V.HINGE, "default"),
        (V.REWARD, "default"),
    ],
)
def test_center_map(golden: Golden, variant: V, key: str) -> None:
    """Centres from logits with a class token; a non-square grid tells y from x."""
    content = golden("02")
    scores = scores_of(two_samples(tensor(content["inputs"]["logits"])), variant)
    mask = everywhere(2, GENERATED.tokens)
    centers = attention(scores, mask, GENERATED, REFERENCE, variant).centers[1]
    expected = tensor(content["expected"][key])
    torch.testing.assert_close(centers, expected, **ALIKE)
    swapped = tensor(content["must_not_equal"]["xy_swapped_default"])
    assert (centers - swapped).abs().max() > 0.1


@pytest.mark.parametrize("masked", ["mask_all_ones", "mask"])
@pytest.mark.parametrize(
    ("variant", "key"),
    [
        (V.PAPER, "paper"),
        (V.PAPER_WITHOUT_FACTOR, "paper"),
        (V.AUTHORS_V1, "authors_code"),
        (V.AUTHORS_V2, "authors_code"),
        (V.HINGE, "default"),
    ],
)
def test_dcml_value_and_gradient(golden: Golden, variant: V, key: str, masked: str) -> None:
    """A 4x3 field with and without a mask; the value with x and y swapped is another one."""
    content = golden("03")
    centers = on_tokens(content["inputs"]["C"]).requires_grad_()
    mask = mask_of(content, masked)
    value = VARIANTS[variant].dcml(of_centers(centers, mask))[1]
    expected = content["expected"][masked]
    torch.testing.assert_close(value, tensor(expected[key]), **ALIKE)
    value.backward()
    assert centers.grad is not None
    gradient = tensor(expected[f"{key}_grad"]).flatten(0, 1)
    torch.testing.assert_close(centers.grad[1], gradient, **ALIKE)
    swapped = VARIANTS[variant].dcml(of_centers(centers.flip(-1), mask))[1]
    assert (swapped - value).abs().detach() > 1e-3


def test_dcml_rejects_the_swapped_axes(golden: Golden) -> None:
    """The listed wrong values are those of swapped components: the check above means something."""
    content = golden("03")
    wrong = content["expected"]["mask"]["must_not_equal"]
    swapped = on_tokens(content["inputs"]["C"]).flip(-1)
    mask = mask_of(content)
    for variant, key in ((V.PAPER, "paper_xy_swapped"), (V.AUTHORS_V2, "authors_code_xy_swapped")):
        value = VARIANTS[variant].dcml(of_centers(swapped, mask))[1]
        torch.testing.assert_close(value, tensor(wrong[key]), **ALIKE)


@pytest.mark.parametrize("masked", ["mask_all_ones", "mask"])
@pytest.mark.parametrize("name", ["reward", "mixed"])
def test_dcml_of_the_projects_variants(golden: Golden, name: str, masked: str) -> None:
    """Reward is the authors' sum over valid pairs; mixed adds the hinge."""
    content = golden("03")
    expected = content["expected"][masked]
    pairs = expected["n_pairs_x"] + expected["n_pairs_y"]
    reward = expected["authors_code"] * GENERATED.tokens**2 / pairs
    mask = mask_of(content, masked)
    value = VARIANTS[V(name)].dcml(of_centers(on_tokens(content["inputs"]["C"]), mask))[1]
    total = reward if name == "reward" else reward + expected["default"]
    torch.testing.assert_close(value, tensor(total), **ALIKE)


@pytest.mark.parametrize("masked", ["mask_all_ones", "mask"])
@pytest.mark.parametrize(
    ("variant", "key"),
    [
        (V.PAPER, "paper"),
        (V.PAPER_WITHOUT_FACTOR, "paper"),
        (V.AUTHORS_V1, "authors_code_v1"),
        (V.AUTHORS_V2, "authors_code_v2"),
        (V.HINGE, "default"),
        (V.REWARD, "default"),
        (V.MARGIN, "default"),
        (V.MIXED, "default"),
    ],
)
def test_tv(golden: Golden, variant: V, key: str, masked: str) -> None:
    """Sums, the authors' averages over masked zeros, and the mean over valid neighbours."""
    content = golden("04")
    mask = mask_of(content, masked)
    value = VARIANTS[variant].tv(of_centers(on_tokens(content["inputs"]["C"]), mask))[1]
    torch.testing.assert_close(value, tensor(content["expected"][masked][key]), **ALIKE)


@pytest.mark.parametrize(
    ("variant", "key"),
    [
        (V.PAPER, "paper_literal"),
        (V.PAPER_WITHOUT_FACTOR, "paper_without_factor"),
        (V.AUTHORS_V1, "authors_code_v1"),
        (V.AUTHORS_V2, "authors_code_v2"),
        (V.HINGE, "default"),
        (V.MIXED, "default"),
    ],
)
def test_cwg(golden: Golden, variant: V, key: str) -> None:
    """The masked 4x3 example from logits with a class token."""
    content = golden("05")
    scores = scores_of(two_samples(tensor(content["inputs"]["logits"])), variant)
    mask = mask_of(content)
    value = VARIANTS[variant].cwg(attention(scores, mask, GENERATED, REFERENCE, variant))[1]
    torch.testing.assert_close(value, tensor(content["expected"][key]), **ALIKE)


@pytest.mark.parametrize("detached", [False, True])
def test_cwg_gradient(golden: Golden, detached: bool) -> None:
    """Gradient for the logits, through the centres and past them (numeric, hence 1e-7)."""
    content = golden("05")
    logits = two_samples(tensor(content["inputs"]["logits"])).requires_grad_()
    scores = scores_of(logits, V.HINGE)
    mask = mask_of(content)
    cwg(attention(scores, mask, GENERATED, REFERENCE, V.HINGE), detach_centers=detached)[1].backward()
    key = "C_detached" if detached else "C_not_detached"
    (name,) = (name for name in content if key in name)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[1], tensor(content[name]), rtol=0.0, atol=1e-7)
