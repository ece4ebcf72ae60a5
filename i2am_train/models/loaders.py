"""Which models `i2am explain` loads itself, what each must be given, and those that a function of the user's loads."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np
from PIL import Image as PillowImage

from i2am_train.attention.known import KnownModel, known_models, register
from i2am_train.attention.lookup import detect_recipe, named_recipe
from i2am_train.attention.recipe import Recipe
from i2am_train.config.explanation import FACTORY, TRYON
from i2am_train.data.pictures import Image, resize_picture
from i2am_train.doors import calls, is_import_path, make, resolve
from i2am_train.errors import ConfigError
from i2am_train.models.catvton import load_catvton
from i2am_train.models.ip_adapter import load_ip_adapter
from i2am_train.models.paint_by_example import load_paint_by_example
from i2am_train.models.traceable import Loader, Request, Source, TraceableModel, pillow
from i2am_train.types import GridSize

_ARGUMENTS = (
    "image", "mask", "reference", "prompt", "height", "width", "steps", "guidance", "seed",
)  # fmt: skip
"""Keywords that a pipeline is called with."""
_HOW = (
    "a function that takes (checkpoint, device) and returns a pipeline, or (pipeline, recipe). The "
    f"pipeline is called with the keywords {', '.join(_ARGUMENTS)} (those that it does not need it "
    "takes as **others) and returns an RGB picture of Pillow"
)


def _load_by_factory(source: Source) -> TraceableModel:
    """What the user's factory makes, with the recipe that it names, that was asked for, or that fits.

    The pipeline's modules are searched by the recipe's paths, so the attribute names of the model's own code must be
    kept (StableVITON: ``pipeline.model.diffusion_model``). It is called with pictures as the user gave them, None for
    one that was not given, and returns one in the geometry of ``image``.

    Raises:
        ConfigError: the function cannot be imported, or returns something else.
        CaptureError: no recipe is known for it.
    """
    assert source.factory is not None, "checked with the configuration"
    factory = resolve(source.factory, "factory", _HOW, calls("checkpoint", "device"))
    made = factory(source.checkpoint, source.device)
    pipeline, recipe = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    wrong = calls(**dict.fromkeys(_ARGUMENTS))(pipeline)
    if not (recipe is None or isinstance(recipe, (Recipe, str))):
        wrong = f"comes with a recipe of type {type(recipe).__name__}"
    if wrong:  # before anything is computed
        raise ConfigError(
            f"factory={source.factory} returned a {type(pipeline).__name__}, which {wrong}. Expected {_HOW}."
        )

    def make(request: Request) -> Image:
        picture = pipeline(
            image=None if request.image is None else pillow(request.image),
            mask=None if request.mask is None else pillow(request.mask),
            reference=pillow(request.reference),
            prompt=request.prompt,
            height=request.size.height,
            width=request.size.width,
            steps=request.steps,
            guidance=request.guidance,
            seed=request.seed,
        )
        return _checked_picture(picture, request, str(source.factory))

    return TraceableModel(target=pipeline, recipe=_recipe(pipeline, recipe, source), make=make)


def _recipe(pipeline: Any, recipe: Recipe | str | None, source: Source) -> Recipe:
    if source.recipe and is_import_path(source.recipe):
        return _imported_recipe(pipeline, source.recipe, source.options)
    if isinstance(recipe, Recipe) and not source.recipe:
        return recipe
    name = source.recipe or recipe or detect_recipe(pipeline).name
    return named_recipe(pipeline, str(name), **source.options)


def _imported_recipe(pipeline: Any, path: str, options: Mapping[str, Any]) -> Recipe:
    """The user's recipe by its import path."""
    expected = (
        "a Recipe, a KnownModel, or a function that takes the options in recipe_options as keywords and returns a "
        "Recipe (i2am_train/attention/README.md)"
    )

    def fits(found: Any) -> str | None:
        if isinstance(found, Recipe):
            return f"takes no {', '.join(options)}: it is a Recipe already" if options else None
        return None if isinstance(found, KnownModel) else calls(**options)(found)

    found = resolve(path, "recipe", expected, fits)
    if isinstance(found, KnownModel):
        register(found)
        return named_recipe(pipeline, found.name, **options)
    made = found if isinstance(found, Recipe) else make(found, f"recipe={path}", **options)
    if not isinstance(made, Recipe):
        raise ConfigError(f"recipe={path} returned a {type(made).__name__}. Expected {expected}.")
    return made


def _checked_picture(picture: Any, request: Request, name: str) -> Image:
    array = np.asarray(picture.convert("RGB") if isinstance(picture, PillowImage.Image) else picture)
    if array.ndim != 3 or array.shape[-1] != 3 or array.dtype != np.uint8:
        raise ConfigError(
            f"The pipeline of factory={name} returned a {type(picture).__name__} of shape "
            f"{array.shape} and type {array.dtype}. Expected {_HOW}."
        )
    return resize_picture(array, request.size)


_SQUARE = GridSize(512, 512)
_TRYON_SIZE = GridSize(512, 384)
_FILLING = ("checkpoint", "image", "mask", "reference")

_IP_ADAPTER = Loader(
    load=load_ip_adapter, needs=("checkpoint", "adapter", "reference"), takes=("image", "mask", "prompt"), size=_SQUARE
)

_LOADERS: Mapping[str, Loader] = {
    "paint_by_example": Loader(load=load_paint_by_example, needs=_FILLING, size=_SQUARE),
    "ip_adapter": _IP_ADAPTER,
    "ip_adapter_plus": _IP_ADAPTER,
    "ip_adapter_full_face": _IP_ADAPTER,
    "catvton": Loader(load=load_catvton, needs=_FILLING, takes=("adapter",), size=_TRYON_SIZE),
    FACTORY: Loader(
        load=_load_by_factory,
        needs=("factory", "reference"),
        takes=("checkpoint", "image", "mask", "prompt", "recipe"),
        size=_TRYON_SIZE,
    ),
}


def loader_of(model: str) -> Loader:
    """The loader of a model by name.

    Raises:
        ConfigError: there is none: the model needs its own code, or nothing is known of it.

    >>> loader_of("catvton").needs
    ('checkpoint', 'image', 'mask', 'reference')
    >>> loader_of("catvtn")
    Traceback (most recent call last):
        ...
    i2am_train.errors.ConfigError: There is no model 'catvtn'. Did you mean 'catvton'? ...
    """
    if model in _LOADERS:
        return _LOADERS[model]
    known = {one.name for one in known_models()}
    if model in known:
        raise ConfigError(
            f"model={model} runs in its own repository's code, which is not part of this program. "
            f"Write a function that returns its pipeline, and set model={FACTORY} "
            "factory=package.module:function (i2am_train/attention/README.md)."
        )
    names = [TRYON, *_LOADERS]
    near = get_close_matches(model, [*names, *known], n=1)
    hint = f"Did you mean '{near[0]}'?" if near else f"There are {', '.join(names)}."
    raise ConfigError(f"There is no model '{model}'. {hint} `i2am explain --recipes` lists all.")
