"""The explorer: one HTML file in which a reader asks captured attention, patch by patch.

The page holds numbers, not pictures of maps: per layer, time group and head the column means of
both directions, and the score matrices of as many layers as fit. Its script makes every map and
score from them, as `AttributionMaps` and `imacs` do. It needs no server and asks for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from i2am_train.attention.maps import AttributionMaps
from i2am_train.attention.recipe import paper_number
from i2am_train.attention.store import AttributionStore, LayerRecord, time_groups
from i2am_train.config.evaluation import AttributionConfig
from i2am_train.data.pictures import Image
from i2am_train.errors import ConfigError
from i2am_train.evaluation.explanation import TO_GENERATED, TO_REFERENCE, Explanation
from i2am_train.reporting.figures.arms import TEAR
from i2am_train.reporting.figures.canvas import OKABE_ITO, TRUTH_COLOR, arm_colors, heat_colormap
from i2am_train.reporting.figures.panels import short_name
from i2am_train.reporting.pages import as_base64, embedded_picture, page_environment
from i2am_train.types import GridSize

PAGE = "explorer.html"
"""What its file is called in a run folder."""

SIZE_LIMIT = 10_000_000
"""Bytes of the page per sample, all models together; score matrices take what the rest leaves.
Only the column means of very large models, or one very large matrix asked for, exceed it."""
_PAGE_ALLOWANCE = 100_000
"""Bytes kept free for markup, style and script."""
_LEVELS = 2**16 - 1
"""Steps between a map's minimum and maximum: each value is off by half a step at most."""

Json: TypeAlias = dict[str, Any]


def explorer_data(models: Mapping[str, Sequence[Explanation]], options: AttributionConfig) -> Json:
    """What the page's script reads, as plain values for JSON.

    Args:
        models: by the name that the page shows, explanations of the same samples in the order of the page.
            Reference, masks and truth are those of the first model. All samples have the same sizes.
        options: how the page opens (threshold, penalty, weighting, layer of single patches), and
            the number of time groups.

    Raises:
        ConfigError: the models' layers differ, so that they cannot be shown side by side, or there
            are fewer sampling steps than time groups.
        CaptureError: the layer of single patches was not captured with its matrices.
    """
    stores = [each.maps.store for made in models.values() for each in made]
    _check_comparable(stores)
    groups = time_groups(stores[0].steps, options.time_groups)
    data = _without_matrices(models, options, groups)
    if TO_REFERENCE in stores[0].directions:
        _add_matrices(data, models, _matrix_layers(stores[0], options, data))
    return data


def explorer_page(data: Json, making: Mapping[str, str]) -> str:
    """The page as HTML.

    Args:
        data: from ``explorer_data``.
        making: what the page says of its origin, text by term.
    """
    environment = page_environment()
    assert environment.loader is not None
    sources = {name: environment.loader.get_source(environment, f"explorer_{name}.js")[0] for name in ("maps", "page")}
    return environment.get_template("explorer.html.j2").render(
        data=data,
        making=making,
        scripts=sources,
        layer_choices=list(_layer_choices(data["layers"])),
        head_choices=[(str(head), f"Head {head}") for head in range(max(layer["heads"] for layer in data["layers"]))],
        time_choices=[(str(at), f"Group {at}, {group['label']}") for at, group in enumerate(data["groups"])],
        matrix_note=_matrix_note(data["layers"]),
    )


def _layer_choices(layers: Sequence[Json]) -> Iterator[tuple[str, str]]:
    """Value and text of each choice: all layers, those of one resolution, single layers."""
    yield "all", f"All {len(layers)} layers"
    by_grid: dict[GridSize, list[str]] = {}
    for layer in layers:
        by_grid.setdefault(GridSize(*layer["grids"]["generated"]), []).append(layer["key"])
    for grid, keys in by_grid.items():
        if len(keys) > 1:
            yield str(grid), f"{grid.height}×{grid.width}: layers {', '.join(keys)}"
    for layer in layers:
        grid = GridSize(*layer["grids"]["generated"])
        yield layer["key"], f"{layer['label']}, {grid.height}×{grid.width}"


