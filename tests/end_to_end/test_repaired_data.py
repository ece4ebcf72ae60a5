"""Pictures that break: named before training starts, and once they are replaced the same command goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from i2am_train.config.store import compose
from i2am_train.data.cache import CacheLayout, LatentCache
from i2am_train.data.picture_files import UnreadablePictureError
from i2am_train.errors import DataError, RunFolderError
from i2am_train.training.encode_dataset import make_cache
from i2am_train.workflows.train import train

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("default"),  # Lightning's and torch's own deprecations
]


@pytest.fixture
def data(small_dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_dataset, tmp_path / "data"))


def spoilt(path: Path) -> bytes:
    """Damages the pixels of a PNG, whose header and end stay whole; its content before."""
    content = path.read_bytes()
    place = content.index(b"IDAT") + 8
    path.write_bytes(content[:place] + bytes(len(content) - place - 12) + content[-12:])
    return content


def test_broken_pictures_are_named_before_a_folder_is_made(data: Path, training: list[str], tmp_path: Path) -> None:
    """All of them at once, those of validation, too; and each command that reads them says so."""
    for name in ("image/00001_00.jpg", "cloth/00018_00.jpg"):
        file = data / "train" / name
        file.write_bytes(file.read_bytes()[:-30])
    (data / "train/cloth-mask/00002_00.jpg").write_bytes(b"<html>")
    config = compose("train", [*training, f"data.root={data}", f"output={tmp_path / 'run'}"])
    said = r"3 of the 160 pictures .*cloth/00018_00\.jpg is cut off .*cloth-mask/00002_00\.jpg is no picture"
    with pytest.raises(UnreadablePictureError, match=said):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_a_repaired_picture(
    data: Path, training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage that only decoding shows stops the run; a mask of another size takes the file's place."""
    options = [*training, f"data.root={data}", f"output={tmp_path / 'run'}", "data.workers=1"]
    mask = data / "train/agnostic-mask/00003_00_mask.png"
    content = spoilt(mask)
    with pytest.raises(DataError, match=r"00003_00_mask\.png cannot be decoded"):
        train(compose("train", options))
    mask.write_bytes(content + b"\0")
    other = data / "train/agnostic-mask/00004_00_mask.png"
    sound = other.read_bytes()
    other.write_bytes(sound + b"\0")
    with pytest.raises(RunFolderError, match=r"2 changed \(train/agnostic-mask/00003_00_mask\.png\)"):
        train(compose("train", options))
    other.write_bytes(sound)
    with pytest.warns(UserWarning, match="1 files that the run .* could not read were replaced"):
        folder = train(compose("train", options))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["repaired"] == ["train/agnostic-mask/00003_00_mask.png"]
    assert manifest["finished"]


def test_a_cache_goes_on_with_a_repaired_picture(data: Path, make_small_model: Any, tmp_path: Path) -> None:
    """What was encoded stays, and the cache then belongs to the repaired data."""
    mask = data / "train/gt_cloth_warped_mask/00013_00.jpg"
    content = mask.read_bytes()
    model, output, layout = make_small_model(), tmp_path / "cache", CacheLayout(shard_samples=8)
    correspondence = data / "train/correspondence/00013_00.png"
    whole = spoilt(correspondence)
    with pytest.raises(DataError, match=r"correspondence/00013_00\.png cannot be decoded"):
        make_cache(model, data, output, layout, batch_size=4)
    first = (output / "train-000000.safetensors").stat().st_mtime_ns
    correspondence.write_bytes(whole + b"\0")
    mask.write_bytes(content + b"\0")
    with pytest.raises(DataError, match="already holds another cache: data"):
        make_cache(model, data, output, layout, batch_size=4)
    mask.write_bytes(content)
    index = make_cache(model, data, output, layout, batch_size=4)
    assert (output / "train-000000.safetensors").stat().st_mtime_ns == first
    assert LatentCache(output).index.key == index.key
    assert make_cache(model, data, output, layout, batch_size=4).key == index.key
