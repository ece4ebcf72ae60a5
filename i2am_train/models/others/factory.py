"""Models that need their own code: a Python function of the user's returns the pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from PIL import Image as PillowImage

from i2am_train.attention.known import KnownModel, register
from i2am_train.attention.lookup import detect_recipe, named_recipe
from i2am_train.attention.recipe import Recipe
from i2am_train.data.pictures import Image, resize_picture
from i2am_train.doors import calls, is_import_path, make, resolve
from i2am_train.errors import ConfigError
from i2am_train.models.others.other_model import OtherModel, Request, Source, pillow

ARGUMENTS = (
    "image", "mask", "reference", "prompt", "height", "width", "steps", "guidance", "seed",
)  # fmt: skip
"""Keywords that a pipeline is called with."""
HOW = (
    "a function that takes (checkpoint, device) and returns a pipeline, or (pipeline, recipe). The "
    f"pipeline is called with the keywords {', '.join(ARGUMENTS)} (those that it does not need it "
    "takes as **others) and returns an RGB picture of Pillow"
)


class FactoryPipeline(Protocol):
    """What a factory returns: an object that holds the model, and makes one picture.

    Its modules are searched by the recipe's paths, so the attribute names of the model's own code
    must be kept (StableVITON: ``pipeline.model.diffusion_model``).
    """

    def __call__(
        self,
        *,
        image: PillowImage.Image | None,
        mask: PillowImage.Image | None,
        reference: PillowImage.Image,
        prompt: str,
        height: int,
        width: int,
        steps: int,
        guidance: float,
        seed: int,
    ) -> PillowImage.Image:
        """The picture, in the geometry of ``image``. Pictures come as the user gave them."""
        ...


def load_by_factory(source: Source) -> OtherModel:
    """What the user's factory makes, with the recipe that it names, that was asked for, or that fits.

    Raises:
        ConfigError: the function cannot be imported, or returns something else.
        CaptureError: no recipe is known for it.
    """
    assert source.factory is not None, "checked with the configuration"
    factory = resolve(source.factory, "factory", HOW, calls("checkpoint", "device"))
    made = factory(source.checkpoint, source.device)
    pipeline, recipe = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    _check(pipeline, recipe, source.factory)

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

    return OtherModel(target=pipeline, recipe=_recipe(pipeline, recipe, source), make=make)


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


def _check(pipeline: Any, recipe: Any, name: str) -> None:
    """Refuses what cannot be called as a pipeline, before anything is computed."""
    wrong = calls(**dict.fromkeys(ARGUMENTS))(pipeline)
    if not (recipe is None or isinstance(recipe, (Recipe, str))):
        wrong = f"comes with a recipe of type {type(recipe).__name__}"
    if wrong:
        raise ConfigError(f"factory={name} returned a {type(pipeline).__name__}, which {wrong}. Expected {HOW}.")


def _checked_picture(picture: Any, request: Request, name: str) -> Image:
    array = np.asarray(picture.convert("RGB") if isinstance(picture, PillowImage.Image) else picture)
    if array.ndim != 3 or array.shape[-1] != 3 or array.dtype != np.uint8:
        raise ConfigError(
            f"The pipeline of factory={name} returned a {type(picture).__name__} of shape "
            f"{array.shape} and type {array.dtype}. Expected {HOW}."
        )
    return resize_picture(array, request.size)
