"""Image quality: SSIM and learned distances of pairs of pictures, Fréchet and kernel distance of two sets of pictures.

**Pairs** compare a generated picture with its ground truth, so they are for paired evaluation; for unpaired try-on
there is no truth, only the distances of sets.

**Sets** are compared by features of a frozen network; the name of a score says which: ``fd_efficientnet_lite0`` and
``kd_efficientnet_lite0`` use EfficientNet-Lite0, whose weights a package carries; ``fid`` and ``kid`` are the same code
on clean-fid's Inception-v3. Resizing and both formulas are clean-fid's (Parmar et al. 2022). How far to trust them: the
Fréchet distance is biased upwards, the more so the fewer the images. With 64 images its covariances have rank 63 in
1280 dimensions, and the level means little: compare only values from equally many images, and say how many. The kernel
distance has no such bias for independent sets. When the generated images reconstruct the very images that they are
compared with (paired evaluation), the two sets are not independent, and the kernel distance of a good model falls below
0.

**Each sample counts once.** A sampler that spreads a dataset over processes repeats a few samples so that each process
gets equally many. Metrics here take the sample's index along with its images, drop such repetitions and sort, so that
two processes, other batch sizes and another order give the number of one process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import cleanfid.fid
import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from scipy.linalg import LinAlgWarning
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.utilities.data import dim_zero_cat

from i2am_train.errors import DataError
from i2am_train.metrics.features import (
    IMAGES_PER_PASS,
    check_image_pair,
    feature_network,
    image_features,
    loaded,
    perceptual_network,
)


def first_of_each(index: Int[Tensor, " samples"]) -> Int[Tensor, " kept"]:
    """Positions of the first occurrence of every index, in ascending order of the index.

    >>> first_of_each(torch.tensor([7, 3, 7, 5])).tolist()
    [1, 3, 0]
    """
    order = index.argsort(stable=True)
    ascending = index[order]
    kept = torch.ones_like(ascending, dtype=torch.bool)
    kept[1:] = ascending[1:] != ascending[:-1]
    return order[kept]


class _IndexedMetric(Metric):
    """Base of metrics that keep one row per sample in list states, with the sample's index."""

    full_state_update = False
    is_differentiable = False
    index: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("index", default=[], dist_reduce_fx="cat")

    def _remember(self, index: Int[Tensor, " samples"], **rows: Tensor) -> None:
        """Append a batch to the list states named by the keywords."""
        first = next(iter(rows.values()))
        batch, device = first.shape[0], first.device
        if index.shape != (batch,):
            raise DataError(
                f"{type(self).__name__} got {batch} images and an index of shape "
                f"{tuple(index.shape)}. Pass the batch's 'index', one number per sample."
            )
        self.index.append(index.to(device))
        for state, values in rows.items():
            getattr(self, state).append(values)

    def _gathered(self, *states: str) -> list[Tensor]:
        """Return the states' rows, each sample once, by ascending index."""
        if len(self.index) == 0:
            raise DataError(f"{type(self).__name__} has seen no images. Update it before compute.")
        kept = first_of_each(dim_zero_cat(self.index))
        return [dim_zero_cat(getattr(self, state))[kept] for state in states]


SSIM_SIGMA = 1.5
SSIM_WINDOW = 11
"""Gaussian window of Wang et al. 2004, section III-B: 11x11, deviation 1.5."""

ImagePairScore = Callable[[Tensor, Tensor], Tensor]
"""Takes generated and real uint8 images [batch, 3, height, width], gives one value per sample."""


def ssim(
    generated: UInt8[Tensor, "batch 3 height width"], real: UInt8[Tensor, "batch 3 height width"]
) -> Float[Tensor, " batch"]:
    """Structural similarity (Wang et al. 2004) per sample, in [-1, 1]; 1 for equal images.

    Mean over the three colour channels and over the windows that lie inside the image, as pytorch-msssim (the paper's
    choice) and scikit-image average it. torchmetrics' own mean includes windows that reach into a mirrored border;
    hence its map is taken, and averaged here.

    Raises:
        DataError: not two uint8 batches of one shape, or images smaller than the window.

    >>> images = torch.arange(2 * 3 * 16 * 12).reshape(2, 3, 16, 12).to(torch.uint8)
    >>> ssim(images, images).tolist()
    [1.0, 1.0]
    """
    check_image_pair(generated, real)
    _require_size(generated, SSIM_WINDOW, "ssim")
    # float64: a local variance is the small difference of two large means of squares.
    _, similarity = structural_similarity_index_measure(
        generated.double(), real.double(), sigma=SSIM_SIGMA, data_range=255.0, reduction="none", return_full_image=True
    )
    border = SSIM_WINDOW // 2
    inside: Tensor = similarity[..., border:-border, border:-border]
    return inside.mean(dim=(1, 2, 3)).float()


