"""What is wrong with each layer and head of a model, measured: columns of figures by sample.

The figures stand in :mod:`i2am_train.metrics.diagnosis`, `faithfulness` and `attention`; none needs to know where the
attention should look. A model is asked through a :class:`~i2am_train.evaluation.remaking.Remake`. A *place* is a
layer's name, or ``name#head``; a column is called ``figure/place``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from i2am_train.attention.hooks import heads_of
from i2am_train.attention.lookup import chosen_recipe, resolve_root, resolve_sites
from i2am_train.attention.maps import AttributionMaps
from i2am_train.attention.recipe import Recipe
from i2am_train.attention.store import LayerRecord, time_groups
from i2am_train.attention.trace import trace
from i2am_train.config.evaluation import DiagnosisConfig
from i2am_train.errors import CaptureError
from i2am_train.evaluation.explaining import worn_patches
from i2am_train.evaluation.faithfulness import FEWEST_PATCHES, WhiteQuarters, layer_use, layers_asked, reference_grid
from i2am_train.evaluation.remaking import Remake, counted, sample_rows
from i2am_train.losses.attention import attention_centers
from i2am_train.metrics.attention import attention_entropy, correspondence_error, target_on_grid
from i2am_train.metrics.diagnosis import concordance, extent_ratio, order_violations, round_trip, sink_mass
from i2am_train.metrics.faithfulness import attention_to_parts, garment_patches
from i2am_train.ops.grids import resize_maps, unflatten
from i2am_train.types import GridSize

TIME_GROUPS = 5
"""Runs of sampling steps that sinks are told by; fewer where there are fewer steps."""

_Columns = dict[str, Float[Tensor, " batch"]]


def head_place(layer: str, head: int) -> str:
    """A head as a place of figures.

    >>> head_place("up_blocks.2.attentions.1", 3)
    'up_blocks.2.attentions.1#3'
    """
    return f"{layer}#{head}"


def layer_heads(target: Any, recipe: Recipe | None, options: DiagnosisConfig) -> dict[str, int]:
    """The layers that are asked, in the model's order, and how many heads each has.

    Raises:
        CaptureError: a layer does not exist, or the reference's tokens have no place in its picture.
    """
    chosen = chosen_recipe(target, recipe)
    sites = resolve_sites(resolve_root(target, chosen), chosen)
    names = layers_asked(target, recipe, options.layers)
    asked = [site for site in sites if site.layer in names]
    for site in asked:
        grid = site.site.reference.grid
        if grid is None or (not isinstance(grid, str) and GridSize(*grid).tokens < FEWEST_PATCHES):
            raise _no_patches(site.layer, grid)
    return {site.layer: heads_of(site) for site in asked}


def images_of(heads: Mapping[str, int], options: DiagnosisConfig) -> int:
    """How often each image is made, for layers with so many heads.

    >>> images_of({"a": 8, "b": 1}, DiagnosisConfig()), images_of({"a": 8, "b": 1}, DiagnosisConfig(heads=False))
    (15, 7)
    """
    original, quarters_of_garment = 1, 4
    single = sum(count for count in heads.values() if count > 1) if options.heads else 0
    return original + quarters_of_garment + len(heads) + single


def diagnosis(
    remake: Remake, options: DiagnosisConfig, on_run: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """A row of figures for each sample; None where it has no value (an empty mask, no truth).

    Args:
        remake: the batch.
        options: layers, and whether their heads are asked, too.
        on_run: called after each time that the images were made.

    Raises:
        CaptureError: the reference has no patches, a layer does not exist, or the attention is not finite.
        NotFiniteError: images became NaN or infinite.
    """
    remake = counted(remake, on_run)
    with trace(
        remake.target,
        remake.recipe,
        layers=layers_asked(remake.target, remake.recipe, options.layers),
        matrix_layers=None,
        matrix_heads=options.heads,
        generated_mask=remake.mask,
    ) as attention:
        image = remake.make(remake.reference)
    maps = attention.maps()
    places = list(_places(maps, options.heads))
    columns = {
        f"use/{place.name}": layer_use(
            remake, image, [place.layer.layer], heads=None if place.head is None else [place.head]
        )
        for place in places
    }
    whitened = WhiteQuarters.made(remake, image, reference_grid(maps))
    for place in places:
        columns |= {f"{figure}/{place.name}": values for figure, values in _figures(place, remake, whitened).items()}
    columns |= _agreement(places, columns, remake)
    columns |= _sinks(maps, places)
    return sample_rows(remake, columns)


@dataclass(frozen=True, eq=False)
class _Place:
    """A layer, or one of its heads: what it attended with, mean over steps (and heads)."""

    layer: LayerRecord
    head: int | None
    over_reference: Float[Tensor, "batch generated reference"]
    over_generated: Float[Tensor, "batch generated reference"]

    @property
    def name(self) -> str:
        return self.layer.layer if self.head is None else head_place(self.layer.layer, self.head)

    @property
    def reference_grid(self) -> GridSize:
        grid = self.layer.reference_grid
        assert grid is not None, "checked by _places"
        return grid

    @property
    def centers(self) -> Float[Tensor, "batch generated 2"]:
        """Of the attention, in reference patches."""
        return attention_centers(_on_grid(self.over_reference, self.reference_grid))

    def steps(self) -> Float[Tensor, "batch step reference"]:
        """Attention of each reference token by sampling step."""
        heads = self.layer.to_reference
        return heads.mean(dim=2) if self.head is None else heads[:, :, self.head]


def _on_grid(values: Tensor, grid: GridSize) -> Tensor:
    """Values with their last axis, the reference's tokens, in rows and columns."""
    return values.reshape(*values.shape[:-1], *grid)


