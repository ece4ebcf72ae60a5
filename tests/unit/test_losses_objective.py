"""The weighted sum: weights in one place, dropped conditions, empty masks, missing truth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from i2am_train.assembly import make_objective
from i2am_train.config.losses import ObjectiveConfig
from i2am_train.config.store import arm_config, compose
from i2am_train.config.training import OptimizationConfig, TrainConfig
from i2am_train.errors import ConfigError
from i2am_train.losses.base import RULES
from i2am_train.losses.objective import AttentionObjective, TermWeights
from i2am_train.types import GridSize, LossVariant

GENERATED, REFERENCE = GridSize(4, 3), GridSize(6, 5)
GRIDS = {"generated_grid": GENERATED, "reference_grid": REFERENCE}
WEIGHTS = TermWeights(dcml=0.5, tv=0.25, cwg=2.0, supervised=0.125)


@pytest.fixture
def logits() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (3, GENERATED.tokens, REFERENCE.tokens)
    return torch.randn(shape, generator=generator).requires_grad_()


@pytest.fixture
def mask() -> Tensor:
    inside = torch.ones(3, GENERATED.tokens, dtype=torch.bool)
    inside[1, :5] = False
    return inside


@pytest.fixture
def target() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(3, GENERATED.tokens, 2, generator=generator) * 4


def test_total_is_the_weighted_sum_of_means(logits: Tensor, mask: Tensor, target: Tensor) -> None:
    """The logged means times the weights give the total; the means carry no weight."""
    objective = AttentionObjective(weights=WEIGHTS)
    scores = logits.softmax(-1)
    value = objective(scores, mask, target=target, **GRIDS)
    samples = objective.terms(scores, mask, target=target, **GRIDS)
    assert list(value.terms) == ["dcml", "tv", "cwg", "supervised"]
    expected = sum(weight * samples[name].mean() for name, weight in WEIGHTS.active.items())
    torch.testing.assert_close(value.total, expected)
    torch.testing.assert_close(value.terms["cwg"], samples["cwg"].mean().detach())
    assert not value.terms["cwg"].requires_grad


def test_weights_of_none_and_zero_skip_the_term(logits: Tensor, mask: Tensor) -> None:
    """A term without a weight is neither computed nor logged, so that it needs no truth either."""
    weights = TermWeights(dcml=None, tv=1.0, cwg=0.0, supervised=None)
    value = AttentionObjective(weights=weights)(logits.softmax(-1), mask, **GRIDS)
    assert list(value.terms) == ["tv"]


def test_nothing_switched_on_is_zero(logits: Tensor, mask: Tensor) -> None:
    """The baseline arm may call the objective; it adds nothing."""
    value = AttentionObjective()(logits.softmax(-1), mask, **GRIDS)
    assert value.total.item() == 0.0
    assert value.terms == {}


@pytest.mark.parametrize("variant", LossVariant)
def test_dropped_conditions_take_no_part(
    logits: Tensor, mask: Tensor, target: Tensor, variant: LossVariant
) -> None:
    """Dropping a sample equals leaving it out of the batch, and its logits get no gradient."""
    objective = AttentionObjective(weights=WEIGHTS, variant=variant)
    kept = torch.tensor([True, False, True])
    value = objective(logits.softmax(-1), mask, target=target, conditioned=kept, **GRIDS)
    value.total.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad[1], torch.zeros_like(logits.grad[1]))
    assert logits.grad[0].abs().sum() > 0
    alone = objective(logits[kept].softmax(-1), mask[kept], target=target[kept], **GRIDS)
    torch.testing.assert_close(value.total, alone.total)


@pytest.mark.parametrize("variant", [LossVariant.REWARD, LossVariant.AUTHORS_V1])
def test_several_batches_weigh_by_their_samples(
    logits: Tensor, mask: Tensor, variant: LossVariant
) -> None:
    """Two processes, or two accumulated batches, of 2 and 1: the mean of their losses is that over all three.

    For the authors' first CWG that is the mean of the batches' quotients, each as often as it has samples.
    """
    objective = AttentionObjective(weights=TermWeights(cwg=1.0), variant=variant)
    scores, parts = logits.softmax(-1), (slice(0, 2), slice(2, 3))
    whole = [objective(scores[rows], mask[rows], **GRIDS).total for rows in parts]
    shared = torch.tensor(1.5)
    split = [objective(scores[rows], mask[rows], count=shared, **GRIDS).total for rows in parts]
    torch.testing.assert_close(sum(split) / 2, (2 * whole[0] + whole[1]) / 3)


def test_a_dropped_sample_may_hold_nan(logits: Tensor, mask: Tensor) -> None:
    """Whatever the null condition's attention is, it cannot poison the others."""
    broken = logits.detach().softmax(-1)
    broken[1] = torch.nan
    broken.requires_grad_()
    kept = torch.tensor([True, False, True])
    objective = AttentionObjective(weights=TermWeights(dcml=1.0, tv=1.0, cwg=1.0))
    value = objective(broken, mask, conditioned=kept, **GRIDS)
    value.total.backward()
    assert broken.grad is not None
    assert value.total.isfinite()
    assert broken.grad.isfinite().all()


