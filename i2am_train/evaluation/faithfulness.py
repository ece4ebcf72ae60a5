"""Whether maps tell what a model uses: images are made again, from the same noise, of a reference that was changed.

The questions, and what is computed of the images, stand in :mod:`i2am_train.metrics.faithfulness`. Any model that
can be traced can be asked: a :class:`Remake` is all that is needed of it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from i2am_train.attention.lookup import choose_sites, chosen_recipe, resolve_root, resolve_sites
from i2am_train.attention.maps import AttributionMaps
from i2am_train.attention.recipe import LayerId, Recipe
from i2am_train.attention.trace import trace
from i2am_train.attention.uniform import uniform_attention
from i2am_train.config.evaluation import AttributionConfig, FaithfulnessConfig
from i2am_train.config.models import SamplingConfig
from i2am_train.data.dataset import TryOnBatch, batch_rows
from i2am_train.errors import CaptureError
from i2am_train.evaluation.explaining import sample_batch, value_or_none
from i2am_train.evaluation.explanation import TO_REFERENCE
from i2am_train.metrics.attention import target_on_grid
from i2am_train.metrics.faithfulness import (
    SAMPLE,
    attention_to_parts,
    central_importance,
    curve_area,
    garment_patches,
    image_change,
    patch_change,
    quarters,
    random_importance,
    ranked_patches,
    where_correlation,
    without_patches,
)
from i2am_train.models.tryon import TryOnModel
from i2am_train.ops.grids import mask_on_grid, resize_maps
from i2am_train.ops.numerics import to_unit
from i2am_train.seeds import seed_for
from i2am_train.types import GridSize

_Images = Float[Tensor, "batch 3 height width"]


@dataclass(frozen=True, kw_only=True)
class Remake:
    """A batch of images that can be made again from the same noise. Tensors are on the CPU, pictures in [0, 1]."""

    target: Any
    """The model, as `trace` takes it."""
    recipe: Recipe | None
    """None: the model's own."""
    names: Sequence[str]
    indices: Sequence[int]
    """Of the samples; random rankings are drawn by them."""
    reference: Float[Tensor, "batch 3 height width"]
    garment: Bool[Tensor, "batch height width"]
    """What counts of the reference."""
    mask: Bool[Tensor, "batch height width"]
    """Where the generated image is compared."""
    make: Callable[[Tensor], Tensor]
    """Images of other reference pictures; the same images for the same pictures."""
    correspondence: Float[Tensor, "batch height width 2"] | None = None
    """The true reference position of each pixel of the generated image, where the data knows it."""
    worn: Bool[Tensor, "batch height width"] | None = None
    """Where the generated image shows the garment, where the data knows it."""


def remake_of(model: TryOnModel, batch: TryOnBatch, sampling: SamplingConfig) -> Remake:
    """A try-on batch, whose tensors lie on the model's device."""

    def make(reference: Tensor) -> Tensor:
        garment = reference.to(model.device) * 2 - 1
        return to_unit(sample_batch(model, {**batch, "garment": garment}, sampling)).cpu()

    return Remake(
        target=model,
        recipe=None,
        names=batch["name"],
        indices=[int(index) for index in batch["index"]],
        reference=to_unit(batch["garment"]).cpu(),
        garment=batch["garment_mask"].cpu(),
        mask=batch["inpaint_mask"].cpu(),
        make=make,
        correspondence=batch["correspondence"].cpu(),
        worn=batch["warped_garment_mask"].cpu(),
    )


def runs_of(options: FaithfulnessConfig, layers: int) -> int:
    """How often each image is made if the use of so many layers is asked, where the truth is known.

    >>> runs_of(FaithfulnessConfig(shares=[0.25], random_draws=2), layers=9)
    23
    """
    original, without_choice, quarters_of_garment = 1, layers + (layers > 1), 4
    deletions, insertions = 4 + options.random_draws, 2
    return original + without_choice + quarters_of_garment + len(options.shares) * (deletions + insertions)


def layers_asked(
    target: Any, recipe: Recipe | None, layers: Sequence[LayerId] | None, *others: Sequence[LayerId] | None
) -> list[str]:
    """Names of a model's layers, in its order: those of ``layers`` and of ``others``; all where one of them is None.

    Raises:
        CaptureError: a layer does not exist.
    """
    chosen = chosen_recipe(target, recipe)
    sites = resolve_sites(resolve_root(target, chosen), chosen)
    asked = [layers, *others]
    named = {site.layer for some in asked for site in (sites if some is None else choose_sites(sites, some))}
    return [site.layer for site in sites if site.layer in named]


def check_faithfulness(
    target: Any, recipe: Recipe | None, options: FaithfulnessConfig, attribution: AttributionConfig
) -> None:
    """Fails as measuring would, before an image is made.

    Raises:
        CaptureError: a layer does not exist, or the model has no reference patches.
    """
    names = layers_asked(target, recipe, options.layers, attribution.layers)
    chosen = chosen_recipe(target, recipe)
    sites = resolve_sites(resolve_root(target, chosen), chosen)
    known = [site.site.reference.grid for site in sites if site.layer in names]
    # "latent": a grid that is known when the model runs.
    _check_grids({None if grid is None else GridSize(*grid) for grid in known if not isinstance(grid, str)})


