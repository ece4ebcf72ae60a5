"""The weighted sum: weights in one place, dropped conditions, empty masks, missing truth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from i2am_train.config.objective import TERMS, ObjectiveConfig
from i2am_train.config.options import plain
from i2am_train.doors import allow_named
from i2am_train.errors import ConfigError
from i2am_train.losses.attention import Attention, attention_on_grids
from i2am_train.losses.objective import NEEDS, Objective, make_objective
from i2am_train.losses.paper import VARIANTS
from i2am_train.results.study import uses_truth
from i2am_train.types import GridSize, LossVariant
from tests.support.terms import mass, weights

GENERATED, REFERENCE = GridSize(4, 3), GridSize(6, 5)
WEIGHTS = {"dcml": 0.5, "tv": 0.25, "cwg": 2.0, "supervised": 0.125}


def weighted(variant: LossVariant = LossVariant.REWARD, **terms: float) -> Objective:
    return make_objective(ObjectiveConfig(layers=2, variant=variant, terms=weights(**terms)))


def of_terms(**terms: dict[str, Any]) -> Objective:
    return make_objective(ObjectiveConfig(layers=2, terms=terms))


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
    total, terms = objective({2: on_grids(scores, mask, target=target)})
    samples = objective.per_sample(on_grids(scores, mask, target=target))
    assert list(terms) == ["dcml", "tv", "cwg", "supervised"]
    expected = sum(weight * samples[name].mean() for name, weight in WEIGHTS.items())
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(terms["cwg"], samples["cwg"].mean().detach())
    assert not terms["cwg"].requires_grad


def test_a_weight_of_zero_skips_the_term(logits: Tensor, mask: Tensor) -> None:
    """A term without a weight is neither computed nor logged, so that it needs no truth either."""
    objective = weighted(dcml=0.0, tv=1.0, cwg=0.0, supervised=0.0)
    assert not objective.needs
    assert list(objective({2: on_grids(logits.softmax(-1), mask)})[1]) == ["tv"]


def test_nothing_switched_on_is_zero(logits: Tensor, mask: Tensor) -> None:
    """The baseline arm may call the objective; it adds nothing."""
    total, terms = Objective()({2: on_grids(logits.softmax(-1), mask)})
    assert total.item() == 0.0
    assert terms == {}


@pytest.mark.parametrize("variant", LossVariant)
def test_dropped_conditions_take_no_part(logits: Tensor, mask: Tensor, target: Tensor, variant: LossVariant) -> None:
    """Dropping a sample equals leaving it out of the batch, and its logits get no gradient."""
    objective = weighted(**WEIGHTS, variant=variant)
    kept = torch.tensor([True, False, True])
    scores = logits.softmax(-1)
    total, _ = objective({2: on_grids(scores, mask, target=target, conditioned=kept)})
    total.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad[1], torch.zeros_like(logits.grad[1]))
    assert logits.grad[0].abs().sum() > 0
    alone, _ = objective({2: on_grids(scores[kept], mask[kept], target=target[kept])})
    torch.testing.assert_close(total, alone)


@pytest.mark.parametrize("variant", [LossVariant.REWARD, LossVariant.AUTHORS_V1])
def test_several_batches_weigh_by_their_samples(logits: Tensor, mask: Tensor, variant: LossVariant) -> None:
    """Two processes, or two accumulated batches, of 2 and 1: the mean of their losses is that over all three.

    For the authors' first CWG that is the mean of the batches' quotients, each as often as it has samples.
    """
    objective = weighted(cwg=1.0, variant=variant)
    scores = logits.softmax(-1)
    parts = [on_grids(scores[rows], mask[rows]) for rows in (slice(0, 2), slice(2, 3))]
    whole = [objective({2: part})[0] for part in parts]
    split = [objective({2: part}, counts=torch.tensor([1.5]))[0] for part in parts]
    torch.testing.assert_close(sum(split) / 2, (2 * whole[0] + whole[1]) / 3)


def test_a_dropped_sample_may_hold_nan(logits: Tensor, mask: Tensor) -> None:
    """Whatever the null condition's attention is, it cannot poison the others."""
    broken = logits.detach().softmax(-1)
    broken[1] = torch.nan
    broken.requires_grad_()
    kept = torch.tensor([True, False, True])
    objective = weighted(dcml=1.0, tv=1.0, cwg=1.0)
    total, _ = objective({2: on_grids(broken, mask, conditioned=kept)})
    total.backward()
    assert broken.grad is not None
    assert total.isfinite()
    assert broken.grad.isfinite().all()


