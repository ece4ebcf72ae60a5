"""No file of weights runs code, whoever it is read for: one hostile file for every door."""

from __future__ import annotations

import json
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from i2am_train.callbacks.checkpoints import AtomicCheckpointIO
from i2am_train.config.models import InitConfig
from i2am_train.detection import detectors
from i2am_train.detection.detectors import load_detector
from i2am_train.errors import CheckpointError, I2AMError, WeightsMissingError
from i2am_train.metrics import features
from i2am_train.models.annotators import HumanParser, ViTPoseEstimator
from i2am_train.models.assembly import assemble
from i2am_train.models.catvton import load_catvton
from i2am_train.models.ip_adapter import load_ip_adapter
from i2am_train.models.paint_by_example import PaintByExample, read_pipeline
from i2am_train.models.pretrained import load_encoder
from i2am_train.models.traceable import Source
from i2am_train.models.tryon import TryOnModel
from i2am_train.weight_files import PublishedFile, read_adapter, read_weights
from tests.support.detectors import tiny_yolos
from tests.support.pipelines import tiny_catvton, tiny_ip_adapter
from tests.support.published_files import publish

Door = Callable[[Path], Any]
SSD = "ssdlite320_mobilenet_v3_large"


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that hostile weights make; a pickle that is read as one shows that it works."""
    path = tmp_path / "ran"
    torch.save({"x": Harmful(path)}, tmp_path / "proof.pt")
    torch.load(tmp_path / "proof.pt", weights_only=False)
    assert path.exists()
    path.unlink()
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of torch hub's files."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    features.loaded.cache_clear()
    yield folder
    features.loaded.cache_clear()


def pickled(folder: Path) -> Path:
    """The one file of weights in a folder, as the pickle that libraries would read in its place."""
    from safetensors.torch import load_file

    (file,) = folder.glob("*.safetensors")
    stem = "diffusion_pytorch_model" if file.stem.startswith("diffusion") else "pytorch_model"
    torch.save(load_file(file), folder / f"{stem}.bin")
    file.unlink()
    return folder / f"{stem}.bin"


def poison(file: Path, marker: Path) -> None:
    """Adds an object to a pickle that runs a program when it is read."""
    content = torch.load(file, weights_only=True)
    torch.save({**content, "x": Harmful(marker)}, file)


@pytest.mark.parametrize("part", ["unet", "vae", "reference_encoder", "projector"])
def test_a_checkpoint(part: str, small_checkpoint: Path, tmp_path: Path, marker: Path) -> None:
    """``init`` and ``checkpoint`` of every command; the same folder without the object is read."""
    folder = tmp_path / "model"
    shutil.copytree(small_checkpoint, folder)
    file = pickled(folder / part)
    TryOnModel.from_pretrained(folder)
    poison(file, marker)
    with pytest.raises(CheckpointError, match=rf"{part}.* is a pickle with more than tensors in it"):
        TryOnModel.from_pretrained(folder)
    assert not marker.exists()


SINGLE_FILES: dict[str, Door] = {
    "init unet": lambda f: assemble(InitConfig(unet=str(f), output=f.parent / "m")),
    "init custom": lambda f: assemble(InitConfig(custom=f, output=f.parent / "m")),
    "init paint_by_example": read_pipeline,
    "any file": read_weights,
    "any adapter": read_adapter,
    "detectors @FILE": lambda f: load_detector(f"torchvision:{SSD}@{f}"),
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("door", SINGLE_FILES)
def test_single_files(door: str, old: bool, tmp_path: Path, marker: Path) -> None:
    """Both formats of torch."""
    file = tmp_path / "weights.pth"
    content = {"state_dict": {"a": torch.ones(2)}, "x": Harmful(marker)}
    torch.save(content, file, _use_new_zipfile_serialization=not old)
    with pytest.raises(CheckpointError, match="pickle with more than tensors in it"):
        SINGLE_FILES[door](file)
    assert not marker.exists()


def test_a_zip_behind_a_harmless_pickle(tmp_path: Path, marker: Path) -> None:
    """torch.hub would unpack the one file in a zip archive, even where the archive follows harmless tensors."""
    import io
    import zipfile

    file, hostile = tmp_path / "weights.pth", io.BytesIO()
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    torch.save({"x": Harmful(marker)}, hostile, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("weights.pth", hostile.getvalue())
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(file)
    assert not marker.exists()


@pytest.mark.parametrize("known", [True, False], ids=["the digest is right", "another file"])
def test_alexnet_of_lpips(known: bool, hub: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put by hand where our own message says; eight digits of a digest are soon forged."""
    file = hub / features.ALEXNET_WEIGHTS.name
    torch.save({"features.0.weight": torch.ones(2), "x": Harmful(marker)}, file)
    if known:
        publish(monkeypatch, "ALEXNET_WEIGHTS", file)
    expected = "pickle with more than tensors" if known else "It was not opened"
    with pytest.raises(WeightsMissingError, match=expected):
        features.loaded("lpips", torch.device("cpu"))
    assert not marker.exists()


