"""What must hold for any scores: symmetries, locality and independence of samples."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from i2am_train.losses.attention import attention_centers, attention_on_grids
from i2am_train.losses.literature import supervised
from i2am_train.losses.paper import VARIANTS
from i2am_train.types import GridSize, LossVariant

FEW = settings(max_examples=12, deadline=None)
variants = st.sampled_from(list(LossVariant))
fair_variants = st.sampled_from([LossVariant.HINGE, LossVariant.REWARD, LossVariant.MARGIN, LossVariant.MIXED])
seeds = st.integers(0, 2**16)
grids = st.tuples(st.integers(1, 5), st.integers(1, 6)).map(lambda sizes: GridSize(*sizes))


def draw(seed: int, samples: int, generated: GridSize, reference: GridSize) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, generated.tokens, reference.tokens)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    mask = torch.rand(samples, generated.tokens, generator=generator) > 0.3
    return logits.softmax(-1), mask


def all_terms(scores: Tensor, mask: Tensor, generated: GridSize, reference: GridSize, variant: LossVariant) -> Tensor:
    reading = VARIANTS[variant]
    attention = attention_on_grids(scores, mask, generated, reference, centers=reading.centers)
    return torch.stack([term(attention) for term in (reading.dcml, reading.tv, reading.cwg)])


@FEW
@given(grids, seeds)
def test_a_one_hot_score_gives_exactly_that_centre(reference: GridSize, seed: int) -> None:
    """Row and column of the token, without rounding."""
    tokens = torch.arange(reference.tokens)
    chosen = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))]
    scores = torch.nn.functional.one_hot(chosen, reference.tokens).float().expand(2, -1, -1)
    centers = attention_centers(scores.reshape(2, -1, *reference))
    expected = torch.stack((chosen // reference.width, chosen % reference.width), dim=-1).float()
    assert torch.equal(centers[1], expected)


@FEW
@given(grids, grids, seeds, variants)
def test_samples_are_independent(generated: GridSize, reference: GridSize, seed: int, variant: LossVariant) -> None:
    """Splitting a batch changes nothing, and permuting it permutes the values."""
    scores, mask = draw(seed, 3, generated, reference)
    whole = all_terms(scores, mask, generated, reference, variant)
    order = torch.tensor([2, 0, 1])
    permuted = all_terms(scores[order], mask[order], generated, reference, variant)
    torch.testing.assert_close(permuted, whole[:, order])
    parts = torch.cat(
        [all_terms(scores[rows], mask[rows], generated, reference, variant) for rows in (slice(0, 1), slice(1, 3))],
        dim=1,
    )
    own = slice(2) if variant is LossVariant.AUTHORS_V1 else slice(3)  # its CWG is of the batch
    torch.testing.assert_close(parts[own], whole[own])


@FEW
@given(grids, grids, seeds, variants)
def test_patches_outside_the_mask_do_not_matter(
    generated: GridSize, reference: GridSize, seed: int, variant: LossVariant
) -> None:
    """Other scores there give the same value, and their gradient is 0."""
    scores, mask = draw(seed, 2, generated, reference)
    others, _ = draw(seed + 1, 2, generated, reference)
    mixed = torch.where(mask[..., None], scores, others).requires_grad_()
    value = all_terms(mixed, mask, generated, reference, variant)
    expected = all_terms(scores, mask, generated, reference, variant)
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    assert mixed.grad is not None
    assert torch.equal(mixed.grad[~mask], torch.zeros_like(mixed.grad[~mask]))


@FEW
@given(grids, grids, seeds, fair_variants)
def test_flipping_both_pictures_changes_nothing(
    generated: GridSize, reference: GridSize, seed: int, variant: LossVariant
) -> None:
    """Left and right swapped in both grids: the same order, smoothness and sharpness.

    The augmentation flips person and garment together, so that the terms must not notice.
    """
    scores, mask = draw(seed, 2, generated, reference)
    grid = scores.reshape(2, *generated, *reference).flip(2, 4).reshape(scores.shape)
    flipped_mask = mask.reshape(2, *generated).flip(2).flatten(1)
    flipped = all_terms(grid, flipped_mask, generated, reference, variant)
    torch.testing.assert_close(flipped, all_terms(scores, mask, generated, reference, variant))


@FEW
@given(grids, grids, seeds, fair_variants)
def test_swapping_the_axes_changes_nothing(
    generated: GridSize, reference: GridSize, seed: int, variant: LossVariant
) -> None:
    """Both pictures transposed: rows and columns are treated alike."""
    scores, mask = draw(seed, 2, generated, reference)
    turned = scores.reshape(2, *generated, *reference).permute(0, 2, 1, 4, 3).flatten(3).flatten(1, 2)
    turned_mask = mask.reshape(2, *generated).mT.flatten(1)
    value = all_terms(turned, turned_mask, GridSize(*generated[::-1]), GridSize(*reference[::-1]), variant)
    torch.testing.assert_close(value, all_terms(scores, mask, generated, reference, variant))


@FEW
@given(grids, grids, seeds)
def test_bounds_of_the_normalised_terms(generated: GridSize, reference: GridSize, seed: int) -> None:
    """Hinge in [0, grid], reward in [-grid, 0], TV at least 0, CWG in [-1, 0]."""
    scores, mask = draw(seed, 2, generated, reference)
    size = max(reference)
    hinge, tv, cwg = all_terms(scores, mask, generated, reference, LossVariant.HINGE)
    reward = all_terms(scores, mask, generated, reference, LossVariant.REWARD)[0]
    assert ((hinge >= 0) & (hinge <= size)).all()
    assert ((reward <= 0) & (reward >= -size)).all()
    assert (tv >= 0).all()
    assert ((cwg <= 0) & (cwg >= -1 - 1e-12)).all()


@FEW
@given(grids, grids, seeds)
def test_supervision_ignores_patches_without_truth(generated: GridSize, reference: GridSize, seed: int) -> None:
    """NaN targets are left out of value and gradient."""
    scores, mask = draw(seed, 2, generated, reference)
    scores.requires_grad_()
    target = torch.where(mask[..., None], torch.zeros(2, generated.tokens, 2), torch.nan)
    everywhere = torch.ones_like(mask)
    value = supervised(attention_on_grids(scores, everywhere, generated, reference, target=target))
    assert value.isfinite().all()
    value.sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert torch.equal(scores.grad[~mask], torch.zeros_like(scores.grad[~mask]))