def _places(maps: AttributionMaps, heads: bool) -> Iterator[_Place]:
    for record in maps.store.layers:
        if record.reference_grid is None or record.reference_grid.tokens < FEWEST_PATCHES:
            raise _no_patches(record.layer, record.reference_grid)
        single = range(record.heads) if heads and record.heads > 1 else ()
        for head in (None, *single):
            over = (maps.scores(record.layer, side, head) for side in ("reference", "generated"))
            yield _Place(record, head, *over)


def _no_patches(layer: str, grid: object) -> CaptureError:
    found = "tokens without a place in the picture (pooled vectors or words)" if grid is None else f"a grid of {grid}"
    return CaptureError(
        f"The reference of layer {layer} has {found}, and a diagnosis needs at least {FEWEST_PATCHES} patches: with "
        "fewer there is no order to be out of, and nothing that attention losses repair. Choose layers=[...] that "
        "attend to patches, or a model whose encoder gives them."
    )


def _figures(place: _Place, remake: Remake, whitened: WhiteQuarters) -> _Columns:
    """All that needs no further image."""
    generated, reference = place.layer.generated_grid, place.reference_grid
    worn = worn_patches(remake.worn, remake.mask, generated)
    centers, scores = place.centers, place.over_reference
    found = {
        "where": whitened.correlation(attention_to_parts(scores, whitened.parts_on(reference)), generated),
        "violations": order_violations(centers, worn, generated),
        "spread": extent_ratio(centers, worn, garment_patches(remake.garment, reference), reference),
        "entropy": attention_entropy(scores, worn),
        "round_trip": round_trip(scores, place.over_generated, worn, generated),
    }
    if remake.correspondence is not None and remake.worn is not None:
        target = target_on_grid(remake.correspondence, remake.worn, generated, reference)
        found["error"] = correspondence_error(centers, target)
    return found


def _agreement(places: list[_Place], columns: _Columns, remake: Remake) -> _Columns:
    """Concordance of each place's centres with those of the other layers, which count by their use."""
    finest = max((place.layer.generated_grid for place in places), key=lambda grid: grid.tokens)
    worn = worn_patches(remake.worn, remake.mask, finest)
    fields = {place.name: _field(place, finest) for place in places}
    layers = [place for place in places if place.head is None]
    found = {}
    for place in places:
        others = [other.name for other in layers if other.layer is not place.layer]
        if others:
            values = torch.stack([concordance(fields[place.name], fields[other], worn) for other in others])
            weights = torch.stack([columns[f"use/{other}"] for other in others])
            weights = torch.where(values.isfinite(), weights, 0.0)
            found[f"agreement/{place.name}"] = (values.nan_to_num() * weights).sum(dim=0) / weights.sum(dim=0)
    return found


def _field(place: _Place, finest: GridSize) -> Float[Tensor, "batch patch 2"]:
    """Centres as shares of the reference's height and width, on the finest generated grid."""
    shares = (place.centers + 0.5) / place.centers.new_tensor(place.reference_grid)
    on_grid = unflatten(shares, place.layer.generated_grid).movedim(-1, 1)
    return resize_maps(on_grid, finest).flatten(2).mT


def _sinks(maps: AttributionMaps, places: list[_Place]) -> _Columns:
    """The share of the sinks, mean over steps, and of layers by time: ``sinks@0`` is the noisiest run of steps."""
    found = {}
    groups = time_groups(maps.store.steps, min(TIME_GROUPS, maps.store.steps))
    for place in places:
        share = sink_mass(place.steps())
        found[f"sinks/{place.name}"] = share.mean(dim=1)
        if place.head is None:
            found |= {f"sinks@{at}/{place.name}": share[:, run].mean(dim=1) for at, run in enumerate(groups)}
    return found