def _matrix_note(layers: Sequence[Json]) -> str:
    """Which layers have maps of single patches, and why not all."""
    if not all(layer["grids"]["reference"] for layer in layers):
        return "This model has none: its reference tokens have no place in the reference picture."
    with_matrix = [layer["label"] for layer in layers if layer["matrix"]]
    if len(with_matrix) == len(layers):
        return "All layers have them here."
    return (
        f"Layers that have them here: {', '.join(with_matrix) or 'none'}; the others' were not kept, "
        f"or would take the page over {SIZE_LIMIT // 10**6} MB per sample."
    )


def _check_comparable(stores: Sequence[AttributionStore]) -> None:
    """One set of controls serves all captures, so their layers, grids, heads and steps agree."""
    shapes = {
        tuple((record.layer, record.heads, record.generated_grid, record.reference_grid) for record in store.layers)
        + (store.steps,)
        for store in stores
    }
    if len(shapes) > 1:
        raise ConfigError(
            "The checkpoints differ in their attention layers, heads, grids or sampling steps, so "
            "one page cannot show them side by side. Explain them one by one."
        )


def _without_matrices(
    models: Mapping[str, Sequence[Explanation]], options: AttributionConfig, groups: Sequence[slice]
) -> Json:
    """Everything that the script reads, but for the score matrices."""
    samples = next(iter(models.values()))
    store = samples[0].maps.store
    seen = [sample.seen_picture() for sample in samples]
    sizes = {"generated": tuple(samples[0].size), "reference": seen[0].shape[:2]}
    colors = arm_colors(models, start_arm="")
    alpha = heat_colormap()(np.arange(256))
    return {
        "sizes": {side: list(size) for side, size in sizes.items()},
        "aspect": min(width / height for height, width in sizes.values()),
        "notices": _notices([each.maps for made in models.values() for each in made]),
        "truth_known": any(sample.correspondence is not None for sample in samples),
        "palette": as_base64(np.round(alpha * 255).astype(np.uint8).tobytes()),
        "colors": {"truth": TRUTH_COLOR, "mask": OKABE_ITO[5], "models": list(colors.values())},
        "tear": TEAR,
        "options": {
            "delta": options.delta,
            "penalty": options.penalty,
            "weighting": options.weighting.value,
            "patch_layer": store.index(options.judged_layer),
        },
        "groups": [_group(group, store) for group in groups],
        "layers": [_layer(record) for record in store.layers],
        "models": list(models),
        "samples": [_sample(*pair) for pair in zip(samples, seen, strict=True)],
        "captures": [[_capture(explanation, groups) for explanation in made] for made in models.values()],
    }


def _notices(captures: Sequence[AttributionMaps]) -> list[str]:
    """What a reader must know before trusting the maps, each once."""
    notices = [mark for maps in captures for mark in maps.marks]
    notices += [
        f"{float(maps.mass().values.mean()):.0%} of the attention goes to the reference, the rest "
        "to the generated picture itself; the maps are of the part that goes to the reference."
        for maps in captures
        if maps.store.joint
    ]
    return list(dict.fromkeys(notices))


def _group(group: slice, store: AttributionStore) -> Json:
    """A time group: how many steps it holds, and its name."""
    first, last = store.timesteps[group.start], store.timesteps[group.stop - 1]
    times = "" if first is None or last is None else f" (t {first:g} to {last:g})"
    steps = f"{group.start}" if group.stop - group.start == 1 else f"{group.start}–{group.stop - 1}"
    return {"steps": group.stop - group.start, "label": f"step {steps}{times}"}


def _layer(record: LayerRecord) -> Json:
    number = paper_number(record.layer)
    return {
        "key": record.layer if number is None else str(number),
        "label": short_name(record.layer) if number is None else f"Layer {number}",
        "name": record.layer,
        "heads": record.heads,
        "grids": {
            "generated": list(record.generated_grid),
            "reference": None if record.reference_grid is None else list(record.reference_grid),
        },
        "matrix": False,
    }


def _sample(sample: Explanation, seen: Image) -> Json:
    """Reference, masks, and per layer which generated patches lie on the garment and where they belong: yx in
    reference patches, NaN where unknown."""
    on_reference, inpaint = sample.seen_mask(), sample.mask(TO_GENERATED)
    return {
        "heading": f"Sample {sample.index}" if sample.is_tryon else sample.name,
        "name": sample.name,
        "about": ", ".join(f"{kind} {name}" for kind, name in sample.inputs.items()),
        "picture": embedded_picture(seen),
        "masks": {
            side: None if mask is None else _packed_mask(mask)
            for side, mask in (("generated", inpaint), ("reference", on_reference))
        },
        "layers": [
            {
                "on_garment": _packed_mask(sample.patches_inside(record.generated_grid).numpy()),
                "target": _packed_floats(
                    sample.true_places(record.generated_grid, record.reference_grid or GridSize(1, 1))
                ),
            }
            for record in sample.maps.store.layers
        ],
    }


