"""Objects of a COCO-format dataset as the authors' detection bench takes them (paper section 5.1).

Of each image, in the order of image ids, the first annotation counts whose box covers a tenth to three tenths of the
image; an image without one is left out. An annotation of a crowd is a box like any other in the authors' bench, and
can be left out here. Without COCO there is a made dataset of coloured shapes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from i2am_train.data.picture_files import (
    UnreadablePictureError,
    is_there,
    read_rgb,
    read_size,
    refuse_what_is_no_file,
    write_picture,
)
from i2am_train.data.pictures import Image, Mask
from i2am_train.errors import DataError
from i2am_train.files import write_json
from i2am_train.locks import staged
from i2am_train.metrics.boxes import Box
from i2am_train.types import GridSize

SMALLEST_SHARE, LARGEST_SHARE = 0.1, 0.3
"""Share of the image that an object's box covers, both ends included (paper section 5.1)."""

TOLERANCE = 2.0
"""Pixels that a box may reach beyond its image: COCO's own boxes come from rounded polygons."""

_KEYS: Mapping[str, Sequence[str]] = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("id", "image_id", "category_id"), (int, str)),
    **dict.fromkeys(("width", "height", "area"), (int, float)),
    **dict.fromkeys(("file_name", "name"), (str,)),
}
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class BenchSample:
    """One image and the object in it that is painted anew and looked for."""

    index: int
    """Place of the image among all of the dataset, by image id: the authors' number of a sample."""
    image_id: int
    path: Path
    size: GridSize
    box: Box
    """In whole pixels of the image."""
    category: str
    crowd: bool

    @property
    def name(self) -> str:
        """As COCO names images, without the ending: 12 digits."""
        return f"{self.image_id:012d}"

    def image(self) -> Image:
        """The photograph, RGB ``[height, width, 3]``.

        Raises:
            DataError: the file cannot be read.
        """
        return read_rgb(self.path)

    def mask(self) -> Mask:
        """True inside the box, ``[height, width]``: what is painted anew.

        >>> size, box = GridSize(2, 4), Box(1, 0, 3, 1)
        >>> cup = BenchSample(index=0, image_id=7, path=Path(), size=size, box=box, category="cup", crowd=False)
        >>> cup.mask().astype(int)
        array([[0, 1, 1, 0],
               [0, 0, 0, 0]])
        """
        mask = np.zeros(self.size, np.bool_)
        mask[self._inside] = True
        return mask

    def reference(self, image: Image) -> Image:
        """The object, cut out along its box.

        >>> size, box = GridSize(4, 8), Box(1, 0, 6, 3)
        >>> cup = BenchSample(index=0, image_id=7, path=Path(), size=size, box=box, category="cup", crowd=False)
        >>> cup.reference(np.zeros((4, 8, 3), np.uint8)).shape
        (3, 5, 3)
        """
        return image[self._inside]

    @property
    def _inside(self) -> tuple[slice, slice]:
        left, top, right, bottom = map(int, self.box)
        return slice(top, bottom), slice(left, right)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The samples, and how many images they were chosen from."""

    samples: tuple[BenchSample, ...]
    images: int

    @property
    def crowds(self) -> int:
        """Samples whose annotation is of a crowd.

        >>> Bench(samples=(), images=9).crowds
        0
        """
        return sum(sample.crowd for sample in self.samples)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits for which objects of which images are looked for, in which order.

        >>> Bench(samples=(), images=9).fingerprint
        '4f53cda18c2baa0c'
        """
        chosen = [(s.image_id, s.size, s.box, s.category) for s in self.samples]
        return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:16]


