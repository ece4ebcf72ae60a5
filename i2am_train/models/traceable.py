"""Other people's models, loaded and asked in one way, so that `i2am explain` can trace them.

Where such a model comes from, what it is asked for, how it is run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PillowImage

from i2am_train.attention.lookup import named_recipe
from i2am_train.attention.recipe import Recipe
from i2am_train.data.pictures import Image, Mask
from i2am_train.errors import ConfigError
from i2am_train.types import Fit, GridSize

NO_GUIDANCE = 1.0
"""Scale at which diffusers leaves out the unconditional half."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a model comes from, and the options of its recipe."""

    model: str
    """Name of its recipe."""
    checkpoint: str | None = None
    """Folder, or name on the hub."""
    adapter: Path | None = None
    """Further weights."""
    factory: str | None = None
    """``package.module:function``."""
    recipe: str | None = None
    """Name of the recipe of what a factory makes; None: detected."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of the recipe that the user chose."""
    guided: bool = True
    """Whether sampling uses guidance."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def recipe_of(self, target: Any) -> Recipe:
        """The model's recipe for a pipeline that was loaded here."""
        return named_recipe(target, self.model, **{"guided": self.guided, **self.options})

    @property
    def folder(self) -> str:
        """The checkpoint of a model that needs one.

        >>> Source(model="catvton", checkpoint="models/inpainting").folder
        'models/inpainting'
        """
        assert self.checkpoint is not None, "checked with the configuration"
        return self.checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One picture that is asked for. Pictures are RGB ``[height, width, 3]`` of any size."""

    reference: Image
    image: Image | None = None
    mask: Mask | None = None
    """As large as ``image``, True where it is painted anew."""
    prompt: str = ""
    size: GridSize
    """Of the result."""
    steps: int
    guidance: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceableModel:
    """A loaded model. ``make`` gives the result as RGB ``[height, width, 3]``."""

    target: Any
    """What is traced."""
    recipe: Recipe
    make: Callable[[Request], Image]
    fit: Fit = "stretch"
    """How the picture and its mask come to the result's size."""
    multiple: int = 1
    """Pixels that height and width must be multiples of."""

    def check_size(self, size: GridSize) -> None:
        """Refuses a size that the networks cannot halve as often as they do.

        >>> TraceableModel(target=None, recipe=None, make=None, multiple=64).check_size(GridSize(512, 400))
        Traceback (most recent call last):
            ...
        i2am_train.errors.ConfigError: size=512x400 (height x width) does not fit this model: both ...
        """
        if size.height % self.multiple or size.width % self.multiple:
            raise ConfigError(
                f"size={size} (height x width) does not fit this model: both must be multiples of "
                f"{self.multiple}. Set size=[HEIGHT,WIDTH] to such numbers."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """How a kind of model is loaded. ``needs`` and ``takes`` are options of `i2am explain`."""

    load: Callable[[Source], TraceableModel]
    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()
    size: GridSize
    """Of the result where the user names none."""


def latent_multiple(unet: Any, pixels: int) -> int:
    """Pixels that a side must be a multiple of: whole latents at each level of the U-Net.

    >>> from types import SimpleNamespace
    >>> unet = SimpleNamespace(config=SimpleNamespace(block_out_channels=(320, 640, 1280, 1280)))
    >>> latent_multiple(unet, pixels=8)
    64
    """
    return int(pixels * 2 ** (len(unet.config.block_out_channels) - 1))


def pillow(picture: Image | Mask) -> PillowImage.Image:
    """A picture, or a mask as black and white.

    >>> pillow(np.array([[True, False]])).getpixel((0, 0))
    255
    """
    white = np.uint8(255)
    return PillowImage.fromarray(picture * white if picture.dtype == np.bool_ else picture)
