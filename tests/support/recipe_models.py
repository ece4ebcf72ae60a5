"""Small models of the structure that each recipe declares, made of parts of diffusers, with random
weights in float64, and what is known of the real ones: paths, heads, places of tokens.

Facts are from their public code; sizes are as small as the structure allows and never square.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PaintByExamplePipeline, PNDMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
    MultiIPAdapterImageProjection,
)
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, Dinov2Config, Dinov2Model

from i2am_train.models.pipeline import TryOnPipeline
from i2am_train.types import GridSize
from tests.support.recipe_contract import Case, ExpectedSite, first_half
from tests.support.super_resolution import attending

LATENT = GridSize(12, 8)
LEVELS = (LATENT, GridSize(6, 4), GridSize(3, 2), GridSize(2, 1))
"""Finest first; a stride-2 convolution rounds up."""

CONTEXT, TIMESTEPS = 10, (801, 401)
WIDTHS, HEADS = (8, 8, 16, 16), (2, 2, 4, 4)
SD2 = {"block_out_channels": (10, 20, 40, 40), "attention_head_dim": (5, 10, 20, 20)} | {
    "norm_num_groups": 5,
    "use_linear_projection": True,
}
"""Stable Diffusion 2's numbers of heads, by level."""
SDXL = {
    "block_out_channels": (8, 8, 16),
    "attention_head_dim": (2, 2, 4),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 4 * 6 + CONTEXT,
}
"""Stable Diffusion XL's topology, with 2 and 3 transformer blocks in an attention instead of 2 and 10."""


def sharpened(model: Any) -> Any:
    """Weights in float64, with queries and keys far from uniform attention."""
    for name, weight in model.named_parameters():
        if any(f".{kind}." in name for kind in ("to_q", "to_k", "to_k_ip")):
            weight.data *= 3
    return model.double().eval()


def make_unet(**changes: Any) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's topology, eight channels wide."""
    torch.manual_seed(0)
    sizes = {"block_out_channels": WIDTHS, "attention_head_dim": HEADS, "norm_num_groups": 4}
    return sharpened(UNet2DConditionModel(**sizes | {"cross_attention_dim": CONTEXT} | changes))


def noise(*shape: int, seed: int) -> Tensor:
    """Inputs, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def evaluate(unet: nn.Module, rows: int, step: int, tokens: int = 7, latent: GridSize = LATENT, **more: Any) -> Tensor:
    """One evaluation on inputs of the step."""
    sample = noise(rows, unet.config.in_channels, *latent, seed=step)
    context = noise(rows, tokens, CONTEXT, seed=7)
    return unet(sample, torch.tensor(TIMESTEPS[step]), context, **more).sample


def both_branches(batch: int, guided: bool) -> int:
    """Rows of a call."""
    return 2 * batch if guided else batch


# ------------------------------------------------------------ places of the attention modules


def decoder_sites(
    heads: tuple[int, ...],
    reference: Any = None,
    reference_grid: GridSize | None = None,
    kind: str = "attentions",
    last: str = "attn2",
) -> tuple[ExpectedSite, ...]:
    """Three attentions in each of the last blocks of the decoder, coarse to fine; ``heads`` are
    given per block. ``reference`` None: keys lie on the grid of the queries."""
    return tuple(
        ExpectedSite(
            path=f"up_blocks.{block}.{kind}.{position}.transformer_blocks.0.{last}",
            layer=f"up_blocks.{block}.{kind}.{position}",
            heads=count,
            grid=LEVELS[3 - block],
            generated=range(LEVELS[3 - block].tokens),
            reference=range(LEVELS[3 - block].tokens) if reference is None else reference,
            reference_grid=LEVELS[3 - block] if reference is None else reference_grid,
        )
        for block, count in enumerate(heads, start=4 - len(heads))
        for position in range(3)
    )


def sd15_attentions() -> Iterator[tuple[str, int, int]]:
    """Path of all 16 attentions, their number of blocks and their level."""
    for level in (0, 1, 2):
        yield from ((f"down_blocks.{level}.attentions.{at}", 1, level) for at in range(2))
    yield "mid_block.attentions.0", 1, 3
    for level in (2, 1, 0):
        yield from ((f"up_blocks.{3 - level}.attentions.{at}", 1, level) for at in range(3))


def sdxl_attentions() -> Iterator[tuple[str, int, int]]:
    """Path of all 11 attentions of SDXL, their number of blocks and their level."""
    for level, blocks in ((1, 2), (2, 3)):
        yield from ((f"down_blocks.{level}.attentions.{at}", blocks, level) for at in range(2))
    yield "mid_block.attentions.0", 3, 2
    for level, blocks in ((2, 3), (1, 2)):
        yield from ((f"up_blocks.{2 - level}.attentions.{at}", blocks, level) for at in range(3))


def everywhere(
    attentions: Iterator[tuple[str, int, int]],
    last: str,
    places: Callable[[int], tuple[GridSize, Any, Any, GridSize | None]],
) -> tuple[ExpectedSite, ...]:
    """An attention module in each transformer block; ``places`` gives, for a level, the generated
    grid, both lists of tokens and the reference grid."""
    return tuple(
        ExpectedSite(
            f"{path}.transformer_blocks.{block}.{last}",
            f"{path}.transformer_blocks.{block}",
            HEADS[level],
            *places(level),
        )
        for path, blocks, level in attentions
        for block in range(blocks)
    )


def doubled(level: int) -> tuple[GridSize, Any, Any, GridSize]:
    """The garment's tokens come after as many of the generated picture."""
    grid, count = LEVELS[level], LEVELS[level].tokens
    return grid, range(count), range(count, 2 * count), grid


