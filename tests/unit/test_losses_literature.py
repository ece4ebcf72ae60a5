"""What the terms of other papers do to attention, and where they end."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from i2am_train.errors import CaptureError
from i2am_train.losses.attention import Attention, Pictures, attention_on_grids
from i2am_train.losses.literature import atv, entropy, leffa, mass, matches
from i2am_train.losses.paper import cwg, dcml, tv
from i2am_train.metrics.attention import attention_entropy, correspondence_error, spread_ratio, target_on_grid
from i2am_train.ops.attention import reference_mass
from i2am_train.ops.grids import garment_slope, mask_on_grid, matches_on_grid
from i2am_train.ops.rows import head_mean_scores, log_head_scores, log_reference_mass
from i2am_train.types import GridSize
from tests.support.attentions import whole_attention

GENERATED, REFERENCE = GridSize(4, 3), GridSize(7, 5)
Term = Callable[[Attention], Tensor]
TERMS: dict[str, Term] = {
    "capped": partial(dcml, force="capped"),
    "extent": partial(dcml, force="extent"),
    "floor": partial(cwg, entropy_floor=0.3),
    "matches": matches,
    "matches of the mean": partial(matches, per_head=False),
    "leffa": leffa,
    "entropy": entropy,
    "mass": mass,
    "atv": atv,
}
SMOOTH = sorted(TERMS.keys() - {"floor"})
"""Terms that are the integral of their gradient: cwg's floor takes gradient and no value."""
everywhere = torch.ones(2, GENERATED.tokens, dtype=torch.bool)


def of_logits(logits: Tensor, mask: Tensor = everywhere) -> Attention:
    """Two heads (the second sharper), as the step has them: the logarithm is not that of a rounded softmax."""
    on = whole_attention(logits.softmax(-1), mask, GENERATED, REFERENCE)
    assert on.log_heads is not None
    heads = torch.stack((logits, 2 * logits), dim=1).log_softmax(dim=-1)
    share = heads[:, 0, :, : REFERENCE.width].logsumexp(dim=-1).clamp(max=0)
    return on._replace(
        log_heads=heads.reshape(on.log_heads.shape), log_mass=share.reshape(on.mask.shape), scores=on.scores
    )


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("kind", ["one place", "a place each", "even", "float32 has no such softmax"])
def test_values_and_gradients_are_numbers(name: str, kind: str) -> None:
    """For attention at both ends of what there is, in float32, at the logits: scores there may be exactly 0 and 1."""
    tokens = torch.arange(GENERATED.tokens) % REFERENCE.tokens
    logits = {
        "one place": 200.0 * one_hot(torch.full_like(tokens, 8), REFERENCE.tokens),
        "a place each": 200.0 * one_hot(tokens, REFERENCE.tokens),
        "even": torch.zeros(GENERATED.tokens, REFERENCE.tokens),
        "float32 has no such softmax": 1e6 * one_hot(tokens, REFERENCE.tokens),
    }[kind]
    free = logits.float().expand(2, -1, -1).clone().requires_grad_()
    value = TERMS[name](of_logits(free))
    value.sum().backward()
    assert value.isfinite().all()
    assert free.grad is not None
    assert free.grad.isfinite().all()


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_those_of_the_values(name: str) -> None:
    """By finite differences, in float64, at scores that nothing rounds."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, GENERATED.tokens, REFERENCE.tokens, generator=generator, dtype=torch.float64)
    mask = everywhere.clone()
    mask[0, 3:5] = False

    def value(free: Tensor) -> Tensor:
        return TERMS[name](of_logits(free, mask))

    assert torch.autograd.gradcheck(value, logits.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("name", sorted(TERMS.keys() - {"leffa", "mass"}))
def test_patches_outside_the_mask_have_no_part(name: str) -> None:
    """Other attention there changes nothing. (`leffa` interpolates between patches, `mass` is about them.)"""
    generator = torch.Generator().manual_seed(2)
    logits, others = torch.randn(2, 2, GENERATED.tokens, REFERENCE.tokens, generator=generator)
    mask = torch.rand(2, GENERATED.tokens, generator=generator) > 0.3
    mixed = torch.where(mask[..., None], logits, others)
    assert torch.equal(TERMS[name](of_logits(mixed, mask)), TERMS[name](of_logits(logits, mask)))


def mirrored(on: Attention) -> Attention:
    """Both pictures, left and right swapped."""
    assert on.matches is not None
    assert on.log_heads is not None
    assert on.log_mass is not None
    assert on.pictures is not None
    scores, centers = on.scores.flip(2, 4), on.centers.flip(2)
    return on._replace(
        scores=scores,
        centers=torch.stack((centers[..., 0], REFERENCE.width - 1 - centers[..., 1]), dim=-1),
        mask=on.mask.flip(2),
        matches=on.matches.flip(2, 4),
        log_heads=on.log_heads.flip(3, 5),
        log_mass=on.log_mass.flip(2),
        pictures=Pictures(on.pictures.person.flip(3), on.pictures.worn.flip(2), on.pictures.garment.flip(3)),
    )


@pytest.mark.parametrize("name", TERMS)
def test_flipping_both_pictures_changes_nothing(name: str) -> None:
    """The augmentation flips person and garment together."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, GENERATED.tokens, REFERENCE.tokens, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, GENERATED.tokens, generator=generator) > 0.3
    on = of_logits(logits, mask)
    torch.testing.assert_close(TERMS[name](mirrored(on)), TERMS[name](on))


