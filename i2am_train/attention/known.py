"""Known models: where each keeps its reference attention, how it is recognised, and what its maps mean.

Each recipe's function is named as its model is asked for; its keywords are the recipe's options. ``guided`` says
whether sampling uses guidance, for pipelines that do not say so themselves (see `Recipe`). A `KnownModel` is one row of
the support table: such a function, the module names by which the model is told from others (`Signature`), and notes.
Facts about the models are from reading their public code. A model of your own: ``i2am_train/attention/README.md``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from i2am_train.attention.recipe import Latent, LatentSize, Recipe, Rows, Site, Tokens, module_like, part, with_rows
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

    >>> decoder = diffusers_decoder(GridSize(16, 16), special_tokens=1).sites[0]
    >>> decoder.layer_of("up_blocks.1.attentions.1.transformer_blocks.0.attn2")
    'up_blocks.1.attentions.1'
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
    return replace(diffusers_decoder(reference_grid, special_tokens, rows, guided=guided), name="tryon")


DINOV2_GRID = GridSize(37, 28)
"""Patches of the paper's reference encoder, DINOv2 with patches of 14, at 518x392."""


def custom(reference_grid: GridSize = DINOV2_GRID, special_tokens: int = 1, guided: bool | None = None) -> Recipe:
    """The paper's own model in its authors' code: conditional rows come first."""
    pattern = r"(?P<layer>decoders\.\d+\.1)\.attention_2"
    site = Site(pattern, "q_proj", "k_proj", "n_heads", reference=Tokens(reference_grid, skip=special_tokens))
    return Recipe("diffusion.unet", (site,), "first_half", "x", "time", name="custom", guided=guided)


def paint_by_example(guided: bool | None = None) -> Recipe:
    """Paint-by-Example in diffusers: one pooled token."""
    site = Site(DIFFUSERS_DECODER, reference=Tokens(None, count=1))
    return Recipe("unet", (site,), name="paint_by_example", absent=(SDXL_BLOCKS,), guided=guided)


LDM_ROOT = "model.diffusion_model"


def paint_by_example_ldm(guided: bool | None = None) -> Recipe:
    """Paint-by-Example in its authors' code."""
    site = Site(LDM_DECODER, reference=Tokens(None, count=1))
    return Recipe(LDM_ROOT, (site,), latent="x", timestep="timesteps", name="paint_by_example_ldm", guided=guided)


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
    """CatVTON: one canvas, person above garment; ``side_by_side``: left and right.

    >>> catvton().sites[0].reference.places(8, GridSize(4, 2))
    TokenPlaces(index=slice(4, 8, None), count=4, grid=GridSize(height=2, width=2))
    """
    person, garment = (0.0, 0.5, 0.0, 1.0), (0.5, 1.0, 0.0, 1.0)
    if side_by_side:
        person, garment = (0.0, 1.0, 0.0, 0.5), (0.0, 1.0, 0.5, 1.0)
    site = _joint(Tokens(crop=person), Tokens(crop=garment))
    return Recipe("unet", (site,), name="catvton", canvas=Canvas.LETTERBOX, guided=guided)


def ladi_vton(first: int = 11, count: int = 16, guided: bool | None = None) -> Recipe:
    """LaDI-VTON: pseudo-words among 77 words.

    ``first`` is the position of the first one: 11 after "a photo of a model wearing an upper body garment", 9 after
    "... a dress".

    >>> ladi_vton(first=9).sites[0].reference.places(77, GridSize(64, 48)).index
    slice(9, 25, None)
    """
    words = Tokens(None, skip=first, stop=first + count, count=count)
    site = Site(DIFFUSERS_DECODER, reference=words)
    partial = "the warped garment also enters by input channels"
    return Recipe("unet", (site,), guided=guided, name="ladi_vton", absent=(SDXL_BLOCKS,), partial=partial)


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
    """Which attention call is an adapter's: after the text and those before it, of which each with a scale of zero is
    left out; -1 if it is itself."""

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
    return _ip_adapter("ip_adapter_full_face", Tokens(GridSize(16, 16), skip=1), adapter, guided, Canvas.CENTRE_CROP)


KONTEXT_GRID = GridSize(64, 64)
"""Packed tokens of Kontext's default picture, 1024x1024."""


def flux_kontext(
    generated_grid: GridSize = KONTEXT_GRID,
    reference_grid: GridSize = KONTEXT_GRID,
    text_tokens: int = 512,
    guided: bool | None = None,
) -> Recipe:
    """FLUX.1 Kontext in diffusers: all blocks attend to [text; generated; reference picture].

    Tokens are normalised and rotated after the projection, so the attention call is observed. Grids are those of the
    packed latents, image size / 16 (64x64: 1024x1024). With true guidance each step makes two calls, the conditional
    one first.
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
    """Reads the sizes of Kontext's two pictures from their position ids ``[token, 3]`` (picture, row, column), and
    refuses others than the recipe's."""

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


