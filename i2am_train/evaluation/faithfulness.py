"""Whether maps tell what a model uses: images are made again, from the same noise, of a reference that was changed.

The questions, and what is computed of the images, stand in :mod:`i2am_train.metrics.faithfulness`. Any model that
can be traced can be asked: a :class:`Remake` is all that is needed of it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from i2am_train.attention.hooks import heads_of
from i2am_train.attention.lookup import choose_sites, chosen_recipe, resolve_root, resolve_sites
from i2am_train.attention.maps import AttributionMaps, patch_indices
from i2am_train.attention.recipe import LayerId, Recipe
from i2am_train.attention.store import Rollup, time_groups
from i2am_train.attention.trace import trace
from i2am_train.attention.uniform import uniform_attention
from i2am_train.config.evaluation import AttributionConfig, FaithfulnessConfig
from i2am_train.config.models import SamplingConfig
from i2am_train.config.options import OptionError
from i2am_train.data.dataset import TryOnBatch
from i2am_train.errors import CaptureError
from i2am_train.evaluation.explanation import TO_REFERENCE
from i2am_train.evaluation.remaking import Remake, batch_rows, counted, remake_of, sample_rows
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
from i2am_train.metrics.registry import image_pair_score
from i2am_train.models.tryon import TryOnModel
from i2am_train.ops.grids import mask_on_grid, resize_maps, spread_patches
from i2am_train.seeds import seed_for
from i2am_train.types import Backend, Direction, GridSize, PerceptualNetwork

FEWEST_PATCHES = 4
"""Of the reference: fewer have no order and no quarters."""
_Images = Float[Tensor, "batch 3 height width"]
_SENSITIVE = frozenset(("gradient", "gradient_attention"))


def runs_of(options: FaithfulnessConfig, layers: int) -> int:
    """How often each image is made if the use of so many layers is asked, where the truth is known.

    >>> runs_of(FaithfulnessConfig(shares=[0.25], random_draws=2, controls=["random"]), layers=9)
    21
    """
    original, without_choice, quarters_of_garment = 1, layers + (layers > 1), 4
    controls = set(options.controls)
    chance = options.random_draws if "random" in controls else 0
    curves = 2 + chance + len(controls - {"random"}) + 1 + (chance > 0)  # deletions, and insertions
    chosen = options.generated_patches
    patches = chosen if isinstance(chosen, int) else len(chosen)
    sensitivity = not controls.isdisjoint(_SENSITIVE)
    return original + without_choice + quarters_of_garment + sensitivity + len(options.shares) * (curves + 3 * patches)


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
    target: Any, recipe: Recipe | None, options: FaithfulnessConfig, attribution: AttributionConfig, steps: int
) -> None:
    """Fails as measuring would, before an image is made.

    Raises:
        CaptureError: a layer does not exist, or the model has no reference patches.
        ConfigError: there is no such head or group of steps.
        WeightsMissingError: the perceptual network is not on this machine.
    """
    if options.generated_patches:
        layers_asked(target, recipe, [attribution.judged_layer])
    names = layers_asked(target, recipe, options.layers, attribution.layers)
    chosen = chosen_recipe(target, recipe)
    sites = resolve_sites(resolve_root(target, chosen), chosen)
    known = [site.site.reference.grid for site in sites if site.layer in names]
    # "latent": a grid that is known when the model runs.
    _check_grids({None if grid is None else GridSize(*grid) for grid in known if not isinstance(grid, str)})
    if options.perceptual is not None:
        image_pair_score(options.perceptual)
    groups = time_groups(steps, attribution.time_groups) if options.time_group is not None else ()
    if options.time_group is not None and options.time_group >= len(groups):
        raise OptionError("time_group", options.time_group, f"less than attribution.time_groups={len(groups)}")
    if options.head is not None:
        of_map = layers_asked(target, recipe, attribution.layers)
        counts = {heads_of(site) for site in sites if site.layer in of_map and site.site.via is Backend.PROJECTIONS}
        if len(counts) > 1 or options.head >= min(counts, default=options.head + 1):
            found = " or ".join(map(str, sorted(counts)))
            raise OptionError("head", options.head, f"less than {found}, the heads of each of the map's layers (equal)")


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
    alone = [attribution.judged_layer] if options.generated_patches else []
    captured = layers_asked(remake.target, remake.recipe, attribution.layers, used, alone)
    with trace(
        remake.target,
        remake.recipe,
        layers=captured,
        matrix_layers=None,
        generated_mask=remake.mask if attribution.inpaint_queries else None,
    ) as attention:
        image = remake.make(remake.reference)
    maps = attention.maps()
    truth = _truth(remake, maps)
    columns = {f"use/{name}": layer_use(remake, image, [name]) for name in used}
    if len(used) > 1:
        columns["use/all"] = layer_use(remake, image, used)
    columns |= {f"where/{name}": values for name, values in where(remake, image, maps, truth).items()}
    importance = map_importance(maps, remake.mask, options, attribution)
    columns |= _deletion(remake, image, importance, reference_grid(maps), truth, options)
    if options.generated_patches:
        columns |= patch_deletion(remake, image, maps, attribution.judged_layer, options)
    return sample_rows(remake, columns)


def layer_use(
    remake: Remake, image: _Images, layers: Sequence[LayerId], heads: Sequence[int] | None = None
) -> Float[Tensor, " batch"]:
    """How much the image changes inside the mask if these layers (or heads of them) may not choose where they look.

    ``image`` is what was made of the reference as it is.
    """
    with uniform_attention(remake.target, remake.recipe, layers=layers, heads=heads):
        return image_change(image, remake.make(remake.reference), remake.mask)


def reference_grid(maps: AttributionMaps) -> GridSize:
    """The finest grid of the reference's patches among the layers: patches are deleted on it.

    Raises:
        CaptureError: a layer has no such grid, or too few patches to delete one after the other.
    """
    grids = {record.reference_grid for record in maps.store.layers}
    _check_grids(grids)
    return max((grid for grid in grids if grid is not None), key=lambda grid: grid.tokens)


def _check_grids(grids: Set[GridSize | None]) -> None:
    """Raises CaptureError unless all grids are known, and of enough patches."""
    if any(grid is None or grid.tokens < FEWEST_PATCHES for grid in grids):
        found = ", ".join(sorted("none" if one is None else str(one) for one in grids))
        raise CaptureError(
            f"The reference of this model has no patches that could be deleted one after the other (grids: {found}). "
            f"Faithfulness needs a grid of at least {FEWEST_PATCHES} patches in each layer; a pooled vector and words "
            "have no place in the picture. Choose layers=[...] and attribution.layers=[...] that have one, or another "
            "model."
        )


@dataclass(frozen=True, eq=False)
class WhiteQuarters:
    """What becomes of the images when a quarter of the garment is white, one quarter after the other."""

    remake: Remake
    image: _Images
    """Of the reference as it is."""
    grid: GridSize
    """Of the reference patches that make up the quarters."""
    parts: Bool[Tensor, "batch part reference"]
    others: Sequence[_Images]
    """Of the reference without each part."""

    @classmethod
    def made(cls, remake: Remake, image: _Images, grid: GridSize) -> Self:
        """Makes the images four times."""
        parts = quarters(garment_patches(remake.garment, grid), grid)
        without = [without_patches(remake.reference, part, grid, fill="white") for part in parts.unbind(1)]
        return cls(remake, image, grid, parts, [remake.make(one) for one in without])

    def parts_on(self, grid: GridSize) -> Bool[Tensor, "batch part reference"]:
        """The quarters on another grid of the reference."""
        if grid == self.grid:
            return self.parts
        cells = self.parts.reshape(*self.parts.shape[:2], *self.grid).float()
        pixels = F.interpolate(cells, self.remake.reference.shape[-2:], mode="nearest-exact").bool()
        return torch.stack([mask_on_grid(part, grid) for part in pixels.unbind(1)], dim=1)

    def correlation(self, attention: Float[Tensor, "batch part generated"], grid: GridSize) -> Float[Tensor, " batch"]:
        """Of the attention that goes to each quarter, on a grid of the generated image, with the image's change."""
        changes = torch.stack([patch_change(self.image, other, grid) for other in self.others], dim=1)
        return where_correlation(attention, changes, mask_on_grid(self.remake.mask, grid))


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
    finest = _finest_grid(maps)
    whitened = WhiteQuarters.made(remake, image, reference_grid(maps))
    found: dict[str, Tensor] = {}
    together = []
    for record in maps.store.layers:
        attention = attention_to_parts(maps.scores(record.layer), whitened.parts_on(record.grid(TO_REFERENCE)))
        found[record.layer] = whitened.correlation(attention, record.generated_grid)
        on_grid = attention.reshape(*attention.shape[:2], *record.generated_grid)
        together.append(resize_maps(on_grid, finest).flatten(2))
    if len(together) > 1:
        found["all"] = whitened.correlation(torch.stack(together).mean(dim=0), finest)
    if truth is not None:
        found["truth"] = whitened.correlation(attention_to_parts(truth, whitened.parts), finest)
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
    return F.one_hot(at, grid.tokens) * known[..., None].float()


