"""Which models `i2am explain` loads itself, and what each must be given."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from i2am_train.attention.known import known_models
from i2am_train.config.explanation import FACTORY, TRYON
from i2am_train.errors import ConfigError
from i2am_train.models.others.catvton import load_catvton
from i2am_train.models.others.factory import load_by_factory
from i2am_train.models.others.ip_adapter import load_ip_adapter
from i2am_train.models.others.other_model import Loader
from i2am_train.models.others.paint_by_example import load_paint_by_example
from i2am_train.types import GridSize

SQUARE = GridSize(512, 512)
TRYON_SIZE = GridSize(512, 384)
FILLING = ("checkpoint", "image", "mask", "reference")

_IP_ADAPTER = Loader(
    load=load_ip_adapter, needs=("checkpoint", "adapter", "reference"), takes=("image", "mask", "prompt"), size=SQUARE
)

LOADERS: Mapping[str, Loader] = {
    "paint_by_example": Loader(load=load_paint_by_example, needs=FILLING, size=SQUARE),
    "ip_adapter": _IP_ADAPTER,
    "ip_adapter_plus": _IP_ADAPTER,
    "ip_adapter_full_face": _IP_ADAPTER,
    "catvton": Loader(load=load_catvton, needs=FILLING, takes=("adapter",), size=TRYON_SIZE),
    FACTORY: Loader(
        load=load_by_factory,
        needs=("factory", "reference"),
        takes=("checkpoint", "image", "mask", "prompt", "recipe"),
        size=TRYON_SIZE,
    ),
}


def loader_of(model: str) -> Loader:
    """The loader of a model by name.

    Raises:
        ConfigError: there is none: the model needs its own code, or nothing is known of it.
    """
    if model in LOADERS:
        return LOADERS[model]
    known = {one.name for one in known_models()}
    if model in known:
        raise ConfigError(
            f"model={model} runs in its own repository's code, which is not part of this program. "
            f"Write a function that returns its pipeline, and set model={FACTORY} "
            "factory=package.module:function (i2am_train/attention/README.md)."
        )
    names = [TRYON, *LOADERS]
    near = get_close_matches(model, [*names, *known], n=1)
    hint = f"Did you mean '{near[0]}'?" if near else f"There are {', '.join(names)}."
    raise ConfigError(f"There is no model '{model}'. {hint} `i2am explain --recipes` lists all.")
