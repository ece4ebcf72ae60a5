"""Attention capture and attribution maps: `trace` a sampling run, then ask its maps; `ScoreTap` for training."""

from i2am_train.attention.archive import Archive, load_maps, save_maps
from i2am_train.attention.frames import Frame, announce
from i2am_train.attention.known import KnownModel, Signature, detect_recipe, known_models, named_recipe, register
from i2am_train.attention.known_recipes import diffusers_decoder
from i2am_train.attention.live import ScoreTap
from i2am_train.attention.maps import AttributionMaps, HeatMap, normalise, threshold, time_groups
from i2am_train.attention.recipe import (
    LayerId,
    Recipe,
    Site,
    Tokens,
    find_layer,
    layer_name,
    paper_number,
    replace_backend,
)
from i2am_train.attention.store import AttributionStore, LayerRecord
from i2am_train.attention.trace import Trace, trace

__all__ = [
    "Archive",
    "AttributionMaps",
    "AttributionStore",
    "Frame",
    "HeatMap",
    "KnownModel",
    "LayerId",
    "LayerRecord",
    "Recipe",
    "ScoreTap",
    "Signature",
    "Site",
    "Tokens",
    "Trace",
    "announce",
    "detect_recipe",
    "diffusers_decoder",
    "find_layer",
    "known_models",
    "layer_name",
    "load_maps",
    "named_recipe",
    "normalise",
    "paper_number",
    "register",
    "replace_backend",
    "save_maps",
    "threshold",
    "time_groups",
    "trace",
]