def _capture(explanation: Explanation, groups: Sequence[slice]) -> Json:
    """One model's image of one sample and its column means, ``[group, head]`` maps per layer."""
    return {
        "picture": embedded_picture(explanation.images["generated"]),
        "layers": [
            {
                "generated": _packed_maps(_group_means(record.to_generated, groups)),
                "reference": _packed_maps(_group_means(record.to_reference, groups)) if record.reference_grid else None,
            }
            for record in explanation.maps.store.layers
        ],
    }


def _group_means(vectors: Float[Tensor, "1 step head token"], groups: Sequence[slice]) -> Float[Tensor, "map token"]:
    return torch.stack([vectors[0, group].mean(dim=0) for group in groups]).flatten(0, 1)


def _matrix_layers(store: AttributionStore, options: AttributionConfig, data: Json) -> list[int]:
    """That of ``options`` in any case, then as many others as fit on the page, small to large."""
    models, samples = len(data["models"]), len(data["samples"])
    used = sum(_length(part) for part in (data["samples"], data["captures"])) / samples
    left = SIZE_LIMIT - _PAGE_ALLOWANCE - used
    captured = [index for index, record in enumerate(store.layers) if record.scores_over_reference is not None]
    first = store.index(options.judged_layer)
    chosen = {first}
    for index in sorted(captured, key=lambda at: (at != first, _scores(store.layers[at]))):
        left -= models * _packed_size(store.layers[index])
        if left < 0:
            break
        chosen.add(index)
    return sorted(chosen)


def _scores(record: LayerRecord) -> int:
    return record.generated_grid.tokens * record.grid(TO_REFERENCE).tokens


def _packed_size(record: LayerRecord) -> float:
    """Bytes of both matrices in base64: two per score, eight per map."""
    reference = record.grid(TO_REFERENCE).tokens
    maps = record.generated_grid.tokens + reference
    return (2 * _scores(record) * 2 + maps * 8) * 4 / 3


def _length(value: Any) -> int:
    """Characters of the texts in nested data, which are all but a few of its bytes."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_length, value.values()))
    return sum(map(_length, value)) if isinstance(value, list) else 0


def _add_matrices(data: Json, models: Mapping[str, Sequence[Explanation]], layers: Sequence[int]) -> None:
    """``looks``: a map on the reference per generated patch; ``feeds``: the reverse."""
    for index in layers:
        data["layers"][index]["matrix"] = True
    for captures, made in zip(data["captures"], models.values(), strict=True):
        for capture, explanation in zip(captures, made, strict=True):
            for index in layers:
                capture["layers"][index] |= dict(_matrices(explanation.maps, index))


def _matrices(maps: AttributionMaps, index: int) -> Iterator[tuple[str, Json]]:
    layer = maps.layers[index]
    yield "looks", _packed_maps(maps.scores(layer)[0])
    yield "feeds", _packed_maps(maps.scores(layer, over="generated")[0].T)


def _packed_maps(maps: Float[Tensor, "map token"]) -> dict[str, str]:
    """Each map in 16 bits between its own minimum and maximum, little-endian, as base64.

    A value is ``low + units * step``; it is off by half a step, i.e. by 1/131070 of the map's
    range.
    """
    values = maps.double()
    low = values.amin(dim=1, keepdim=True)
    step = (values.amax(dim=1, keepdim=True) - low) / _LEVELS
    units = torch.where(step > 0, (values - low) / step, 0.0).round()
    return {
        "units": as_base64(units.numpy().astype("<u2").tobytes()),
        "low": _packed_floats(low.numpy()),
        "step": _packed_floats(step.numpy()),
    }


def _packed_floats(values: NDArray[np.floating]) -> str:
    return as_base64(values.astype("<f4").tobytes())


def _packed_mask(mask: NDArray[np.bool_]) -> str:
    """Eight pixels per byte, the first one in the highest bit."""
    return as_base64(np.packbits(mask.reshape(-1)).tobytes())