def _finest_grid(maps: AttributionMaps) -> GridSize:
    return max((record.generated_grid for record in maps.store.layers), key=lambda grid: grid.tokens)


def map_importance(
    maps: AttributionMaps,
    mask: Bool[Tensor, "batch height width"],
    options: FaithfulnessConfig,
    attribution: AttributionConfig,
) -> Float[Tensor, "batch reference"]:
    """The map that is judged: a number for each reference patch, as the options choose layers, head, steps, direction.

    Towards the generated image (softmax over its positions) a patch's number is the share that goes into the mask,
    mean over the layers.

    Raises:
        ConfigError: there is no such head or group of steps.
    """
    chosen, grid = maps if attribution.layers is None else maps.select(attribution.layers), reference_grid(maps)
    if options.direction is Direction.REFERENCE_TO_GENERATED:
        shares = [
            torch.einsum(
                "bg,bgr->br",
                mask_on_grid(mask, record.generated_grid).float(),
                chosen.scores(record.layer, over="generated"),
            )
            for record in chosen.store.layers
        ]
        grids = [record.grid(TO_REFERENCE) for record in chosen.store.layers]
        on_grids = [resize_maps(one.reshape(-1, *own), grid) for one, own in zip(shares, grids, strict=True)]
        return torch.stack(on_grids).mean(dim=0).flatten(1)
    groups = None if options.time_group is None else attribution.time_groups
    rollup = Rollup(TO_REFERENCE, attribution.weighting)
    values = rollup.combine(chosen.store.layers, grid, groups=groups, heads=options.head is not None)
    if options.head is not None and options.head >= values.shape[2]:  # where heads are known by the calls alone
        raise OptionError("head", options.head, f"less than {values.shape[2]}, the heads of each of the map's layers")
    return values[:, options.time_group or 0, options.head or 0].flatten(1)


