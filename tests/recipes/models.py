"""Small models of the structure that each recipe declares, made of parts of diffusers, with random
weights in float64, and what is known of the real ones: paths, heads, places of tokens.

Facts are from the adapters note; sizes are as small as the structure allows and never square.
"""

from types import SimpleNamespace

import torch
from diffusers import UNet2DConditionModel

from i2am_train.types import GridSize
from tests.recipes.slow import Case, ExpectedSite

LATENT = GridSize(12, 8)
LEVELS = (LATENT, GridSize(6, 4), GridSize(3, 2), GridSize(2, 1))
"""Finest first; a stride-2 convolution rounds up."""

CONTEXT = 10
TIMESTEPS = (801, 401)


def sharpened(model):
    """Weights in float64, with queries and keys far from uniform attention."""
    for name, weight in model.named_parameters():
        if any(f"{kind}." in name for kind in ("to_q", "to_k", "to_k_ip")):
            weight.data *= 3
    return model.double().eval()


def make_unet(kind=UNet2DConditionModel, **changes):
    """Stable Diffusion 1.5's topology, eight channels wide."""
    torch.manual_seed(0)
    sizes = {
        "block_out_channels": (8, 8, 16, 16),
        "attention_head_dim": 2,
        "cross_attention_dim": CONTEXT,
        "norm_num_groups": 4,
    }
    return sharpened(kind(**sizes | changes))


def noise(*shape, seed):
    """Inputs, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decoder_sites(heads, reference, reference_grid=None, last="attn2", kind="attentions"):
    """The nine cross-attentions of the decoder, coarse to fine; ``heads`` per block."""
    return tuple(
        ExpectedSite(
            f"up_blocks.{block}.{kind}.{position}.transformer_blocks.0.{last}",
            f"up_blocks.{block}.{kind}.{position}",
            heads[block - 1],
            LEVELS[3 - block],
            range(LEVELS[3 - block].tokens),
            reference,
            reference_grid,
        )
        for block in (1, 2, 3)
        for position in (0, 1, 2)
    )


def conditioned(channels, tokens, latent=LATENT):
    """A sampling step whose denoiser attends to so many tokens."""

    def run(target, batch, step, guided):
        rows = batch * (1 + guided)
        sample = noise(rows, channels, *latent, seed=step)
        context = noise(rows, tokens, CONTEXT, seed=7)
        return target.unet(sample, torch.tensor(TIMESTEPS[step]), context).sample

    return run


CASES = (
    Case(
        "ladi_vton",
        lambda: SimpleNamespace(unet=make_unet(in_channels=31)),
        conditioned(31, 77),
        decoder_sites((2, 2, 2), range(11, 27)),
    ),
)
