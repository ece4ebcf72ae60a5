"""Folders of finished images: which there are, whether two folders fit together, and reading them.

What a metric would silently misread is refused before anything is computed: grey pictures (most often masks or maps
that came here by mistake), 16-bit ones (PIL cuts them to 8 bits), CMYK, transparency, several sizes, names that do not
pair up. Two kinds are converted, as no bit of information is lost and there is one way to do it: a palette becomes RGB,
and an alpha channel that is opaque everywhere is left out.
"""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from i2am_train.data.layouts import stem_of
from i2am_train.data.picture_files import UnreadablePictureError, is_deep, open_picture, read_rgb, upright_size
from i2am_train.errors import DataError
from i2am_train.metrics.features import resized_image
from i2am_train.types import GridSize

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
NAMES_SHOWN = 10
READERS = 8
"""Threads that decode images (PIL does not hold Python's lock meanwhile)."""

GREY_MODES = ("1", "L", "LA", "La")


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images of one size that are scored together."""

    names: tuple[str, ...]
    size: GridSize
    read: Callable[[int], UInt8[Tensor, "3 height width"]]
    """The image at a position of ``names``."""

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, positions: Collection[int]) -> UInt8[Tensor, "batch 3 height width"]:
        """Some of the images, read in parallel."""
        with ThreadPoolExecutor(READERS) as pool:
            return torch.stack(list(pool.map(self.read, positions)))


def open_folders(
    images: Path, reference: Path, *, paired: bool, samples: int | None = None, resize: GridSize | None = None
) -> tuple[ImageSet, ImageSet]:
    """The images of two folders, checked to be comparable.

    Args:
        images: folder of generated images.
        reference: folder of real images.
        paired: whether images of the same name, without its ending, belong together.
        samples: how many of the images to take, by name; None for all.
        resize: size that all images are resized to; None: they must have one size.

    Raises:
        DataError: a folder has no images or fewer than ``samples``; names do not pair up; an image is not 8-bit RGB or
            cannot be read; sizes differ.
    """
    first, second = list_images(images), list_images(reference)
    if paired:
        _check_pairs(images, first, reference, second)
    chosen = [_first_of(files, samples, folder) for files, folder in ((first, images), (second, reference))]
    sizes = [check_images(files) for files in chosen]
    if resize is None:
        _check_one_size(sizes[0] | sizes[1])
    return _image_set(chosen[0], sizes[0], resize), _image_set(chosen[1], sizes[1], resize)


def list_images(folder: Path) -> dict[str, Path]:
    """Image files of a folder by their name without its ending, sorted; sub-folders and hidden files are left out.

    Raises:
        DataError: there is no such folder, no image in it, or two of the same name.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}. Give the folder that holds the images.")
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in EXTENSIONS and path.name[0] != "." and not path.is_dir()
    )
    if not files:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise DataError(
            f"{folder} holds no images ({', '.join(EXTENSIONS)}); found {found}. "
            "Give the folder whose own files are the images."
        )
    named = {stem_of(path.name): path for path in files}
    twice = [path.name for path in files if named[stem_of(path.name)] != path]
    if twice:
        raise DataError(
            f"{folder} has several images of one name: {_shown(twice)} and {named[stem_of(twice[0])].name}. "
            "Names without their ending say which images belong together; keep one file of each."
        )
    return named


def _check_pairs(images: Path, first: Mapping[str, Path], reference: Path, second: Mapping[str, Path]) -> None:
    parts = [
        f"{len(alone)} of {len(own)} images in {folder} have no partner ({_shown(sorted(alone))})"
        for folder, own, other in ((images, first, second), (reference, second, first))
        if (alone := own.keys() - other.keys())
    ]
    if parts:
        raise DataError(
            f"The folders do not pair up by file name: {'; '.join(parts)}. Make the names agree, remove what is too "
            "much, or set evaluation.pairing=unpaired to compare the folders as sets only."
        )


def _first_of(files: Mapping[str, Path], samples: int | None, folder: Path) -> dict[str, Path]:
    if samples is not None and samples > len(files):
        raise DataError(
            f"evaluation.samples={samples} images were asked for, and {folder} has {len(files)}. Ask for "
            f"{len(files)} or fewer."
        )
    return dict(list(files.items())[:samples])


def check_images(files: Mapping[str, Path]) -> dict[Path, GridSize]:
    """Size of each image, from its header.

    Raises:
        DataError: some are not 8-bit RGB, or cannot be read; the message says which and why.
    """
    with ThreadPoolExecutor(READERS) as pool:
        found = dict(zip(files.values(), pool.map(_size_or_fault, files.values()), strict=True))
    faults = {path: fault for path, fault in found.items() if isinstance(fault, str)}
    if faults:
        first = next(iter(faults))
        raise DataError(
            f"{len(faults)} of {len(files)} images in {first.parent} cannot be scored: {first.name} {faults[first]}. "
            f"All of them: {_shown([path.name for path in faults])}."
        )
    return {path: size for path, size in found.items() if isinstance(size, GridSize)}


def _size_or_fault(path: Path) -> GridSize | str:
    try:
        with open_picture(path) as image:
            return _fault(image) or upright_size(image)
    except UnreadablePictureError as error:
        return error.fault


def _fault(image: Image.Image) -> str | None:
    """Why an image is not 8-bit RGB that can be had without loss, or None."""
    if is_deep(image):
        return "has more than 8 bits per channel; save it with 8 bits, in the way its maker would"
    if image.mode in GREY_MODES:
        return f"is grey (mode {image.mode}), as masks and maps are; save it as RGB if it is meant as a photograph"
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        return "is transparent in places; put it on the background that it is meant to have"
    return None


def _check_one_size(sizes: dict[Path, GridSize]) -> None:
    examples = {size: path for path, size in reversed(sizes.items())}
    if len(examples) > 1:
        shown = ", ".join(f"{size} ({path})" for size, path in list(examples.items())[-3:])
        height, width = min(examples)
        raise DataError(
            f"The images have {len(examples)} sizes (height x width), such as {shown}. A score between sizes would "
            f"measure the resizing too. Set resize=[{height},{width}], or another size, to resize all images of both "
            "folders with the same filter."
        )


def _image_set(files: Mapping[str, Path], sizes: Mapping[Path, GridSize], resize: GridSize | None) -> ImageSet:
    paths = list(files.values())
    size = resize or sizes[paths[0]]
    return ImageSet(names=tuple(files), size=size, read=lambda position: read_image(paths[position], size))


def read_image(path: Path, size: GridSize) -> UInt8[Tensor, "3 height width"]:
    """An image as RGB bytes, resized with clean-fid's filter if it has another size.

    Raises:
        DataError: the file is missing, cut off or damaged.
    """
    pixels = read_rgb(path)
    loaded = torch.from_numpy(pixels).permute(2, 0, 1)
    return loaded if pixels.shape[:2] == tuple(size) else resized_image(loaded, size)


def _shown(names: list[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
