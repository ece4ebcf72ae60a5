"""A small dataset in COCO's layout: coloured shapes on plain ground, with the boxes that they fill.

What ``i2am detect`` runs on without COCO. It shows that the experiment works; it says nothing about
photographs. Every picture is a function of (seed, index) alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from i2am_train.data.picture_files import write_picture
from i2am_train.data.pictures import Image, Mask
from i2am_train.files import write_json
from i2am_train.locks import staged
from i2am_train.types import GridSize

SPLIT = "val2017"
CATEGORIES = ("disc", "square", "triangle")
CROWDED = 0
"""Category of the crowds."""
SIZES = (GridSize(120, 160), GridSize(160, 120), GridSize(144, 144))
LARGE, SMALL = (0.13, 0.27), (0.02, 0.07)
"""Shares of the picture that an object's box covers: inside and outside what the bench takes."""
CROWD_EVERY, EMPTY_EVERY = 5, 7
"""Each fifth picture holds a crowd before its object, each seventh only small objects."""


def make_shapes(root: Path, images: int, seed: int = 0) -> Path:
    """Write the dataset; a folder that exists is kept as it is.

    ``root`` appears only when it is complete: ``annotations/instances_val2017.json`` and
    ``val2017/*.jpg``.
    """
    if root.is_dir():
        return root
    with staged(root) as folder:
        _draw_all(folder, images, seed)
    return root


def _draw_all(folder: Path, images: int, seed: int) -> None:
    """Pictures and the file of their annotations."""
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(images):
        picture, objects = draw_shapes(seed, index)
        image_id, name = index + 1, f"{index + 1:012d}.jpg"
        write_picture(folder / SPLIT / name, picture)
        height, width = picture.shape[:2]
        entries.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for entry in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **entry})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CATEGORIES)]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    write_json(folder / "annotations" / f"instances_{SPLIT}.json", content)


def draw_shapes(seed: int, index: int) -> tuple[Image, list[dict[str, Any]]]:
    """A picture and its annotations in COCO's words, small objects and crowds first."""
    generator = np.random.default_rng([seed, index])
    size = SIZES[index % len(SIZES)]
    picture = _ground(size, generator)
    kinds = [("small", SMALL)]
    if index % CROWD_EVERY == CROWD_EVERY - 1:
        kinds.append(("crowd", LARGE))
    kinds.append(("small", SMALL) if index % EMPTY_EVERY == EMPTY_EVERY - 1 else ("object", LARGE))
    objects = []
    for kind, shares in kinds:
        category = CROWDED if kind == "crowd" else int(generator.integers(len(CATEGORIES)))
        place = _place(size, shares, generator)
        mask = _crowd(size, place) if kind == "crowd" else _shape(size, place, category)
        picture[mask] = generator.integers(0, 256, 3)
        objects.append(
            {
                "category_id": category + 1,
                "bbox": _box_of(mask),
                "area": int(mask.sum()),
                "iscrowd": int(kind == "crowd"),
            }
        )
    return picture, objects


def _ground(size: GridSize, generator: np.random.Generator) -> Image:
    """A vertical gradient between two pale colours."""
    first, last = generator.integers(150, 240, (2, 1, 1, 3))
    share = np.linspace(0, 1, size.height).reshape(-1, 1, 1)
    rows = first[0] * (1 - share) + last[0] * share
    return np.repeat(rows.round().astype(np.uint8), size.width, axis=1)


def _place(size: GridSize, shares: tuple[float, float], generator: np.random.Generator) -> NDArray[np.int64]:
    """Left, top, width and height of a box of such a share, inside the picture."""
    share, aspect = generator.uniform(*shares), generator.uniform(0.7, 1.4)
    sides = np.sqrt(share * np.array([aspect, 1 / aspect])) * np.array([size.width, size.height])
    whole = sides.round().astype(np.int64)
    corner = generator.integers(0, np.array([size.width, size.height]) - whole)
    return np.concatenate([corner, whole])


def _shape(size: GridSize, place: NDArray[np.int64], category: int) -> Mask:
    left, top, width, height = map(int, place)
    canvas = np.zeros(size, np.uint8)
    right, bottom = left + width - 1, top + height - 1
    if CATEGORIES[category] == "disc":
        centre, axes = ((left + right) / 2, (top + bottom) / 2), (width - 1, height - 1)
        cv2.ellipse(canvas, (centre, axes, 0.0), 1, -1)
    elif CATEGORIES[category] == "square":
        cv2.rectangle(canvas, (left, top), (right, bottom), 1, -1)
    else:
        corners = [[(left + right) // 2, top], [left, bottom], [right, bottom]]
        cv2.fillPoly(canvas, [np.array(corners, np.int32)], 1)
    return canvas.astype(np.bool_)


def _crowd(size: GridSize, place: NDArray[np.int64]) -> Mask:
    """Four discs in the corners of a box."""
    left, top, width, height = map(int, place)
    half = (width // 2, height // 2)
    mask = np.zeros(size, np.bool_)
    for x in (left, left + width - half[0]):
        for y in (top, top + height - half[1]):
            mask |= _shape(size, np.array([x, y, *half]), CROWDED)
    return mask


def _box_of(mask: Mask) -> list[int]:
    """COCO's box of a mask: left, top, width, height."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    top, left = int(rows[0]), int(columns[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
