"""The weighted sum: weights in one place, dropped conditions, empty masks, missing truth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from i2am_train.config.options import plain
from i2am_train.config.store import arm_config, compose
from i2am_train.config.training import ObjectiveConfig, TrainConfig
from i2am_train.doors import allow_named
from i2am_train.errors import ConfigError
from i2am_train.losses.attention import VARIANTS, Attention, attention_on_grids
from i2am_train.losses.objective import Objective, make_objective
from i2am_train.results.study import uses_truth
from i2am_train.types import GridSize, LossVariant
from tests.support.terms import mass

GENERATED, REFERENCE = GridSize(4, 3), GridSize(6, 5)
WEIGHTS = {"dcml": 0.5, "tv": 0.25, "cwg": 2.0, "supervised": 0.125}


def weighted(**options: Any) -> Objective:
    return make_objective(ObjectiveConfig(**options))


def on_grids(scores: Tensor, mask: Tensor, **more: Any) -> Attention:
    return attention_on_grids(scores, mask, GENERATED, REFERENCE, **more)


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
    objective = weighted(**WEIGHTS)
    scores = logits.softmax(-1)
    total, terms = objective(on_grids(scores, mask, target=target))
    samples = objective.per_sample(on_grids(scores, mask, target=target))
    assert list(terms) == ["dcml", "tv", "cwg", "supervised"]
    expected = sum(weight * samples[name].mean() for name, weight in WEIGHTS.items())
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(terms["cwg"], samples["cwg"].mean().detach())
    assert not terms["cwg"].requires_grad


def test_a_weight_of_zero_skips_the_term(logits: Tensor, mask: Tensor) -> None:
    """A term without a weight is neither computed nor logged, so that it needs no truth either."""
    objective = weighted(dcml=0.0, tv=1.0, cwg=0.0, supervised=0.0)
    assert not objective.truth
    assert list(objective(on_grids(logits.softmax(-1), mask))[1]) == ["tv"]


def test_nothing_switched_on_is_zero(logits: Tensor, mask: Tensor) -> None:
    """The baseline arm may call the objective; it adds nothing."""
    total, terms = Objective()(on_grids(logits.softmax(-1), mask))
    assert total.item() == 0.0
    assert terms == {}


@pytest.mark.parametrize("variant", LossVariant)
def test_dropped_conditions_take_no_part(logits: Tensor, mask: Tensor, target: Tensor, variant: LossVariant) -> None:
    """Dropping a sample equals leaving it out of the batch, and its logits get no gradient."""
    objective = weighted(**WEIGHTS, variant=variant)
    kept = torch.tensor([True, False, True])
    scores = logits.softmax(-1)
    total, _ = objective(on_grids(scores, mask, target=target, conditioned=kept))
    total.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad[1], torch.zeros_like(logits.grad[1]))
    assert logits.grad[0].abs().sum() > 0
    alone, _ = objective(on_grids(scores[kept], mask[kept], target=target[kept]))
    torch.testing.assert_close(total, alone)


@pytest.mark.parametrize("variant", [LossVariant.REWARD, LossVariant.AUTHORS_V1])
def test_several_batches_weigh_by_their_samples(logits: Tensor, mask: Tensor, variant: LossVariant) -> None:
    """Two processes, or two accumulated batches, of 2 and 1: the mean of their losses is that over all three.

    For the authors' first CWG that is the mean of the batches' quotients, each as often as it has samples.
    """
    objective = weighted(cwg=1.0, variant=variant)
    scores = logits.softmax(-1)
    parts = [on_grids(scores[rows], mask[rows]) for rows in (slice(0, 2), slice(2, 3))]
    whole = [objective(part)[0] for part in parts]
    split = [objective(part, count=torch.tensor(1.5))[0] for part in parts]
    torch.testing.assert_close(sum(split) / 2, (2 * whole[0] + whole[1]) / 3)


def test_a_dropped_sample_may_hold_nan(logits: Tensor, mask: Tensor) -> None:
    """Whatever the null condition's attention is, it cannot poison the others."""
    broken = logits.detach().softmax(-1)
    broken[1] = torch.nan
    broken.requires_grad_()
    kept = torch.tensor([True, False, True])
    objective = weighted(dcml=1.0, tv=1.0, cwg=1.0)
    total, _ = objective(on_grids(broken, mask, conditioned=kept))
    total.backward()
    assert broken.grad is not None
    assert total.isfinite()
    assert broken.grad.isfinite().all()


