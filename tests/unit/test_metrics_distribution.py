"""Set distances: invariance to order and batching, determinism, few samples, Inception."""

# ruff: noqa: NPY002 - clean-fid draws from numpy's global generator, so the tests must too

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from i2am_train.errors import ConfigError, DataError
from i2am_train.metrics import features
from i2am_train.metrics.distribution import (
    FrechetDistance,
    KernelDistance,
    SetDistance,
    frechet_distance,
    kernel_distance,
)
from i2am_train.metrics.features import image_features, resized
from i2am_train.metrics.registry import image_metric, image_metrics
from tests.support.published_files import publish


def random_images(batch: int, seed: int) -> Tensor:
    """Smooth random images of 64x48 pixels."""
    coarse = torch.rand(batch, 3, 8, 6, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, (64, 48), mode="bilinear") * 255).to(torch.uint8)


def random_features(samples: int, dimension: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated non-negative features, like those behind a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(99))
    rows = torch.randn(samples, dimension, generator=generator) @ mixing / dimension**0.5
    return (rows + shift).clamp(min=0)


@pytest.mark.parametrize(("samples", "dimension"), [(40, 12), (9, 50)])
def test_equal_sets_are_at_distance_zero(samples: int, dimension: int) -> None:
    """The Fréchet distance of a set to itself is 0, also with fewer samples than features."""
    rows = random_features(samples, dimension, seed=0)
    assert frechet_distance(rows, rows).item() == pytest.approx(0.0, abs=1e-4)


def test_frechet_distance_of_known_gaussians() -> None:
    """Equal means, deviations 1 and 3 in one direction: (1 - 3)^2; a shift by (3, 4) adds 25."""
    square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]) * 0.75**0.5
    stretched = square * torch.tensor([3.0, 1.0])
    assert frechet_distance(stretched, square).item() == pytest.approx(4.0, abs=1e-5)
    shifted = stretched + torch.tensor([3.0, 4.0])
    assert frechet_distance(shifted, square).item() == pytest.approx(29.0, abs=1e-4)


def test_unused_features_add_nothing() -> None:
    """Features that are always zero (singular covariances) leave the distance as it was."""
    first, second = random_features(40, 7, seed=0), random_features(40, 7, seed=1, shift=0.3)
    padded = [torch.cat([rows, torch.zeros(40, 5)], dim=1) for rows in (first, second)]
    expected = frechet_distance(first, second).item()
    assert frechet_distance(*padded).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_row_order_does_not_matter(distance: type) -> None:
    """Permuting either set leaves both distances as they were."""
    first, second = random_features(20, 50, seed=0), random_features(20, 50, seed=1, shift=0.3)
    permuted = distance(first.flip(0), second.roll(3, dims=0)).item()
    assert permuted == pytest.approx(distance(first, second).item(), rel=1e-6)


def test_kernel_distance_is_deterministic_and_leaves_numpy_alone() -> None:
    """Random subsets are drawn with a fixed seed, and numpy's stream goes on undisturbed."""
    first, second = random_features(9, 6, seed=0), random_features(14, 6, seed=1, shift=0.3)
    np.random.seed(5)
    expected = np.random.rand(3)
    np.random.seed(5)
    values = {kernel_distance(first, second).item() for _ in range(3)}
    assert len(values) == 1
    np.testing.assert_array_equal(np.random.rand(3), expected)


def test_kernel_distance_by_hand() -> None:
    """Two points each in one dimension, straight from the unbiased estimator's definition."""
    generated, real = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    within_generated, within_real = (0 * 1 + 1) ** 3, (1 * 2 + 1) ** 3
    between = ((0 + 1) ** 3 + (0 + 1) ** 3 + (1 + 1) ** 3 + (2 + 1) ** 3) / 4
    expected = within_generated + within_real - 2 * between
    assert kernel_distance(generated, real).item() == pytest.approx(expected)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_a_single_image_is_not_a_set(distance: type) -> None:
    """One image has no covariance: an error that says how many were found, not NaN."""
    with pytest.raises(DataError, match="at least 2 images in each, found 1 generated and 5 real"):
        distance(random_features(1, 6, seed=0), random_features(5, 6, seed=1))


