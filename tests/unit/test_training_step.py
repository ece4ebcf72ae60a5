"""Random numbers depend on seed, epoch and sample alone; what the loss is made of, and where its gradient goes."""

import copy
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from i2am_train.attention.trace import ScoreTap
from i2am_train.config.objective import TERMS, ObjectiveConfig
from i2am_train.config.training import OptimizationConfig
from i2am_train.errors import CaptureError
from i2am_train.losses.attention import Attention, attention_centers
from i2am_train.losses.objective import NEEDS, Objective, Term, make_objective, snr_weights
from i2am_train.ops import rows
from i2am_train.ops.attention import reference_mass
from i2am_train.ops.grids import garment_slope
from i2am_train.ops.rows import log_reference_mass as log_mass
from i2am_train.training.module import TryOnModule
from i2am_train.training.optimization import prepare_networks, set_trainable
from i2am_train.training.step import Draws, draw, step_losses
from i2am_train.types import GridSize, Need
from tests.support.terms import weights

LATENT = GridSize(4, 3)


def numbers_of(indices: list[int], **changes: Any) -> Draws:
    options = {"seed": 0, "epoch": 3, "timesteps": 1000, "condition_dropout": 0.2} | changes
    return draw(options.pop("seed"), options.pop("epoch"), indices, latent=LATENT, **options)


def test_shapes() -> None:
    """One timestep, noise, posterior noise of three images and a decision for each sample."""
    drawn = numbers_of([5, 8])
    assert drawn.timesteps.shape == drawn.dropped.shape == (2,)
    assert drawn.noise.shape == (2, 4, 4, 3)
    assert drawn.posterior.shape == (2, 3, 4, 4, 3)
    assert drawn.timesteps.dtype == torch.int64


def test_a_sample_does_not_depend_on_its_batch() -> None:
    """Order and company in the batch, and so the number of processes, change nothing."""
    together, turned = numbers_of([2, 7, 11, 4]), numbers_of([4, 11, 2])
    for name in Draws._fields:
        first, second = getattr(together, name), getattr(turned, name)
        assert torch.equal(first[[3, 2, 0]], second), name


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 4}])
def test_other_seed_or_epoch_draws_other_numbers(change: dict[str, int]) -> None:
    """An epoch does not repeat the noise of the last, nor a run that of another seed."""
    indices = list(range(20))
    one, other = numbers_of(indices), numbers_of(indices, **change)
    assert not torch.isclose(one.noise, other.noise).any()
    assert not torch.equal(one.timesteps, other.timesteps)
    assert not torch.equal(one.dropped, other.dropped)


def test_samples_differ_and_so_do_the_parts_of_one() -> None:
    """No noise is used twice: not by neighbours, not for denoising and for a posterior."""
    drawn = numbers_of([0, 1])
    assert not torch.isclose(drawn.noise[0], drawn.noise[1]).any()
    parts = torch.cat([drawn.noise[:1], drawn.posterior[0]])
    assert len(parts.flatten(1).unique(dim=0)) == 4


def test_distributions() -> None:
    """Standard normal noise, timesteps over the whole range and not beyond, the asked share dropped."""
    drawn = numbers_of(list(range(2000)))
    assert drawn.noise.mean().abs() < 0.02
    assert drawn.posterior.std().sub(1).abs() < 0.02
    assert drawn.dropped.float().mean().sub(0.2).abs() < 0.03
    counts = torch.bincount(numbers_of(list(range(2000)), timesteps=5).timesteps, minlength=5)
    assert len(counts) == 5
    assert counts.sub(400).abs().max() < 80


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 50)])
def test_nobody_or_everybody_is_dropped(share: float, expected: int) -> None:
    """The ends of the range are exact, and the share does not move the other numbers."""
    drawn, usual = numbers_of(list(range(50)), condition_dropout=share), numbers_of(list(range(50)))
    assert int(drawn.dropped.sum()) == expected
    assert torch.equal(drawn.noise, usual.noise)
    assert torch.equal(drawn.timesteps, usual.timesteps)


def test_the_global_stream_is_not_touched() -> None:
    """Drawing neither reads nor moves torch's global generator."""
    before = torch.get_rng_state()
    numbers_of([0, 1, 2])
    assert torch.equal(torch.get_rng_state(), before)


SAMPLES = [1, 4, 6]
WEIGHTS = {"dcml": 0.5, "tv": 0.25, "cwg": 2.0, "supervised": 0.125}
LAYER = "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2"


@pytest.fixture(scope="module")
def model(make_small_model: Callable[..., Any]) -> Any:
    model = make_small_model()
    set_trainable(model, "all")
    return model


@pytest.fixture(scope="module")
def batch(read_batch: Callable[..., Any]) -> Any:
    return read_batch(SAMPLES, split="train")


def draws(indices: list[int], dropped: list[bool]) -> Draws:
    drawn = draw(0, 0, indices, latent=GridSize(16, 12), timesteps=1000, condition_dropout=0.0)
    return drawn._replace(dropped=torch.tensor(dropped))


def refined(**terms: float) -> Objective:
    return make_objective(ObjectiveConfig(layers=2, terms=weights(**terms)))


