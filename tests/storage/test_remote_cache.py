"""A cache in object storage, read by LatentCache and trained from as a user does."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from i2am_train.config.store import compose
from i2am_train.data import cache as latent_cache
from i2am_train.data.cache import CacheLayout, LatentCache
from i2am_train.data.dataset import CachedDataset
from i2am_train.errors import ConfigError, DataError
from i2am_train.training.encode_dataset import make_cache
from i2am_train.types import Split
from i2am_train.workflows.train import train

SHARD = "train-000008.safetensors"


@pytest.fixture(scope="module")
def made(
    small_dataset: Path, make_small_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:  # fmt: skip
    """A cache of three shards of the 20 training samples, for tests that do not write to it."""
    folder = tmp_path_factory.mktemp("caches") / "plain"
    make_cache(make_small_model(), small_dataset, folder, CacheLayout(shard_samples=8), batch_size=8)
    return folder


def spoiled(cache: Path, output: Path) -> Path:
    """A copy of a cache with a flipped bit in one shard."""
    shutil.copytree(cache, output)
    content = bytearray((output / SHARD).read_bytes())
    content[len(content) // 2] ^= 0x10
    (output / SHARD).write_bytes(content)
    return output


def trained(cache: str, options: list[str], output: Path) -> dict[str, torch.Tensor]:
    """Weights after the epoch's two steps with two reading processes."""
    words = [f"data.cache={cache}", f"data.cache_copies={output.parent / 'copies'}", "data.workers=2"]
    folder = train(compose("train", [*options, *words, f"output={output}"]))
    return load_file(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture
def options(small_dataset: Path, small_checkpoint: Path) -> list[str]:
    """Two refined steps on the CPU, nothing else; a checkpoint after each."""
    return [
        "experiment=refined",
        f"data.root={small_dataset}",
        f"init={small_checkpoint}",
        "data.height=64",
        "data.width=48",
        "data.batch_size=8",
        "optimization.steps=2",
        "validation.samples=0",
        "trainer.accelerator=cpu",
        "trainer.progress_bar=false",
        "trainer.checkpoint_every_n_steps=1",
        "tracking=files",
    ]


@pytest.mark.filterwarnings("default")  # Lightning's and torch's own deprecations
def test_training_is_that_from_a_folder(storage: Any, made: Path, options: list[str], tmp_path: Path) -> None:
    """Bit by bit; while a line dies the run stops with the URL, and goes on when the line is sound."""
    url = storage.put(made, "cache")
    local = trained(str(made), options, tmp_path / "local")
    index = (made / "index.json").stat().st_size
    storage.relay.limit = 2 * index
    assert all(file.stat().st_size > 20 * index for file in made.glob("*.safetensors"))
    with pytest.raises(DataError, match=rf"{url}/train-0000\d\d.safetensors cannot be read"):
        trained(url, options, tmp_path / "remote")
    # The process that reads beside the failing one is killed, and may leave a part under a hidden name.
    assert not list((tmp_path / "copies").rglob("train-*"))
    storage.relay.limit = None
    remote = trained(url, options, tmp_path / "remote")
    assert local.keys() == remote.keys()
    assert all(torch.equal(value, remote[name]) for name, value in local.items())
    assert len(list((tmp_path / "copies").rglob("train-*"))) == 3


def test_a_flipped_bit_in_storage_is_refused(storage: Any, made: Path, small_dataset: Path, tmp_path: Path) -> None:
    """Nothing of the shard is kept; the others are read; when it is put right, so is it."""
    url = storage.put(spoiled(made, tmp_path / "spoiled"), "cache")
    data = CachedDataset(LatentCache(url, tmp_path / "copies"), small_dataset, Split.TRAIN)
    with pytest.raises(DataError, match=rf"{url}/{SHARD} is damaged: .* Copy the folder there again"):
        data[8]
    assert not list((tmp_path / "copies").rglob("*.*"))
    local = CachedDataset(LatentCache(made), small_dataset, Split.TRAIN)
    assert torch.equal(data[7]["person_mean"], local[7]["person_mean"])
    storage.put(made, "cache")
    assert torch.equal(data[8]["person_mean"], local[8]["person_mean"])


def test_a_damaged_copy_is_named(storage: Any, made: Path, tmp_path: Path) -> None:
    """The copy, the shard that it is of, and what to do; deleted, it is fetched again."""
    cache = LatentCache(storage.put(made, "cache"), tmp_path / "copies")
    cache.row(Split.TRAIN, 8)
    (copy,) = (tmp_path / "copies").rglob("*.safetensors")
    content = copy.read_bytes()
    copy.write_bytes(content[:8] + bytes(byte ^ 1 for byte in content[8:]))
    again = LatentCache(cache.place, tmp_path / "copies")
    with pytest.raises(DataError, match=rf"{copy} is damaged.* Delete this copy of {cache.place}/{SHARD}"):
        again.row(Split.TRAIN, 8)
    copy.unlink()
    again.row(Split.TRAIN, 8)
    assert copy.read_bytes() == content


def test_what_is_not_there_is_said(storage: Any, made: Path, tmp_path: Path) -> None:
    """No cache at the address, and a cache that was not copied whole."""
    part = shutil.copytree(made, tmp_path / "part")
    (part / SHARD).unlink()
    url = storage.put(part, "cache")
    with pytest.raises(DataError, match=rf"{url}/{SHARD} is missing, and the cache's index names it"):
        LatentCache(url, tmp_path / "copies").row(Split.TRAIN, 9)
    with pytest.raises(DataError, match=r"There is no cache in .*/nowhere: .* copy that folder to"):
        LatentCache(f"{storage.url}/nowhere", tmp_path / "copies")


def test_a_cache_made_anew_is_fetched_anew(
    small_dataset: Path, make_small_model: Callable[..., Any], tmp_path: Path
) -> None:
    """Another cache at the same address: its shards have names of their own among the copies."""
    model, place, copies = make_small_model(), tmp_path / "place", tmp_path / "copies"
    first = {}
    for dtype in ("float32", "float16"):
        shutil.rmtree(place, ignore_errors=True)
        make_cache(model, small_dataset, place, CacheLayout(dtype=dtype), splits=[Split.TEST])
        remote, local = LatentCache(f"file://{place}", copies), LatentCache(place)
        first[dtype] = remote.row(Split.TEST, 0)["person_mean"]
        assert torch.equal(first[dtype], local.row(Split.TEST, 0)["person_mean"])
    assert not torch.equal(first["float32"], first["float16"])
    assert len(list(copies.rglob("*.safetensors"))) == 2


def test_copies_need_room(made: Path, small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before training begins; shards that are there already do not count."""
    url, copies = f"file://{made}", tmp_path / "copies"
    cache = LatentCache(url, copies)
    sizes = [shard.bytes for shard in cache.index.shards["train"]]
    cache.row(Split.TRAIN, 0)
    monkeypatch.setattr(latent_cache, "free_space", lambda _: (tmp_path, sum(sizes[1:]) - 1))
    with pytest.raises(DataError, match=r"MiB free, and copies of the train shards .*data\.cache_copies"):
        CachedDataset(cache, small_dataset, Split.TRAIN)
    monkeypatch.setattr(latent_cache, "free_space", lambda _: (tmp_path, sum(sizes[1:])))
    CachedDataset(cache, small_dataset, Split.TRAIN)


def test_a_cache_is_not_made_at_an_address() -> None:
    """Refused by the option's check; pathlib would make a folder named s3: here."""
    words = ["root=data", "output=s3://bucket/cache"]
    with pytest.raises(ConfigError, match=r"output=s3:/bucket/cache is not possible: expected a folder"):
        compose("data_cache", words)
