"""Per-sample image metrics: values that can be checked by hand, bad input, samples counted once."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import Tensor
from torchvision.models import alexnet

from i2am_train.errors import ConfigError, DataError, WeightsMissingError
from i2am_train.metrics import features
from i2am_train.metrics.image_quality import MeanImageMetric, PerceptualDistance, ssim
from i2am_train.metrics.indexed import first_of_each
from i2am_train.metrics.registry import (
    METRICS,
    available_image_metrics,
    image_metric,
    image_metrics,
    image_pair_score,
    metric_info,
)
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


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    """A misspelled metric is an error that lists what there is."""
    with pytest.raises(ConfigError, match=r"'ssmi'.*ssim, stlpips, lpips, fd_efficientnet_lite0"):
        image_metric("ssmi")
    with pytest.raises(ConfigError, match=r"'imacs'.*imacs_g, imacs_r"):
        metric_info("imacs")
    with pytest.raises(ConfigError, match=r"'fid'.*ssim, stlpips, lpips"):
        image_pair_score("fid")
    with pytest.raises(ConfigError, match=r"'dists'.*stlpips, lpips"):
        PerceptualDistance("dists")


def test_registry_describes_every_image_metric() -> None:
    """Each image metric that can be made is described, and each described one can be made."""
    assert set(available_image_metrics()) == {k for k, v in METRICS.items() if v.group == "image"}
    for name in available_image_metrics(offline_only=True):
        assert image_metric(name).higher_is_better in {None, metric_info(name).higher_is_better}
    assert metric_info("center_spread").higher_is_better is None
    assert metric_info("pck_1").as_json() == {
        "label": "PCK@1",
        "higher_is_better": True,
        "digits": 3,
        "group": "attention",
        "unit": "",
        "description": "Share of garment patches whose attention centre is 1 patch off at most",
    }


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
