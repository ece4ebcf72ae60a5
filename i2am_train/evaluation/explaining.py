"""Sampling with the attention captured: try-on models by batches, other people's models by single pictures.

Networks and batch lie on the model's device. What comes back, and what it is judged by, is on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from i2am_train.attention.lookup import resolve_root, resolve_sites
from i2am_train.attention.maps import AttributionMaps
from i2am_train.attention.recipe import LayerId, find_layer
from i2am_train.attention.store import time_groups
from i2am_train.attention.trace import trace
from i2am_train.config.evaluation import AttributionConfig
from i2am_train.config.models import SamplingConfig
from i2am_train.data.dataset import TryOnBatch, batch_on
from i2am_train.data.pictures import Image, Mask, fit_mask
from i2am_train.errors import DataError
from i2am_train.evaluation.explanation import TO_GENERATED, TO_REFERENCE, Explanation
from i2am_train.losses.attention import attention_centers
from i2am_train.metrics.attention import (
    attention_entropy,
    center_spread,
    correspondence_error,
    imacs,
    imacs_column,
    pck,
    spread_ratio,
    target_on_grid,
)
from i2am_train.models.sampling import SamplingStep, encoded_conditions, sample_conditioned
from i2am_train.models.traceable import Request, TraceableModel
from i2am_train.models.tryon import Conditions, TryOnModel
from i2am_train.models.watch import Watch
from i2am_train.ops.grids import mask_on_grid, threshold
from i2am_train.ops.numerics import to_uint8
from i2am_train.seeds import seed_for
from i2am_train.types import GridSize

IMAGES = ("garment", "agnostic", "densepose", "person")
MASKS = ("garment", "inpaint", "warped_garment")
"""What an explanation keeps of a try-on sample."""


# ---- try-on --------------------------------------------------------------------------------------


def explain_batch(
    model: TryOnModel,
    batch: TryOnBatch,
    sampling: SamplingConfig,
    attribution: AttributionConfig,
    *,
    matrix_layers: Sequence[LayerId] | None = (),
    on_step: Callable[[SamplingStep], None] | None = None,
) -> list[Explanation]:
    """Samples a batch and scores the attention of that very pass; one explanation per sample, in their order.

    Score matrices are kept of ``attribution.layer`` and of ``matrix_layers`` (None: of every layer); ``on_step`` is
    the sampler's.

    Raises:
        NotFiniteError: images or attention became NaN or infinite; the message says where, and of which samples.
    """
    with trace(
        model,
        layers=attribution.layers,
        matrix_layers=None if matrix_layers is None else [attribution.judged_layer, *matrix_layers],
        generated_mask=batch["inpaint_mask"] if attribution.inpaint_queries else None,
    ) as attention:
        generated = sample_batch(model, batch, sampling, on_step)
    return _of_samples(batch_on(batch, "cpu"), generated, attention.maps(), attribution)


def sample_batch(
    model: TryOnModel,
    batch: TryOnBatch,
    sampling: SamplingConfig,
    on_step: Callable[[SamplingStep], None] | None = None,
    conditions: Conditions | None = None,
) -> Float[Tensor, "batch 3 height width"]:
    """Images of a batch in [-1, 1]; each sample's noise is drawn from its own seed.

    ``conditions``, where they are given, stand in for the pictures that they were encoded from.
    """
    if conditions is None:
        conditions = encoded_conditions(model, batch["garment"], batch["agnostic"], batch["densepose"])
    return sample_conditioned(
        model,
        conditions,
        seeds=[seed_for(sampling.seed, "sampling", int(index)) for index in batch["index"]],
        steps=sampling.steps,
        guidance=sampling.guidance,
        sampler=sampling.sampler,
        precision=sampling.precision,
        cuda_graphs=sampling.cuda_graphs,
        names=batch["name"],
        on_step=on_step,
    )


def _of_samples(
    batch: TryOnBatch,
    generated: Float[Tensor, "batch 3 height width"],
    maps: AttributionMaps,
    attribution: AttributionConfig,
) -> list[Explanation]:
    scores = attention_scores(maps, batch, attribution)
    tensors: dict[str, Tensor] = {**batch, "generated": generated}  # type: ignore[dict-item]
    images = {name: to_pictures(tensors[name]) for name in (*IMAGES, "generated")}
    masks = {name: tensors[f"{name}_mask"].numpy() for name in MASKS}
    truth = batch["correspondence"].numpy()
    return [
        Explanation(
            name=name,
            inputs={"person": name, "garment": batch["garment_name"][row]},
            index=int(batch["index"][row]),
            paired=bool(batch["paired"][row]),
            images={key: stack[row] for key, stack in images.items()},
            masks={key: stack[row] for key, stack in masks.items()},
            correspondence=truth[row] if np.isfinite(truth[row]).any() else None,
            maps=AttributionMaps(maps.store.sample(row)),
            layer=maps.store.layer(attribution.judged_layer).layer,
            scores={key: value_or_none(float(column[row])) for key, column in scores.items()},
            delta=attribution.delta,
            weighting=attribution.weighting,
            time_groups=attribution.time_groups,
        )
        for row, name in enumerate(batch["name"])
    ]


def to_pictures(images: Float[Tensor, "batch 3 height width"]) -> Image:
    """Images in [-1, 1] as uint8 ``[batch, height, width, 3]``.

    >>> to_pictures(torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1)).tolist()
    [[[[0, 128, 255]]]]
    """
    return to_uint8(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def attention_scores(
    maps: AttributionMaps, batch: TryOnBatch, attribution: AttributionConfig
) -> dict[str, Float[Tensor, " batch"]]:
    """Every attention metric of each sample; NaN where a sample has no value (empty mask, no truth), and nowhere else.

    Args:
        maps: of the batch, with the score matrix of ``attribution.layer``.
        batch: with the masks and the truth, on the CPU.
        attribution: layer, weighting, thresholds and penalties.

    Raises:
        NotFiniteError: the attention itself is NaN or infinite.
    """
    record, weights = maps.store.layer(attribution.judged_layer), maps.scores(attribution.judged_layer)
    grid, reference_grid = record.generated_grid, record.grid(TO_REFERENCE)
    centers = attention_centers(weights.reshape(*weights.shape[:2], *reference_grid))
    size = GridSize(*batch["inpaint_mask"].shape[-2:])
    on_generated, on_reference = (
        maps.unified(direction, attribution.weighting).on_picture(size).values
        for direction in (TO_GENERATED, TO_REFERENCE)
    )
    watch = Watch(batch["name"])
    watch.see(weights, f"The attention of layer {record.layer}")
    watch.see(centers, f"The attention centres of layer {record.layer}")
    watch.see(on_generated, "The map on the generated image, over all layers and steps,")
    watch.see(on_reference, "The map on the reference, over all layers and steps,")
    watch.check()
    warped = batch["warped_garment_mask"]
    target = target_on_grid(batch["correspondence"], warped, grid, reference_grid)
    patches = worn_patches(warped, batch["inpaint_mask"], grid)
    return {
        **_imacs_table("imacs_g", on_generated, batch["inpaint_mask"], attribution),
        **_imacs_table("imacs_r", on_reference, batch["garment_mask"], attribution),
        "correspondence_error": correspondence_error(centers, target),
        "pck_1": pck(centers, target, 1.0),
        "pck_2": pck(centers, target, 2.0),
        "center_spread": center_spread(centers, patches),
        "spread_ratio": spread_ratio(centers, target),
        "attention_entropy": attention_entropy(weights, patches),
    }


def worn_patches(
    worn: Bool[Tensor, "batch height width"] | None, painted: Bool[Tensor, "batch height width"], grid: GridSize
) -> Bool[Tensor, "batch generated"]:
    """Generated patches that lie on the garment: where it is known to be worn, else the region that is painted.

    >>> worn, painted = torch.tensor([[[True, False]], [[False, False]]]), torch.ones(2, 1, 2, dtype=torch.bool)
    >>> worn_patches(worn, painted, GridSize(1, 2)).tolist()  # of the second sample nothing is known
    [[True, False], [True, True]]
    """
    if worn is None:
        return mask_on_grid(painted, grid)
    known = worn.flatten(1).any(dim=1)[:, None, None]
    return mask_on_grid(torch.where(known, worn, painted), grid)


def _imacs_table(name: str, heat_map: Tensor, mask: Tensor, options: AttributionConfig) -> dict[str, Tensor]:
    """IMACS at every threshold and penalty, from one map; first of all at the options' own ones."""
    penalties = list(dict.fromkeys([options.penalty, *options.penalties]))
    table = {
        imacs_column(name, delta, penalty): values
        for delta in dict.fromkeys([options.delta, *options.deltas])
        for penalty, values in zip(penalties, imacs(threshold(heat_map, delta), mask, penalties), strict=True)
    }
    return {name: table[imacs_column(name, options.delta, options.penalty)], **table}


