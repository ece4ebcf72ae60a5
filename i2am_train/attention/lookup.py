"""From a model to its recipe, and from a recipe to the modules that it means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import nn

from i2am_train.attention.known import KnownModel, known_model, known_models
from i2am_train.attention.recipe import (
    LayerId,
    Recipe,
    Site,
    TokenPlaces,
    find_layer,
    module_like,
    named_modules,
    part,
    uncompiled,
)
from i2am_train.errors import CaptureError
from i2am_train.types import GridSize


@runtime_checkable
class _HasAttentionRecipe(Protocol):
    """A model that declares its own attention."""

    def attention_recipe(self) -> Recipe:
        """The recipe of this very model."""
        ...


def detect_recipe(target: Any) -> Recipe:
    """The recipe of a model that knows its own, or of a known one; else an error that says how to write one.

    >>> class Mine(nn.Module):
    ...     def attention_recipe(self):
    ...         return Recipe("unet", (Site(r"blocks\\.\\d+\\.attn2"),), name="mine")
    >>> detect_recipe(Mine()).name
    'mine'
    """
    if isinstance(target, _HasAttentionRecipe):
        return target.attention_recipe()
    for known in known_models():
        for root in known.roots:
            module = part(target, root)
            if module is None or known.signature is None:
                continue
            if known.signature.fits(target, module):
                return replace(known.made(**known.read(target)), root=root)
    raise CaptureError(
        f"No recipe is known for {type(target).__name__}. Pass one: for a U-Net of diffusers, "
        "diffusers_decoder(reference_grid=GridSize(height, width), special_tokens=...), with "
        "root='' if you trace the U-Net itself; by name, named_recipe(target, name), if it is a "
        "variant of a known model; for any other model, a Recipe of Sites. In a command: recipe=package.module:NAME."
    )


def named_recipe(target: Any, name: str, **options: Any) -> Recipe:
    """The recipe of a known model by its name, with the root where ``target`` has its denoiser.

    ``options`` are those of the recipe's function, such as ``guided=False``.

    >>> named_recipe(nn.ModuleDict({"unet": nn.Linear(2, 3)}), "seesr").root
    'unet'
    """
    known = known_model(name)
    recipe = known.made(**{**known.read(target), **options})
    found = [root for root in (*known.roots, "") if part(target, root) is not None]
    return replace(recipe, root=found[0]) if found else recipe


def chosen_recipe(target: Any, recipe: Recipe | str | None) -> Recipe:
    """What ``trace`` is given, as a recipe: itself, a known model's by name, or the detected one."""
    if recipe is None:
        return detect_recipe(target)
    return named_recipe(target, recipe) if isinstance(recipe, str) else recipe


def _nearest_recipe(root: nn.Module) -> KnownModel | None:
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


class SitePlaces(NamedTuple):
    """Places of the generated and of the reference tokens of one site."""

    generated: TokenPlaces
    reference: TokenPlaces


@dataclass(eq=False)
class SiteModule:
    """One attention module of a model, resolved from a recipe."""

    layer: str
    path: str
    site: Site
    module: nn.Module

    def places(self, generated: int, reference: int, latent: GridSize) -> SitePlaces:
        """Where the picture's tokens are among so many queries and keys; an error that names the layer if they don't
        fit."""
        try:
            return SitePlaces(
                self.site.generated.places(generated, latent), self.site.reference.places(reference, latent)
            )
        except CaptureError as error:
            raise CaptureError(f"Layer {self.layer}: {error}") from None


def resolve_root(target: Any, recipe: Recipe) -> nn.Module:
    """The recipe's root module in a model or pipeline; what ``torch.compile`` wrapped, unwrapped: the wrapper passes
    its arguments on without their names.

    >>> resolve_root(nn.ModuleDict({"unet": nn.Linear(2, 3)}), Recipe("unet", ()))
    Linear(in_features=2, out_features=3, bias=True)
    """
    found = target
    for name in filter(None, recipe.root.split(".")):
        if not hasattr(found, name):
            children = [key for key, _ in found.named_children()] if isinstance(found, nn.Module) else []
            has = f" It has: {', '.join(children)}." if children else ""
            raise CaptureError(
                f"{type(target).__name__} has no part '{recipe.root}', the recipe's root.{has} "
                "Set the recipe's root to the denoiser's path ('' if you pass the denoiser itself)."
            )
        found = getattr(found, name)
    if not isinstance(found, nn.Module):
        raise CaptureError(
            f"The recipe's root '{recipe.root}' of {type(target).__name__} is a {type(found).__name__}, not a torch "
            "module. Set it to the denoiser's path."
        )
    return uncompiled(found)


def resolve_sites(root: nn.Module, recipe: Recipe) -> tuple[SiteModule, ...]:
    """The recipe's attention modules as they are now (call it when attaching: adapters may be injected until then).

    >>> network = nn.ModuleDict({"attn1": nn.Identity(), "attn2": nn.Identity()})
    >>> [site.layer for site in resolve_sites(network, Recipe("", (Site("attn2"),)))]
    ['attn2']
    """
    found = [
        SiteModule(layer, path, site, module)
        for path, module in named_modules(root)
        for site in recipe.sites
        if (layer := site.layer_of(path)) is not None
    ]
    if not found:
        patterns = ", ".join(repr(site.pattern) for site in recipe.sites)
        near = _nearest_recipe(root)
        advice = "" if near is None else f"; the nearest known recipe is '{near.name}'"
        raise CaptureError(
            f"No attention layer matches {patterns}. This model has: {_attention_like(root, recipe)}. Set the recipe's "
            f"pattern to one of them (paths start below the recipe's root, {recipe.root or 'the model'!r}){advice}."
        )
    _refuse_other_models(root, recipe)
    return tuple(found)


def _refuse_other_models(root: nn.Module, recipe: Recipe) -> None:
    for pattern in recipe.absent:
        if (path := module_like(root, pattern)) is not None:
            raise CaptureError(
                f"{type(root).__name__} has a module '{path}', which no model of the recipe "
                f"'{recipe.name}' has: it is of another kind (SDXL, for one, has several transformer "
                "blocks in an attention). Choose a recipe for it (i2am explain --recipes)."
            )


def _attention_like(root: nn.Module, recipe: Recipe) -> str:
    """Paths of modules that look like attention, or have the projections of a site, for messages."""
    projections = {(site.generated_projection, site.reference_projection) for site in recipe.sites}
    names = [
        path
        for path, module in named_modules(root)
        if hasattr(module, "heads")
        or "attn" in path.rpartition(".")[2]
        or any(all(part(module, name) is not None for name in pair) for pair in projections)
    ]
    shown = names[:12] + ([f"and {len(names) - 12} more"] if len(names) > 12 else [])
    return ", ".join(shown) or "no module with heads, and none with the projections of the recipe's sites"


def choose_sites(
    sites: Sequence[SiteModule], layers: Sequence[LayerId], model: Sequence[str] | None = None
) -> tuple[SiteModule, ...]:
    """The sites of the given layers, in the order given; an error that lists what there is.

    Numbers count the ``model``'s layers (None: those of the sites), as `layer_numbers` does.

    >>> named = [SiteModule(f"up_blocks.1.attentions.{i}", "", Site(""), nn.Identity()) for i in (0, 1)]
    >>> [site.layer for site in choose_sites(named, [2])]
    ['up_blocks.1.attentions.1']
    """
    by_name = {site.layer: site for site in sites}
    names = [find_layer(layer, list(by_name), model or ()) for layer in layers]
    return tuple(by_name[name] for name in names)