def read_bench(annotations: Path, folder: Path, *, crowds: bool = True, limit: int | None = None) -> Bench:
    """The bench of a COCO file, whose images were all found.

    Args:
        annotations: ``instances_val2017.json`` or a file like it.
        folder: of the images.
        crowds: let annotations of crowds count, as the authors do.
        limit: only so many samples, the first ones.

    Raises:
        DataError: the file is not COCO's, a box lies outside its image, no object is of the wanted size, or an image is
            missing, damaged or of another size.

    >>> read_bench(Path("nowhere.json"), Path("images"))
    Traceback (most recent call last):
        ...
    i2am_train.errors.DataError: Cannot read the annotations nowhere.json: No such file or directory. ...
    """
    content = _read_coco(annotations)
    images = sorted(content["images"], key=lambda image: image["id"])
    names = {category["id"]: category["name"] for category in content["categories"]}
    objects = defaultdict(list)
    for annotation in content["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    samples: list[BenchSample] = []
    for index, image in enumerate(images):
        chosen = first_of_size(objects[image["id"]], image, crowds=crowds)
        if chosen is not None and (limit is None or len(samples) < limit):
            samples.append(_sample(index, image, chosen, names[chosen["category_id"]], folder))
    if not samples:
        raise DataError(
            f"No annotation in {annotations} covers {SMALLEST_SHARE:.0%} to {LARGEST_SHARE:.0%} of its image "
            f"({len(images)} images, {len(content['annotations'])} annotations), so there is nothing to look for. Give "
            f"a file of objects with boxes{'' if crowds else ', or crowds=true'}."
        )
    _check_images(samples)
    return Bench(samples=tuple(samples), images=len(images))


def first_of_size(
    annotations: Iterable[Mapping[str, Any]], image: Mapping[str, Any], *, crowds: bool = True
) -> Mapping[str, Any] | None:
    """The first annotation whose box, in whole pixels, covers the wanted share of its image.

    >>> image = {"height": 10, "width": 20}
    >>> first_of_size([{"bbox": [0, 0, 5.9, 3]}, {"bbox": [1, 2, 5.9, 4.2]}], image)
    {'bbox': [1, 2, 5.9, 4.2]}
    """
    pixels = image["height"] * image["width"]
    for annotation in annotations:
        _, _, width, height = (int(value) for value in annotation["bbox"])
        of_size = SMALLEST_SHARE <= width * height / pixels <= LARGEST_SHARE
        if of_size and (crowds or not annotation.get("iscrowd")):
            return annotation
    return None


def _sample(
    index: int, image: Mapping[str, Any], annotation: Mapping[str, Any], category: str, folder: Path
) -> BenchSample:
    left, top, width, height = (int(value) for value in annotation["bbox"])
    return BenchSample(
        index=index,
        image_id=int(image["id"]),
        path=folder / image["file_name"],
        size=GridSize(image["height"], image["width"]),
        box=Box(max(0, left), max(0, top), min(image["width"], left + width), min(image["height"], top + height)),
        category=category,
        crowd=bool(annotation.get("iscrowd")),
    )


# ---- the file ------------------------------------------------------------------------------------------------------


def _read_coco(file: Path) -> dict[str, Any]:
    """The content of a COCO file of objects, checked."""
    content = _read_json(file)
    _check_entries(content, file)
    _check_content(content, file)
    return content


def _read_json(file: Path) -> dict[str, Any]:
    try:
        refuse_what_is_no_file(file)
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"Cannot read the annotations {file}: {error.strerror}. Expected COCO's layout, "
            "ROOT/annotations/instances_val2017.json beside ROOT/val2017/*.jpg; give root=ROOT, and split=NAME or "
            "annotations=FILE where they are called otherwise."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file} is no readable JSON ({error}). Download it again; COCO's comes in annotations_trainval2017.zip."
        ) from error
    if not isinstance(content, dict) or any(kind not in content for kind in _KEYS):
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"{file} is no file of COCO's objects: found {found or 'nothing'}, expected {', '.join(_KEYS)}. Give "
            "an instances_*.json."
        )
    return content


def _check_entries(content: Mapping[str, Any], file: Path) -> None:
    for kind, keys in _KEYS.items():
        if not isinstance(content[kind], list):
            found = type(content[kind]).__name__
            raise DataError(f"{kind} in {file} is no list but of type {found}. Give an instances_*.json.")
        for position, entry in enumerate(content[kind]):
            there = entry if isinstance(entry, dict) else {}
            _check_types(there, f"Entry {position} of {kind} in {file}")
            if lacking := [key for key in keys if key not in there]:
                raise DataError(
                    f"Entry {position} of {kind} in {file} lacks {', '.join(lacking)}; expected {', '.join(keys)}. "
                    "Give an instances_*.json, not one of captions or panoptic segments."
                )
        ids = Counter(entry["id"] for entry in content[kind])
        twice = [entry_id for entry_id, count in ids.items() if count > 1]
        _refuse(twice, f"ids of {kind} in {file} come twice", "Give each entry an id of its own.")


def _check_types(entry: Mapping[str, Any], where: str) -> None:
    for key, types in _TYPES.items():
        value = entry.get(key, 0)
        if key in entry and (not isinstance(value, types) or isinstance(value, bool)):
            expected = " or ".join(kind.__name__ for kind in types)
            raise DataError(f"{where} has {key}={value!r}, expected a value of type {expected}. Correct it.")