@dataclass(frozen=True)
class Signature:
    """What tells a model from others.

    ``modules`` are patterns of which each must fit the path of some module below the root, or its ``path:ClassName``.
    ``channels`` is the number of input channels of the first convolution, ``target`` the class of what is traced.
    """

    modules: tuple[str, ...] = ()
    channels: int | None = None
    target: str | None = None

    def fits(self, target: Any, root: nn.Module) -> bool:
        """Whether this is the model. ``target`` is what is traced, ``root`` its denoiser.

        >>> Signature(channels=9).fits(None, nn.Sequential(nn.Conv2d(9, 8, 3)))
        True
        """
        return (
            (self.target is None or type(target).__name__ == self.target)
            and (self.channels is None or _input_channels(root) == self.channels)
            and all(module_like(root, pattern) is not None for pattern in self.modules)
        )


def _input_channels(root: nn.Module) -> int | None:
    first = next((module for module in root.modules() if isinstance(module, nn.Conv2d)), None)
    return None if first is None else first.in_channels


_FACTORY = "your code, by a factory"


@dataclass(frozen=True)
class KnownModel:
    """One supported model. ``recipe`` makes its recipe; its keywords are the options of ``trace`` and of
    ``i2am explain`` for it. ``roots`` are the places where its denoiser may be in what is traced, ``signature`` None
    means that it must be asked for by name. ``read`` takes options off the traced object. The rest is for the support
    table."""

    recipe: Callable[..., Recipe]
    title: str
    sites: str = "-"
    grids: str = "-"
    licence: str = "-"
    loading: str = _FACTORY
    roots: tuple[str, ...] = ("unet", "")
    signature: Signature | None = None
    read: Callable[[Any], Mapping[str, Any]] = field(default=lambda _: {})
    functional: bool = True
    same_picture: bool = False
    """Whether the reference shows what is generated (super-resolution), place by place."""

    @property
    def name(self) -> str:
        """What the model is asked for by."""
        return self.recipe.__name__

    @property
    def options(self) -> tuple[str, ...]:
        """Keywords of the recipe."""
        return tuple(inspect.signature(self.recipe).parameters)

    @property
    def meaning(self) -> tuple[str, ...]:
        """What its maps are, in the words of the support table: "functional" or "not functional", and "partial" and
        "mass" where they apply.

        >>> known_model("catvton").meaning, known_model("dci_vton").meaning
        (('functional', 'mass'), ('not functional', 'partial'))
        """
        recipe = self.made()
        words = ["functional" if self.functional else "not functional"]
        words += ["partial"] if isinstance(recipe.partial, str) else []
        words += ["mass"] if any(site.joint for site in recipe.sites) else []
        return tuple(words)

    def made(self, **options: Any) -> Recipe:
        """The recipe. Raises `CaptureError` for an option that it does not have.

        >>> known_model("custom").made(special_tokens=0).sites[0].reference.skip
        0
        """
        unknown = [name for name in options if name not in self.options]
        if unknown:
            raise CaptureError(
                f"The recipe {self.name} has no option '{unknown[0]}'. It has: {', '.join(self.options) or 'none'}."
            )
        return self.recipe(**options)


def _read_tryon(pipeline: Any) -> dict[str, Any]:
    return {"reference_grid": GridSize(*pipeline.reference_grid), "special_tokens": int(pipeline.config.class_token)}


_LDM_ROOTS = (LDM_ROOT, "diffusion_model", "")
_PROJECTION = r"encoder_hid_proj\.image_projection_layers\.0:"
_FOLDER = "folder or hub name"
_ADAPTER = _FOLDER + " + `adapter=` file (SD1.5)"
_OPEN_RAIL = "CreativeML OpenRAIL-M"
_CC = "CC BY-NC-SA 4.0"