def test_inception_is_opened_only_as_the_known_file(hub: Path) -> None:
    """TorchScript is a program; all of its digest is compared before."""
    digest = features.INCEPTION_WEIGHTS.sha256
    assert len(digest) == 64
    file = hub / features.INCEPTION_WEIGHTS.name
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit")
        torch.jit.save(torch.jit.script(nn.Identity()), str(file))
    for use in (features.feature_network, lambda name: features.loaded(name, torch.device("cpu"))):
        with pytest.raises(WeightsMissingError, match=rf"expected {digest}; .*It was not opened"):
            use("inception_v3")


@pytest.mark.parametrize("known", [True, False], ids=["the digest is right", "another file"])
def test_detectors_of_torchvision(known: bool, hub: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision itself would unpickle its file, and check its digest only after a download of its own."""
    import torchvision

    url = torchvision.models.get_model_weights(SSD).DEFAULT.url
    file = hub / url.rpartition("/")[2]
    torch.save({"a": torch.ones(2), "x": Harmful(marker)}, file)
    if known:
        forged = staticmethod(lambda name, url, **_: PublishedFile(name, url, sha256=""))
        monkeypatch.setattr(detectors, "PublishedFile", forged)
    expected = "pickle with more than tensors" if known else "It was not opened"
    with pytest.raises(CheckpointError, match=expected):
        load_detector(f"torchvision:{SSD}")
    assert not marker.exists()


def test_torchvision_s_own_tensors_reach_its_own_network(tmp_path: Path) -> None:
    """A file as torchvision names it gives what torchvision builds of it, norms included."""
    import torchvision

    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    weights = torchvision.models.get_model_weights(name).DEFAULT
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    state = OrderedDict((n, v) for n, v in plain.state_dict().items() if "num_batches" not in n)
    torch.save(state, tmp_path / "own.pth")
    built: Any = load_detector(f"torchvision:{name}@{tmp_path / 'own.pth'}")
    frozen = torchvision.ops.misc.FrozenBatchNorm2d
    assert any(isinstance(module, frozen) for module in built.model.modules())
    assert all(torch.equal(built.model.state_dict()[n], v) for n, v in state.items())
    assert "get_state_dict" not in vars(weights)


def transformers_folders(tmp_path: Path) -> dict[str, tuple[Path, Door]]:
    """Folders of transformers, and what reads them."""
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        SegformerConfig,
        SegformerForSemanticSegmentation,
        SegformerImageProcessor,
        VitPoseConfig,
        VitPoseForPoseEstimation,
        VitPoseImageProcessor,
    )

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**small, image_size=28)).save_pretrained(tmp_path / "encoder")
    labels = {0: "background", 1: "hat"}
    SegformerForSemanticSegmentation(
        SegformerConfig(
            num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[8], num_attention_heads=[1],
            patch_sizes=[7], strides=[4], mlp_ratios=[1], decoder_hidden_size=8, id2label=labels,
        )
    ).save_pretrained(tmp_path / "parser")  # fmt: skip
    SegformerImageProcessor().save_pretrained(tmp_path / "parser")
    backbone = {"model_type": "vitpose_backbone", **small, "image_size": [32, 32], "patch_size": [16, 16]}
    pose = VitPoseConfig(backbone_config=backbone, num_labels=17, id2label={n: str(n) for n in range(17)})
    VitPoseForPoseEstimation(pose).save_pretrained(tmp_path / "estimator")
    VitPoseImageProcessor().save_pretrained(tmp_path / "estimator")
    return {
        "init encoder": (tmp_path / "encoder", lambda folder: load_encoder(str(folder))),
        "detectors": (
            tiny_yolos(tmp_path / "detector", (0.5, 0.5, 0.5, 0.5), 0.9),
            lambda folder: load_detector(str(folder)),
        ),
        "parser": (tmp_path / "parser", lambda folder: HumanParser.from_pretrained(str(folder), "cpu")),
        "estimator": (tmp_path / "estimator", lambda folder: ViTPoseEstimator.from_pretrained(str(folder), "cpu")),
    }


def test_folders_of_transformers(tmp_path: Path, marker: Path) -> None:
    """Pickles are read as tensors alone; code that lies in the folder is not run, with or without a terminal."""
    for name, (folder, door) in transformers_folders(tmp_path).items():
        file = pickled(folder)
        door(folder)
        whole = file.read_bytes()
        poison(file, marker)
        with pytest.raises(CheckpointError, match="pickle with more than tensors in it"):
            door(folder)
        file.write_bytes(whole)
        config = json.loads((folder / "config.json").read_text())
        code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
        (folder / "hostile.py").write_text(code)
        every = ("AutoConfig", "AutoModel", "AutoModelForObjectDetection", "AutoImageProcessor")
        config |= {"model_type": "hostile", "auto_map": dict.fromkeys(every, "hostile.Hostile")}
        (folder / "config.json").write_text(json.dumps(config))
        with suppress(CheckpointError):  # or read as what its own class says, without that code
            door(folder)
        assert not marker.exists(), name


def test_pipelines_of_other_models(tmp_path: Path, marker: Path, paint_by_example: Path) -> None:
    """Each network of a pipeline, adapters, and classes that an index names."""
    device = torch.device("cpu")
    base, adapter = tiny_ip_adapter(tmp_path / "ip", "ip_adapter_plus")
    canvas, attention = tiny_catvton(tmp_path / "catvton")
    painter = tmp_path / "painter"
    shutil.copytree(paint_by_example, painter)
    ip = Source(model="ip_adapter_plus", checkpoint=str(base), adapter=adapter, device=device)
    clothes = Source(model="catvton", checkpoint=str(canvas), adapter=attention, device=device)
    doors: list[tuple[Path, Callable[[], Any]]] = [
        (adapter, lambda: load_ip_adapter(ip)),
        (base / "text_encoder", lambda: load_ip_adapter(ip)),
        (canvas / "vae", lambda: load_catvton(clothes)),
        (painter / "image_encoder", lambda: PaintByExample.from_pretrained(str(painter))),
        (painter / "unet", lambda: PaintByExample.from_pretrained(str(painter))),
    ]
    for place, door in doors:
        file = pickled(place) if place.is_dir() else place
        door()
        whole = file.read_bytes()
        poison(file, marker)
        with pytest.raises(I2AMError, match="pickle with more than tensors in it"):
            door()
        file.write_bytes(whole)
        assert not marker.exists(), place
    index = base / "model_index.json"
    (tmp_path / "ip" / "hostile.py").write_text(f"open({str(marker)!r}, 'w')")
    (base / "hostile.py").write_text(f"open({str(marker)!r}, 'w')")
    index.write_text(json.dumps(json.loads(index.read_text()) | {"tokenizer": ["hostile", "Tokenizer"]}))
    with pytest.raises(CheckpointError, match="hostile"):
        load_ip_adapter(ip)
    assert not marker.exists()


def test_an_index_stays_in_its_folder(small_checkpoint: Path, tmp_path: Path) -> None:
    """An index of shards names files beside itself only."""
    folder = tmp_path / "model"
    shutil.copytree(small_checkpoint, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(folder / "elsewhere.safetensors")
    (folder / "unet" / f"{file.name}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": "../elsewhere.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=r"outside its folder .\.\./elsewhere"):
        TryOnModel.from_pretrained(folder)


def test_a_checkpoint_of_a_training(tmp_path: Path, marker: Path) -> None:
    """A run's folder may come from somebody else, too."""
    file = tmp_path / "step=1.ckpt"
    torch.save({"state_dict": {}, "x": Harmful(marker)}, file)
    with pytest.raises(CheckpointError, match="cannot be read"):
        AtomicCheckpointIO().load_checkpoint(file)
    assert not marker.exists()