def test_all_conditions_dropped(logits: Tensor, mask: Tensor, target: Tensor) -> None:
    """Zero with a gradient of zero, so that a parallel process can still go backwards."""
    none = torch.zeros(3, dtype=torch.bool)
    objective = weighted(**WEIGHTS)
    total, _ = objective({2: on_grids(logits.softmax(-1), mask, target=target, conditioned=none)})
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
    total, _ = objective({2: on_grids(logits.softmax(-1), one_empty)})
    torch.testing.assert_close(total, (samples[0] + samples[2]) / 3)


def test_supervision_stays_inside_the_mask(logits: Tensor, mask: Tensor, target: Tensor) -> None:
    """A target outside the mask changes nothing."""
    objective = weighted(supervised=1.0)
    moved = target.clone()
    moved[1, :5] = 0.0
    plain, other = (objective({2: on_grids(logits.softmax(-1), mask, target=given)})[0] for given in (target, moved))
    torch.testing.assert_close(other, plain)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_impossible_weights_are_refused(weight: float) -> None:
    """The message names the term and the value."""
    with pytest.raises(ConfigError, match=rf"tv\.weight={weight} is not possible"):
        ObjectiveConfig(terms=weights(tv=weight))


# -- layers, schedules, timesteps -----------------------------------------------------------------------------------


def test_several_layers_are_a_weighted_sum(logits: Tensor, mask: Tensor) -> None:
    """Every term on every layer, on grids of their own; logged together and one by one."""
    finer = torch.randn(3, 8 * 6, 12, generator=torch.Generator().manual_seed(2)).softmax(-1)
    attention = {
        2: on_grids(logits.softmax(-1), mask),
        "fine": attention_on_grids(finer, torch.ones(3, 48).bool(), GridSize(8, 6), GridSize(4, 3)),
    }
    options = ObjectiveConfig(layers={"2": 1.0, "fine": 0.25}, terms=weights(tv=0.5, cwg=2.0))
    objective = make_objective(options)
    total, logged = objective(attention)
    means = {
        layer: {name: values.mean() for name, values in objective.per_sample(on).items()}
        for layer, on in attention.items()
    }
    assert list(logged) == ["tv", "tv@2", "tv@fine", "cwg", "cwg@2", "cwg@fine"]
    for name in ("tv", "cwg"):
        assert logged[f"{name}@2"] == means[2][name]
        assert logged[f"{name}@fine"] == means["fine"][name]
        torch.testing.assert_close(logged[name], means[2][name] + 0.25 * means["fine"][name])
    torch.testing.assert_close(total, 0.5 * logged["tv"] + 2.0 * logged["cwg"])


@pytest.mark.parametrize(
    ("schedule", "weights_of_steps"),
    [
        ({}, [2, 2, 2, 2, 2, 2, 2, 2]),
        ({"schedule": "early", "share": 0.25}, [2, 2, 0, 0, 0, 0, 0, 0]),
        ({"schedule": "late", "share": 0.25}, [0, 0, 2, 2, 2, 2, 2, 2]),
        ({"schedule": "ramp", "share": 0.25}, [0, 1, 2, 2, 2, 2, 2, 2]),
        ({"schedule": "ramp", "share": 1.0}, [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]),
    ],
)
def test_a_schedule_changes_the_weight_and_not_the_log(
    logits: Tensor, mask: Tensor, schedule: dict[str, Any], weights_of_steps: list[float]
) -> None:
    """Over a run of eight steps; where a term is off, its logits get no gradient."""
    objective = of_terms(cwg={"weight": 2.0, **schedule})
    attention = {2: on_grids(logits.softmax(-1), mask)}
    alone = objective.per_sample(attention[2])["cwg"].mean().detach()
    for step, weight in enumerate(weights_of_steps):
        total, logged = objective(attention, progress=step / 8)
        assert objective.terms["cwg"].weight_at(step / 8) == weight
        torch.testing.assert_close(total.detach(), weight * alone)
        assert logged["cwg"] == alone
        assert total.requires_grad == (weight > 0)