def test_all_conditions_dropped(logits: Tensor, mask: Tensor, target: Tensor) -> None:
    """Zero with a gradient of zero, so that a parallel process can still go backwards."""
    none = torch.zeros(3, dtype=torch.bool)
    objective = weighted(**WEIGHTS)
    total, _ = objective(on_grids(logits.softmax(-1), mask, target=target, conditioned=none))
    total.backward()
    assert total.item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_an_empty_mask_counts_as_zero(logits: Tensor, mask: Tensor) -> None:
    """The pull on a sample does not grow because its neighbour has no garment."""
    objective = weighted(cwg=1.0)
    one_empty = mask.clone()
    one_empty[1] = False
    samples = objective.per_sample(on_grids(logits.softmax(-1), mask))["cwg"]
    total, _ = objective(on_grids(logits.softmax(-1), one_empty))
    torch.testing.assert_close(total, (samples[0] + samples[2]) / 3)


def test_supervision_stays_inside_the_mask(logits: Tensor, mask: Tensor, target: Tensor) -> None:
    """A target outside the mask changes nothing."""
    objective = weighted(supervised=1.0)
    moved = target.clone()
    moved[1, :5] = 0.0
    plain, other = (objective(on_grids(logits.softmax(-1), mask, target=given))[0] for given in (target, moved))
    torch.testing.assert_close(other, plain)


def test_supervision_needs_a_target(logits: Tensor, mask: Tensor) -> None:
    """A dataset without correspondence is told what to do."""
    objective = weighted(supervised=1.0)
    with pytest.raises(ConfigError, match=r"no correspondence.*set the weight to 0"):
        objective(on_grids(logits.softmax(-1), mask))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_impossible_weights_are_refused(weight: float) -> None:
    """The message names the term and the value."""
    with pytest.raises(ConfigError, match=rf"tv={weight} is not possible"):
        ObjectiveConfig(tv=weight)


MINE = {"fn": "tests.support.terms:mass", "weight": 0.5}


@pytest.fixture
def own_terms() -> None:
    allow_named(["fn=tests.support.terms:mass"])


@pytest.mark.usefixtures("own_terms")
def test_a_term_of_ones_own(logits: Tensor, mask: Tensor) -> None:
    """By its import path, with keywords, beside the package's; of weight 0 it is not even imported."""
    nowhere = {"fn": "nowhere.at:all", "weight": 0.0}
    objective = weighted(tv=1.0, terms={"mine": {**MINE, "scale": 3.0}, "off": nowhere})
    attention = on_grids(logits.softmax(-1), mask)
    total, terms = objective(attention)
    assert list(terms) == ["tv", "mine"]
    torch.testing.assert_close(terms["mine"], 3 * mass(attention).mean().detach())
    torch.testing.assert_close(total.detach(), terms["tv"] + 0.5 * terms["mine"])


@pytest.mark.usefixtures("own_terms")
def test_own_terms_are_held_to_the_rules(logits: Tensor, mask: Tensor) -> None:
    """Float32 under autocast, and no value or gradient of a sample whose condition was dropped, mask or no mask."""
    objective = weighted(terms={"mine": {"fn": "tests.support.terms:product", "weight": 1.0}})
    kept = torch.tensor([True, False, True])
    attention = on_grids(logits.softmax(-1), mask, conditioned=kept)
    values = objective.per_sample(attention)["mine"]
    assert values[1] == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(objective.per_sample(attention)["mine"], values)
    values.sum().backward()
    assert logits.grad is not None
    assert (logits.grad.abs().sum(dim=(1, 2)) > 0).tolist() == kept.tolist()


