"""The captured maps against a slow transcription of the paper's equations 3 to 7, one logit at a time."""

import copy
import math

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from i2am_train.attention import announce, diffusers_decoder, trace
from i2am_train.types import Direction, GridSize

LATENT, REFERENCE, CONTEXT, STEPS = GridSize(8, 12), GridSize(3, 2), 6, 2


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=tuple(LATENT),
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8, 8),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=CONTEXT,
        norm_num_groups=4,
        layers_per_block=1,
    ).eval()
    for name, weight in model.named_parameters():
        if "attn2.to_q" in name or "attn2.to_k" in name:
            weight.data *= 3  # so that attention is far from uniform
    return model


class Calls:
    """Inputs of every cross-attention, noted independently of the library's hooks."""

    def __init__(self, unet):
        self.seen = {}
        self.handles = [
            module.register_forward_pre_hook(self.note(name), with_kwargs=True)
            for name, module in unet.named_modules()
            if name.startswith("up_blocks") and name.endswith("attn2")
        ]

    def note(self, name):
        layer = name.removesuffix(".transformer_blocks.0.attn2")

        def hook(module, args, kwargs):
            call = module, args[0], kwargs["encoder_hidden_states"]
            self.seen.setdefault(layer, []).append(call)

        return hook

    def remove(self):
        for handle in self.handles:
            handle.remove()


def softmax(numbers):
    largest = max(numbers)
    exponentials = [math.exp(number - largest) for number in numbers]
    return [value / sum(exponentials) for value in exponentials]


def slow_maps(module, hidden, context, special):
    """Eqs. 3 and 6 for one sample and layer: per head, both softmaxes of the same logits and their column means."""
    queries = (hidden.double() @ module.to_q.weight.double().T).unflatten(-1, (module.heads, -1))
    keys = (context.double() @ module.to_k.weight.double().T).unflatten(-1, (module.heads, -1))
    keys = keys[special:]
    width = queries.shape[-1]
    to_generated, to_reference = [], []
    for head in range(module.heads):
        q, k = queries[:, head].tolist(), keys[:, head].tolist()
        logits = [[sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(width) for y in k] for x in q]
        over_reference = [softmax(row) for row in logits]
        over_generated = [softmax(list(column)) for column in zip(*logits, strict=True)]
        to_reference.append([sum(c) / len(c) for c in zip(*over_reference, strict=True)])
        to_generated.append([sum(c) / len(c) for c in zip(*over_generated, strict=True)])
    return torch.tensor(to_generated), torch.tensor(to_reference)


def sample(unet, batch, guided, special, by_announcement):
    """A short DDIM loop as diffusers' pipelines write it, [unconditional; conditional] under guidance."""
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(batch)
    latents = torch.randn(batch, 4, *LATENT, generator=generator)
    context = torch.randn(batch, REFERENCE.tokens + special, CONTEXT, generator=generator)
    if guided:
        context = torch.cat([torch.zeros_like(context), context])
    for step_index, timestep in enumerate(scheduler.timesteps):
        rows = torch.cat([latents, latents]) if guided else latents
        if by_announcement:
            conditional = slice(batch, 2 * batch) if guided else slice(0, batch)
            with announce(step_index=step_index, conditional_rows=conditional):
                noise = unet(rows, timestep, context).sample
        else:
            noise = unet(rows, timestep, encoder_hidden_states=context).sample
        if guided:
            unconditional, conditional = noise.chunk(2)
            noise = unconditional + 5 * (conditional - unconditional)
        latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize("by_announcement", [True, False])
@pytest.mark.parametrize(("batch", "guided", "special"), [(2, True, 0), (3, False, 1), (3, True, 1)])
def test_captured_maps_are_those_of_the_equations(unet, batch, guided, special, by_announcement):
    calls = Calls(unet)
    rows = "second_half" if guided else "all"
    recipe = diffusers_decoder(REFERENCE, special_tokens=special, rows=rows, root="")
    with torch.no_grad(), trace(unet, recipe) as attention:
        sample(unet, batch, guided, special, by_announcement)
    calls.remove()
    store = attention.maps().store
    assert store.steps == STEPS
    assert store.names == tuple(calls.seen)  # the order in which the model runs them
    for record in store.layers:
        for step, (module, hidden, context) in enumerate(calls.seen[record.layer]):
            for row in range(batch):
                at = row + batch if guided else row
                generated, reference = slow_maps(module, hidden[at], context[at], special)
                torch.testing.assert_close(record.to_generated[row, step], generated.float(), atol=1e-6, rtol=1e-5)
                torch.testing.assert_close(record.to_reference[row, step], reference.float(), atol=1e-6, rtol=1e-5)


def test_in_float64_they_agree_to_rounding(unet):
    # the same network in float64; only the kept maps are float32
    precise = copy.deepcopy(unet).double()
    calls = Calls(precise)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, *LATENT, generator=generator, dtype=torch.float64)
    context = torch.randn(2, REFERENCE.tokens, CONTEXT, generator=generator, dtype=torch.float64)
    with torch.no_grad(), trace(precise, diffusers_decoder(REFERENCE, rows="all", root="")) as attention:
        precise(latents, 500, context)
    for record in attention.maps().store.layers:
        ((module, hidden, context),) = calls.seen[record.layer]
        for row in range(2):
            generated, reference = slow_maps(module, hidden[row], context[row], 0)
            one_unit = {"rtol": 1.2e-7, "atol": 0}  # the last bit of float32
            torch.testing.assert_close(record.to_generated[row, 0], generated.float(), **one_unit)
            torch.testing.assert_close(record.to_reference[row, 0], reference.float(), **one_unit)


def test_scores_of_a_matrix_layer_are_diffusers_own_attention_probabilities(unet):
    # Attention.get_attention_scores is the library's definition of what the model attends with
    calls = Calls(unet)
    recipe = diffusers_decoder(REFERENCE, rows="all", root="")
    layer = "up_blocks.1.attentions.0"
    with torch.no_grad(), trace(unet, recipe, matrix_layers=[layer]) as attention:
        sample(unet, 2, False, 0, True)
    calls.remove()
    means = []
    for module, hidden, context in calls.seen[layer]:
        queries = module.head_to_batch_dim(module.to_q(hidden))
        keys = module.head_to_batch_dim(module.to_k(context))
        probabilities = module.get_attention_scores(queries, keys)
        means.append(probabilities.unflatten(0, (2, module.heads)).mean(dim=1))
    expected = torch.stack(means).mean(dim=0)
    maps = attention.maps()
    torch.testing.assert_close(maps.scores(layer), expected, atol=1e-6, rtol=0)
    record = maps.store.layer(layer)
    to_reference = record.to_reference.mean(dim=(1, 2))
    torch.testing.assert_close(expected.mean(dim=1), to_reference, atol=1e-6, rtol=0)
    direct = maps.specific_reference([(1, 3)], layer).values[:, 0]
    at = 1 * record.generated_grid.width + 3
    torch.testing.assert_close(direct, expected[:, at].reshape(2, *REFERENCE), atol=1e-6, rtol=0)
    assert maps.unified(Direction.GENERATED_TO_REFERENCE).grid == REFERENCE