CANVAS = GridSize(16, 8)
"""One picture of CatVTON, which halves on every level."""


def above_each_other(level: int) -> tuple[GridSize, Any, Any, GridSize]:
    """The garment lies below the person on one canvas."""
    height, width = (side // 2**level for side in CANVAS)
    cells = [(y, x) for y in range(height) for x in range(width)]
    person = [y * width + x for y, x in cells]
    garment = [(y + height) * width + x for y, x in cells]
    return GridSize(height, width), person, garment, GridSize(height, width)


def beside_each_other(level: int) -> tuple[GridSize, Any, Any, GridSize]:
    """The garment lies to the right of the person on one canvas."""
    height, width = (side // 2**level for side in CANVAS)
    cells = [(y, x) for y in range(height) for x in range(width)]
    person = [y * 2 * width + x for y, x in cells]
    garment = [y * 2 * width + width + x for y, x in cells]
    return GridSize(height, width), person, garment, GridSize(height, width)


# ------------------------------------------------------------ ours, and Paint-by-Example


REFERENCE = GridSize(5, 4)


def small_vae() -> AutoencoderKL:
    """A VAE that halves once."""
    return AutoencoderKL(
        block_out_channels=(4, 4),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def make_tryon() -> TryOnPipeline:
    """The pipeline that this package exports, for a class token and 5x4 patches."""
    width = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 1}
    return TryOnPipeline(
        unet=make_unet(in_channels=12),
        vae=small_vae(),
        reference_encoder=Dinov2Model(Dinov2Config(patch_size=14, image_size=28, **width)),
        projector=nn.Identity(),
        scheduler=DDIMScheduler(),
        height=2 * LATENT.height,
        width=2 * LATENT.width,
        reference_height=14 * REFERENCE.height,
        reference_width=14 * REFERENCE.width,
        class_token=True,
    )


def run_tryon(pipeline: TryOnPipeline, batch: int, step: int, guided: bool) -> Tensor:
    """As in the pipeline's own loop."""
    pipeline._guidance_scale = 5.0 if guided else 1.0
    return evaluate(pipeline.unet, both_branches(batch, guided), step, REFERENCE.tokens + 1)


def make_paint_by_example() -> PaintByExamplePipeline:
    """The pipeline of diffusers, whose reference is one token."""
    vision = {"intermediate_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2}
    sizes = {"hidden_size": CONTEXT, "projection_dim": CONTEXT, "image_size": 8, "patch_size": 4}
    return PaintByExamplePipeline(
        vae=small_vae(),
        image_encoder=PaintByExampleImageEncoder(CLIPVisionConfig(**vision | sizes), CONTEXT),
        unet=make_unet(in_channels=9),
        scheduler=PNDMScheduler(skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        requires_safety_checker=False,
    )


def run_unet(tokens: int) -> Callable[[Any, int, int, bool], Tensor]:
    """A plain U-Net that attends to so many tokens."""

    def run(target: Any, batch: int, step: int, guided: bool) -> Tensor:
        return evaluate(target.unet, both_branches(batch, guided), step, tokens)

    return run


# ------------------------------------------------------------ attention beside the text's (PASD, SeeSR)


def with_attending_blocks(unet: Any, name: str, heads: tuple[int, ...], width: int | None = None) -> Any:
    """The last blocks of the decoder attend to a reference; ``heads`` are given per block."""
    attending(unet, name, heads, width, groups=2)
    return SimpleNamespace(unet=sharpened(unet))


def make_pasd() -> Any:
    """Pixel attention in all four blocks of the decoder."""
    return with_attending_blocks(make_unet(), "pixel_attentions", HEADS[::-1])


def control_features(rows: int, level: int, channels: int) -> Tensor:
    """What PASD's control network makes of the low-resolution picture, flattened row by row."""
    return noise(rows, LEVELS[level].tokens, channels, seed=20 + level)


def run_pasd(target: Any, batch: int, step: int, guided: bool) -> Tensor:
    """Both branches see the control features of their own level."""
    rows = both_branches(batch, guided)
    for block, level in zip(target.unet.up_blocks, (3, 2, 1, 0), strict=True):
        block.reference = control_features(rows, level, block.channels)
    return evaluate(target.unet, rows, step)


def make_seesr() -> Any:
    """Image attention with Stable Diffusion 2's numbers of heads."""
    return with_attending_blocks(make_unet(**SD2), "image_attentions", (20, 10, 5), width=6)


def run_seesr(target: Any, batch: int, step: int, guided: bool) -> Tensor:
    """Both branches see the same 145 tokens: 12x12 of a Swin transformer after their mean."""
    rows = both_branches(batch, guided)
    for block in target.unet.up_blocks[1:]:
        block.reference = noise(rows, 145, 6, seed=21)
    return evaluate(target.unet, rows, step)


# ------------------------------------------------------------ transformer blocks of their own


class OwnBlock(nn.Module):
    """A transformer block made of the parts of one of diffusers; ``reference`` is set by the owner
    before each evaluation."""

    def __init__(self, block: BasicTransformerBlock) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = block.norm1, block.norm2, block.norm3
        self.attn1, self.attn2, self.ff = block.attn1, block.attn2, block.ff

    def after_self_attention(self, hidden: Tensor, context: Tensor | None) -> Tensor:
        """Cross-attention to the text, and the feed-forward layer."""
        hidden = hidden + self.attn2(self.norm2(hidden), encoder_hidden_states=context)
        return hidden + self.ff(self.norm3(hidden))


class PixelBlock(OwnBlock):
    """PASD-light: one more attention in the text's transformer."""

    def __init__(self, block: BasicTransformerBlock) -> None:
        super().__init__(block)
        width, heads = block.dim, block.num_attention_heads
        self.norm2_plus = nn.LayerNorm(width)
        self.attn2_plus = Attention(width, width, heads=heads, dim_head=width // heads)

    def forward(self, hidden: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        hidden = hidden + self.attn1(self.norm1(hidden))
        plus = self.attn2_plus(self.norm2_plus(hidden), encoder_hidden_states=self.reference)
        return self.after_self_attention(hidden + plus, encoder_hidden_states)


class NormalisedGarmentBlock(OwnBlock):
    """IDM-VTON: self-attention over both pictures' normalised tokens; the generated half goes on."""

    def forward(self, hidden: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        both = self.attn1(torch.cat([self.norm1(hidden), self.reference], dim=1))
        generated = hidden + both[:, : hidden.shape[1]]
        return self.after_self_attention(generated, encoder_hidden_states)


class RawGarmentBlock(OwnBlock):
    """OOTDiffusion: the garment's tokens are joined before they are normalised."""

    def forward(self, hidden: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        both = torch.cat([hidden, self.reference], dim=1)
        generated = (self.attn1(self.norm1(both)) + both).chunk(2, dim=1)[0]
        return self.after_self_attention(generated, encoder_hidden_states)


def transformers(unet: nn.Module) -> list[Transformer2DModel]:
    """All transformers, in the order of their paths."""
    return [module for module in unet.modules() if isinstance(module, Transformer2DModel)]


def with_blocks(unet: Any, kind: type[OwnBlock], of: Callable[[str], bool] = bool) -> Any:
    """The U-Net with transformer blocks of another kind in the chosen modules."""
    for path, module in unet.named_modules():
        if isinstance(module, Transformer2DModel) and of(path):
            blocks = [kind(block) for block in module.transformer_blocks]
            module.transformer_blocks = nn.ModuleList(blocks)
    return sharpened(unet)


def own_blocks(unet: nn.Module) -> list[OwnBlock]:
    """The blocks that need a reference."""
    return [module for module in unet.modules() if isinstance(module, OwnBlock)]


def make_pasd_light() -> Any:
    """PASD-light, in the decoder."""
    unet = with_blocks(make_unet(), PixelBlock, of=lambda path: path.startswith("up_blocks"))
    return SimpleNamespace(unet=unet)


def run_pasd_light(target: Any, batch: int, step: int, guided: bool) -> Tensor:
    """Control features of the block's own level."""
    rows = both_branches(batch, guided)
    for index, block in enumerate(own_blocks(target.unet)):
        level = 2 - index // 3
        block.reference = control_features(rows, level, block.attn2_plus.to_k.in_features)
    return evaluate(target.unet, rows, step)


def garment_features(unet: nn.Module, evaluation: Callable[[], Any], normalised: bool) -> list[Any]:
    """What the blocks of the garment's network see: their input, or their input normalised."""
    found: list[Tensor] = []
    blocks = [block for model in transformers(unet) for block in model.transformer_blocks]
    handles = [
        (block.norm1 if normalised else block).register_forward_hook(
            lambda _, args, output: found.append(output if normalised else args[0])
        )
        for block in blocks
    ]
    evaluation()
    for handle in handles:
        handle.remove()
    return found


def in_running_order(unet: nn.Module) -> list[OwnBlock]:
    """Blocks of the encoder, the middle and the decoder: paths list the decoder before the middle."""
    parts = (unet.down_blocks, unet.mid_block, unet.up_blocks)
    return [block for part in parts for block in own_blocks(part)]


def make_idm_vton() -> Any:
    """SDXL with the garment's network beside it."""
    return SimpleNamespace(
        unet=with_blocks(make_unet(in_channels=13, **SDXL), NormalisedGarmentBlock), unet_encoder=make_unet(**SDXL)
    )


def of_sdxl(rows: int) -> dict[str, Tensor]:
    """What SDXL is told of the picture's size, and the pooled words."""
    return {"text_embeds": noise(rows, CONTEXT, seed=8), "time_ids": torch.ones(rows, 6, dtype=torch.float64)}


def run_idm_vton(target: Any, batch: int, step: int, guided: bool) -> Tensor:
    """The garment's network runs at every step; the unconditional rows, first, see zeros."""

    def encode() -> None:
        evaluate(target.unet_encoder, batch, step, added_cond_kwargs=of_sdxl(batch))

    features = garment_features(target.unet_encoder, encode, normalised=True)
    for block, tokens in zip(in_running_order(target.unet), features, strict=True):
        block.reference = torch.cat([torch.zeros_like(tokens), tokens]) if guided else tokens
    rows = both_branches(batch, guided)
    return evaluate(target.unet, rows, step, added_cond_kwargs=of_sdxl(rows))


def make_ootdiffusion() -> Any:
    """SD1.5 with the garment's network beside it."""
    return SimpleNamespace(unet_vton=with_blocks(make_unet(in_channels=8), RawGarmentBlock), unet_garm=make_unet())


def run_ootdiffusion(target: Any, batch: int, step: int, guided: bool) -> Tensor:
    """The garment's network runs at t = 0; its batch, too, has the conditional rows first."""
    rows = both_branches(batch, guided)
    features = garment_features(target.unet_garm, lambda: evaluate(target.unet_garm, rows, step=0), normalised=False)
    for block, tokens in zip(in_running_order(target.unet_vton), features, strict=True):
        block.reference = tokens
    return evaluate(target.unet_vton, rows, step)


# ------------------------------------------------------------ CatVTON and IP-Adapter


class SkipAttnProcessor(nn.Module):
    """CatVTON leaves cross-attention out."""

    def __call__(self, attn: Attention, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def make_catvton() -> Any:
    """A plain inpainting U-Net without text."""
    unet = make_unet(in_channels=9)
    processors = unet.attn_processors
    skipping = {name: SkipAttnProcessor() for name in processors if "attn2" in name}
    unet.set_attn_processor(processors | skipping)
    return SimpleNamespace(unet=unet)


def run_catvton(canvas: GridSize) -> Callable[[Any, int, int, bool], Tensor]:
    """Both pictures are denoised on one canvas."""

    def run(target: Any, batch: int, step: int, guided: bool) -> Tensor:
        sample = noise(both_branches(batch, guided), 9, *canvas, seed=step)
        return target.unet(sample, torch.tensor(TIMESTEPS[step]), None).sample

    return run


def with_ip_adapter(unet: Any, projection: nn.Module, tokens: int) -> Any:
    """The U-Net after ``load_ip_adapter`` of diffusers: a projection, and a processor with keys and
    values of its own in every cross-attention."""
    torch.manual_seed(1)
    for module in unet.modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            widths = module.inner_dim, module.cross_attention_dim
            module.set_processor(IPAdapterAttnProcessor2_0(*widths, num_tokens=(tokens,)))
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    return SimpleNamespace(unet=sharpened(unet))


def run_ip_adapter(*image: int, sdxl: bool = False) -> Callable[[Any, int, int, bool], Tensor]:
    """One reference picture, whose embedding has the shape ``image``."""

    def run(target: Any, batch: int, step: int, guided: bool) -> Tensor:
        rows = both_branches(batch, guided)
        added = {"image_embeds": [noise(rows, 1, *image, seed=9)]} | (of_sdxl(rows) if sdxl else {})
        return evaluate(target.unet, rows, step, added_cond_kwargs=added)

    return run


def given_to_ip_adapter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Text and image tokens come as a pair; the latter as ``[row, image, token, channel]``."""
    _, (image_tokens,) = kwargs["encoder_hidden_states"]
    return args[0], image_tokens.flatten(1, 2)


def reading(count: int, first: int = 0, grid: GridSize | None = None) -> Any:
    """All of the generated tokens attend to the same ``count`` reference tokens, from ``first``."""

    def places(level: int) -> tuple[GridSize, Any, Any, GridSize | None]:
        return LEVELS[level], range(LEVELS[level].tokens), range(first, first + count), grid

    return places


def resampler(width: int) -> IPAdapterPlusImageProjection:
    """The projection of IP-Adapter plus: 16 tokens from any number."""
    return IPAdapterPlusImageProjection(width, CONTEXT, 4, 1, 2, 2, num_queries=16, ffn_ratio=1)


def ip_adapter_case(name: str, make: Callable[[], Any], run: Any, sites: Any, suffix: str) -> Case:
    """What all IP-Adapters have in common."""
    return Case(name, make, run, sites, given=given_to_ip_adapter, keys="processor.to_k_ip.0", name=name + suffix)


CASES = (
    Case("tryon", make_tryon, run_tryon, decoder_sites(HEADS[2::-1], range(1, 21), REFERENCE)),
    Case("paint_by_example", make_paint_by_example, run_unet(1), decoder_sites(HEADS[2::-1], range(1))),
    Case("pasd", make_pasd, run_pasd, decoder_sites(HEADS[::-1], kind="pixel_attentions")),
    Case("pasd_light", make_pasd_light, run_pasd_light, decoder_sites(HEADS[2::-1], last="attn2_plus")),
    Case(
        "seesr",
        make_seesr,
        run_seesr,
        decoder_sites((20, 10, 5), range(1, 145), GridSize(12, 12), kind="image_attentions"),
    ),
    Case("idm_vton", make_idm_vton, run_idm_vton, everywhere(sdxl_attentions(), "attn1", doubled), joint=True),
    Case(
        "ootdiffusion",
        make_ootdiffusion,
        run_ootdiffusion,
        everywhere(sd15_attentions(), "attn1", doubled),
        root="unet_vton",
        rows=first_half,
        joint=True,
    ),
    Case(
        "catvton",
        make_catvton,
        run_catvton(GridSize(2 * CANVAS.height, CANVAS.width)),
        everywhere(sd15_attentions(), "attn1", above_each_other),
        joint=True,
    ),
    Case(
        "catvton",
        make_catvton,
        run_catvton(GridSize(CANVAS.height, 2 * CANVAS.width)),
        everywhere(sd15_attentions(), "attn1", beside_each_other),
        options=lambda guided: {"guided": guided, "side_by_side": True},
        joint=True,
        name="catvton_side_by_side",
    ),
    Case(
        "ladi_vton",
        lambda: SimpleNamespace(unet=make_unet(in_channels=31, **SD2)),
        run_unet(77),
        decoder_sites((20, 10, 5), range(11, 27)),
    ),
    ip_adapter_case(
        "ip_adapter",
        lambda: with_ip_adapter(make_unet(), ImageProjection(6, CONTEXT, 4), 4),
        run_ip_adapter(6),
        everywhere(sd15_attentions(), "attn2", reading(4)),
        "",
    ),
    ip_adapter_case(
        "ip_adapter",
        lambda: with_ip_adapter(make_unet(**SDXL), ImageProjection(6, CONTEXT, 4), 4),
        run_ip_adapter(6, sdxl=True),
        everywhere(sdxl_attentions(), "attn2", reading(4)),
        "_sdxl",
    ),
    ip_adapter_case(
        "ip_adapter_plus",
        lambda: with_ip_adapter(make_unet(), resampler(6), 16),
        run_ip_adapter(9, 6),
        everywhere(sd15_attentions(), "attn2", reading(16)),
        "",
    ),
    ip_adapter_case(
        "ip_adapter_full_face",
        lambda: with_ip_adapter(make_unet(), IPAdapterFullImageProjection(6, CONTEXT), 257),
        run_ip_adapter(257, 6),
        everywhere(sd15_attentions(), "attn2", reading(256, 1, GridSize(16, 16))),
        "",
    ),
)
