"""Save and load a capture as one safetensors file: all maps can be made from it again, without the model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from i2am_train.attention.maps import AttributionMaps
from i2am_train.attention.store import AttributionStore, LayerRecord, not_finite
from i2am_train.errors import DataError
from i2am_train.files import written
from i2am_train.types import Canvas, GridSize

_NAME = "i2am-attribution-"
_FORMAT = f"{_NAME}1"
_OPTIONAL = ("mass", "scores_over_reference", "scores_over_generated")


@dataclass(frozen=True)
class Archive:
    """A loaded capture: its maps, and the names of its samples."""

    maps: AttributionMaps
    names: tuple[str, ...]


def save_maps(maps: AttributionMaps, path: str | os.PathLike[str], names: Sequence[str] = ()) -> Path:
    """Write everything that `maps` can be made from; the file appears whole or not at all.

    ``names`` are those of the samples, in the order of the batch. Raises `DataError` for maps that
    are not finite, and for other numbers of names.
    """
    target = Path(path)
    if (where := not_finite(maps.store)) is not None:
        raise DataError(
            f"The maps are not finite numbers: {where}. Nothing was written to '{target}'. Run the "
            "model in a precision that holds its values (float32, bfloat16)."
        )
    if names and len(names) != maps.store.batch:
        raise DataError(
            f"{len(names)} names were given for {maps.store.batch} samples. Give one name per sample, or none."
        )
    with written(target) as unfinished:
        save_file(_tensors(maps.store), unfinished, metadata=_metadata(maps.store, names))
    return target


def load_maps(path: str | os.PathLike[str]) -> Archive:
    """Read what `save_maps` wrote. Raises `DataError` for anything else, and for maps that are not finite."""
    source = Path(path)
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"'{source}' cannot be read as an attribution archive ({error}). Make it again with 'i2am explain'."
        ) from error
    if metadata.get("format", "").startswith(_NAME) and metadata["format"] != _FORMAT:
        raise DataError(
            f"'{source}' is an attribution archive of another version (its format is "
            f"{metadata['format']!r}, this program reads {_FORMAT!r}). Make it again with "
            "'i2am explain'."
        )
    if metadata.get("format") != _FORMAT:
        raise DataError(
            f"'{source}' is not an attribution archive (its format is {metadata.get('format')!r}, "
            f"expected {_FORMAT!r}). Give a file that 'i2am explain' or save_maps() wrote."
        )
    layers = tuple(_layer(entry, tensors) for entry in json.loads(metadata["layers"]))
    recipe, partial, canvas = json.loads(metadata.get("model", '["", null, "stretch"]'))
    store = AttributionStore(
        layers,
        tuple(json.loads(metadata["timesteps"])),
        recipe,
        partial,
        Canvas(canvas),
        tuple(json.loads(metadata.get("model_layers", "[]"))),
    )
    if (where := not_finite(store)) is not None:
        raise DataError(
            f"'{source}' holds maps that are not finite numbers: {where}. Make it again, with the "
            "model in a precision that holds its values (float32, bfloat16)."
        )
    return Archive(AttributionMaps(store), tuple(json.loads(metadata["names"])))


def _tensors(store: AttributionStore) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for record in store.layers:
        kept = ("to_generated", "to_reference", *_OPTIONAL)
        values = {name: getattr(record, name) for name in kept}
        tensors |= {f"{record.layer}/{name}": value.contiguous() for name, value in values.items() if value is not None}
    return tensors


def _metadata(store: AttributionStore, names: Sequence[str]) -> dict[str, str]:
    layers = [
        {
            "layer": record.layer,
            "generated_grid": record.generated_grid,
            "reference_grid": record.reference_grid,
            "functional": record.functional,
        }
        for record in store.layers
    ]
    return {
        "format": _FORMAT,
        "layers": json.dumps(layers),
        "timesteps": json.dumps(store.timesteps),
        "model": json.dumps([store.recipe, store.partial, store.canvas]),
        "model_layers": json.dumps(list(store.model)),
        "names": json.dumps(list(names)),
    }


def _layer(entry: dict[str, Any], tensors: dict[str, Tensor]) -> LayerRecord:
    layer, reference_grid = entry["layer"], entry["reference_grid"]
    return LayerRecord(
        layer=layer,
        generated_grid=GridSize(*entry["generated_grid"]),
        reference_grid=None if reference_grid is None else GridSize(*reference_grid),
        to_generated=tensors[f"{layer}/to_generated"],
        to_reference=tensors[f"{layer}/to_reference"],
        functional=entry["functional"],
        **{name: tensors.get(f"{layer}/{name}") for name in _OPTIONAL},
    )
