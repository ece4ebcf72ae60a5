"""attention/trace.py: scores with gradient in training, with checkpointing, autocast and class tokens."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from i2am_train.attention import ScoreTap, diffusers_decoder
from i2am_train.errors import CaptureError
from i2am_train.types import GridSize
from tests.support.lora import add_lora

BATCH, LATENT, REFERENCE, CONTEXT = 3, GridSize(24, 16), GridSize(5, 4), 10
LAYER = "up_blocks.1.attentions.1"


@pytest.fixture(scope="module")
def shared_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=tuple(LATENT),
        in_channels=12,
        out_channels=4,
        block_out_channels=(8, 8, 16, 16),
        attention_head_dim=(1, 1, 2, 2),
        cross_attention_dim=CONTEXT,
        norm_num_groups=4,
    )


@pytest.fixture
def unet(shared_unet):
    return copy.deepcopy(shared_unet).train()


def inputs(tokens=REFERENCE.tokens):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(BATCH, 12, *LATENT, generator=generator),
        torch.tensor([10, 500, 900]),
        torch.randn(BATCH, tokens, CONTEXT, generator=generator),
    )


def recipe(special_tokens=0):
    return diffusers_decoder(REFERENCE, special_tokens, root="")


def seen_by(unet, layer=LAYER):
    """Hidden states and context that the layer's attention is called with, by an independent hook."""
    seen = []
    module = unet.get_submodule(f"{layer}.transformer_blocks.0.attn2")
    module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0], kwargs["encoder_hidden_states"])), with_kwargs=True
    )
    return module, seen


def expected_scores(module, hidden, context, skip=0):
    queries = module.to_q(hidden).unflatten(-1, (module.heads, -1)).transpose(1, 2).double()
    keys = module.to_k(context)[:, skip:].unflatten(-1, (module.heads, -1)).transpose(1, 2).double()
    return (queries @ keys.mT * queries.shape[-1] ** -0.5).softmax(-1).mean(1)


def test_scores_are_the_head_mean_of_the_layers_attention(unet):
    module, seen = seen_by(unet)
    with ScoreTap(unet, recipe(), layers=[2]) as tap:
        unet(*inputs())
        scores = tap.scores(2)
        assert tap.scores(LAYER) is scores
        assert (tap.generated_grid(2), tap.reference_grid(2)) == (GridSize(6, 4), REFERENCE)
        assert tap.layers == (LAYER,)
    assert scores.shape == (BATCH, 24, 20)
    torch.testing.assert_close(scores.double(), expected_scores(module, *seen[0]), atol=1e-6, rtol=0)


def test_the_class_token_is_left_out_before_the_softmax(unet):
    module, seen = seen_by(unet)
    with ScoreTap(unet, recipe(special_tokens=1), layers=[2]) as tap:
        unet(*inputs(tokens=21))
        scores = tap.scores(2)
    torch.testing.assert_close(scores.sum(-1), torch.ones(BATCH, 24))
    expected = expected_scores(module, *seen[0], skip=1)
    torch.testing.assert_close(scores.double(), expected, atol=1e-6, rtol=0)


def gradients(unet, loss_from):
    unet.zero_grad()
    with ScoreTap(unet, recipe(), layers=[2, 5]) as tap:
        prediction = unet(*inputs()).sample
        loss_from(prediction, tap).backward()
    return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


def attention_loss(prediction, tap):
    return prediction.square().mean() + sum(tap.scores(layer).square().sum() for layer in (2, 5))


def test_the_gradient_arrives_also_under_gradient_checkpointing(unet):
    plain = gradients(unet, attention_loss)
    without = gradients(unet, lambda prediction, _: prediction.square().mean())
    unet.enable_gradient_checkpointing()
    checkpointed = gradients(unet, attention_loss)
    projection = f"{LAYER}.transformer_blocks.0.attn2.to_k.weight"
    assert plain[projection].abs().max() > 10 * without[projection].abs().max()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_the_reentrant_kind_of_checkpointing_is_an_error(unet):
    unet.enable_gradient_checkpointing(
        lambda module, *args: torch.utils.checkpoint.checkpoint(module.__call__, *args, use_reentrant=True)
    )
    sample, timestep, context = inputs()
    with ScoreTap(unet, recipe(), layers=[2]) as tap:
        unet(sample.requires_grad_(), timestep, context)
        with pytest.raises(CaptureError, match="non-reentrant"):
            tap.scores(2)


def test_scores_are_float32_under_autocast(unet):
    with ScoreTap(unet, recipe(), layers=[2]) as tap:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            unet(*inputs())
            scores = tap.scores(2)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.sum(-1), torch.ones(BATCH, 24))
        scores.square().sum().backward()
    assert unet.get_submodule(f"{LAYER}.transformer_blocks.0.attn2.to_q").weight.grad is not None


def test_training_with_a_tap_that_nobody_asks_changes_no_bit(unet):
    def step(tapped):
        unet.zero_grad()
        tap = ScoreTap(unet, recipe(), layers=[2, 5])
        if tapped:
            tap.attach()
        unet(*inputs()).sample.square().mean().backward()
        tap.close()
        return [p.grad.clone() for p in unet.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(step(True), step(False), strict=True))


def test_forwards_without_gradient_are_ignored(unet):
    with ScoreTap(unet, recipe(), layers=[2]) as tap:
        with torch.no_grad():
            unet(*inputs())
        with pytest.raises(CaptureError, match="no forward with gradient"):
            tap.scores(2)


def test_the_next_forward_and_closing_forget_the_scores(unet):
    with ScoreTap(unet, recipe(), layers=[2]) as tap:
        unet(*inputs())
        first = tap.scores(2)
        unet(*inputs())
        assert tap.scores(2) is not first
        tap.clear()
        with pytest.raises(CaptureError, match="no scores yet"):
            tap.scores(2)


def test_only_chosen_layers_and_one_tap(unet):
    with pytest.raises(CaptureError, match=r"No attention layer is called 'x'.*attentions.1 \(2\)"):
        ScoreTap(unet, recipe(), layers=["x"])
    with ScoreTap(unet, recipe(), layers=[2]) as tap:
        with pytest.raises(CaptureError, match="No attention layer is called"):
            tap.scores(5)
        with pytest.raises(CaptureError, match="already has a score tap"):
            ScoreTap(unet, recipe()).attach()
    tap.attach()  # a tap may be used again
    tap.close()


def test_lora_added_after_the_tap_gets_its_gradient(unet):
    # the hooks move to the layers that peft puts around the projections
    with ScoreTap(unet, recipe(), layers=[2]) as tap:
        add_lora(unet)
        unet(*inputs())
        late = tap.scores(2)
        own = [
            weight
            for name, weight in unet.named_parameters()
            if f"{LAYER}.transformer_blocks.0.attn2" in name and (".down." in name or ".up." in name)
        ]
        reached = torch.autograd.grad(late.square().sum(), own, allow_unused=True)
    with ScoreTap(unet, recipe(), layers=[2]) as tap:
        unet(*inputs())
        torch.testing.assert_close(late, tap.scores(2))
    assert len(own) == 4
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in reached)