def _deletion(
    remake: Remake,
    image: _Images,
    importance: Float[Tensor, "batch reference"],
    grid: GridSize,
    truth: Float[Tensor, "batch generated reference"] | None,
    options: FaithfulnessConfig,
) -> dict[str, Float[Tensor, " batch"]]:
    """The change of the image when the highest patches of a ranking go, by ranking and share, and the areas."""
    candidates = garment_patches(remake.garment, grid)
    rankings, chance = _rankings(remake, importance, grid, truth, options), list[str]()
    if "random" in options.controls:
        for draw in range(options.random_draws):
            seeds = [seed_for(0, "faithfulness", index, draw) for index in remake.indices]
            rankings[f"random{draw}"] = random_importance(seeds, grid.tokens)
            chance.append(f"random{draw}")

    def measured(patches: Bool[Tensor, "batch reference"]) -> dict[str, Float[Tensor, " batch"]]:
        other = remake.make(_without(remake, patches, grid, options))
        found = {"": image_change(image, other, remake.mask)}
        if options.perceptual is not None:
            found[f"_{options.perceptual}"] = perceptual_change(image, other, remake.mask, options.perceptual)
        return found

    def curves_of(values: Tensor, *, keep: bool = False) -> dict[str, Float[Tensor, "batch share"]]:
        selected = [ranked_patches(values, candidates, share) for share in options.shares]
        found = [measured(candidates & ~one if keep else one) for one in selected]
        return {end: torch.stack([one[end] for one in found], dim=1) for end in found[0]}

    curves = {name: curves_of(values) for name, values in rankings.items()}
    if "truth" in curves:  # a sample without it has no ranking by it
        known = rankings["truth"].any(dim=1, keepdim=True)
        curves["truth"] = {end: torch.where(known, values, torch.nan) for end, values in curves["truth"].items()}
    kept = {name: curves_of(rankings[name], keep=True) for name in ("top", *chance[:1])}
    if chance:
        drawn = [curves.pop(name) for name in chance]
        curves["random"] = {end: torch.stack([one[end] for one in drawn]).mean(dim=0) for end in drawn[0]}
        kept["random"] = kept.pop(chance[0])
    columns: dict[str, Tensor] = {}
    for end in curves["top"]:
        columns |= _columns(f"deletion{end}", {name: of[end] for name, of in curves.items()}, options.shares)
        columns |= _columns(f"insertion{end}", {name: of[end] for name, of in kept.items()}, options.shares)
    return columns


def _columns(
    kind: str, curves: Mapping[str, Float[Tensor, "batch share"]], shares: Sequence[float]
) -> dict[str, Float[Tensor, " batch"]]:
    """Areas, the score where there are both ends of a map, and the points of curves."""
    areas = {name: curve_area(shares, values) for name, values in curves.items()}
    columns = {f"{kind}/{name}": area for name, area in areas.items()} if "bottom" in areas else {}
    if "bottom" in areas:
        columns[f"{kind}/score"] = areas["top"] - areas["bottom"]
    for at, share in enumerate(shares):
        columns |= {f"{kind}/{name}@{share:g}": values[:, at] for name, values in curves.items()}
    return columns