@pytest.mark.parametrize("variant", [LossVariant.REWARD, LossVariant.AUTHORS_V1])
def test_a_window_of_timesteps_counts_its_samples_alone(logits: Tensor, mask: Tensor, variant: LossVariant) -> None:
    """As a batch of those samples; the others get no gradient of the term. Other terms count all.

    The authors' first CWG divides by the masks of its whole batch, and so by those of the samples that count.
    """
    entries = {"tv": {"weight": 1.0}, "cwg": {"weight": 1.0, "timesteps": [10, 500]}}
    objective = make_objective(ObjectiveConfig(layers=2, variant=variant, terms=entries))
    scores, timesteps = logits.softmax(-1), torch.tensor([10, 500, 499])
    _, logged = objective({2: on_grids(scores, mask)}, timesteps)
    inside = [0, 2]
    _, alone = objective({2: on_grids(scores[inside], mask[inside])}, timesteps[inside])
    _, everyone = objective({2: on_grids(scores, mask)}, torch.full((3,), 100))
    torch.testing.assert_close(logged["cwg"], alone["cwg"])
    assert logged["tv"] == everyone["tv"]
    objective.per_sample(on_grids(scores, mask), timesteps)["cwg"].sum().backward()
    assert logits.grad is not None
    assert (logits.grad.abs().sum(dim=(1, 2)) > 0).tolist() == [True, False, True]


def test_a_window_without_a_sample_adds_nothing(logits: Tensor, mask: Tensor) -> None:
    """Zero, with a gradient of zero, and not 0 / 0."""
    objective = of_terms(cwg={"weight": 1.0, "timesteps": [0, 10]})
    total, logged = objective({2: on_grids(logits.softmax(-1), mask)}, torch.tensor([10, 11, 999]))
    total.backward()
    assert total == logged["cwg"] == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_windows_have_divisors_of_their_own(logits: Tensor, mask: Tensor) -> None:
    """Two batches of 2 and 1 that divide by their mean counts are one batch of 3, term by term."""
    objective = of_terms(tv={"weight": 1.0}, cwg={"weight": 3.0, "timesteps": [0, 500]})
    scores, timesteps = logits.softmax(-1), torch.tensor([3, 700, 4])
    counts = torch.tensor([1.5, 1.0])
    whole, _ = objective({2: on_grids(scores, mask)}, timesteps)
    parts = [
        objective({2: on_grids(scores[rows], mask[rows])}, timesteps[rows], counts=counts)[0]
        for rows in (slice(0, 2), slice(2, 3))
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


# -- terms of one's own, and of the package -------------------------------------------------------------------------

MINE = {"fn": "tests.support.terms:mass", "weight": 0.5}


@pytest.fixture
def own_terms() -> None:
    allow_named(["fn=tests.support.terms:mass"])


@pytest.mark.usefixtures("own_terms")
def test_a_term_of_ones_own(logits: Tensor, mask: Tensor) -> None:
    """By its import path, with keywords, after the package's; of weight 0 it is not even imported."""
    nowhere = {"fn": "nowhere.at:all", "weight": 0.0}
    objective = of_terms(mine={**MINE, "scale": 3.0}, off=nowhere, tv={"weight": 1.0})
    attention = on_grids(logits.softmax(-1), mask)
    total, terms = objective({2: attention})
    assert list(terms) == ["tv", "mine"]
    torch.testing.assert_close(terms["mine"], 3 * mass(attention).mean().detach())
    torch.testing.assert_close(total.detach(), terms["tv"] + 0.5 * terms["mine"])


@pytest.mark.usefixtures("own_terms")
def test_own_terms_are_held_to_the_rules(logits: Tensor, mask: Tensor) -> None:
    """Float32 under autocast, and no value or gradient of a sample whose condition was dropped, mask or no mask."""
    objective = of_terms(mine={"fn": "tests.support.terms:product", "weight": 1.0})
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
    with pytest.raises(ConfigError, match=r"None without needs: \[target\]"):
        of_terms(mine=entry)
    options = ObjectiveConfig(layers=2, terms={"mine": {**entry, "needs": ["target"]}})
    objective = make_objective(options)
    assert options.needs == objective.needs == {"target"}
    assert uses_truth({"losses": plain(options)})
    assert objective({2: on_grids(logits.softmax(-1), mask, target=target)})[0] > 0
    off = ObjectiveConfig(terms={"mine": {**entry, "weight": 0, "needs": ["target"]}})
    assert not off.needs
    assert not uses_truth({"losses": plain(off)})


@pytest.mark.usefixtures("own_terms")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("compared", r"returns \[.*\], and \[.*\] where by_patch hands it blocks .*must treat every patch alone"),
        ("four_axes", r"fails where by_patch hands it a block of patches, as for a large layer, with IndexError"),
    ],
)
def test_what_would_be_wrong_in_blocks_is_found_before(name: str, message: str) -> None:
    """A large layer's term is called with blocks of patches, which the small example tries."""
    with pytest.raises(ConfigError, match=message):
        of_terms(mine={"fn": f"tests.support.terms:{name}", "weight": 1.0})


