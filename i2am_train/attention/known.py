"""Known models: how each is recognised, and what a user must know before reading its maps.

A `KnownModel` is one row of the support table: a function that makes the `Recipe`
(:mod:`~i2am_train.attention.known_recipes`), the module names by which the model is told from others (`Signature`), and
its notes. A model of your own: ``i2am_train/attention/README.md``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from torch import nn

from i2am_train.attention import known_recipes as recipes
from i2am_train.attention.recipe import Recipe, named_modules
from i2am_train.errors import CaptureError
from i2am_train.types import GridSize


@dataclass(frozen=True)
class Signature:
    """What tells a model from others.

    ``modules`` are patterns of which each must fit the path of some module below the root, or its
    ``path:ClassName``. ``channels`` is the number of input
    channels of the first convolution, ``target`` the class of what is traced.
    """

    modules: tuple[str, ...] = ()
    channels: int | None = None
    target: str | None = None

    def fits(self, target: Any, root: nn.Module) -> bool:
        """Whether this is the model. ``target`` is what is traced, ``root`` its denoiser."""
        return (
            (self.target is None or type(target).__name__ == self.target)
            and (self.channels is None or _input_channels(root) == self.channels)
            and all(module_like(root, pattern) is not None for pattern in self.modules)
        )


def _input_channels(root: nn.Module) -> int | None:
    first = next((module for module in root.modules() if isinstance(module, nn.Conv2d)), None)
    return None if first is None else first.in_channels


def module_like(root: nn.Module, pattern: str) -> str | None:
    """Path of the first module whose path, or ``path:ClassName``, fits a pattern; None without."""
    return next(
        (
            path
            for path, module in named_modules(root)
            if re.fullmatch(pattern, path) or re.fullmatch(pattern, f"{path}:{type(module).__name__}")
        ),
        None,
    )


def _nothing_to_read(_: Any) -> dict[str, Any]:
    return {}


_FACTORY = "your code, by a factory"


@dataclass(frozen=True)
class KnownModel:
    """One supported model. ``recipe`` makes its recipe; its keywords are the options of
    ``trace`` and of ``i2am explain`` for it. ``roots`` are the places where its denoiser may be in
    what is traced, ``signature`` None means that it must be asked for by name. ``read`` takes
    options off the traced object. The rest is for the support table."""

    recipe: Callable[..., Recipe]
    title: str
    sites: str = "-"
    grids: str = "-"
    licence: str = "-"
    loading: str = _FACTORY
    roots: tuple[str, ...] = ("unet", "")
    signature: Signature | None = None
    read: Callable[[Any], Mapping[str, Any]] = field(default=_nothing_to_read)
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
        """What its maps are, in the words of the support table: "functional" or "not functional",
        and "partial" and "mass" where they apply."""
        recipe = self.made()
        words = ["functional" if self.functional else "not functional"]
        words += ["partial"] if isinstance(recipe.partial, str) else []
        words += ["mass"] if any(site.joint for site in recipe.sites) else []
        return tuple(words)

    def made(self, **options: Any) -> Recipe:
        """The recipe. Raises `CaptureError` for an option that it does not have."""
        unknown = [name for name in options if name not in self.options]
        if unknown:
            raise CaptureError(
                f"The recipe {self.name} has no option '{unknown[0]}'. It has: {', '.join(self.options) or 'none'}."
            )
        return self.recipe(**options)


def _read_tryon(pipeline: Any) -> dict[str, Any]:
    return {"reference_grid": GridSize(*pipeline.reference_grid), "special_tokens": int(pipeline.config.class_token)}


_LDM_ROOTS = (recipes.LDM_ROOT, "diffusion_model", "")
_PROJECTION = r"encoder_hid_proj\.image_projection_layers\.0:"
_FOLDER = "folder or hub name"
_ADAPTER = _FOLDER + " + `adapter=` file (SD1.5)"
_OPEN_RAIL = "CreativeML OpenRAIL-M"
_CC = "CC BY-NC-SA 4.0"

# fmt: off
KNOWN_MODELS: tuple[KnownModel, ...] = (
    KnownModel(
        recipes.tryon, "Try-on model of this package", "9 decoder", "16x12, 32x24, 64x48; 37x28 tokens + class",
        "Apache-2.0 / yours", "`checkpoint=`", signature=Signature(target="TryOnPipeline"), read=_read_tryon,
    ),
    KnownModel(
        recipes.custom, "Custom (paper, authors' code)", "9 decoder", "16x12, 32x24, 64x48; 37x28 tokens + class",
        "none stated", "`i2am init`, or " + _FACTORY, roots=("diffusion.unet", "unet", ""),
        signature=Signature(modules=(r"decoders\.3\.1\.attention_2", r"bottleneck")),
    ),
    KnownModel(
        recipes.paint_by_example, "Paint-by-Example (diffusers)", "9 decoder", "16x16, 32x32, 64x64; 1 token",
        _OPEN_RAIL, _FOLDER + ", or `i2am init`", signature=Signature(target="PaintByExamplePipeline"),
        functional=False,
    ),
    KnownModel(
        recipes.paint_by_example_ldm, "Paint-by-Example (authors' code)", "9 decoder", "16x16, 32x32, 64x64; 1 token",
        _OPEN_RAIL, roots=_LDM_ROOTS, signature=Signature(modules=(recipes.LDM_DECODER,), channels=9),
        functional=False,
    ),
    KnownModel(
        recipes.dci_vton, "DCI-VTON", "9 decoder", "16x16, 32x32, 64x64; 1 token", "MIT / not stated",
        roots=_LDM_ROOTS, functional=False,
    ),
    KnownModel(
        recipes.dci_vton_diffusers, "DCI-VTON (diffusers)", "9 decoder", "16x16, 32x32, 64x64; 1 token",
        "MIT / not stated", "`i2am init`", functional=False,
    ),
    KnownModel(
        recipes.stableviton, "StableVITON", "9 warping blocks", "16x12, 32x24, 64x48, both sides", _CC,
        roots=_LDM_ROOTS, signature=Signature(modules=(r"warp_flow_blks\.\d+\.transformer_blocks\.0\.attn2",)),
    ),
    KnownModel(
        recipes.pasd, "PASD", "12 pixel attentions", "8x8 to 64x64, both sides", "Apache-2.0",
        signature=Signature(modules=(r"up_blocks\.\d+\.pixel_attentions\.\d+",)), same_picture=True,
    ),
    KnownModel(
        recipes.pasd_light, "PASD-light", "decoder", "both sides", "Apache-2.0",
        signature=Signature(modules=(r"up_blocks\..*\.attn2_plus",)), same_picture=True,
    ),
    KnownModel(
        recipes.seesr, "SeeSR", "9 decoder", "16x16, 32x32, 64x64; 12x12 tokens + mean", "Apache-2.0",
        signature=Signature(modules=(r"up_blocks\.\d+\.image_attentions\.\d+",)), same_picture=True,
    ),
    KnownModel(
        recipes.idm_vton, "IDM-VTON", "70 self-attentions", "32x24, 64x48, both sides", _CC,
        signature=Signature(modules=(recipes.SDXL_BLOCKS,), channels=13),
    ),
    KnownModel(
        recipes.ootdiffusion, "OOTDiffusion", "16 self-attentions", "16x12 to 128x96, both sides", _CC,
        roots=("unet_vton",), signature=Signature(modules=(recipes.DIFFUSERS_SELF_ATTENTION,)),
    ),
    KnownModel(
        recipes.catvton, "CatVTON", "16 self-attentions", "8x6 to 64x48, both sides", _CC,
        _FOLDER + " + attention weights", signature=Signature(modules=(r".*\.attn2\.processor:SkipAttnProcessor",)),
    ),
    KnownModel(
        recipes.ladi_vton, "LaDI-VTON", "9 decoder", "16x12, 32x24, 64x48; 16 pseudo-words", "CC BY-NC 4.0",
        signature=Signature(channels=31),
    ),
    KnownModel(
        recipes.ip_adapter, "IP-Adapter", "16 (SD1.5), 70 (SDXL)", "all levels; 4 tokens", "Apache-2.0", _ADAPTER,
        signature=Signature(modules=(_PROJECTION + "ImageProjection",)),
    ),
    KnownModel(
        recipes.ip_adapter_plus, "IP-Adapter plus", "16 (SD1.5), 70 (SDXL)", "all levels; 16 tokens", "Apache-2.0",
        _ADAPTER, signature=Signature(modules=(_PROJECTION + "IPAdapterPlusImageProjection",)),
    ),
    KnownModel(
        recipes.ip_adapter_full_face, "IP-Adapter full-face", "16 (SD1.5), 70 (SDXL)",
        "all levels; 16x16 tokens + class", "Apache-2.0", _ADAPTER,
        signature=Signature(modules=(_PROJECTION + "IPAdapterFullImageProjection",)),
    ),
    KnownModel(
        recipes.flux_kontext, "FLUX.1 Kontext", "57 joint attentions", "image size / 16, both sides",
        "Apache-2.0 / FLUX.1 [dev] non-commercial", _FOLDER, roots=("transformer", ""),
        signature=Signature(target="FluxKontextPipeline"),
    ),
)
# fmt: on
"""Every supported model, in the order in which they are tried."""

_REGISTERED: list[KnownModel] = []


def register(model: KnownModel) -> None:
    """Make a model of your own known to `detect_recipe`, ``trace`` and ``i2am explain``.

    Registering the same name again replaces the former one; the name of a shipped model is refused
    with `CaptureError`.
    """
    if any(known.name == model.name for known in KNOWN_MODELS):
        raise CaptureError(f"There is a shipped recipe called '{model.name}'. Give your function another name.")
    _REGISTERED[:] = [known for known in _REGISTERED if known.name != model.name] + [model]


def known_models() -> tuple[KnownModel, ...]:
    """All models: registered ones come first, so that they win."""
    return (*reversed(_REGISTERED), *KNOWN_MODELS)


def known_model(name: str) -> KnownModel:
    """A model by name. Raises `CaptureError` that lists them all."""
    found = {known.name: known for known in known_models()}
    if name not in found:
        raise CaptureError(f"No recipe is called '{name}'. There are: {', '.join(sorted(found))}.")
    return found[name]


@runtime_checkable
class HasAttentionRecipe(Protocol):
    """A model that declares its own attention."""

    def attention_recipe(self) -> Recipe:
        """The recipe of this very model."""
        ...


def of_same_picture(recipe: str) -> bool:
    """Whether a recipe's reference shows what is generated, so that a patch should look at its own
    place; False for recipes that are not known.

    >>> of_same_picture("pasd"), of_same_picture("tryon")
    (True, False)
    """
    return any(known.name == recipe and known.same_picture for known in known_models())


def detect_recipe(target: Any) -> Recipe:
    """The recipe of a model that knows its own, or of a known one; else an error that says how to write one."""
    if isinstance(target, HasAttentionRecipe):
        return target.attention_recipe()
    for known in known_models():
        for root in known.roots:
            module = recipes.part(target, root)
            if module is None or known.signature is None:
                continue
            if known.signature.fits(target, module):
                return replace(known.made(**known.read(target)), root=root)
    raise CaptureError(
        f"No recipe is known for {type(target).__name__}. Pass one: for a U-Net of diffusers, "
        "diffusers_decoder(reference_grid=GridSize(height, width), special_tokens=...), with "
        "root='' if you trace the U-Net itself; by name, named_recipe(target, name), if it is a "
        "variant of a known model; for any other model, a Recipe of Sites."
    )


def named_recipe(target: Any, name: str, **options: Any) -> Recipe:
    """The recipe of a known model by its name, with the root where ``target`` has its denoiser.

    ``options`` are those of the recipe's function, such as ``guided=False``.
    """
    known = known_model(name)
    recipe = known.made(**{**known.read(target), **options})
    found = [root for root in (*known.roots, "") if recipes.part(target, root) is not None]
    return replace(recipe, root=found[0]) if found else recipe


def chosen_recipe(target: Any, recipe: Recipe | str | None) -> Recipe:
    """What ``trace`` is given, as a recipe: itself, a known model's by name, or the detected one."""
    if recipe is None:
        return detect_recipe(target)
    return named_recipe(target, recipe) if isinstance(recipe, str) else recipe


def nearest_recipe(root: nn.Module) -> KnownModel | None:
    """The known model that this is, or else the first of which there is a site, for messages."""
    paths = [path for path, _ in named_modules(root)]

    def has_site(known: KnownModel) -> bool:
        sites = known.made().sites
        return any(site.layer_of(path) is not None for site in sites for path in paths)

    def is_this(known: KnownModel) -> bool:
        # what is told by the name of its root alone cannot be told from the root
        signature = known.signature if "" in known.roots else None
        return signature is not None and signature.fits(root, root)

    models = known_models()
    return next(iter([*filter(is_this, models), *filter(has_site, models)]), None)