def faithfulness(
    remake: Remake,
    options: FaithfulnessConfig,
    attribution: AttributionConfig | None = None,
    on_run: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """A row of scores for each sample; None where it has no value (an empty mask, no truth).

    Args:
        remake: the batch.
        options: layers whose use is measured, shares, what stands in the place of what is deleted.
        attribution: of the map: layers, weighting, and whether it averages over the mask's positions only.
        on_run: called after each time that the images were made.

    Raises:
        CaptureError: the model has no reference patches, or a layer does not exist.
        NotFiniteError: images or attention became NaN or infinite.
    """
    attribution = attribution or AttributionConfig()
    remake = counted(remake, on_run)
    used = layers_asked(remake.target, remake.recipe, options.layers)
    captured = layers_asked(remake.target, remake.recipe, attribution.layers, used)
    with trace(
        remake.target,
        remake.recipe,
        layers=captured,
        matrix_layers=None,
        generated_mask=remake.mask if attribution.inpaint_queries else None,
        byte_budget=attribution.byte_budget,
    ) as attention:
        image = remake.make(remake.reference)
    maps = attention.maps()
    truth = _truth(remake, maps)
    columns = {f"use/{name}": layer_use(remake, image, [name]) for name in used}
    if len(used) > 1:
        columns["use/all"] = layer_use(remake, image, used)
    columns |= {f"where/{name}": values for name, values in where(remake, image, maps, truth).items()}
    columns |= _deletion(remake, image, maps, truth, options, attribution)
    return sample_rows(remake, columns)


def sample_rows(remake: Remake, columns: Mapping[str, Float[Tensor, " batch"]]) -> list[dict[str, Any]]:
    """Columns of scores as a row for each sample, ready for JSON; None in the place of NaN."""
    return [
        {"index": index, "name": name, **{key: value_or_none(float(values[row])) for key, values in columns.items()}}
        for row, (index, name) in enumerate(zip(remake.indices, remake.names, strict=True))
    ]


def layer_use(
    remake: Remake, image: _Images, layers: Sequence[LayerId], heads: Sequence[int] | None = None
) -> Float[Tensor, " batch"]:
    """How much the image changes inside the mask if these layers (or heads of them) may not choose where they look.

    ``image`` is what was made of the reference as it is.
    """
    with uniform_attention(remake.target, remake.recipe, layers=layers, heads=heads):
        return image_change(image, remake.make(remake.reference), remake.mask)


def counted(remake: Remake, on_run: Callable[[], None]) -> Remake:
    """The same, with a function that is called after each time that the images were made."""

    def make(reference: Tensor) -> Tensor:
        images = remake.make(reference)
        on_run()
        return images

    return replace(remake, make=make)


def reference_grid(maps: AttributionMaps) -> GridSize:
    """The one grid of the reference's patches.

    Raises:
        CaptureError: layers differ in it, or there are too few patches to delete one after the other.
    """
    grids = {record.reference_grid for record in maps.store.layers}
    _check_grids(grids)
    (grid,) = grids
    assert grid is not None, "just checked"
    return grid


def _check_grids(grids: Set[GridSize | None]) -> None:
    """Raises CaptureError unless all known grids are one, of enough patches."""
    if len(grids) > 1 or any(grid is None or grid.tokens < 4 for grid in grids):
        found = ", ".join(sorted("none" if one is None else str(one) for one in grids))
        raise CaptureError(
            f"The reference of this model has no patches that could be deleted one after the other (grids: {found}). "
            "Faithfulness needs one grid of at least 4 patches, the same in all layers; pooled vectors and words have "
            "no place in the picture. Choose layers=[...] and attribution.layers=[...] of one grid, or another model."
        )


def where(
    remake: Remake,
    image: _Images,
    maps: AttributionMaps,
    truth: Float[Tensor, "batch generated reference"] | None = None,
) -> dict[str, Float[Tensor, " batch"]]:
    """Whether the image changes where the attention to a whitened quarter of the garment is, by layer.

    Also of all layers together (``all``) where there are several, and of the ``truth`` where it is given. The images
    are made four times. ``maps`` need the score matrices of their layers.
    """
    grid, finest = reference_grid(maps), _finest_grid(maps)
    parts = quarters(garment_patches(remake.garment, grid), grid)
    others = [remake.make(without_patches(remake.reference, part, grid, fill="white")) for part in parts.unbind(1)]

    def correlation(attention: Float[Tensor, "batch part generated"], on: GridSize) -> Float[Tensor, " batch"]:
        changes = torch.stack([patch_change(image, other, on) for other in others], dim=1)
        return where_correlation(attention, changes, mask_on_grid(remake.mask, on))

    found: dict[str, Tensor] = {}
    together = []
    for record in maps.store.layers:
        attention = attention_to_parts(maps.scores(record.layer), parts)
        found[record.layer] = correlation(attention, record.generated_grid)
        on_grid = attention.reshape(*attention.shape[:2], *record.generated_grid)
        together.append(resize_maps(on_grid, finest).flatten(2))
    if len(together) > 1:
        found["all"] = correlation(torch.stack(together).mean(dim=0), finest)
    if truth is not None:
        found["truth"] = correlation(attention_to_parts(truth, parts), finest)
    return found


def _truth(remake: Remake, maps: AttributionMaps) -> Float[Tensor, "batch generated reference"] | None:
    """What attention on the finest grid would be that looks at the true position and nowhere else; zeros where there
    is none, None where the data knows none."""
    if remake.correspondence is None or remake.worn is None:
        return None
    grid = reference_grid(maps)
    target = target_on_grid(remake.correspondence, remake.worn, _finest_grid(maps), grid)
    known = target.isfinite().all(dim=-1)
    y, x = torch.where(known[..., None], target, 0.0).round().long().unbind(dim=-1)
    at = y.clamp(0, grid.height - 1) * grid.width + x.clamp(0, grid.width - 1)
    return torch.nn.functional.one_hot(at, grid.tokens) * known[..., None].float()


def _finest_grid(maps: AttributionMaps) -> GridSize:
    return max((record.generated_grid for record in maps.store.layers), key=lambda grid: grid.tokens)


def _deletion(
    remake: Remake,
    image: _Images,
    maps: AttributionMaps,
    truth: Float[Tensor, "batch generated reference"] | None,
    options: FaithfulnessConfig,
    attribution: AttributionConfig,
) -> dict[str, Float[Tensor, " batch"]]:
    """The change of the image when the highest patches of a ranking go, by ranking and share, and the areas."""
    grid = reference_grid(maps)
    candidates = garment_patches(remake.garment, grid)
    chosen = maps if attribution.layers is None else maps.select(attribution.layers)
    importance = chosen.unified(TO_REFERENCE, attribution.weighting).values.flatten(1)
    rankings = {"top": importance, "bottom": -importance, "middle": central_importance(candidates, grid)}
    for draw in range(options.random_draws):
        seeds = [seed_for(0, "faithfulness", index, draw) for index in remake.indices]
        rankings[f"random{draw}"] = random_importance(seeds, grid.tokens)
    if truth is not None:
        rankings["truth"] = truth.sum(dim=1)

    def change_without(patches: Bool[Tensor, "batch reference"]) -> Tensor:
        picture = without_patches(remake.reference, patches, grid, fill=options.fill, garment=remake.garment)
        return image_change(image, remake.make(picture), remake.mask)

    def curve(values: Tensor, *, keep: bool = False) -> Float[Tensor, "batch share"]:
        selected = [ranked_patches(values, candidates, share) for share in options.shares]
        return torch.stack([change_without(candidates & ~one if keep else one) for one in selected], dim=1)

    curves = {name: curve(values) for name, values in rankings.items()}
    if truth is not None:  # a sample without it has no ranking by it
        known = rankings["truth"].any(dim=1, keepdim=True)
        curves["truth"] = torch.where(known, curves["truth"], torch.nan)
    chance = [f"random{draw}" for draw in range(options.random_draws)]
    curves["random"] = torch.stack([curves.pop(name) for name in chance]).mean(dim=0)
    areas = {name: curve_area(options.shares, values) for name, values in curves.items()}
    columns = {f"deletion/{name}": area for name, area in areas.items()}
    columns["deletion/score"] = areas["top"] - areas["bottom"]
    for at, share in enumerate(options.shares):
        columns |= {f"deletion/{name}@{share:g}": values[:, at] for name, values in curves.items()}
    for name, values in (("top", rankings["top"]), ("random", rankings[chance[0]])):
        columns |= {
            f"insertion/{name}@{share:g}": kept
            for share, kept in zip(options.shares, curve(values, keep=True).unbind(1), strict=True)
        }
    return columns


def judged_faithfulness(
    model: TryOnModel,
    batch: TryOnBatch,
    sampling: SamplingConfig,
    attribution: AttributionConfig,
    options: FaithfulnessConfig,
    judged: Container[int],
) -> dict[int, dict[str, float | None]]:
    """Scores of those samples of a batch whose index is among the ``judged``, by index.

    Beside those of :func:`faithfulness` there are the figures that tables show (``metrics.registry``): ``use`` and
    ``where`` of the layer ``attribution.layer``, ``where_all`` of all layers together, ``deletion``.
    """
    chosen = [row for row, index in enumerate(batch["index"].tolist()) if index in judged]
    if not chosen:
        return {}
    (layer,) = layers_asked(model, None, [attribution.layer])
    if options.layers is not None:
        options = replace(options, layers=[layer, *options.layers])
    rows = faithfulness(remake_of(model, batch_rows(batch, chosen), sampling), options, attribution)
    shown = {"use": f"use/{layer}", "where": f"where/{layer}", "where_all": "where/all", "deletion": "deletion/score"}
    return {
        row["index"]: {
            **{name: row.get(column) for name, column in shown.items()},
            **{name: value for name, value in row.items() if name not in SAMPLE},
        }
        for row in rows
    }