def test_needs_are_the_optional_fields_of_an_attention() -> None:
    """What a term may ask for is what a step may fill."""
    assert list(NEEDS) == list(Attention._field_defaults)


def test_every_built_in_term_is_there() -> None:
    """Each entry of the table names a function, which makes a term with the keywords of its signature."""
    objective = make_objective(ObjectiveConfig(layers=2, terms=weights(**dict.fromkeys(TERMS, 1.0))))
    assert list(objective.terms) == list(TERMS)


def test_a_file_has_no_term_imported() -> None:
    """Whoever runs an experiment of somebody else allows the module first."""
    with pytest.raises(ConfigError, match=r"mine\.fn=tests\.support\.terms:mass was read from a file"):
        of_terms(mine=MINE)


def test_every_variant_has_its_preset() -> None:
    """A new variant without one is found here and not in a training run."""
    assert set(VARIANTS) == set(LossVariant)


@pytest.mark.parametrize("variant", LossVariant)
def test_a_variant_trains_with_its_own_keywords(logits: Tensor, mask: Tensor, variant: LossVariant) -> None:
    """Unless a term has one of its own, which leaves the others as they are."""
    attention = on_grids(logits.detach().softmax(-1), mask)
    own = VARIANTS[variant].cwg
    for given in ({}, {"sigma": 3.0}):
        options = ObjectiveConfig(layers=2, variant=variant, terms={"cwg": {"weight": 1.0, **given}})
        assert torch.equal(make_objective(options).terms["cwg"].function(attention), own(attention, **given))
    assert not torch.equal(own(attention), own(attention, sigma=3.0))


@pytest.mark.parametrize(("keywords", "exponent"), [({}, 1.0), ({"sigma": 1.0}, 0.25)])
def test_cwg_of_the_first_version_as_training_computes_it(keywords: dict[str, float], exponent: float) -> None:
    """By hand: half the mass on each of two neighbours lies 1/2 from the centre; exp(-(1/2) / (2 sigma^2))."""
    scores = torch.tensor([[[0.0, 0.5, 0.5], [0.5, 0.5, 0.0]]])
    entry = {"weight": 1.0, **keywords}
    objective = make_objective(ObjectiveConfig(layers=2, variant=LossVariant.AUTHORS_V1, terms={"cwg": entry}))
    everywhere = torch.ones(1, 2, dtype=torch.bool)
    attention = attention_on_grids(scores, everywhere, GridSize(1, 2), GridSize(1, 3))
    value = objective.per_sample(attention)["cwg"]
    torch.testing.assert_close(value, torch.tensor([-math.exp(-exponent)]))


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"cvg": {"weight": 1}}, r"terms\.cvg=.*expected one of dcml, tv, cwg, .*Did you mean 'cwg'\?"),
        ({"cwg": 0.5}, r"terms\.cwg=0\.5 .*a mapping, such as terms\.cwg=\{name"),
        ({"cwg": {"sigma": 1}}, r"terms\.cwg=.*expected a weight, too: \{weight: 0\.05\}"),
        ({"cwg": {"weight": "much"}}, r"terms\.cwg\.weight=much .*expected a number"),
        ({"cwg": {"weight": 1, "needs": ["target"]}}, r"terms\.cwg\.needs=.*what a built-in term needs is known"),
        ({"cwg": {"weight": 1, "fn": "a:b"}}, r"a name that is not taken, as 'cwg' is"),
        ({"total": {"weight": 1, "fn": "a:b"}}, r"a name that is not taken, as 'total' is"),
        ({"mine": {"weight": 1, "fn": "a:b", "needs": ["truth"]}}, r"terms\.mine\.needs\[0\]=truth .*one of target"),
        ({"cwg": {"weight": 1, "schedule": "early"}}, r"terms\.cwg\.share=null .*such as 0\.25"),
        ({"cwg": {"weight": 1, "share": 0.5}}, r"terms\.cwg\.share=0\.5 .*none with schedule=constant"),
        ({"cwg": {"weight": 1, "schedule": ["early", "ramp"], "share": 0.5}}, r"schedule=\['early', 'ramp'\] .*one of"),
        ({"cwg": {"weight": 1, "schedule": "soon", "share": 0.5}}, r"terms\.cwg\.schedule=soon .*one of constant"),
        ({"cwg": {"weight": 1, "schedule": "late", "share": 1.0}}, r"terms\.cwg\.share=1\.0 .*would never be on"),
        ({"cwg": {"weight": 1, "schedule": "early", "share": 1.5}}, r"terms\.cwg\.share=1\.5 .*more than 0 and at"),
        ({"cwg": {"weight": 1, "schedule": "ramp", "share": 0.0}}, r"terms\.cwg\.share=0\.0 .*more than 0 and at"),
        ({"cwg": {"weight": 1, "timesteps": [500, 0]}}, r"terms\.cwg\.timesteps=\[500, 0\] .*first below end"),
        ({"cwg": {"weight": 1, "timesteps": [5, 5]}}, r"terms\.cwg\.timesteps=\[5, 5\] .*first below end"),
        ({"cwg": {"weight": 1, "timesteps": [-1, 5]}}, r"terms\.cwg\.timesteps\[0\]=-1 .*at least 0"),
        ({"cwg": {"weight": 1, "timesteps": 500}}, r"terms\.cwg\.timesteps=500 .*a list of 2 values"),
    ],
)
def test_terms_that_are_none(terms: dict[str, Any], message: str) -> None:
    """Refused where options are made: before anything is loaded."""
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(terms=terms)