def _rankings(
    remake: Remake,
    importance: Float[Tensor, "batch reference"],
    grid: GridSize,
    truth: Float[Tensor, "batch generated reference"] | None,
    options: FaithfulnessConfig,
) -> dict[str, Float[Tensor, "batch reference"]]:
    """The map's, its reverse, and the controls that know something."""
    controls = options.controls
    rankings = {"top": importance, "bottom": -importance}
    if "middle" in controls:
        rankings["middle"] = central_importance(garment_patches(remake.garment, grid), grid)
    if "truth" in controls and truth is not None:
        rankings["truth"] = truth.sum(dim=1)
    if remake.sensitivity is not None and not _SENSITIVE.isdisjoint(controls):
        sensitivity = remake.sensitivity()
        rankings |= {
            name: values
            for name, values in (("gradient", sensitivity), ("gradient_attention", sensitivity * importance))
            if name in controls
        }
    return rankings


def _without(
    remake: Remake, patches: Bool[Tensor, "batch reference"], grid: GridSize, options: FaithfulnessConfig
) -> _Images:
    return without_patches(remake.reference, patches, grid, fill=options.fill, garment=remake.garment)


def perceptual_change(
    image: _Images, other: _Images, mask: Bool[Tensor, "batch height width"], network: PerceptualNetwork
) -> Float[Tensor, " batch"]:
    """Learned distance of two images that differ inside a mask only; NaN where the mask is empty.

    The mean is over the whole image, so that values of different masks do not compare.
    """
    pasted = torch.where(mask[:, None], other, image)
    pair = [(one * 255).round().clamp(0, 255).to(torch.uint8) for one in (image, pasted)]
    return torch.where(mask.flatten(1).any(dim=1), image_pair_score(network)(*pair), torch.nan)


def patch_deletion(
    remake: Remake, image: _Images, maps: AttributionMaps, layer: LayerId, options: FaithfulnessConfig
) -> dict[str, Float[Tensor, " batch"]]:
    """The change at a generated patch when what it looks at goes: mean over the patches that are asked alone.

    Beside the highest of its attention in ``layer`` go, in their turn, its lowest, and random ones. A sample whose mask
    holds no cell of the layer's grid has no value, unless positions are given.
    """
    record, scores = maps.store.layer(layer), maps.scores(layer)
    grid, reference = record.generated_grid, record.grid(TO_REFERENCE)
    candidates = garment_patches(remake.garment, reference)
    asked = options.generated_patches
    if isinstance(asked, int):
        inside = mask_on_grid(remake.mask, grid)
        places = [patch_indices(spread_patches(one, grid, asked), grid) if one.any() else [] for one in inside]
    else:
        places = [patch_indices(asked, grid)] * len(image)
    most = max(map(len, places))
    seeds = [seed_for(0, "faithfulness", index, 0) for index in remake.indices]
    chance = random_importance(seeds, reference.tokens)
    rows = torch.arange(len(image))
    found: dict[str, list[Tensor]] = {"top": [], "bottom": [], "random": []}
    for number in range(most):
        # A sample with fewer patches is made along with the others, and left out of the mean.
        at = torch.tensor([of[number] if number < len(of) else 0 for of in places])
        known = torch.tensor([number < len(of) for of in places])
        looks = scores[rows, at]
        for name, values in (("top", looks), ("bottom", -looks), ("random", chance)):
            points = []
            for share in options.shares:
                gone = ranked_patches(values, candidates, share)
                other = remake.make(_without(remake, gone, reference, options))
                points.append(torch.where(known, patch_change(image, other, grid)[rows, at], torch.nan))
            found[name].append(torch.stack(points, dim=1))
    if not most:
        return {}
    return _columns("patch", {name: torch.stack(of).nanmean(dim=0) for name, of in found.items()}, options.shares)


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
    (layer,) = layers_asked(model, None, [attribution.judged_layer])
    if options.layers is not None:
        options = replace(options, layers=[layer, *options.layers])
    rows = faithfulness(remake_of(model, batch_rows(batch, chosen), sampling), options, attribution)
    shown = {"use": f"use/{layer}", "where": f"where/{layer}", "where_all": "where/all", "deletion": "deletion/score"}
    shown["deletion_perceptual"] = f"deletion_{options.perceptual}/score"
    return {
        row["index"]: {
            **{name: row.get(column) for name, column in shown.items()},
            **{name: value for name, value in row.items() if name not in SAMPLE},
        }
        for row in rows
    }