@pytest.mark.parametrize("name", ["extent", "capped", "matches", "leffa", "mass", "atv"])
def test_what_is_missing_is_named(name: str) -> None:
    """A term of the scores alone says what it would need."""
    plain = attention_on_grids(torch.full((2, 12, 35), 1 / 35), everywhere, GENERATED, REFERENCE)
    with pytest.raises(CaptureError, match=r"needs (slope|matches|pictures|log_mass|log_heads), which this Attention"):
        TERMS[name](plain)


def test_heads_and_mass_are_those_of_the_scores() -> None:
    """Logarithms of what the other functions give, also where a share is too small for float32."""
    generator = torch.Generator().manual_seed(5)
    generated = torch.randn(2, 3, 6, 8, generator=generator)
    keys = torch.randn(2, 3, 9, 8, generator=generator)
    heads = log_head_scores(generated, keys[:, :, 1:])
    torch.testing.assert_close(heads.exp().mean(dim=1), head_mean_scores(generated, keys[:, :, 1:]))
    share = log_reference_mass(generated, keys, slice(1, None))
    torch.testing.assert_close(share.exp(), reference_mass(generated, keys, slice(1, None)).mean(dim=1))
    keys[:, :, 0] = 40 * generated[:, :, 0]
    tiny = log_reference_mass(generated * 10, keys, slice(1, None))
    assert tiny.isfinite().all()
    assert tiny.min() < -200


def test_matches_by_hand() -> None:
    """One patch with two matches in one cell and one in its neighbour; a 3x3 blur at a border; two heads."""
    places = torch.tensor([[[[0.5, 0.1], [0.5, 0.2], [0.5, 0.4], [torch.nan, torch.nan]]]])  # cells 0, 0, 1 of three
    worn = torch.ones(1, 1, 4, dtype=torch.bool)
    found = matches_on_grid(places, worn, GridSize(1, 1), GridSize(1, 3))
    torch.testing.assert_close(found, torch.tensor([[[2 / 3, 1 / 3, 0.0]]]))
    heads = torch.tensor([[[[0.5, 0.25, 0.25]], [[0.25, 0.5, 0.25]]]])
    on = attention_on_grids(
        heads.mean(dim=1), torch.ones(1, 1).bool(), GridSize(1, 1), GridSize(1, 3), log_heads=heads.log(), matches=found
    )
    two_thirds = (2 / 3 * math.log(2) + 1 / 3 * math.log(4) + 2 / 3 * math.log(4) + 1 / 3 * math.log(2)) / 2
    assert float(matches(on, sigma=0.0)) == pytest.approx(two_thirds, rel=1e-5)
    side = math.exp(-2)  # sigma .5
    blurred = torch.tensor([2 + side, 1 + 2 * side, side])
    goal = blurred / blurred.sum()
    expected = -(goal * heads[0, :, 0].log()).sum() / 2
    torch.testing.assert_close(matches(on), expected[None])