def _require_size(images: Tensor, smallest: int, name: str) -> None:
    height, width = images.shape[-2:]
    if min(height, width) < smallest:
        raise DataError(
            f"{name} needs images of at least {smallest}x{smallest} pixels, found "
            f"{height}x{width}. Evaluate at a larger size or leave {name} out."
        )


@dataclass(frozen=True, slots=True)
class PerceptualDistance:
    """Learned perceptual distance per sample; 0 for equal images.

    ``stlpips`` is ShiftTolerant-LPIPS (Ghildyal and Liu 2022), AlexNet, whose weights the package stlpips-pytorch
    carries. ``lpips`` is LPIPS 0.1 (Zhang et al. 2018), AlexNet, as the paper uses; its trunk is torchvision's and has
    to be downloaded. The two scales are not comparable.

    Raises:
        ConfigError: there is no such network.
        WeightsMissingError: the weights are missing and cannot be downloaded.
    """

    network: str = "stlpips"

    def __post_init__(self) -> None:
        perceptual_network(self.network)

    def __call__(
        self, generated: UInt8[Tensor, "batch 3 height width"], real: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, " batch"]:
        """One distance per sample, computed in float32 also under autocast."""
        check_image_pair(generated, real)
        _require_size(generated, perceptual_network(self.network).size, self.network)
        module = loaded(self.network, generated.device)
        pairs = zip(*(torch.split(x, IMAGES_PER_PASS) for x in (generated, real)), strict=True)
        with torch.no_grad(), torch.autocast(generated.device.type, enabled=False):
            distances = [module(_signed(first), _signed(second)) for first, second in pairs]
        return torch.cat(distances).flatten()


