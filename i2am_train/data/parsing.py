"""Human-parsing maps: which pixel of a photograph is hair, face, arm, or which garment.

Two label sets are read. ``VITON_HD`` is that of ``image-parse-v3``: the 20 labels of CIHP, stored as a PNG with
palette. ``DRESS_CODE`` is that of ``label_maps``: the 18 labels of ATR, stored as grey values; models such as
segformer_b2_clothes predict it. Rules speak of labels by the names here, which both sets share.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from i2am_train.data.picture_files import is_there, open_picture, read_values
from i2am_train.data.pictures import Image, Mask
from i2am_train.errors import DataError
from i2am_train.files import written
from i2am_train.types import Category

LabelMap = NDArray[np.uint8]


@dataclass(frozen=True)
class LabelSet:
    """Names of labels, by value, and the colours that they are shown in."""

    title: str
    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]

    def inside(self, labels: LabelMap, names: Collection[str]) -> Mask:
        """Where any of the named labels is; names that the set lacks are nowhere.

        >>> DRESS_CODE.inside(np.array([[0, 7, 11]], np.uint8), {"face", "glove"}).tolist()
        [[False, False, True]]
        """
        values = [value for value, name in enumerate(self.names) if name in names]
        return np.isin(labels, values)

    def coloured(self, labels: LabelMap) -> Image:
        """A map in the set's colours, RGB.

        >>> DRESS_CODE.coloured(np.array([[0, 11]], np.uint8)).tolist()
        [[[0, 0, 0], [0, 0, 255]]]
        """
        return np.asarray(self.colours, np.uint8)[labels]

    def found(self, labels: LabelMap) -> str:
        """The labels of a map by name, for messages.

        >>> DRESS_CODE.found(np.array([[0, 7, 7]], np.uint8))
        'background, dress'
        """
        return ", ".join(self.names[value] for value in np.unique(labels))


# fmt: off
_CIHP_COLOURS = (
    (0, 0, 0), (128, 0, 0), (255, 0, 0), (0, 85, 0), (170, 0, 51), (255, 85, 0), (0, 0, 85), (0, 119, 221),
    (85, 85, 0), (0, 85, 85), (85, 51, 0), (52, 86, 128), (0, 128, 0), (0, 0, 255), (51, 170, 221), (0, 255, 255),
    (85, 255, 170), (170, 255, 85), (255, 255, 0), (255, 170, 0),
)
VITON_HD = LabelSet(
    "VITON-HD's image-parse-v3 (20 labels)",
    (
        "background", "hat", "hair", "glove", "sunglasses", "upper_clothes", "dress", "coat", "socks", "pants", "neck",
        "scarf", "skirt", "face", "left_arm", "right_arm", "left_leg", "right_leg", "left_shoe", "right_shoe",
    ),
    _CIHP_COLOURS,
)
DRESS_CODE_NAMES = (
    "background", "hat", "hair", "sunglasses", "upper_clothes", "skirt", "pants", "dress", "belt", "left_shoe",
    "right_shoe", "face", "left_leg", "right_leg", "left_arm", "right_arm", "bag", "scarf",
)
_BY_NAME = dict(zip(VITON_HD.names, _CIHP_COLOURS, strict=True)) | {"belt": (85, 85, 0), "bag": (0, 119, 221)}
DRESS_CODE = LabelSet(
    "DressCode's label_maps (18 labels)", DRESS_CODE_NAMES, tuple(_BY_NAME[name] for name in DRESS_CODE_NAMES)
)
# fmt: on
LABEL_SETS = {"viton_hd": VITON_HD, "dresscode": DRESS_CODE}


def usual_labels(category: Category | None) -> LabelSet:
    """The set of a layout that says its category (DressCode's), or of one that does not (VITON-HD's).

    >>> usual_labels("dresses").title
    "DressCode's label_maps (18 labels)"
    """
    return VITON_HD if category is None else DRESS_CODE


WORN: dict[Category, frozenset[str]] = {
    "upper_body": frozenset({"upper_clothes", "coat", "dress"}),
    "lower_body": frozenset({"skirt", "pants"}),
    "dresses": frozenset({"dress"}),
}
"""Labels of the garment that is tried on."""

ARMS, LEGS = frozenset({"left_arm", "right_arm"}), frozenset({"left_leg", "right_leg"})
SHOES = frozenset({"left_shoe", "right_shoe"})
HEAD = frozenset({"face", "hat", "sunglasses"})
LOWER_CLOTHES = frozenset({"skirt", "pants", "belt", "socks"})
HELD = frozenset({"bag", "glove"})
LARGEST_GLASSES = 0.05
"""Share of a person that sunglasses cover."""


def read_labels(path: Path, labels: LabelSet) -> LabelMap:
    """A parsing map ``[H, W]``: values, a palette's indices, or the set's colours.

    Raises:
        DataError: the file is missing or broken, or holds values or colours that are not of the set.
    """
    if not is_there(path):
        raise DataError(f"{path} is missing: a parsing map is needed for every person.")
    values, palette = _read(path)
    if values.ndim == 3:
        values = _from_colours(values, path, labels)
    unknown = np.unique(values[values >= len(labels.names)])
    if len(unknown):
        raise DataError(
            f"{path} holds unknown labels {', '.join(map(str, unknown[:5]))}; expected 0...{len(labels.names) - 1}, "
            f"those of {labels.title}. Choose the other set with labels={_other(labels)}, or make the map again."
        )
    known = np.asarray(values, np.uint8)
    if palette is not None:
        _refuse_other_palette(np.unique(known), palette, path, labels)
    other = LABEL_SETS[_other(labels)]
    if not _is_person(known, labels) and _is_person(known, other):
        raise DataError(
            f"{path} holds labels that are in their places only as {other.title}; as those of {labels.title}, legs or "
            f"glasses would be where clothes are. Choose them with labels={_other(labels)}, or make the map again."
        )
    return known


def _read(path: Path) -> tuple[NDArray[Any], NDArray[np.uint8] | None]:
    """Values or colours, and the palette ``[N, 3]`` if the file has one."""
    values = read_values(path, palette=True)
    with open_picture(path) as picture:
        entries = picture.getpalette("RGB") if picture.mode == "P" else None
    return values, None if entries is None else np.asarray(entries, np.uint8).reshape(-1, 3)


def _refuse_other_palette(used: NDArray[np.uint8], palette: NDArray[np.uint8], path: Path, labels: LabelSet) -> None:
    """Refuse palettes that name other labels by a set's own colours; others (Pascal's, grey) name nothing."""
    shown = {int(value): tuple(palette[value].tolist()) for value in used[used < len(palette)] if value}
    for one in LABEL_SETS.values():
        if len(shown) < 2 or not set(shown.values()) <= set(one.colours):
            continue
        for value, colour in shown.items():
            if labels.colours[value] != colour:
                raise DataError(
                    f"{path} shows label {value} in the colour of {one.names[one.colours.index(colour)]}, and in "
                    f"{labels.title} it is {labels.names[value]}: its palette is that of other labels. Choose the "
                    f"other set with labels={_other(labels)}, or make the map again."
                )


def _is_person(values: LabelMap, labels: LabelSet) -> bool:
    """Whether labels lie as on a person: glasses are small, legs below the clothes, the face above them."""
    clothes = labels.inside(values, {"upper_clothes", "coat", "dress", "skirt", "pants"})
    glasses = labels.inside(values, {"sunglasses"})
    if not clothes.any() or glasses.sum() > LARGEST_GLASSES * (values > 0).sum():
        return False
    middle = float(np.nonzero(clothes)[0].mean())
    legs, faces = labels.inside(values, LEGS), labels.inside(values, {"face"})
    above = bool(faces.any()) and float(np.nonzero(faces)[0].mean()) > middle
    return not above and not (legs.any() and float(np.nonzero(legs)[0].mean()) < middle)


def write_labels(path: Path, values: LabelMap, labels: LabelSet) -> None:
    """A parsing map as a PNG with the set's palette, in one step."""
    picture = PILImage.fromarray(values)
    picture.putpalette(np.asarray(labels.colours, np.uint8).tobytes())
    with written(path) as unfinished:
        picture.save(unfinished, format="PNG", optimize=True)


def _from_colours(picture: Image, path: Path, labels: LabelSet) -> LabelMap:
    """Values of exact colours."""
    weights = np.array([65536, 256, 1])
    codes = picture.astype(np.int64) @ weights
    known = np.asarray(labels.colours, np.int64) @ weights
    order = np.argsort(known)
    places = np.clip(np.searchsorted(known[order], codes), 0, len(known) - 1)
    values = order[places]
    strange = known[values] != codes
    if strange.any():
        colour = tuple(int(level) for level in picture[strange][0])
        raise DataError(
            f"{path} holds the colour {colour}, which is none of {labels.title}; expected a PNG of labels. "
            f"Choose the other set with labels={_other(labels)}, or save the map with its palette (mode P)."
        )
    return np.asarray(values, np.uint8)


def _other(labels: LabelSet) -> str:
    return next(name for name, other in LABEL_SETS.items() if other is not labels)
