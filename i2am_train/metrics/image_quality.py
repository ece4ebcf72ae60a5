"""Likeness of a generated image to the real one, per sample: SSIM and learned perceptual distances.

These compare a generated image with its ground truth, so they are for paired evaluation; for
unpaired try-on there is no truth, only the set distances of `i2am_train.metrics.distribution`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from i2am_train.errors import DataError
from i2am_train.metrics.features import IMAGES_PER_PASS, check_image_pair, loaded, perceptual_network
from i2am_train.metrics.indexed import IndexedMetric

SSIM_SIGMA = 1.5
SSIM_WINDOW = 11
"""Gaussian window of Wang et al. 2004, section III-B: 11x11, deviation 1.5."""

ImagePairScore = Callable[[Tensor, Tensor], Tensor]
"""Takes generated and real uint8 images [batch, 3, height, width], gives one value per sample."""


def ssim(
    generated: UInt8[Tensor, "batch 3 height width"], real: UInt8[Tensor, "batch 3 height width"]
) -> Float[Tensor, " batch"]:
    """Structural similarity (Wang et al. 2004) per sample, in [-1, 1]; 1 for equal images.

    Mean over the three colour channels and over the windows that lie inside the image, as
    pytorch-msssim (the paper's choice) and scikit-image average it. torchmetrics' own mean includes
    windows that reach into a mirrored border; hence its map is taken, and averaged here.

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

    ``stlpips`` is ShiftTolerant-LPIPS (Ghildyal and Liu 2022), AlexNet, whose weights the package
    stlpips-pytorch carries. ``lpips`` is LPIPS 0.1 (Zhang et al. 2018), AlexNet, as the paper uses;
    its trunk is torchvision's and has to be downloaded. The two scales are not comparable.

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
        _require_size(generated, perceptual_network(self.network).smallest, self.network)
        module = loaded(self.network, generated.device)
        pairs = zip(*(torch.split(x, IMAGES_PER_PASS) for x in (generated, real)), strict=True)
        with torch.no_grad(), torch.autocast(generated.device.type, enabled=False):
            distances = [module(_signed(first), _signed(second)) for first, second in pairs]
        return torch.cat(distances).flatten()


def _signed(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1.0


class MeanImageMetric(IndexedMetric):
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
        """Mean over all samples of all processes."""
        (values,) = self._gathered("values")
        return values.double().mean().float()
