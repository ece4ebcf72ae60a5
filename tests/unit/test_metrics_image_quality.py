"""Image quality: values that can be checked by hand, invariances, bad input, few samples, samples counted once."""

# ruff: noqa: NPY002 - clean-fid draws from numpy's global generator, so the tests must too

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import alexnet

from i2am_train.errors import ConfigError, DataError, WeightsMissingError
from i2am_train.metrics import features
from i2am_train.metrics.features import image_features, resized
from i2am_train.metrics.image_quality import (
    FrechetDistance,
    KernelDistance,
    MeanImageMetric,
    PerceptualDistance,
    SetDistance,
    first_of_each,
    frechet_distance,
    kernel_distance,
    ssim,
)
from i2am_train.metrics.registry import available_image_metrics, image_metric, image_metrics, image_pair_score
from tests.support.published_files import publish


def random_images(batch: int, seed: int, height: int = 64, width: int = 48) -> Tensor:
    """Smooth random images, so that learned distances see more than noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 8, 6, generator=generator)
    size = (height, width)
    return (torch.nn.functional.interpolate(coarse, size, mode="bilinear") * 255).to(torch.uint8)


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A torch hub without files on a machine without network; gives its checkpoint folder."""

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    yield folder
    features.loaded.cache_clear()


def test_equal_images_score_perfectly() -> None:
    """SSIM of an image with itself is 1, the perceptual distance 0, for every sample."""
    images = random_images(3, seed=0)
    torch.testing.assert_close(ssim(images, images), torch.ones(3))
    torch.testing.assert_close(PerceptualDistance("stlpips")(images, images), torch.zeros(3))


def test_scores_worsen_with_noise() -> None:
    """More noise gives a lower SSIM and a larger perceptual distance, sample by sample."""
    images = random_images(2, seed=0)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    slight, strong = ((images + deviation * noise).clamp(0, 255).to(torch.uint8) for deviation in (5.0, 40.0))
    stlpips = PerceptualDistance("stlpips")
    assert (ssim(slight, images) > ssim(strong, images)).all()
    assert (stlpips(slight, images) < stlpips(strong, images)).all()


