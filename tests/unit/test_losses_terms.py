"""Behaviour of single terms that the golden files do not show."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from i2am_train.errors import CaptureError
from i2am_train.losses.attention import Attention, attention_on_grids
from i2am_train.losses.literature import supervised
from i2am_train.losses.objective import denoising_loss, snr_weights
from i2am_train.losses.paper import VARIANTS, cwg, dcml, tv
from i2am_train.ops.grids import aligned_coordinates, reference_coordinates
from i2am_train.types import GridSize, PredictionType
from i2am_train.types import LossVariant as V

GENERATED, REFERENCE = GridSize(4, 3), GridSize(8, 9)


def everywhere(samples: int = 2) -> Tensor:
    return torch.ones(samples, GENERATED.tokens, dtype=torch.bool)


def of_centers(centers: Tensor) -> Attention:
    scores = torch.zeros(2, *GENERATED, *REFERENCE)
    mask, all_of_them = torch.ones(2, *GENERATED).bool(), torch.ones(2).bool()
    return Attention(scores, centers.reshape(2, *GENERATED, 2), mask, all_of_them)


def of_scores(scores: Tensor, target: Tensor | None = None) -> Attention:
    return attention_on_grids(scores, everywhere(), GENERATED, REFERENCE, target=target)


def identity_layout() -> Attention:
    return of_centers(aligned_coordinates(GENERATED, REFERENCE).expand(2, -1, -1))


def test_collapse_satisfies_the_paper_but_not_the_reward() -> None:
    """One centre for all patches: hinge and TV are content with it, reward and margin are not."""
    collapsed = of_centers(torch.full((2, GENERATED.tokens, 2), 3.0))
    for variant in (V.PAPER_WITHOUT_FACTOR, V.HINGE):
        assert VARIANTS[variant].dcml(collapsed).tolist() == [0.0, 0.0]
    assert tv(collapsed).tolist() == [0.0, 0.0]
    for variant in (V.REWARD, V.MIXED, V.MARGIN, V.AUTHORS_V2):
        order = VARIANTS[variant].dcml
        assert (order(identity_layout()) < order(collapsed)).all()


def test_margin_is_in_reference_patches_per_step() -> None:
    """The identity layout has strides 2 and 3: a margin of 2 is met, 2.5 misses in y only."""
    met = dcml(identity_layout(), force="margin", margin=2.0)
    torch.testing.assert_close(met, torch.zeros(2), rtol=0.0, atol=1e-6)
    missed = dcml(identity_layout(), force="margin", margin=2.5)
    steps = 3 * (3 * 1 + 2 * 2 + 1 * 3)  # three columns of four cells: pairs times their distance
    pairs = 3 * 6 + 4 * 3
    torch.testing.assert_close(missed, torch.full((2,), 0.5 * steps / pairs))


def test_mixed_is_reward_plus_hinge() -> None:
    """On any field, and therefore minus the mean gap."""
    centers = torch.randn(2, GENERATED.tokens, 2, generator=torch.Generator().manual_seed(0))
    reward, hinge, mixed = (VARIANTS[v].dcml(of_centers(centers)) for v in (V.REWARD, V.HINGE, V.MIXED))
    torch.testing.assert_close(mixed, reward + hinge)


def test_centers_refuse_a_class_token() -> None:
    """One token too many is an error that says what to drop."""
    with pytest.raises(CaptureError, match=r"73 reference tokens.*8x9 has 72"):
        of_scores(torch.zeros(2, 12, 73))


def test_sharp_attention_reaches_the_bound_of_cwg() -> None:
    """One-hot rows give -1, also with the unsquared distance, whose root has no gradient at 0."""
    scores = torch.zeros(2, GENERATED.tokens, REFERENCE.tokens)
    scores[..., 40] = 1.0
    for variant in (V.HINGE, V.AUTHORS_V1):
        free = scores.clone().requires_grad_()
        value = VARIANTS[variant].cwg(of_scores(free))
        assert value.tolist() == [-1.0, -1.0]
        value.sum().backward()
        assert free.grad is not None
        assert free.grad.isfinite().all()


def test_sigma_overrides_the_variants_own() -> None:
    """A wider Gaussian forgives more."""
    scores = torch.rand(2, GENERATED.tokens, REFERENCE.tokens).softmax(-1)
    narrow, wide = (cwg(of_scores(scores), sigma=sigma) for sigma in (1.0, 2.0))
    torch.testing.assert_close(narrow, cwg(of_scores(scores)))
    assert (wide < narrow).all()


def test_cross_entropy_is_least_at_the_target() -> None:
    """The Gaussian itself as scores gives its entropy; any other scores give more."""
    places = reference_coordinates(REFERENCE)
    target = torch.tensor([4.0, 4.0]).expand(2, GENERATED.tokens, 2)
    gaussian = (-(places - target[0, 0]).square().sum(-1) / 2).softmax(-1)
    perfect = gaussian.expand(2, GENERATED.tokens, -1)
    least = supervised(of_scores(perfect, target))
    assert least[0].item() == pytest.approx(math.log(2 * math.pi * math.e), abs=0.01)
    other = supervised(of_scores(perfect.roll(1, dims=-1), target))
    assert (other > least).all()


def test_cross_entropy_gradient_is_finite_for_a_score_of_zero() -> None:
    """A float32 softmax can be exactly 0 at the true place."""
    scores = torch.zeros(2, GENERATED.tokens, REFERENCE.tokens)
    scores[..., 0] = 1.0
    scores.requires_grad_()
    target = torch.full((2, GENERATED.tokens, 2), 7.0)
    supervised(of_scores(scores, target)).sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_denoising_loss_is_float32_and_weighted() -> None:
    """bfloat16 predictions do not lower the precision of the mean."""
    target = torch.zeros(2, 4, 6, 5)
    prediction = torch.stack([torch.full((4, 6, 5), 1.5), torch.full((4, 6, 5), -0.5)])
    plain = denoising_loss(prediction.bfloat16(), target)
    assert plain.dtype is torch.float32
    assert plain.tolist() == [2.25, 0.25]
    weighted = denoising_loss(prediction, target, torch.tensor([2.0, 0.0]))
    assert weighted.tolist() == [4.5, 0.0]


@pytest.mark.parametrize("prediction", list(PredictionType))
def test_snr_weights_without_gamma_are_one(prediction: PredictionType) -> None:
    """gamma None is the plain loss."""
    weights = snr_weights(torch.linspace(0.99, 0.01, 10), torch.tensor([0, 9]), prediction, None)
    assert weights.tolist() == [1.0, 1.0]


def test_snr_weights_turn_one_target_into_the_other() -> None:
    """Both weigh the error of x0 with min(snr, gamma): w_eps * snr = w_v * (snr + 1)."""
    alphas = torch.linspace(0.999, 0.01, 50, dtype=torch.float64)
    drawn = torch.arange(50)
    ratio = alphas / (1 - alphas)
    epsilon = snr_weights(alphas, drawn, PredictionType.EPSILON, 5.0)
    velocity = snr_weights(alphas, drawn, PredictionType.V_PREDICTION, 5.0)
    torch.testing.assert_close(epsilon * ratio, ratio.clamp(max=5.0))
    torch.testing.assert_close(velocity * (ratio + 1), ratio.clamp(max=5.0))


def test_snr_weights_of_pure_noise_and_pure_signal_are_finite() -> None:
    """Zero-terminal schedules have a ratio of 0, and some begin with no noise at all."""
    alphas = torch.tensor([1.0, 0.0])
    drawn = torch.tensor([0, 1])
    assert snr_weights(alphas, drawn, PredictionType.EPSILON, 5.0).tolist() == [0.0, 1.0]
    assert snr_weights(alphas, drawn, PredictionType.V_PREDICTION, 5.0).tolist() == [0.0, 0.0]
