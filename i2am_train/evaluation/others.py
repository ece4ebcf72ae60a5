"""Other people's models: one picture with the attention that made it, and its scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from i2am_train.attention.hooks import resolve_root, resolve_sites
from i2am_train.attention.maps import AttributionMaps, time_groups
from i2am_train.attention.recipe import LayerId, similar_layer
from i2am_train.attention.trace import trace
from i2am_train.config.attention import AttributionConfig
from i2am_train.data.arrays import Image, Mask
from i2am_train.data.pictures import fit_mask
from i2am_train.errors import DataError
from i2am_train.evaluation.evaluator import imacs_table, value_or_none
from i2am_train.models.others.other_model import OtherModel, Request
from i2am_train.types import Direction, GridSize


@dataclass(frozen=True, kw_only=True)
class Attended:
    """One picture, and the attention of the sampling run that made it."""

    generated: Image
    mask: Mask | None
    """The region that was filled in, as large as ``generated``."""
    maps: AttributionMaps
    layer: str
    """The layer that patches are counted on."""


def generate_attended(
    model: OtherModel,
    request: Request,
    attribution: AttributionConfig,
    matrix_layers: list[LayerId] | None,
) -> Attended:
    """Makes one picture and keeps its attention.

    Layers by number are those of `similar_layer`. Score matrices are kept of ``attribution.layer``
    and of ``matrix_layers`` (None: of every layer).

    Raises:
        CaptureError: the model does not fit its recipe, or a layer does not exist.
        ConfigError: the size does not fit, or there are fewer steps than time groups.
    """
    model.check_size(request.size)
    time_groups(request.steps, attribution.time_groups)
    names = captured_layers(model)
    chosen = [similar_layer(layer, names) for layer in attribution.layers or names]
    layer = similar_layer(attribution.layer, chosen)
    matrices = (
        None if matrix_layers is None else [similar_layer(one, chosen) for one in matrix_layers]
    )
    mask = None if request.mask is None else fit_mask(request.mask, request.size, model.fit)
    with trace(
        model.target,
        model.recipe,
        layers=chosen,
        matrix_layers=None if matrices is None else [layer, *matrices],
        generated_mask=_as_batch(mask) if attribution.inpaint_queries else None,
        byte_budget=attribution.byte_budget,
    ) as attention:
        generated = model.make(request)
    return Attended(generated=generated, mask=mask, maps=attention.maps(), layer=layer)


def captured_layers(model: OtherModel) -> list[str]:
    """Names of the layers of a model's sites; an error that says what is missing if there are none."""
    sites = resolve_sites(resolve_root(model.target, model.recipe), model.recipe)
    return list(dict.fromkeys(site.layer for site in sites))


def _as_batch(mask: Mask | None) -> Tensor | None:
    return None if mask is None else torch.from_numpy(mask)[None]


def attended_scores(
    maps: AttributionMaps,
    masks: dict[Direction, Mask],
    attribution: AttributionConfig,
) -> dict[str, float | None]:
    """IMACS of each direction that has a mask, at every threshold and penalty; None for no value.

    A reference's mask must cover what the model saw of the picture, as the map does.

    Raises:
        DataError: a reference mask is given for tokens without a place in the picture.
    """
    scores: dict[str, Tensor] = {}
    for direction, mask in masks.items():
        if direction not in maps.store.directions:
            raise DataError(
                "reference_mask= is given, and this model's reference tokens have no place in the "
                "reference picture, so there is no map to score. Leave it out."
            )
        name = "imacs_g" if direction is Direction.REFERENCE_TO_GENERATED else "imacs_r"
        region = torch.from_numpy(mask)[None]
        heat: Float[Tensor, "1 height width"] = (
            maps.unified(direction, attribution.weighting).on_picture(GridSize(*mask.shape)).values
        )
        scores |= imacs_table(name, heat, region, attribution)
    return {name: value_or_none(float(value[0])) for name, value in scores.items()}
