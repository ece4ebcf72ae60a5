"""Recipes of known models: where each keeps its reference attention.

Each function is named as its model is asked for (:mod:`~i2am_train.attention.known`); its keywords are the recipe's
options. ``guided`` says whether sampling uses guidance, for pipelines that do not say so themselves (see `Recipe`).
Facts about the models are from reading their public code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from i2am_train.attention.recipe import Latent, LatentSize, Recipe, Rows, Site, Tokens, with_rows
from i2am_train.errors import CaptureError
from i2am_train.types import Backend, Canvas, GridSize

DIFFUSERS_DECODER = r"(?P<layer>up_blocks\.\d+\.attentions\.\d+)\.transformer_blocks\.0\.attn2"
"""The decoder's cross-attention of Stable-Diffusion-like networks of diffusers: the paper's layers 1..9."""

LDM_DECODER = r"(?P<layer>output_blocks\.\d+\.1)\.transformer_blocks\.0\.attn2"
"""The same layers in the code of latent-diffusion."""

DIFFUSERS_SELF_ATTENTION = (
    r"(?P<layer>(?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+"
    r"\.transformer_blocks\.\d+)\.attn1"
)

SDXL_BLOCKS = r"up_blocks\.\d+\.attentions\.\d+\.transformer_blocks\.[1-9]\d*"
"""Further transformer blocks in one attention: SDXL, not Stable Diffusion 1.5 or 2."""


def diffusers_decoder(
    reference_grid: GridSize | None,
    special_tokens: int = 0,
    rows: Rows | None = None,
    root: str = "unet",
    guided: bool | None = None,
) -> Recipe:
    """Recipe for any diffusers U-Net whose decoder cross-attends to reference tokens.

    ``reference_grid`` None means tokens without a place in the picture (pooled vectors, words); ``special_tokens``
    counts the class tokens in front of the patches. ``rows`` says which rows are conditional, so that nothing is asked.
    """
    site = Site(DIFFUSERS_DECODER, reference=Tokens(reference_grid, skip=special_tokens))
    recipe = Recipe(root, (site,), name="diffusers_decoder", absent=(SDXL_BLOCKS,), guided=guided)
    return recipe if rows is None else with_rows(recipe, rows)


def tryon(
    reference_grid: GridSize | None = None,
    special_tokens: int = 0,
    rows: Rows | None = None,
    guided: bool | None = None,
) -> Recipe:
    """This package's exported pipelines, which know their grid."""
    recipe = diffusers_decoder(reference_grid, special_tokens, rows, guided=guided)
    return replace(recipe, name="tryon")


DINOV2_GRID = GridSize(37, 28)
"""Patches of the paper's reference encoder, DINOv2 with patches of 14, at 518x392."""


def custom(reference_grid: GridSize = DINOV2_GRID, special_tokens: int = 1, guided: bool | None = None) -> Recipe:
    """The paper's own model in its authors' code: conditional rows come first."""
    tokens = Tokens(reference_grid, skip=special_tokens)
    pattern = r"(?P<layer>decoders\.\d+\.1)\.attention_2"
    site = Site(pattern, "q_proj", "k_proj", "n_heads", reference=tokens)
    return Recipe("diffusion.unet", (site,), "first_half", "x", "time", name="custom", guided=guided)


def paint_by_example(guided: bool | None = None) -> Recipe:
    """Paint-by-Example in diffusers: one pooled token."""
    site = Site(DIFFUSERS_DECODER, reference=Tokens(None, count=1))
    recipe = diffusers_decoder(None, guided=guided)
    return replace(recipe, sites=(site,), name="paint_by_example")


LDM_ROOT = "model.diffusion_model"


def paint_by_example_ldm(guided: bool | None = None) -> Recipe:
    """Paint-by-Example in its authors' code."""
    site = Site(LDM_DECODER, reference=Tokens(None, count=1))
    name = "paint_by_example_ldm"
    return Recipe(LDM_ROOT, (site,), latent="x", timestep="timesteps", name=name, guided=guided)


_BY_CLIP = "a CLIP embedding of the garment also enters by cross-attention"
_WARPED = "the warped garment also enters by four input channels and the start noise"


def dci_vton(guided: bool | None = None) -> Recipe:
    """DCI-VTON: as Paint-by-Example in latent diffusion's layout."""
    return replace(paint_by_example_ldm(guided), name="dci_vton", partial=_WARPED)