def test_matches_are_content_with_what_was_matched() -> None:
    """The histogram itself as attention has the least value, its entropy; the true place is not another one's."""
    generator = torch.Generator().manual_seed(6)
    found = torch.rand(2, 12, 35, generator=generator, dtype=torch.float64)
    found = found / found.sum(dim=2, keepdim=True)
    on = whole_attention(found, everywhere, GENERATED, REFERENCE, matches=found, log_heads=found.log()[:, None])
    least = -(found * found.log()).sum(dim=2).mean(dim=1)
    torch.testing.assert_close(matches(on, sigma=0.0), least, rtol=1e-5, atol=0.0)
    wrong = found.roll(3, dims=2)
    other = on._replace(log_heads=wrong.log()[:, None].reshape(2, 1, *GENERATED, *REFERENCE))
    assert (matches(other, sigma=0.0) > least).all()


def photographed(garment: Tensor) -> Attention:
    """A person who wears the garment as it lies, and attention that looks one patch to the side of the truth."""
    grid = GridSize(8, 6)
    cells = torch.arange(grid.tokens).view(*grid)
    beside = cells.roll(1, dims=1).flatten()
    logits = (8.0 * one_hot(beside, grid.tokens)).double()[None].requires_grad_()
    worn = torch.zeros(1, *garment.shape[2:], dtype=torch.bool)
    worn[:, 8:-8, 8:-8] = True  # nearer to the border, a bilinear flow cannot point at the garment's
    return attention_on_grids(
        logits.softmax(-1),
        mask_on_grid(worn, grid),
        grid,
        grid,
        log_heads=logits.log_softmax(-1)[:, None],
        pictures=Pictures(garment, worn, garment),
    )


def test_leffa_is_blind_on_plain_cloth() -> None:
    """A garment of one colour has no photometric gradient, whatever the attention looks at; one with a ramp has."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 48), indexing="ij")
    plain, ramp = torch.full((1, 3, 64, 48), 0.3), torch.stack((x, y, x * y))[None]
    for garment, has_gradient in ((plain, False), (ramp, True)):
        on = photographed(garment.double())
        value = leffa(on)
        assert on.log_heads is not None
        (gradient,) = torch.autograd.grad(value.sum(), on.log_heads)
        assert bool(value.item() > 1e-3) is has_gradient
        assert bool(gradient.abs().max() > 1e-6) is has_gradient


def test_leffa_is_least_at_the_truth() -> None:
    """Attention at each patch's own place warps the garment onto itself, and less well one patch to the side."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 48), indexing="ij")
    on = photographed(torch.stack((x, y, x * y))[None].double())
    grid = GridSize(8, 6)
    own = (1e4 * one_hot(torch.arange(48), 48)).double().log_softmax(-1).reshape(1, 1, *grid, *grid)
    assert leffa(on._replace(log_heads=own)).item() < 1e-10
    assert leffa(on).item() > 1e-2


def test_heads_that_cancel() -> None:
    """`atv` is never below `tv` with power 1, which sees the mean of the heads, and equal for one head."""
    generator = torch.Generator().manual_seed(7)
    heads = torch.randn(2, 3, 12, 35, generator=generator, dtype=torch.float64).mul(3).log_softmax(-1)
    on = attention_on_grids(heads.exp().mean(dim=1), everywhere, GENERATED, REFERENCE, log_heads=heads)
    assert (atv(on) > tv(on, power=1)).all()
    single = attention_on_grids(heads[:, 0].exp(), everywhere, GENERATED, REFERENCE, log_heads=heads[:, :1])
    torch.testing.assert_close(atv(single), tv(single, power=1))