def _check_content(content: Mapping[str, Any], file: Path) -> None:
    """Names stay below the folder of images, links lead to entries, boxes lie in their images.

    A downloaded file must not name other files of this machine.
    """
    images = {image["id"]: image for image in content["images"]}
    names = (image["file_name"] for image in content["images"])
    _refuse(
        [repr(name) for name in names if not _is_below(name)],
        f"images in {file} have a file_name that leads out of the folder of images, or is none",
        "Expected names below that folder, with / between folders. Do not use a file that you did not make without "
        "looking at it; correct the names.",
    )
    for key, kind in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in content[kind]}
        _refuse(
            [entry["id"] for entry in content["annotations"] if entry[key] not in known],
            f"annotations in {file} name an {key} that is none of its {kind}",
            f"Add the {kind}, or remove these annotations.",
            "annotations ",
        )
    wrong = [a for a in content["annotations"] if not _is_inside(a["bbox"], images[a["image_id"]])]
    if wrong:
        first, image = wrong[0], images[wrong[0]["image_id"]]
        _refuse(
            [annotation["id"] for annotation in wrong],
            f"annotations in {file} have boxes that are not [x, y, width, height] in pixels inside their image",
            f"Annotation {first['id']} has {first['bbox']} on an image of width {image['width']} and height "
            f"{image['height']}. Correct or remove them; corners [x1, y1, x2, y2] and shares of the image must be "
            "converted.",
            "annotations ",
        )


def _is_below(name: Any) -> bool:
    """Whether a name stays in its folder; links that lie there are the user's own."""
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.name != ""


def _is_inside(box: Any, image: Mapping[str, Any]) -> bool:
    if not isinstance(box, list) or len(box) != 4:
        return False
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in box):
        return False
    left, top, width, height = box
    right, bottom = image["width"] + TOLERANCE, image["height"] + TOLERANCE
    inside = left + width <= right and top + height <= bottom
    return bool(inside and min(left, top) >= -TOLERANCE and min(width, height) >= 0)


def _check_images(samples: Sequence[BenchSample]) -> None:
    """Fails unless each image is there, is a picture and has the size that the annotations say."""
    folder, of = samples[0].path.parent, f"of the bench's {len(samples)} images"
    _refuse(
        [sample.path.name for sample in samples if not is_there(sample.path)],
        f"{of} are not in {folder}",
        "Unpack COCO's val2017.zip there, or give the folder with root=ROOT and split=NAME.",
    )
    faults = {s.path.name: fault for s in samples if (fault := _fault(s))}
    first = " ".join(next(iter(faults.items()), ()))
    fault = f"{of} in {folder} do not fit their annotations"
    _refuse(list(faults), fault, f"{first}. Use the images that the file was made for.", ends=":")


def _fault(sample: BenchSample) -> str | None:
    try:
        size = read_size(sample.path)
    except UnreadablePictureError as error:
        return error.fault
    if size != sample.size:
        return f"is {size} (height x width), and the annotations say {sample.size}"
    return None


def _refuse(wrong: Sequence[object], fault: str, advice: str, kind: str = "", ends: str = ".") -> None:
    """Fails if anything is wrong, with the number of what is and the first of them."""
    if wrong:
        more = ", ..." if len(wrong) > _SHOWN else ""
        shown = ", ".join(map(str, wrong[:_SHOWN])) + more
        raise DataError(f"{len(wrong)} {fault} ({kind}{shown}){ends} {advice}")


# ---- the made dataset -------------------------------------------------------------------------------------------

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
    """Write a small dataset in COCO's layout, coloured shapes on plain ground with the boxes that they fill.

    What ``i2am detect`` runs on without COCO. It shows that the experiment works; it says nothing about photographs.
    Every picture is a function of (seed, index) alone. ``root`` appears only when it is complete:
    ``annotations/instances_val2017.json`` and ``val2017/*.jpg``; a folder that exists is kept as it is.
    """
    if root.is_dir():
        return root
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    with staged(root) as folder:
        for index in range(images):
            picture, objects = draw_shapes(seed, index)
            image_id, name = index + 1, f"{index + 1:012d}.jpg"
            write_picture(folder / SPLIT / name, picture)
            height, width = picture.shape[:2]
            entries.append({"id": image_id, "file_name": name, "height": height, "width": width})
            for entry in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, **entry})
        categories = [{"id": number, "name": name} for number, name in enumerate(CATEGORIES, 1)]
        content = {"images": entries, "annotations": annotations, "categories": categories}
        write_json(folder / "annotations" / f"instances_{SPLIT}.json", content)
    return root


def draw_shapes(seed: int, index: int) -> tuple[Image, list[dict[str, Any]]]:
    """A picture and its annotations in COCO's words, small objects and crowds first.

    >>> picture, objects = draw_shapes(seed=0, index=4)
    >>> picture.shape, [entry["iscrowd"] for entry in objects]
    ((160, 120, 3), [0, 1, 0])
    """
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
                "bbox": list(cv2.boundingRect(mask.astype(np.uint8))),
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