def dci_vton_diffusers(guided: bool | None = None) -> Recipe:
    """DCI-VTON as a pipeline of diffusers, which ``i2am init dci_vton=FILE`` makes."""
    return replace(paint_by_example(guided), name="dci_vton_diffusers", partial=_WARPED)


def stableviton(guided: bool | None = None) -> Recipe:
    """StableVITON's warping blocks.

    With guidance (a scale other than 1) each step makes two calls, the conditional one first.
    """
    site = Site(r"(?P<layer>warp_flow_blks\.\d+)\.transformer_blocks\.0\.attn2")
    return Recipe(
        LDM_ROOT, (site,), "first_call", "x", "timesteps", name="stableviton", guided=guided, partial=_BY_CLIP
    )  # fmt: skip


def pasd(guided: bool | None = None) -> Recipe:
    """PASD's pixel attention, 12 sites."""
    site = Site(r"(?P<layer>up_blocks\.\d+\.pixel_attentions\.\d+)\.transformer_blocks\.0\.attn2")
    return Recipe(
        "unet", (site,), guided=guided, name="pasd", once_per_step=True,
        partial="features of the low-resolution picture are also added to the skip connections",
    )  # fmt: skip


def pasd_light(guided: bool | None = None) -> Recipe:
    """PASD-light: the same attention inside the text transformers."""
    site = Site(r"(?P<layer>up_blocks\.\d+\.attentions\.\d+)\.transformer_blocks\.0\.attn2_plus")
    return replace(pasd(guided), sites=(site,), name="pasd_light")


def seesr(guided: bool | None = None) -> Recipe:
    """SeeSR's image attention in the decoder: 145 tokens, the mean and 12x12."""
    pattern = r"(?P<layer>up_blocks\.\d+\.image_attentions\.\d+)\.transformer_blocks\.0\.attn2"
    site = Site(pattern, reference=Tokens(GridSize(12, 12), skip=1))
    return Recipe(
        "unet", (site,), guided=guided, name="seesr", once_per_step=True,
        partial="a control network and the start noise also carry the low-resolution picture",
    )  # fmt: skip


def _joint(generated: Tokens, reference: Tokens) -> Site:
    """Self-attention over the tokens of both pictures."""
    return Site(DIFFUSERS_SELF_ATTENTION, generated=generated, reference=reference, joint=True)


_DOUBLED = _joint(Tokens(block=(0, 2)), Tokens(block=(1, 2)))
"""The generated tokens, and as many of the garment behind them."""


def idm_vton(guided: bool | None = None) -> Recipe:
    """IDM-VTON: 70 self-attentions over the tokens of both pictures."""
    tokens = "16 IP-Adapter tokens of the garment also enter by cross-attention"
    return Recipe("unet", (_DOUBLED,), "second_half", name="idm_vton", guided=guided, partial=tokens)


def ootdiffusion(guided: bool | None = None) -> Recipe:
    """OOTDiffusion: 16 self-attentions, conditional rows first."""
    return Recipe("unet_vton", (_DOUBLED,), "first_half", name="ootdiffusion", guided=guided, partial=_BY_CLIP)


def catvton(guided: bool | None = None, side_by_side: bool = False) -> Recipe:
    """CatVTON: one canvas, person above garment; ``side_by_side``: left and right."""
    person, garment = (0.0, 0.5, 0.0, 1.0), (0.5, 1.0, 0.0, 1.0)
    if side_by_side:
        person, garment = (0.0, 1.0, 0.0, 0.5), (0.0, 1.0, 0.5, 1.0)
    site = _joint(Tokens(crop=person), Tokens(crop=garment))
    return Recipe("unet", (site,), name="catvton", canvas=Canvas.LETTERBOX, guided=guided)


def ladi_vton(first: int = 11, count: int = 16, guided: bool | None = None) -> Recipe:
    """LaDI-VTON: pseudo-words among 77 words.

    ``first`` is the position of the first one: 11 after "a photo of a model wearing an upper body
    garment", 9 after "... a dress".
    """
    words = Tokens(None, skip=first, stop=first + count, count=count)
    return Recipe(
        "unet", (Site(DIFFUSERS_DECODER, reference=words),), guided=guided, name="ladi_vton", absent=(SDXL_BLOCKS,),
        partial="the warped garment also enters by input channels",
    )  # fmt: skip


def _ip_adapter(name: str, tokens: Tokens, adapter: int, guided: bool | None, canvas: Canvas) -> Recipe:
    site = Site(
        DIFFUSERS_SELF_ATTENTION.replace("attn1", "attn2"),
        reference_projection=f"processor.to_k_ip.{adapter}",
        reference=tokens,
        sdpa_call=_AdapterCall(adapter),
        masks=("ip_adapter_masks",),  # attention masks are for the text
    )
    return Recipe("unet", (site,), name=name, canvas=canvas, guided=guided, partial=_other_adapters)