@pytest.mark.parametrize("force", ["capped", "extent"])
def test_the_extent_is_in_reference_patches(force: str) -> None:
    """Centres that are divided by the number of patches, as eq. 15 is printed, cannot be compared with it."""
    terms = {"dcml": {"weight": 1, "force": force}}
    assert make_objective(ObjectiveConfig(layers=2, variant=LossVariant.HINGE, terms=terms)).needs == {"slope"}
    with pytest.raises(ConfigError, match=r"variant=paper .*whose centres are in reference patches"):
        ObjectiveConfig(variant=LossVariant.PAPER, terms=terms)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"cwg": {"weight": 1, "sigm": 2}}, r"terms\.cwg has no keyword 'sigm'\. .*sigma,.*Did you mean 'sigma'\?"),
        ({"cwg": {"weight": 1, "origin": 1}}, r"terms\.cwg has no keyword 'origin'"),
        ({"cwg": {"weight": 1, "sigma": 0}}, r"objective\.terms\.cwg\.sigma=0.* expected more than 0"),
        ({"cwg": {"weight": 1, "detach_centers": 1}}, r"terms\.cwg\.detach_centers=1 .*true or false"),
        ({"cwg": {"weight": 1, "norm": "median"}}, r"terms\.cwg\.norm=median .*one of valid, slots, sum, batch"),
        ({"dcml": {"weight": 1, "force": "pull"}}, r"terms\.dcml\.force=pull .*one of reward, hinge"),
        ({"dcml": {"weight": 1, "margin": 0.5}}, r"dcml has margin=0\.5, and force=reward has none"),
        ({"supervised": {"weight": 1, "margin": 0.5}}, r"no keyword 'margin'\. Its own are sigma;"),
    ],
)
def test_keywords_that_a_term_has_not(terms: dict[str, Any], message: str) -> None:
    """Refused where the objective is made, before a model is loaded."""
    with pytest.raises(ConfigError, match=message):
        of_terms(**terms)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (0, r"layers=0 .*1\.\.\.9"),
        ([2, 10], r"layers\[1\]=10 .*1\.\.\.9"),
        ({10: 1.0}, r"layers\.10=1\.0 .*1\.\.\.9"),
        ([], r"layers=\[\] .*without repetition"),
        ([2, 2], r"layers=\[2, 2\] .*without repetition"),
        ({2: 0.0}, r"layers\.2=0\.0 .*more than 0"),
        ({2: 1.0, 5: -1.0}, r"layers\.5=-1\.0 .*more than 0"),
        ({2: float("nan")}, r"layers\.2=nan .*a finite number"),
    ],
)
def test_layers_that_are_none(layers: Any, message: str) -> None:
    """What a model has not is found when the module is made; these are refused without one."""
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(layers=layers)
