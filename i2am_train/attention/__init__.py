"""Attention capture and attribution maps: `trace` a sampling run, then ask its maps; `ScoreTap` for training."""

from i2am_train.attention.compiled import guard_hooks
from i2am_train.attention.frames import Frame, announce
from i2am_train.attention.known import KnownModel, Signature, diffusers_decoder, known_models, register
from i2am_train.attention.lookup import detect_recipe, named_recipe
from i2am_train.attention.maps import Archive, AttributionMaps, HeatMap, load_maps, save_maps
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
from i2am_train.attention.store import AttributionStore, LayerRecord, time_groups
from i2am_train.attention.trace import ScoreTap, Trace, trace
from i2am_train.attention.uniform import uniform_attention
from i2am_train.ops.grids import normalise, threshold

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
    "guard_hooks",
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
    "uniform_attention",
]