def value_or_none(score: float) -> float | None:
    """The score, or None in place of NaN: the sample has no value (empty mask, no truth, no partner).

    Faults do not come here: maps and images are checked to be numbers before they are scored.

    >>> value_or_none(0.5), value_or_none(math.nan)
    (0.5, None)
    """
    return None if math.isnan(score) else score


# ---- other people's models -----------------------------------------------------------------------


def explain_picture(
    model: TraceableModel,
    request: Request,
    attribution: AttributionConfig,
    *,
    name: str = "picture",
    reference_mask: Mask | None = None,
    matrix_layers: Sequence[LayerId] | None = (),
) -> Explanation:
    """Makes one picture and scores its attention.

    Args:
        model: loaded.
        request: what it is asked for.
        attribution: layers by number are those of `layer_numbers`.
        name: of the explanation.
        reference_mask: the region that counts of the reference, as large as it.
        matrix_layers: whose score matrices are kept beside that of ``attribution.layer``; None: of every layer.

    Raises:
        CaptureError: the model does not fit its recipe, or a layer does not exist.
        ConfigError: the size does not fit, or there are fewer steps than time groups.
        DataError: ``reference_mask`` is given for tokens without a place in the picture.
    """
    model.check_size(request.size)
    time_groups(request.steps, attribution.time_groups)
    sites = resolve_sites(resolve_root(model.target, model.recipe), model.recipe)
    names = list(dict.fromkeys(site.layer for site in sites))
    chosen = [find_layer(layer, names) for layer in attribution.layers or names]
    layer = find_layer(attribution.judged_layer, chosen, names)
    kept = None if matrix_layers is None else [find_layer(one, chosen, names) for one in matrix_layers]
    mask = None if request.mask is None else fit_mask(request.mask, request.size, model.fit)
    queries = mask if attribution.inpaint_queries else None
    with trace(
        model.target,
        model.recipe,
        layers=chosen,
        matrix_layers=None if kept is None else [layer, *kept],
        generated_mask=None if queries is None else torch.from_numpy(queries)[None],
    ) as attention:
        generated = model.make(request)
    masks = {"inpaint": mask, "reference": reference_mask}
    explanation = Explanation(
        name=name,
        images={"generated": generated, "reference": request.reference},
        masks={key: value for key, value in masks.items() if value is not None},
        maps=attention.maps(),
        layer=layer,
        delta=attribution.delta,
        weighting=attribution.weighting,
        time_groups=attribution.time_groups,
    )
    return replace(explanation, scores=_picture_scores(explanation, attribution))


def _picture_scores(explanation: Explanation, attribution: AttributionConfig) -> dict[str, float | None]:
    """IMACS of each direction that has a mask, at every threshold and penalty."""
    if "reference" in explanation.masks and TO_REFERENCE not in explanation.directions:
        raise DataError(
            "reference_mask= is given, and this model's reference tokens have no place in the "
            "reference picture, so there is no map to score. Leave it out."
        )
    sides = {
        "imacs_g": (TO_GENERATED, explanation.mask(TO_GENERATED)),
        "imacs_r": (TO_REFERENCE, explanation.seen_mask()),
    }
    scores: dict[str, Tensor] = {}
    for name, (direction, mask) in sides.items():
        if mask is not None:
            unified = explanation.maps.unified(direction, attribution.weighting)
            heat = unified.on_picture(GridSize(*mask.shape)).values
            scores |= _imacs_table(name, heat, torch.from_numpy(mask)[None], attribution)
    return {name: value_or_none(float(value[0])) for name, value in scores.items()}