def losses_of(
    model: Any, objective: Objective, batch: Any, drawn: Draws
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses of a step and the gradients that its total gives to the named parameters."""
    model.zero_grad(set_to_none=True)
    with ScoreTap(model, layers=list(objective.layers)) as tap:
        losses = step_losses(model, batch, drawn, objective, tap)
        losses["total"].backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return losses, gradients


def test_total_is_denoising_plus_weighted_terms(model: Any, batch: Any) -> None:
    """The logged parts are unweighted and carry no gradient; the weights are applied once, in the total."""
    losses, _ = losses_of(model, refined(**WEIGHTS), batch, draws(SAMPLES, [False] * 3))
    assert list(losses) == ["denoising", *WEIGHTS, "total"]
    expected = losses["denoising"] + sum(WEIGHTS[name] * losses[name] for name in WEIGHTS)
    torch.testing.assert_close(losses["total"].detach(), expected)
    assert not any(value.requires_grad for name, value in losses.items() if name != "total")
    assert losses["cwg"] != 0
    assert losses["supervised"] > 0


def seen_by_a_term(model: Any, batch: Any, needs: tuple[Need, ...]) -> Attention:
    """What a step hands to a term."""
    seen: list[Attention] = []

    def look(attention: Attention) -> Tensor:
        seen.append(attention)
        return attention.centers.sum(dim=(1, 2, 3))

    losses_of(model, Objective(terms={"look": Term(1.0, look, needs)}), batch, draws(SAMPLES, [False, False, True]))
    return seen[0]


def test_terms_get_what_they_need(make_small_model: Callable[..., Any], batch: Any) -> None:
    """Heads, mass, matches, slope and pictures of the batch; the softmax of this model has a class token, too."""
    model = make_small_model(class_token=True)
    set_trainable(model, "all")
    inputs: list[Any] = []
    with patch(
        "i2am_train.attention.trace.log_reference_mass", lambda *given: inputs.append(given) or log_mass(*given)
    ):
        on = seen_by_a_term(model, batch, NEEDS)
    assert on.target is not None
    assert on.matches is not None
    assert on.log_heads is not None
    assert on.log_mass is not None
    assert on.pictures is not None
    assert on.log_heads.shape[1] == 4
    torch.testing.assert_close(on.log_heads.exp().mean(dim=1), on.scores)
    ((generated, keys, places, scale),) = inputs
    share = reference_mass(generated, keys, places, scale).mean(dim=1).reshape(on.mask.shape)
    assert (share < 0.999).all()
    torch.testing.assert_close(on.log_mass[:2].exp(), share[:2])
    assert not on.log_mass[2].any()
    known = on.target.isfinite().all(dim=-1)
    torch.testing.assert_close(on.matches.sum(dim=(3, 4))[known], torch.ones(int(known.sum())))
    mean = attention_centers(on.matches)[known]
    assert (mean - on.target[known]).abs().max() < 0.51  # a cell's middle stands for all of it
    grids = GridSize(*on.scores.shape[1:3]), GridSize(*on.scores.shape[3:])
    assert torch.equal(on.slope, garment_slope(batch["warped_garment_mask"], batch["garment_mask"], *grids))
    assert torch.equal(on.pictures.person, batch["person"])
    assert torch.equal(on.pictures.garment, batch["garment"])
    assert torch.equal(on.pictures.worn[:2], batch["warped_garment_mask"][:2])
    assert not on.pictures.worn[2].any()


def test_terms_get_nothing_else(model: Any, batch: Any) -> None:
    """The optional parts are neither made nor given where no term asks for them."""
    with (
        patch("i2am_train.losses.attention.log_head_scores", side_effect=AssertionError),
        patch.object(ScoreTap, "log_mass"),
    ):
        on = seen_by_a_term(model, {**batch, "garment_mask": None}, ())
    assert not [name for name in NEEDS if getattr(on, name) is not None]


def test_the_share_of_the_reference_needs_other_tokens(model: Any, batch: Any) -> None:
    """All attention of this model goes to the reference: `mass` is an error, and so it is before training."""
    objective = make_objective(ObjectiveConfig(layers=2, terms={"mass": {"weight": 1.0}}))
    with pytest.raises(CaptureError, match=r"attends to the reference's patches and to no other token"):
        losses_of(model, objective, batch, draws(SAMPLES, [False] * 3))
    with pytest.raises(CaptureError, match=r"attends to the reference's patches and to no other token"):
        TryOnModule(model, objective, OptimizationConfig())


def test_the_baseline_needs_no_tap(model: Any, batch: Any) -> None:
    """Without attention terms nothing is captured, and an attached tap changes neither loss nor gradient."""
    drawn = draws(SAMPLES, [False, True, False])
    objective = refined()
    assert not objective.terms
    without = step_losses(model, batch, drawn, objective, None)
    assert list(without) == ["denoising", "total"]
    with_tap, _ = losses_of(model, objective, batch, drawn)
    assert torch.equal(without["total"], with_tap["total"])


def test_attention_terms_without_a_tap_are_an_error(model: Any, batch: Any) -> None:
    """They are not silently left out."""
    with pytest.raises(CaptureError, match=r"\(cwg\) and got no score tap.*layers=\[2\]"):
        step_losses(model, batch, draws(SAMPLES, [False] * 3), refined(cwg=1.0), None)


def test_where_the_gradient_of_the_attention_terms_goes(model: Any, batch: Any) -> None:
    """To the chosen layer's queries and keys and what lies before; to no later layer, to nothing frozen."""
    drawn = draws(SAMPLES, [False] * 3)
    _, plain = losses_of(model, refined(), batch, drawn)
    _, steered = losses_of(model, refined(dcml=1.0, tv=1.0, cwg=1.0), batch, drawn)
    moved = {name for name in plain if not torch.allclose(plain[name], steered[name], atol=1e-9)}
    assert {f"{LAYER}.to_q.weight", f"{LAYER}.to_k.weight", "projector.output.weight"} <= moved
    assert "unet.conv_in.weight" in moved
    assert f"{LAYER}.to_v.weight" not in moved
    later = ("unet.up_blocks.1.attentions.2", "unet.up_blocks.2", "unet.up_blocks.3", "unet.conv_out")
    assert not [name for name in moved if name.startswith(later)]
    assert plain.keys() == steered.keys()
    assert not [name for name in steered if name.startswith(("vae.", "reference_encoder."))]


def test_channels_last_changes_the_layout_and_no_number(model: Any, batch: Any) -> None:
    """Convolutions compute in the other layout; losses and gradients are the same but for rounding."""
    objective, drawn = refined(**WEIGHTS), draws(SAMPLES, [False] * 3)
    losses, gradients = losses_of(model, objective, batch, drawn)
    copied = copy.deepcopy(model)
    prepare_networks(copied, OptimizationConfig(channels_last=True))
    seen = []
    copied.unet.conv_out.register_forward_hook(lambda *given: seen.append(given[2]))
    others, found = losses_of(copied, objective, batch, drawn)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(others, losses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_the_matrix_a_step_is_the_same(
    make_small_model: Callable[..., Any], batch: Any, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every term, on two layers, and with the networks' own gradient checkpointing."""
    model = make_small_model(class_token=True)
    set_trainable(model, "all")
    model.train()
    terms = weights(**dict.fromkeys(TERMS, 1.0))
    objective, drawn = make_objective(ObjectiveConfig(layers=[2, 5], terms=terms)), draws(SAMPLES, [False, True, False])
    losses, gradients = losses_of(model, objective, batch, drawn)
    if checkpointing:
        model.unet.enable_gradient_checkpointing()
    monkeypatch.setattr(rows, "MATRIX_BYTES", 0)
    monkeypatch.setattr(rows, "BLOCK_BYTES", 2**14)
    others, found = losses_of(model, objective, batch, drawn)
    torch.testing.assert_close(others, losses, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


def test_dropped_conditions_get_no_attention_gradient(model: Any, batch: Any) -> None:
    """With every condition dropped the refined step is the baseline step, to the bit."""
    drawn = draws(SAMPLES, [True] * 3)
    _, plain = losses_of(model, refined(), batch, drawn)
    losses, steered = losses_of(model, refined(dcml=1.0, tv=1.0, cwg=1.0), batch, drawn)
    assert losses["total"] == losses["denoising"]
    assert all(torch.equal(plain[name], gradient) for name, gradient in steered.items())


def test_attention_terms_are_means_over_the_conditioned_samples(
    model: Any, batch: Any, read_batch: Callable[..., Any]
) -> None:
    """A dropped neighbour changes nothing: the terms are those of the kept samples alone."""
    objective = refined(**WEIGHTS)
    together, _ = losses_of(model, objective, batch, draws(SAMPLES, [False, True, False]))
    kept = [SAMPLES[0], SAMPLES[2]]
    alone, _ = losses_of(model, objective, read_batch(kept, split="train"), draws(kept, [False, False]))
    for name in WEIGHTS:
        torch.testing.assert_close(together[name], alone[name], atol=1e-5, rtol=1e-4)


def test_signal_to_noise_weighting(model: Any, batch: Any, read_batch: Callable[..., Any]) -> None:
    """The weighted loss is the mean of the samples' own errors times the weights of their timesteps."""
    plain, gamma = Objective(), 5.0
    with torch.no_grad():
        errors = torch.stack(
            [
                step_losses(model, read_batch([index], split="train"), draws([index], [False]), plain, None)["total"]
                for index in SAMPLES
            ]
        )
        drawn = draws(SAMPLES, [False] * 3)
        weighted = step_losses(model, batch, drawn, plain, None, snr_gamma=gamma)["total"]
        unweighted = step_losses(model, batch, drawn, plain, None)["total"]
    schedule = model.schedule
    weights = snr_weights(schedule.signal.square(), drawn.timesteps, schedule.prediction_type, gamma)
    assert len(weights.unique()) == 3
    torch.testing.assert_close(unweighted, errors.mean())
    torch.testing.assert_close(weighted, (weights * errors).mean())