@pytest.mark.usefixtures("own_terms")
def test_only_terms_that_ask_for_the_truth_get_it(logits: Tensor, mask: Tensor, target: Tensor) -> None:
    """Arms that use it are marked, so that no term may use it quietly."""
    entry = {"fn": "tests.support.terms:offset", "weight": 1.0}
    with pytest.raises(ConfigError, match="None without truth: true"):
        weighted(terms={"mine": entry})
    options = ObjectiveConfig(terms={"mine": {**entry, "truth": True}})
    objective = make_objective(options)
    assert options.truth
    assert objective.truth
    assert uses_truth({"losses": plain(options)})
    assert objective(on_grids(logits.softmax(-1), mask, target=target))[0] > 0
    assert not ObjectiveConfig(terms={"mine": {**entry, "weight": 0, "truth": True}}).truth


def test_a_file_has_no_term_imported() -> None:
    """Whoever runs an experiment of somebody else allows the module first."""
    with pytest.raises(ConfigError, match=r"mine\.fn=tests\.support\.terms:mass was read from a file"):
        weighted(terms={"mine": MINE})


def test_every_variant_has_its_preset() -> None:
    """A new variant without one is found here and not in a training run."""
    assert set(VARIANTS) == set(LossVariant)


@pytest.mark.parametrize("variant", LossVariant)
def test_a_variant_trains_with_its_own_sigma(logits: Tensor, mask: Tensor, variant: LossVariant) -> None:
    """Unless a number is given; the settings of a training show the number that is used."""
    attention = on_grids(logits.detach().softmax(-1), mask)
    own = VARIANTS[variant].cwg
    for given, used in ((None, variant.sigma), (3.0, 3.0)):
        training = TrainConfig(objective=ObjectiveConfig(variant=variant, sigma=given, cwg=1.0))
        assert training.objective.sigma == used
        trained = make_objective(training.objective).terms["cwg"].function(attention)
        assert torch.equal(trained, own(attention, sigma=used))
    assert torch.equal(own(attention), own(attention, sigma=variant.sigma))


@pytest.mark.parametrize(("sigma", "exponent"), [(None, 1.0), (1.0, 0.25)])
def test_cwg_of_the_first_version_as_training_computes_it(sigma: float | None, exponent: float) -> None:
    """By hand: half the mass on each of two neighbours lies 1/2 from the centre; exp(-(1/2) / (2 sigma^2))."""
    scores = torch.tensor([[[0.0, 0.5, 0.5], [0.5, 0.5, 0.0]]])
    objective = weighted(variant=LossVariant.AUTHORS_V1, sigma=sigma, cwg=1.0)
    everywhere = torch.ones(1, 2, dtype=torch.bool)
    attention = attention_on_grids(scores, everywhere, GridSize(1, 2), GridSize(1, 3))
    value = objective.per_sample(attention)["cwg"]
    torch.testing.assert_close(value, torch.tensor([-math.exp(-exponent)]))


def test_an_arm_of_a_study_may_set_another_variant(tmp_path: Path) -> None:
    """The study's own sigma is not handed to it as a number."""
    arm = tmp_path / "arm.yaml"
    arm.write_text("objective: {variant: authors_v1, cwg: 1.0}\n")
    study = compose("ablate", ["objective.sigma=null"])
    assert arm_config(study, str(arm), seed=0, output=tmp_path).objective.sigma == 0.5
    study = compose("ablate", ["objective.sigma=2.0"])
    assert arm_config(study, str(arm), seed=0, output=tmp_path).objective.sigma == 2.0