def test_all_conditions_dropped(logits: Tensor, mask: Tensor, target: Tensor) -> None:
    """Zero with a gradient of zero, so that a parallel process can still go backwards."""
    none = torch.zeros(3, dtype=torch.bool)
    objective = AttentionObjective(weights=WEIGHTS)
    value = objective(logits.softmax(-1), mask, target=target, conditioned=none, **GRIDS)
    value.total.backward()
    assert value.total.item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_an_empty_mask_counts_as_zero(logits: Tensor, mask: Tensor) -> None:
    """The pull on a sample does not grow because its neighbour has no garment."""
    objective = AttentionObjective(weights=TermWeights(cwg=1.0))
    one_empty = mask.clone()
    one_empty[1] = False
    samples = objective.terms(logits.softmax(-1), mask, **GRIDS)["cwg"]
    value = objective(logits.softmax(-1), one_empty, **GRIDS)
    torch.testing.assert_close(value.total, (samples[0] + samples[2]) / 3)


def test_supervision_stays_inside_the_mask(logits: Tensor, mask: Tensor, target: Tensor) -> None:
    """A target outside the mask changes nothing."""
    objective = AttentionObjective(weights=TermWeights(supervised=1.0))
    moved = target.clone()
    moved[1, :5] = 0.0
    plain = objective(logits.softmax(-1), mask, target=target, **GRIDS).total
    torch.testing.assert_close(
        objective(logits.softmax(-1), mask, target=moved, **GRIDS).total, plain
    )


def test_supervision_needs_a_target(logits: Tensor, mask: Tensor) -> None:
    """A dataset without correspondence is told what to do."""
    objective = AttentionObjective(weights=TermWeights(supervised=1.0))
    with pytest.raises(ConfigError, match=r"no correspondence.*set the weight to 0"):
        objective(logits.softmax(-1), mask, **GRIDS)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_impossible_weights_are_refused(weight: float) -> None:
    """The message names the term and the value."""
    with pytest.raises(ConfigError, match=f"'tv' is {weight}"):
        TermWeights(tv=weight)


def test_every_variant_has_its_rules() -> None:
    """A new variant without a row in the table is found here and not in a training run."""
    assert set(RULES) == set(LossVariant)


def configured(**options: Any) -> AttentionObjective:
    return make_objective(ObjectiveConfig(**options), OptimizationConfig()).attention


@pytest.mark.parametrize("variant", LossVariant)
def test_a_variant_trains_with_its_own_sigma(variant: LossVariant) -> None:
    """Unless a number is given; the settings of a training show the number that is used."""
    own = variant.sigma
    assert configured(variant=variant).sigma == own
    assert configured(variant=variant, sigma=3.0).sigma == 3.0
    for given, used in ((None, own), (3.0, 3.0)):
        training = TrainConfig(objective=ObjectiveConfig(variant=variant, sigma=given))
        assert training.objective.sigma == used


@pytest.mark.parametrize(("sigma", "exponent"), [(None, 1.0), (1.0, 0.25)])
def test_cwg_of_the_first_version_as_training_computes_it(
    sigma: float | None, exponent: float
) -> None:
    """By hand: half the mass on each of two neighbours lies 1/2 from the centre; exp(-(1/2) / (2 sigma^2))."""
    scores = torch.tensor([[[0.0, 0.5, 0.5], [0.5, 0.5, 0.0]]])
    objective = configured(variant=LossVariant.AUTHORS_V1, sigma=sigma, cwg=1.0)
    value = objective.terms(
        scores,
        torch.ones(1, 2, dtype=torch.bool),
        generated_grid=GridSize(1, 2),
        reference_grid=GridSize(1, 3),
    )["cwg"]
    torch.testing.assert_close(value, torch.tensor([-math.exp(-exponent)]))


def test_an_arm_of_a_study_may_set_another_variant(tmp_path: Path) -> None:
    """The study's own sigma is not handed to it as a number."""
    arm = tmp_path / "arm.yaml"
    arm.write_text("objective: {variant: authors_v1, cwg: 1.0}\n")
    study = compose("ablate", ["objective.sigma=null"])
    assert arm_config(study, str(arm), seed=0, output=tmp_path).objective.sigma == 0.5
    study = compose("ablate", ["objective.sigma=2.0"])
    assert arm_config(study, str(arm), seed=0, output=tmp_path).objective.sigma == 2.0