def test_mass_by_hand() -> None:
    """Inside minus the logarithm, outside the share; 0 without an inside."""
    share = torch.tensor([[0.5, 0.25, 0.125, 1.0]] * 2)
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    scores = torch.full((2, 4, 1), 1.0)
    on = attention_on_grids(scores, mask, GridSize(2, 2), GridSize(1, 1), log_mass=share.log())
    expected = (math.log(2) + math.log(4)) / 2 + (0.125 + 1.0) / 2
    torch.testing.assert_close(mass(on), torch.tensor([expected, 0.0]))


def test_dropped_conditions_are_even() -> None:
    """Heads, mass and pictures of a dropped sample have no part, whatever they are."""
    broken = torch.full((2, 2, 12, 35), torch.nan)
    broken[0] = -math.log(35)
    on = attention_on_grids(
        broken.exp().mean(dim=1),
        everywhere,
        GENERATED,
        REFERENCE,
        conditioned=torch.tensor([True, False]),
        log_heads=broken,
        log_mass=broken[:, 0, :, 0],
        pictures=Pictures(*[torch.ones(2, 3, 8, 6), torch.ones(2, 8, 6).bool(), torch.zeros(2, 3, 8, 6)]),
    )
    assert [float(value) for term in (leffa, atv, mass) for value in term(on)] == pytest.approx(
        [1.0, 0.0, 0.0, 0.0, math.log(35), 0.0]
    )


# -- where descent ends --------------------------------------------------------------------------------------------

PICTURE, GRIDS = GridSize(96, 64), (GridSize(6, 4), GridSize(12, 8))


def dressed() -> tuple[Tensor, Tensor, Tensor]:
    """A garment on a person and flat, both rectangles, and the true place of each worn pixel (``yx``, 0 to 1)."""
    worn, flat = torch.zeros(2, 1, *PICTURE, dtype=torch.bool)
    worn[:, 16:80, 16:48] = True
    flat[:, 8:88, 8:56] = True
    y = (8 + (torch.arange(96.0) - 16 + 0.5) * 80 / 64) / 96
    x = (8 + (torch.arange(64.0) - 16 + 0.5) * 48 / 32) / 64
    places = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)[None]
    return worn, flat, places.where(worn[..., None], torch.nan)


def descended(term: Term, steps: int, noise: float = 0.1) -> tuple[Attention, Tensor]:
    """Attention whose free logits went down a term, and the true target."""
    worn, flat, places = dressed()
    generated, reference = GRIDS
    logits = noise * torch.randn(1, generated.tokens, reference.tokens, generator=torch.Generator().manual_seed(8))
    logits.requires_grad_()
    target = target_on_grid(places, worn, generated, reference)
    slope = garment_slope(worn, flat, generated, reference)
    mask = mask_on_grid(worn, generated)
    for _ in range(steps):
        on = attention_on_grids(logits.softmax(-1), mask, generated, reference, slope=slope)
        (gradient,) = torch.autograd.grad(term(on).sum(), logits)
        logits.data -= 10 * gradient
    with torch.no_grad():
        return attention_on_grids(logits.softmax(-1), mask, generated, reference, slope=slope), target


def test_the_extents_slope_is_that_of_the_truth() -> None:
    """For a garment that is shifted and scaled along the axes, masks alone tell it."""
    worn, flat, places = dressed()
    target = target_on_grid(places, worn, *GRIDS).unflatten(1, GRIDS[0])[0]
    true = torch.stack([(target[3, 2] - target[2, 2])[0], (target[3, 2] - target[3, 1])[1]])
    torch.testing.assert_close(garment_slope(worn, flat, *GRIDS)[0], true, rtol=1e-3, atol=0.0)
    assert true.tolist() == pytest.approx([80 / 64 * 2, 48 / 32 * 2])