@pytest.mark.parametrize("name", ["ssim", "stlpips"])
def test_splitting_a_batch_changes_nothing(name: str) -> None:
    """A sample has the same score alone and in a batch."""
    generated, real = random_images(3, seed=0), random_images(3, seed=1)
    score = image_pair_score(name)
    alone = torch.cat([score(generated[i : i + 1], real[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(score(generated, real), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ssim", "stlpips"])
def test_autocast_does_not_lower_the_precision(name: str) -> None:
    """Under bfloat16 autocast the scores are bit-identical float32."""
    generated, real = random_images(2, seed=0), random_images(2, seed=1)
    score = image_pair_score(name)
    expected = score(generated, real)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(score(generated, real), expected, rtol=0, atol=0)
    assert expected.dtype == torch.float32


@pytest.mark.parametrize(
    ("generated", "real", "match"),
    [
        (torch.zeros(2, 3, 64, 48), torch.zeros(2, 3, 64, 48), "need uint8 images"),
        (
            torch.zeros(2, 3, 64, 48, dtype=torch.uint8),
            torch.zeros(2, 3, 128, 96, dtype=torch.uint8),
            "Resize the real images",
        ),
        (
            torch.zeros(2, 1, 64, 48, dtype=torch.uint8),
            torch.zeros(2, 1, 64, 48, dtype=torch.uint8),
            r"\[batch, 3, height, width\]",
        ),
    ],
)
def test_wrong_images_are_refused(generated: Tensor, real: Tensor, match: str) -> None:
    """Float images, unequal sizes and grey images are errors that say what to do."""
    with pytest.raises(DataError, match=match):
        features.check_image_pair(generated, real)


@pytest.mark.parametrize(("name", "smallest"), [("ssim", "11x11"), ("stlpips", "32x32")])
def test_too_small_images_are_refused(name: str, smallest: str) -> None:
    """Images smaller than the window or the network allows are an error with both sizes."""
    images = random_images(2, seed=0, height=64, width=8)
    with pytest.raises(DataError, match=f"{name} needs .* at least {smallest} pixels, found 64x8"):
        image_pair_score(name)(images, images)


def test_mean_counts_each_sample_once_in_any_order() -> None:
    """Another order, another batching and a repeated sample give the same number, bit for bit."""
    generated, real, index = random_images(4, seed=0), random_images(4, seed=1), torch.arange(4)
    whole = MeanImageMetric(ssim)
    whole.update(generated, real, index)
    parts = MeanImageMetric(ssim)
    for rows in (torch.tensor([3, 0]), torch.tensor([2, 1, 3])):
        parts.update(generated[rows], real[rows], index[rows])
    assert parts.compute().item() == whole.compute().item()
    assert whole.compute().item() == pytest.approx(ssim(generated, real).mean().item())


def test_two_processes_equal_one() -> None:
    """Merging the states of two halves, one sample in both, gives the mean of the whole."""
    generated, real, index = random_images(5, seed=0), random_images(5, seed=1), torch.arange(5)
    whole, first, second = (MeanImageMetric(ssim) for _ in range(3))
    whole.update(generated, real, index)
    first.update(generated[0::2], real[0::2], index[0::2])
    rows = torch.tensor([1, 3, 0])
    second.update(generated[rows], real[rows], index[rows])
    first.merge_state(second)
    assert first.compute().item() == whole.compute().item()


def test_reset_forgets() -> None:
    """After a reset only new samples count; computing without any is an error."""
    images, other = random_images(2, seed=0), random_images(2, seed=1)
    metric = MeanImageMetric(ssim)
    metric.update(images, other, torch.arange(2))
    metric.reset()
    metric.update(images, images, torch.arange(2))
    assert metric.compute().item() == 1.0
    metric.reset()
    with (
        pytest.warns(UserWarning, match="before the ``update`` method"),
        pytest.raises(DataError, match="has seen no images"),
    ):
        metric.compute()


def test_index_must_fit_the_batch() -> None:
    """A forgotten or wrong index is refused instead of silently miscounting."""
    images = random_images(3, seed=0)
    with pytest.raises(DataError, match="got 3 images and an index of shape"):
        MeanImageMetric(ssim).update(images, images, torch.arange(2))


def test_first_of_each_keeps_the_first_occurrence() -> None:
    """Positions come by ascending index, and of repeated ones the earliest."""
    assert first_of_each(torch.tensor([4, 2, 4, 2, 9])).tolist() == [1, 0, 4]
    assert first_of_each(torch.tensor([], dtype=torch.int64)).tolist() == []


def test_networks_stay_out_of_checkpoints_and_random_streams() -> None:
    """A metric has no parameters and no state dict; loading its network draws no random number."""
    features.loaded.cache_clear()
    images = random_images(2, seed=0)
    before = torch.get_rng_state()
    metric = image_metric("stlpips")
    metric.update(images, images, torch.arange(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert list(metric.parameters()) == []
    assert metric.state_dict() == {}
    network = features.loaded("stlpips", torch.device("cpu"))
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_metrics_can_be_pickled() -> None:
    """A metric travels to another process with its state, without its network."""
    images = random_images(2, seed=0)
    metric = image_metric("stlpips")
    metric.update(images, images, torch.arange(2))
    payload = pickle.dumps(metric)
    assert len(payload) < 20_000
    copy = pickle.loads(payload)  # noqa: S301 - our own bytes
    assert copy.compute().item() == metric.compute().item()


@pytest.mark.parametrize(
    ("name", "file"),
    [("lpips", "alexnet-owt-7be5be79.pth"), ("fid", "inception-2015-12-05.pt"), ("kid", "inception-2015-12-05.pt")],
)
def test_missing_weights_name_the_file_and_its_place(empty_hub: Path, name: str, file: str) -> None:
    """Without network, asking for the metric fails at once, and says what to put where."""
    with pytest.raises(WeightsMissingError, match=file) as caught:
        image_metric(name)
    assert str(empty_hub / file) in str(caught.value)
    assert "stlpips" in str(caught.value)


def test_damaged_weights_are_named(empty_hub: Path) -> None:
    """A truncated file is reported as such, with its path."""
    (empty_hub / "alexnet-owt-7be5be79.pth").write_bytes(b"PK\x03\x04 not the rest")
    images = random_images(2, seed=0)
    with pytest.raises(WeightsMissingError, match=r"cannot be read: .* Delete the file"):
        PerceptualDistance("lpips")(images, images)


def test_lpips_reads_the_file_that_the_error_names(empty_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an AlexNet file at the named place lpips works offline, and equal images are at 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = alexnet().state_dict()
    # The unused classifier is stored as one repeated number: 1 MB of file, not 244.
    state = {
        key: value if key.startswith("features") else torch.zeros(1).expand(value.shape) for key, value in state.items()
    }
    file = empty_hub / "alexnet-owt-7be5be79.pth"
    torch.save(state, file)
    publish(monkeypatch, "ALEXNET_WEIGHTS", file)
    generated, real = random_images(2, seed=0), random_images(2, seed=1)
    lpips = PerceptualDistance("lpips")
    assert (lpips(generated, real) > 0).all()
    assert lpips(real, real).tolist() == [0.0, 0.0]
    own = packages_own_lpips(state)
    with torch.no_grad():
        expected = own(generated / 127.5 - 1, real / 127.5 - 1).flatten()
    assert torch.equal(lpips(generated, real), expected)


def packages_own_lpips(trunk: dict[str, Tensor]) -> torch.nn.Module:
    """LPIPS as its package builds it, but for the trunk, which it would fetch."""
    import lpips

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        network: torch.nn.Module = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for name, weight in network.net.named_parameters():
        weight.data.copy_(trunk["features." + name.split(".", 1)[1]])
    return network


def test_stlpips_is_the_packages_own() -> None:
    """Reading its file here instead of there changes no weight."""
    from stlpips_pytorch import stlpips

    own = stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False).state_dict()
    ours = features.loaded("stlpips", torch.device("cpu")).state_dict()
    assert own.keys() == ours.keys()
    assert all(torch.equal(own[name], ours[name]) for name in own)


@pytest.mark.long
def test_collection_gives_what_the_single_metrics_give() -> None:
    """Metrics updated together equal metrics updated alone, though two of them share features."""
    names = available_image_metrics(offline_only=True)
    generated, real = random_images(4, seed=0), random_images(4, seed=1)
    together = image_metrics(names)
    for rows in (slice(0, 2), slice(2, 4)):
        together.update(generated[rows], real[rows], torch.arange(4)[rows])
    values = together.compute()
    assert sorted(values) == sorted(names)
    for name in names:
        alone = image_metric(name)
        alone.update(generated, real, torch.arange(4))
        assert values[name].item() == pytest.approx(alone.compute().item(), rel=1e-4)


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
def test_set_distances_of_two_processes_equal_one(metric_class: type[SetDistance]) -> None:
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

    monkeypatch.setattr("i2am_train.metrics.image_quality.image_features", counted)
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
