"""Recipes of models in other layouts than diffusers': small ones with random weights in float64, and what is known of
the real ones."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from i2am_train.attention.recipe import PAPER_LAYERS
from i2am_train.types import GridSize
from tests.support.ldm_models import AuthorsDiffusion, ControlLDM, LatentDiffusion
from tests.support.recipe_contract import Case, ExpectedSite, first_half
from tests.support.recipe_models import noise

LATENT = GridSize(16, 8)
WIDTHS, CONTEXT = (32, 32, 64, 64), 24
TIMESTEPS = (801, 401)
REFERENCE = GridSize(5, 3)


class TryOn(nn.Module):
    """The authors' Lightning module, as far as sampling needs it."""

    def __init__(self, diffusion: AuthorsDiffusion) -> None:
        super().__init__()
        self.diffusion = diffusion


def sharpened(model: nn.Module) -> nn.Module:
    """Weights in float64, with queries and keys far from uniform attention."""
    for name, weight in model.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight", "q_proj.weight", "k_proj.weight")):
            weight.data *= 3
    return model.double().eval()


def make_custom() -> nn.Module:
    torch.manual_seed(0)
    return sharpened(TryOn(AuthorsDiffusion(WIDTHS, CONTEXT, 1 + REFERENCE.tokens)))


def make_latent_diffusion() -> nn.Module:
    torch.manual_seed(0)
    return sharpened(LatentDiffusion(WIDTHS, CONTEXT))


def make_converted() -> SimpleNamespace:
    """What ``i2am init dci_vton=`` makes, as far as the recipe sees it."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        in_channels=9, block_out_channels=WIDTHS, attention_head_dim=8, cross_attention_dim=CONTEXT
    )
    return SimpleNamespace(unet=sharpened(unet))


def make_stableviton() -> nn.Module:
    torch.manual_seed(0)
    return sharpened(ControlLDM(WIDTHS, CONTEXT))


def timestep(step: int, batch: int) -> Tensor:
    return torch.full((batch,), TIMESTEPS[step])


def run_custom(target: Any, batch: int, step: int, guided: bool) -> Tensor:
    """Rows with the reference first, then those with the learned null tokens."""
    diffusion = target.diffusion
    context = noise(batch, 1 + REFERENCE.tokens, CONTEXT, seed=7)
    nothing = diffusion.uncond_vector.expand_as(context)
    rows = batch * (1 + guided)
    inputs = noise(rows, 12, *LATENT, seed=step)
    context = torch.cat([context, nothing]) if guided else context
    return diffusion(inputs, context, timestep(step, rows).double())


def run_latent_diffusion(target: Any, batch: int, step: int, guided: bool) -> Tensor:
    latent, token = noise(batch, 9, *LATENT, seed=step), noise(batch, 1, CONTEXT, seed=7)
    return target.predict(latent, timestep(step, batch), token, guided)


def run_converted(target: Any, batch: int, step: int, guided: bool) -> Tensor:
    rows = batch * (1 + guided)
    latent, token = noise(rows, 9, *LATENT, seed=step), noise(rows, 1, CONTEXT, seed=7)
    return target.unet(latent, TIMESTEPS[step], token).sample


def run_stableviton(target: Any, batch: int, step: int, guided: bool) -> Tensor:
    latent, token = noise(batch, 13, *LATENT, seed=step), noise(batch, 1, CONTEXT, seed=7)
    garment = noise(batch, 4, *LATENT, seed=8)
    return target.predict(latent, timestep(step, batch), token, garment, guided)


def first_of_two(call: int, rows: int, guided: bool) -> slice | None:
    """Under guidance every second call is the unconditional one."""
    return None if guided and call % 2 else slice(0, rows)


def given_in_ldm(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What queries and keys are projected from."""
    return args[0], kwargs["context"]


def nine_sites(
    layers: Sequence[str], inside: str, reference: Sequence[int] | None, grid: GridSize | None = None
) -> tuple[ExpectedSite, ...]:
    """Three layers each at a quarter, half and the whole of the latent's size; ``inside`` leads to the attention.

    ``reference`` None: as many tokens as generated ones, on the same grid.
    """
    sites = []
    for number, layer in enumerate(layers):
        scale = 4 >> number // 3
        own = GridSize(LATENT.height // scale, LATENT.width // scale)
        tokens, on = (range(own.tokens), own) if reference is None else (reference, grid)
        sites.append(ExpectedSite(layer + inside, layer, 8, own, range(own.tokens), tokens, on))
    return tuple(sites)


def numbered(pattern: str, first: int) -> list[str]:
    """Nine names with numbers from ``first`` on."""
    return [pattern.format(first + number) for number in range(9)]


ATTN2 = ".transformer_blocks.0.attn2"

CASES = (
    Case(
        "custom",
        make_custom,
        run_custom,
        nine_sites(numbered("decoders.{}.1", 3), ".attention_2", range(1, 1 + REFERENCE.tokens), REFERENCE),
        root="diffusion.unet",
        rows=first_half,
        options=lambda guided: {"guided": guided, "reference_grid": REFERENCE},
        queries="q_proj",
        keys="k_proj",
    ),
    *(
        Case(
            name,
            make_latent_diffusion,
            run_latent_diffusion,
            nine_sites(numbered("output_blocks.{}.1", 3), ATTN2, [0]),
            root="model.diffusion_model",
            given=given_in_ldm,
        )
        for name in ("paint_by_example_ldm", "dci_vton")
    ),
    Case("dci_vton_diffusers", make_converted, run_converted, nine_sites(PAPER_LAYERS, ATTN2, [0])),
    Case(
        "stableviton",
        make_stableviton,
        run_stableviton,
        nine_sites(numbered("warp_flow_blks.{}", 0), ATTN2, None),
        root="model.diffusion_model",
        rows=first_of_two,
        given=given_in_ldm,
    ),
)