def test_masks_without_an_extent() -> None:
    """Nothing to divide by, nothing to reach: 0, and no pull."""
    worn, flat, _ = dressed()
    nothing = torch.zeros_like(worn)
    for one, other in ((worn, nothing), (nothing, flat), (nothing, nothing)):
        assert garment_slope(one, other, *GRIDS).tolist() == [[0.0, 0.0]]


def test_the_extent_ends_at_the_garments_own() -> None:
    """From almost even attention: `extent` stops where the truth's spread is, `reward` goes on to the borders."""
    ratios, errors = {}, {}
    for force in ("extent", "reward"):
        on, target = descended(partial(dcml, force=force), steps=100)
        centers = on.centers.flatten(1, 2)
        ratios[force] = float(spread_ratio(centers, target))
        known = target.isfinite().all(dim=-1)
        shifted = target + (centers - target)[known].mean(dim=0)  # where the whole lies is left to others
        errors[force] = float(correspondence_error(centers, shifted))
    assert ratios["extent"] == pytest.approx(1.0, abs=0.05)
    assert errors["extent"] < 0.3
    assert ratios["reward"] > 1.5
    assert errors["reward"] > 1.5


def test_a_share_of_the_extent() -> None:
    """The truth has no `extent` left; shrunk, it has none with that `margin`, and as much beyond it as before it."""
    worn, flat, places = dressed()
    target = target_on_grid(places, worn, *GRIDS)
    scores = torch.full((1, GRIDS[0].tokens, GRIDS[1].tokens), 1 / GRIDS[1].tokens)
    slope = garment_slope(worn, flat, *GRIDS)
    on = attention_on_grids(scores, mask_on_grid(worn, GRIDS[0]), *GRIDS, slope=slope)
    for share in (1.0, 0.5, 1.5):
        there = on._replace(centers=(share * target).nan_to_num().unflatten(1, GRIDS[0]))
        assert dcml(there, force="extent", margin=share).item() == pytest.approx(0.0, abs=2e-3)
        less, more = (dcml(there, force="extent", margin=share + change).item() for change in (-0.2, 0.2))
        assert less == pytest.approx(more, rel=0.01)
        assert less > 0.5


def test_where_the_pull_ends() -> None:
    """`capped`, as `reward`, has no gradient for gaps below 0, and none above the garment's own; `extent` has both."""
    centers = torch.tensor([[[[0.0, 0.0], [0.0, -1.0], [0.0, 9.0]]]]).requires_grad_()  # gaps -1, 10 and 9
    on = Attention(torch.ones(1, 1, 3, 1, 1), centers, torch.ones(1, 1, 3).bool(), torch.ones(1).bool())
    on = on._replace(slope=torch.tensor([[1.0, 2.0]]))
    capped, extent = dcml(on, force="capped", norm="sum"), dcml(on, force="extent", norm="sum")
    assert capped.item() == -(0 + 2 + 4)
    assert extent.item() == 3 + 8 + 5
    assert torch.autograd.grad(capped.sum(), centers)[0].abs().sum() == 0
    assert torch.autograd.grad(extent.sum(), centers)[0][0, 0, :, 1].tolist() == [0.0, -2.0, 2.0]


@pytest.mark.parametrize(("term", "noise"), [(cwg, 0.1), (entropy, 1.5)])
def test_the_floor_ends_the_sharpening(term: Callable[..., Tensor], noise: float) -> None:
    """Descent ends in one place a patch without a floor, and near the floor with one."""
    name = "entropy_floor" if term is cwg else "floor"

    def left(floor: float) -> float:
        on, _ = descended(partial(term, **{name: floor}), steps=200, noise=noise)
        return float(attention_entropy(on.scores.flatten(3).flatten(1, 2), on.mask.flatten(1)))

    assert left(0.0) < 0.1
    assert left(0.3) == pytest.approx(0.3, abs=0.05)