@pytest.mark.parametrize("metric_class", [FrechetDistance, KernelDistance])
def test_batches_order_and_repetition_change_nothing(metric_class: type[SetDistance]) -> None:
    """Other batches, another order and a repeated sample give the number of one pass."""
    generated, real, index = random_images(5, seed=0), random_images(5, seed=1), torch.arange(5)
    whole, parts = metric_class(), metric_class()
    whole.update(generated, real, index)
    for rows in (torch.tensor([4, 1]), torch.tensor([0, 4, 2, 3])):
        parts.update(generated[rows], real[rows], index[rows])
    assert parts.compute().item() == pytest.approx(whole.compute().item(), rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("metric_class", [FrechetDistance, KernelDistance])
def test_two_processes_equal_one(metric_class: type[SetDistance]) -> None:
    """Merged states of two interleaved halves, one sample in both, give the number of the whole."""
    generated, real, index = random_images(5, seed=0), random_images(5, seed=1), torch.arange(5)
    whole, first, second = metric_class(), metric_class(), metric_class()
    whole.update(generated, real, index)
    first.update(generated[0::2], real[0::2], index[0::2])
    rows = torch.tensor([1, 3, 0])
    second.update(generated[rows], real[rows], index[rows])
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(whole.compute().item(), rel=1e-4)


@pytest.mark.long
def test_images_of_the_same_kind_are_nearer_than_degraded_ones() -> None:
    """Other images of the same kind are nearer to the real set than its own, grown noisy."""
    real, same_kind, index = random_images(6, seed=1), random_images(6, seed=0), torch.arange(6)
    noise = torch.randint(-60, 61, real.shape, generator=torch.Generator().manual_seed(2))
    degraded = (real.int() + noise).clamp(0, 255).to(torch.uint8)
    for name in ("fd_efficientnet_lite0", "kd_efficientnet_lite0"):
        near, far = image_metric(name), image_metric(name)
        near.update(same_kind, real, index)
        far.update(degraded, real, index)
        assert near.compute() < far.compute()


def test_features_are_computed_once_for_both_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a collection, Fréchet and kernel distance share one pass through the network."""
    calls = []

    def counted(images: Tensor, network: str) -> Tensor:
        calls.append(network)
        return images.float().mean(dim=(2, 3))

    monkeypatch.setattr("i2am_train.metrics.distribution.image_features", counted)
    metrics = image_metrics(["fd_efficientnet_lite0", "kd_efficientnet_lite0"])
    for seed in range(3):
        images = random_images(2, seed)
        metrics.update(images, images, torch.arange(2) + 2 * seed)
    # torchmetrics updates every metric at the first batch, the leaders of the groups afterwards.
    assert len(calls) <= 2 * (3 + 1)
    assert set(metrics.compute()) == {"fd_efficientnet_lite0", "kd_efficientnet_lite0"}


def test_resizing_is_square_and_keeps_the_range() -> None:
    """Images of any size become size x size, unrounded, within [0, 255]."""
    images = torch.randint(0, 256, (2, 3, 40, 30), dtype=torch.uint8)
    pixels = resized(images, 56)
    assert pixels.shape == (2, 3, 56, 56)
    assert pixels.dtype == torch.float32
    assert pixels.min() >= 0
    assert pixels.max() <= 255


def test_unknown_network_is_refused() -> None:
    """A misspelled feature network is an error that lists the known ones."""
    with pytest.raises(ConfigError, match=r"'vgg16'.*efficientnet_lite0, inception_v3"):
        FrechetDistance("vgg16")


class TinyInception(nn.Module):
    """Stands in for clean-fid's TorchScript file: the same interface, 2048 features, tiny."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 2048, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Features of scaled images."""
        return self.layers(images)


@pytest.fixture
def hub_with_inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TinyInception]:
    """A torch hub that holds a stand-in for the Inception file; gives the stand-in."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = TinyInception().eval()
    network.requires_grad_(requires_grad=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit")
        torch.jit.save(torch.jit.script(network), str(folder / "inception-2015-12-05.pt"))
    publish(monkeypatch, "INCEPTION_WEIGHTS", folder / "inception-2015-12-05.pt")
    features.loaded.cache_clear()
    yield network
    features.loaded.cache_clear()


def test_fid_and_kid_run_the_same_code_on_inception(hub_with_inception: TinyInception) -> None:
    """With the file at the named place both work, on pixels scaled as clean-fid scales them."""
    generated, real, index = random_images(4, seed=0), random_images(4, seed=1), torch.arange(4)
    expected = hub_with_inception((resized(generated, 299) - 128) / 128).flatten(1)
    torch.testing.assert_close(image_features(generated, "inception_v3"), expected)
    for name, distance in (("fid", frechet_distance), ("kid", kernel_distance)):
        metric = image_metric(name)
        metric.update(generated, real, index)
        rows = [image_features(images, "inception_v3") for images in (generated, real)]
        torch.testing.assert_close(metric.compute(), distance(*rows))