# fmt: off
KNOWN_MODELS: tuple[KnownModel, ...] = (
    KnownModel(
        tryon, "Try-on model of this package", "9 decoder", "16x12, 32x24, 64x48; 37x28 tokens + class",
        "Apache-2.0 / yours", "`checkpoint=`", signature=Signature(target="TryOnPipeline"), read=_read_tryon),
    KnownModel(
        custom, "Custom (paper, authors' code)", "9 decoder", "16x12, 32x24, 64x48; 37x28 tokens + class",
        "none stated", "`i2am init`, or " + _FACTORY, roots=("diffusion.unet", "unet", ""),
        signature=Signature(modules=(r"decoders\.3\.1\.attention_2", r"bottleneck"))),
    KnownModel(
        paint_by_example, "Paint-by-Example (diffusers)", "9 decoder", "16x16, 32x32, 64x64; 1 token",
        _OPEN_RAIL, _FOLDER + ", or `i2am init`", signature=Signature(target="PaintByExamplePipeline"),
        functional=False),
    KnownModel(
        paint_by_example_ldm, "Paint-by-Example (authors' code)", "9 decoder", "16x16, 32x32, 64x64; 1 token",
        _OPEN_RAIL, roots=_LDM_ROOTS, signature=Signature(modules=(LDM_DECODER,), channels=9),
        functional=False),
    KnownModel(
        dci_vton, "DCI-VTON", "9 decoder", "16x16, 32x32, 64x64; 1 token", "MIT / not stated",
        roots=_LDM_ROOTS, functional=False),
    KnownModel(
        dci_vton_diffusers, "DCI-VTON (diffusers)", "9 decoder", "16x16, 32x32, 64x64; 1 token",
        "MIT / not stated", "`i2am init`", functional=False),
    KnownModel(
        stableviton, "StableVITON", "9 warping blocks", "16x12, 32x24, 64x48, both sides", _CC,
        roots=_LDM_ROOTS, signature=Signature(modules=(r"warp_flow_blks\.\d+\.transformer_blocks\.0\.attn2",))),
    KnownModel(
        pasd, "PASD", "12 pixel attentions", "8x8 to 64x64, both sides", "Apache-2.0",
        signature=Signature(modules=(r"up_blocks\.\d+\.pixel_attentions\.\d+",)), same_picture=True),
    KnownModel(
        pasd_light, "PASD-light", "decoder", "both sides", "Apache-2.0",
        signature=Signature(modules=(r"up_blocks\..*\.attn2_plus",)), same_picture=True),
    KnownModel(
        seesr, "SeeSR", "9 decoder", "16x16, 32x32, 64x64; 12x12 tokens + mean", "Apache-2.0",
        signature=Signature(modules=(r"up_blocks\.\d+\.image_attentions\.\d+",)), same_picture=True),
    KnownModel(
        idm_vton, "IDM-VTON", "70 self-attentions", "32x24, 64x48, both sides", _CC,
        signature=Signature(modules=(SDXL_BLOCKS,), channels=13)),
    KnownModel(
        ootdiffusion, "OOTDiffusion", "16 self-attentions", "16x12 to 128x96, both sides", _CC,
        roots=("unet_vton",), signature=Signature(modules=(DIFFUSERS_SELF_ATTENTION,))),
    KnownModel(
        catvton, "CatVTON", "16 self-attentions", "8x6 to 64x48, both sides", _CC,
        _FOLDER + " + attention weights", signature=Signature(modules=(r".*\.attn2\.processor:SkipAttnProcessor",))),
    KnownModel(
        ladi_vton, "LaDI-VTON", "9 decoder", "16x12, 32x24, 64x48; 16 pseudo-words", "CC BY-NC 4.0",
        signature=Signature(channels=31)),
    KnownModel(
        ip_adapter, "IP-Adapter", "16 (SD1.5), 70 (SDXL)", "all levels; 4 tokens", "Apache-2.0", _ADAPTER,
        signature=Signature(modules=(_PROJECTION + "ImageProjection",))),
    KnownModel(
        ip_adapter_plus, "IP-Adapter plus", "16 (SD1.5), 70 (SDXL)", "all levels; 16 tokens", "Apache-2.0",
        _ADAPTER, signature=Signature(modules=(_PROJECTION + "IPAdapterPlusImageProjection",))),
    KnownModel(
        ip_adapter_full_face, "IP-Adapter full-face", "16 (SD1.5), 70 (SDXL)",
        "all levels; 16x16 tokens + class", "Apache-2.0", _ADAPTER,
        signature=Signature(modules=(_PROJECTION + "IPAdapterFullImageProjection",))),
    KnownModel(
        flux_kontext, "FLUX.1 Kontext", "57 joint attentions", "image size / 16, both sides",
        "Apache-2.0 / FLUX.1 [dev] non-commercial", _FOLDER, roots=("transformer", ""),
        signature=Signature(target="FluxKontextPipeline")),
)
# fmt: on
"""Every supported model, in the order in which they are tried."""

_REGISTERED: list[KnownModel] = []


def register(model: KnownModel) -> None:
    """Make a model of your own known to `detect_recipe`, ``trace`` and ``i2am explain``.

    Registering the same name again replaces the former one; the name of a shipped model is refused with `CaptureError`.
    """
    if any(known.name == model.name for known in KNOWN_MODELS):
        raise CaptureError(f"There is a shipped recipe called '{model.name}'. Give your function another name.")
    _REGISTERED[:] = [known for known in _REGISTERED if known.name != model.name] + [model]


def known_models() -> tuple[KnownModel, ...]:
    """All models: registered ones come first, so that they win."""
    return (*reversed(_REGISTERED), *KNOWN_MODELS)


def known_model(name: str) -> KnownModel:
    """A model by name. Raises `CaptureError` that lists them all.

    >>> known_model("seesr").title
    'SeeSR'
    """
    found = {known.name: known for known in known_models()}
    if name not in found:
        raise CaptureError(f"No recipe is called '{name}'. There are: {', '.join(sorted(found))}.")
    return found[name]


def of_same_picture(recipe: str) -> bool:
    """Whether a recipe's reference shows what is generated, so that a patch should look at its own place; False for
    recipes that are not known.

    >>> of_same_picture("pasd"), of_same_picture("tryon")
    (True, False)
    """
    return any(known.name == recipe and known.same_picture for known in known_models())
