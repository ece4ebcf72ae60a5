"""Train and judge the attention of image-to-image diffusion models.

The names below are the public Python interface; each is loaded when it is first used, so that
``import i2am_train`` and the command line cost nothing.

>>> import i2am_train
>>> i2am_train.GridSize(16, 12).tokens
192
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from i2am_train.attention.maps import AttributionMaps as AttributionMaps
    from i2am_train.attention.maps import HeatMap as HeatMap
    from i2am_train.attention.recipe import Recipe as Recipe
    from i2am_train.attention.trace import ScoreTap as ScoreTap
    from i2am_train.attention.trace import trace as trace
    from i2am_train.config.store import compose as compose
    from i2am_train.losses.attention import Attention as Attention
    from i2am_train.losses.attention import attention_centers as attention_centers
    from i2am_train.losses.attention import attention_on_grids as attention_on_grids
    from i2am_train.losses.objective import Objective as Objective
    from i2am_train.metrics.attention import correspondence_error as correspondence_error
    from i2am_train.metrics.attention import imacs as imacs
    from i2am_train.metrics.attention import pck as pck
    from i2am_train.metrics.registry import image_metric as image_metric
    from i2am_train.models.sampling import sample as sample
    from i2am_train.models.tryon import TryOnModel as TryOnModel
    from i2am_train.types import Branch as Branch
    from i2am_train.types import Direction as Direction
    from i2am_train.types import GridSize as GridSize
    from i2am_train.types import LayerWeighting as LayerWeighting
    from i2am_train.types import LossVariant as LossVariant
    from i2am_train.types import Pairing as Pairing
    from i2am_train.types import PredictionType as PredictionType
    from i2am_train.types import Split as Split

__version__ = "0.1.0"

_HOME_OF = {
    "AttributionMaps": "attention.maps",
    "HeatMap": "attention.maps",
    "Recipe": "attention.recipe",
    "ScoreTap": "attention.trace",
    "trace": "attention.trace",
    "compose": "config.store",
    "Attention": "losses.attention",
    "attention_centers": "losses.attention",
    "attention_on_grids": "losses.attention",
    "Objective": "losses.objective",
    "correspondence_error": "metrics.attention",
    "pck": "metrics.attention",
    "imacs": "metrics.attention",
    "image_metric": "metrics.registry",
    "sample": "models.sampling",
    "TryOnModel": "models.tryon",
    "Branch": "types",
    "Direction": "types",
    "GridSize": "types",
    "LayerWeighting": "types",
    "LossVariant": "types",
    "Pairing": "types",
    "PredictionType": "types",
    "Split": "types",
}
"""Module of each public name; a test keeps this table and the imports above equal."""

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'i2am_train' has no attribute '{name}'")
    value = getattr(import_module(f"i2am_train.{_HOME_OF[name]}"), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