@dataclass(frozen=True)
class _AdapterCall:
    """Which attention call is an adapter's: after the text and those before it, of which each with
    a scale of zero is left out; -1 if it is itself."""

    adapter: int

    def __call__(self, attention: nn.Module) -> int:
        scales: list[float] = list(getattr(attention.processor, "scale", ()))
        if not any(scales[self.adapter : self.adapter + 1]):
            return -1
        return 1 + sum(scale != 0 for scale in scales[: self.adapter])


def _other_adapters(unet: nn.Module) -> str | None:
    """What a network with several adapters says of the maps of one."""
    loaded = getattr(part(unet, "encoder_hid_proj"), "num_ip_adapters", 1)
    if loaded == 1:
        return None
    return f"the pictures of {loaded - 1} other adapter{'s' * (loaded > 2)} also enter beside it"


def ip_adapter(adapter: int = 0, guided: bool | None = None) -> Recipe:
    """IP-Adapter, 4 pooled tokens; ``adapter`` counts the loaded ones."""
    return _ip_adapter("ip_adapter", Tokens(None), adapter, guided, Canvas.STRETCH)


def ip_adapter_plus(adapter: int = 0, guided: bool | None = None) -> Recipe:
    """IP-Adapter plus: 16 tokens of a resampler, without a place in the picture."""
    return _ip_adapter("ip_adapter_plus", Tokens(None), adapter, guided, Canvas.STRETCH)


def ip_adapter_full_face(adapter: int = 0, guided: bool | None = None) -> Recipe:
    """IP-Adapter full-face: the class token and 16x16 patches of CLIP's centre crop."""
    tokens = Tokens(GridSize(16, 16), skip=1)
    return _ip_adapter("ip_adapter_full_face", tokens, adapter, guided, Canvas.CENTRE_CROP)


KONTEXT_GRID = GridSize(64, 64)
"""Packed tokens of Kontext's default picture, 1024x1024."""


def flux_kontext(
    generated_grid: GridSize = KONTEXT_GRID,
    reference_grid: GridSize = KONTEXT_GRID,
    text_tokens: int = 512,
    guided: bool | None = None,
) -> Recipe:
    """FLUX.1 Kontext in diffusers: all blocks attend to [text; generated; reference picture].

    Tokens are normalised and rotated after the projection, so the attention call is observed.
    Grids are those of the packed latents, image size / 16 (64x64: 1024x1024). With true guidance
    each step makes two calls, the conditional one first.
    """
    last_generated = text_tokens + generated_grid.tokens
    site = Site(
        r"(?P<layer>(?:single_)?transformer_blocks\.\d+)\.attn",
        generated=Tokens(generated_grid, skip=text_tokens, stop=last_generated),
        reference=Tokens(reference_grid, skip=last_generated),
        joint=True,
        via=Backend.SDPA,
    )
    latent = _packed_pictures(generated_grid, reference_grid)
    return Recipe("transformer", (site,), "first_call", latent, name="flux_kontext", guided=guided)


def _packed_pictures(generated: GridSize, reference: GridSize) -> Latent:
    """Reads the sizes of Kontext's two pictures from their position ids ``[token, 3]`` (picture,
    row, column), and refuses others than the recipe's."""

    def size(arguments: Mapping[str, Any]) -> LatentSize:
        ids = arguments["img_ids"].reshape(-1, 3)
        found = [_extent(ids[ids[:, 0] == picture]) for picture in (0, 1)]
        if found != [generated, reference]:
            raise CaptureError(
                f"The model was called with pictures of {found[0]} generated and {found[1]} "
                f"reference tokens, and the recipe says {generated} and {reference}. Give the "
                "recipe's generated_grid and reference_grid (image size / 16)."
            )
        return LatentSize(arguments["hidden_states"].shape[0], generated)

    return size


def _extent(ids: Tensor) -> GridSize:
    """Grid that position ids ``[token, 3]`` span; 0x0 for none."""
    if not len(ids):
        return GridSize(0, 0)
    height, width = (int(last) + 1 for last in ids[:, 1:].amax(dim=0))
    return GridSize(height, width)


def part(target: Any, path: str) -> nn.Module | None:
    """The module at a dotted path of attributes, or None."""
    found = target
    for name in filter(None, path.split(".")):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None