def _signed(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1.0


class MeanImageMetric(_IndexedMetric):
    """Mean over the samples of a score of image pairs; each sample counts once.

    Which end is good depends on the score: see `i2am_train.metrics.registry.METRICS`.

    >>> metric = MeanImageMetric(ssim)
    >>> images = torch.arange(2 * 3 * 16 * 12).reshape(2, 3, 16, 12).to(torch.uint8)
    >>> metric.update(images, images, index=torch.tensor([4, 9]))
    >>> metric.compute().item()
    1.0
    """

    values: list[Tensor]

    def __init__(self, score: ImagePairScore) -> None:
        super().__init__()
        self.score = score
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(
        self,
        generated: UInt8[Tensor, "batch 3 height width"],
        real: UInt8[Tensor, "batch 3 height width"],
        index: Int[Tensor, " samples"],
    ) -> None:
        """Add a batch; ``index`` holds each sample's position in the dataset."""
        self._remember(index, values=self.score(generated, real))

    def compute(self) -> Float[Tensor, ""]:
        """Mean over all samples of all processes, computed in float64."""
        (values,) = self._gathered("values")
        return values.double().mean().float()


KERNEL_SUBSET_SIZE = 1000
KERNEL_SUBSETS = 100
"""clean-fid's defaults: sets of more than a thousand images are compared in 100 random subsets."""
KERNEL_SEED = 0
"""Seed of those subsets, so that the same features always give the same number."""


class KernelSubsets(NamedTuple):
    """How a kernel distance compares two sets: as the mean over random subsets of each."""

    size: int
    """Images of either set in a subset."""
    number: int


def kernel_subsets(generated: int, real: int, size: int | None = None, number: int = KERNEL_SUBSETS) -> KernelSubsets:
    """The subsets in which two sets of so many images are compared.

    Args:
        generated: images of one set.
        real: images of the other.
        size: images in a subset. None: all, where the sets are equally large and have 1000 images at most; otherwise
            clean-fid's rule, 1000 or the size of the smaller set.
        number: subsets, where they are drawn at random. A subset of all images is drawn once.

    Raises:
        DataError: a set has fewer images than ``size``.

    >>> kernel_subsets(64, 64), kernel_subsets(64, 500), kernel_subsets(64, 64, size=50)
    (KernelSubsets(size=64, number=1), KernelSubsets(size=64, number=100), \
KernelSubsets(size=50, number=100))
    """
    smaller = min(generated, real)
    if size is not None and size > smaller:
        raise DataError(
            f"The kernel distance was asked for in subsets of {size} images, and there are "
            f"{generated} generated and {real} real images. Set evaluation.kernel_subset_size to "
            f"{smaller} or less, or to null to compare as many as there are."
        )
    size = min(smaller, KERNEL_SUBSET_SIZE) if size is None else size
    return KernelSubsets(size, 1 if generated == real == size else number)


def frechet_distance(
    generated: Float[Tensor, "generated feature"], real: Float[Tensor, "real feature"]
) -> Float[Tensor, ""]:
    """Fréchet distance of two Gaussians fitted to the features (Heusel et al. 2017); 0 if equal.

    clean-fid's ``fid_from_feats`` in float64. With fewer samples than features, both sets are first written in an
    orthonormal basis of their joint span: no mean and no covariance leaves it, so the distance is the same, for a
    hundredth of the time at 64 samples and 1280 features.

    Raises:
        DataError: a set has fewer than two samples, which have no covariance.

    >>> points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    >>> round(frechet_distance(points + torch.tensor([3.0, 0.0]), points).item(), 6)
    9.0
    """
    first, second = _checked_features(generated, real)
    if len(first) + len(second) < first.shape[1]:
        first, second = _in_joint_span(first, second)
    with warnings.catch_warnings():
        # clean-fid asks scipy's sqrtm for its error estimate, an option that scipy 1.18 removes; a
        # singular product is the normal case for few samples, and its trace is still good to 1e-7.
        warnings.filterwarnings("ignore", category=DeprecationWarning, message="The `disp`")
        warnings.simplefilter("ignore", category=LinAlgWarning)
        distance = cleanfid.fid.fid_from_feats(second, first)
    return torch.tensor(float(distance), dtype=torch.float32)


def kernel_distance(
    generated: Float[Tensor, "generated feature"],
    real: Float[Tensor, "real feature"],
    subsets: KernelSubsets | None = None,
) -> Float[Tensor, ""]:
    """Squared maximum mean discrepancy with the kernel (x.y / features + 1)^3, clean-fid's KID.

    Unbiased for independent sets, hence also negative. The subsets (None: as ``kernel_subsets`` chooses them) are drawn
    with a fixed seed; numpy's global random state is left as it was. (Bińkowski et al. 2018; not multiplied by 1000.)

    Raises:
        DataError: a set has fewer than two samples.

    >>> points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    >>> kernel_distance(points + 1, points) > kernel_distance(points, points)
    tensor(True)
    """
    first, second = _checked_features(generated, real)
    size, number = subsets or kernel_subsets(len(first), len(second))
    with _numpy_seed(KERNEL_SEED):
        distance = cleanfid.fid.kernel_distance(second, first, num_subsets=number, max_subset_size=size)
    return torch.tensor(distance, dtype=torch.float32)


def _checked_features(generated: Tensor, real: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if min(len(generated), len(real)) < 2:
        raise DataError(
            f"A distance between sets needs at least 2 images in each, found {len(generated)} "
            f"generated and {len(real)} real. Evaluate more samples."
        )
    return generated.cpu().double().numpy(), real.cpu().double().numpy()


def _in_joint_span(
    first: NDArray[np.float64], second: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    basis, _ = np.linalg.qr(np.concatenate([first, second]).T)
    return first @ basis, second @ basis


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, which clean-fid draws from, and restore it afterwards."""
    state = np.random.get_state()  # noqa: NPY002 - clean-fid uses the global generator
    np.random.seed(seed)  # noqa: NPY002 - the same
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002 - the same


class SetDistance(_IndexedMetric):
    """Base of the distances between sets: collects the features of both sets, each sample once.

    Metrics on the same network hold the same states, so a collection may update them as one group
    (`i2am_train.metrics.registry.image_metrics`).

    Args:
        network: a name in `i2am_train.metrics.features.FEATURE_NETWORKS`.

    Raises:
        ConfigError: there is no such network.
        WeightsMissingError: its weights are missing and cannot be downloaded.
    """

    higher_is_better = False
    _distance: Callable[[Tensor, Tensor], Tensor]
    generated: list[Tensor]
    real: list[Tensor]

    def __init__(self, network: str = "efficientnet_lite0") -> None:
        super().__init__()
        feature_network(network)
        self.network = network
        self.add_state("generated", default=[], dist_reduce_fx="cat")
        self.add_state("real", default=[], dist_reduce_fx="cat")

    def update(
        self,
        generated: UInt8[Tensor, "batch 3 height width"],
        real: UInt8[Tensor, "batch 3 height width"],
        index: Int[Tensor, " samples"],
    ) -> None:
        """Add a batch of both sets; ``index`` holds each sample's position in the dataset.

        Both must have one size: real images at another size than the generated ones would measure the resizing too (the
        paper's FID did).
        """
        check_image_pair(generated, real)
        self._remember(
            index, generated=image_features(generated, self.network), real=image_features(real, self.network)
        )

    def compute(self) -> Float[Tensor, ""]:
        """The distance between the two sets."""
        return self._distance(*self._gathered("generated", "real")).to(self.device)


class FrechetDistance(SetDistance):
    """`frechet_distance` of all images of all processes."""

    _distance = staticmethod(frechet_distance)


class KernelDistance(SetDistance):
    """`kernel_distance` of all images of all processes."""

    _distance = staticmethod(kernel_distance)
