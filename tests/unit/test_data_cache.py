"""data/cache.py and training/encode_dataset.py: what is stored, found again, checked and refused."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from i2am_train.data.cache import ENCODED, TOKENS, CacheKey, CacheLayout, LatentCache
from i2am_train.data.dataset import CachedDataset, EpochPosition, TryOnDataset
from i2am_train.errors import DataError, RunFolderError
from i2am_train.fingerprints import data_state
from i2am_train.training import encode_dataset
from i2am_train.training.encode_dataset import cache_key, make_cache
from i2am_train.types import GridSize, Pairing, Split

SIZE = GridSize(64, 48)
LAYOUT = CacheLayout(shard_samples=8)
"""Three shards of the 20 training samples."""


@pytest.fixture(scope="module")
def made(small_dataset: Path, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "plain"
    make_cache(model, small_dataset, folder, LAYOUT, splits=list(Split), batch_size=3)
    return folder


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "cache"))


def pictures(root: Path, split: Split, **options: Any) -> TryOnDataset:
    return TryOnDataset(root, split, Pairing.PAIRED, SIZE, **options)


def assert_encoded(model: Any, stored: dict[str, Any], sample: Any, **close: float) -> None:
    """The stored tensors are what the encoders give for the sample's pictures, to rounding."""
    with torch.no_grad():
        for name in ENCODED:
            moments = model.encode_moments(sample[name][None])
            torch.testing.assert_close(stored[f"{name}_mean"].float(), moments.mean[0], **close)
            torch.testing.assert_close(stored[f"{name}_std"].float(), moments.std[0], **close)
        tokens = model.encode_garment(sample["garment"][None])[0]
    torch.testing.assert_close(stored[TOKENS].float(), tokens, **close)
    assert torch.equal(stored["warped_garment_mask"], sample["warped_garment_mask"])
    torch.testing.assert_close(stored["correspondence"], sample["correspondence"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("split", Split)
def test_every_sample_is_found_by_its_index(made: Path, small_dataset: Path, model: Any, split: Split) -> None:
    data, plain = (CachedDataset(LatentCache(made), small_dataset, split), pictures(small_dataset, split))
    assert len(data) == len(plain)
    for position in reversed(range(len(plain))):
        stored, sample = data[position], plain[position]
        assert all(stored[name] == sample[name] for name in ("name", "garment_name", "index", "paired"))
        assert_encoded(model, stored, sample, rtol=1e-5, atol=1e-5)
    with pytest.raises(IndexError, match="out of range"):
        data[len(plain)]


def test_half_precision_rounds_numbers_and_nothing_else(
    small_dataset: Path, model: Any, made: Path, tmp_path: Path
) -> None:
    make_cache(model, small_dataset, tmp_path / "half", replace(LAYOUT, dtype="float16"))
    stored = CachedDataset(LatentCache(tmp_path / "half"), small_dataset, Split.TRAIN)[9]
    assert_encoded(model, stored, pictures(small_dataset, Split.TRAIN)[9], rtol=1e-3, atol=1e-3)
    assert stored[TOKENS].dtype == torch.float16
    half, whole = (folder / "train-000000.safetensors" for folder in (tmp_path / "half", made))
    assert half.stat().st_size < whole.stat().st_size


def test_variants_are_the_augmentations_of_an_uncached_run(small_dataset: Path, model: Any, tmp_path: Path) -> None:
    """Epoch by epoch with the cache's seed; other seeds begin elsewhere; all variants differ."""
    layout = replace(LAYOUT, variants=2, seed=5)
    make_cache(model, small_dataset, tmp_path / "cache", layout, batch_size=5)
    cache = LatentCache(tmp_path / "cache")
    data = CachedDataset(cache, small_dataset, Split.TRAIN, seed=5)
    plain = pictures(small_dataset, Split.TRAIN, augment=True, seed=5)
    for epoch in (0, 1):
        for position in (0, 7, 8, 19):
            at = EpochPosition(epoch, position)
            assert_encoded(model, data[at], plain[at], rtol=1e-5, atol=1e-5)
    first, second, again = (data[EpochPosition(epoch, 3)]["person_mean"] for epoch in (0, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    other = CachedDataset(cache, small_dataset, Split.TRAIN, seed=6)
    assert torch.equal(other[EpochPosition(0, 3)]["person_mean"], second)


@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_a_flipped_bit_is_found_and_named_when_it_is_read(cache: Path, small_dataset: Path, place: float) -> None:
    """In the header, in the middle, near the end; the other shards stay readable."""
    shard = cache / "train-000008.safetensors"
    spoil(shard, place)
    data = CachedDataset(LatentCache(cache), small_dataset, Split.TRAIN)
    refused = {}
    for position in range(20):
        try:
            data[position]
        except DataError as error:
            refused[position] = str(error)
    assert refused
    assert refused.keys() <= set(range(8, 16))
    for message in refused.values():
        assert str(shard) in message
        assert "Run 'i2am data cache' again" in message


def spoil(shard: Path, place: float) -> None:
    content = bytearray(shard.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x10
    shard.write_bytes(content)


def test_a_shorter_or_missing_shard_is_refused_at_once(cache: Path) -> None:
    shard = cache / "train-000008.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=rf"{shard.name} has \d+ bytes instead of {len(whole)}"):
        LatentCache(cache)
    shard.unlink()
    with pytest.raises(DataError, match=rf"{shard.name} is missing"):
        LatentCache(cache)


def test_making_again_replaces_what_is_damaged_and_keeps_the_rest(
    cache: Path, made: Path, small_dataset: Path, model: Any
) -> None:
    spoil(cache / "train-000008.safetensors", 0.7)
    (cache / "test-000000.safetensors").unlink()
    kept = (cache / "train-000016.safetensors").stat().st_mtime_ns
    make_cache(model, small_dataset, cache, LAYOUT, splits=[Split.TRAIN], batch_size=3)
    assert (cache / "train-000016.safetensors").stat().st_mtime_ns == kept
    for file in made.iterdir():
        assert (cache / file.name).read_bytes() == file.read_bytes()


def test_stopped_making_goes_on(
    small_dataset: Path, model: Any, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that is not finished is refused by its reader, and the rest of the work gives the same files."""
    write = encode_dataset.write_shard
    written: list[int] = []

    def failing(folder: Path, split: Split, first: int, *rest: Any) -> Any:
        if len(written) == 1:
            raise KeyboardInterrupt("now")
        written.append(first)
        return write(folder, split, first, *rest)

    output = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(encode_dataset, "write_shard", failing)
        with pytest.raises(KeyboardInterrupt, match="now"):
            make_cache(model, small_dataset, output, LAYOUT, splits=list(Split), batch_size=3)
    with pytest.raises(DataError, match="not finished: 8 of 20 train samples"):
        LatentCache(output)
    make_cache(model, small_dataset, output, LAYOUT, splits=list(Split), batch_size=3)
    assert {file.name: file.read_bytes() for file in output.iterdir()} == {
        file.name: file.read_bytes() for file in made.iterdir()
    }


def test_what_a_cache_is_keyed_by(
    made: Path, small_dataset: Path, model: Any, make_small_model: Callable[..., Any], tmp_path: Path
) -> None:
    """Encoders, sizes, normalisation and data count; the denoiser and the VAE's decoder do not."""
    cache, key = LatentCache(made), cache_key(model, data_state(small_dataset))
    cache.require(key, augment=False)
    other = make_small_model()
    with torch.no_grad():
        other.unet.conv_in.weight.zero_()
        other.vae.decoder.conv_in.weight.zero_()
    assert cache_key(other, data_state(small_dataset)) == key
    with torch.no_grad():
        other.vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-6
    other.config.reference_mean = [0.5, 0.5, 0.5]
    data = Path(shutil.copytree(small_dataset, tmp_path / "data"))
    (data / "train/image/50000_00.jpg").write_bytes(b"another picture")
    changed = cache_key(other, data_state(data))
    with pytest.raises(DataError, match="made by another model or of other data") as refused:
        cache.require(changed, augment=False)
    for part in ("vae ", "garment input 64x48 mean [0.485", "data "):
        assert part in str(refused.value)
    assert "reference encoder" not in str(refused.value)


def test_augmentation_and_cache_must_agree(made: Path, small_dataset: Path, model: Any) -> None:
    cache, key = LatentCache(made), cache_key(model, data_state(small_dataset))
    with pytest.raises(DataError, match=r"data.augment=true, and the cache .* variants=N"):
        cache.require(key, augment=True)
    cache.index.layout = CacheLayout(variants=3)
    with pytest.raises(DataError, match=r"data.augment=false, and the cache .* 3 augmented"):
        cache.require(key, augment=False)


def test_other_caches_and_other_files_are_not_overwritten(
    cache: Path, small_dataset: Path, model: Any, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="another cache: variants 0 instead of 2"):
        make_cache(model, small_dataset, cache, replace(LAYOUT, variants=2))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("...")
    with pytest.raises(DataError, match=r"is no cache: it holds chapter1\.tex"):
        make_cache(model, small_dataset, tmp_path / "thesis")
    theirs = tmp_path / "weights/train-000000.safetensors"
    theirs.parent.mkdir()
    theirs.write_text("trained for weeks")
    with pytest.raises(DataError, match=r"is no cache: it holds train-000000\.safetensors"):
        make_cache(model, small_dataset, theirs.parent)
    assert theirs.read_text() == "trained for weeks"
    with pytest.raises(RunFolderError, match="lies among the data"):
        make_cache(model, small_dataset, small_dataset / "train/cache")
    with pytest.raises(DataError, match="There is no cache in"):
        LatentCache(tmp_path / "nowhere")
    (cache / "index.json").write_text("{}")
    with pytest.raises(DataError, match="is not the index of a cache"):
        LatentCache(cache)


def test_a_full_disk_is_noticed_before_anything_is_written(
    small_dataset: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**18))
    with pytest.raises(DataError, match=r"and the cache takes 1\.\d MiB \(20 rows\)"):
        make_cache(model, small_dataset, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_was_stopped_before_its_first_shard_is_gone_on_with(
    small_dataset: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that is whole and not in the index yet is known for ours by the index, which comes first."""
    with monkeypatch.context() as patch:

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt("before the index")

        patch.setattr(encode_dataset.CacheIndex, "write", _second_time(encode_dataset.CacheIndex.write, killed))
        with pytest.raises(KeyboardInterrupt, match="before the index"):
            make_cache(model, small_dataset, tmp_path / "cache", LAYOUT, batch_size=8)
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert names == ["index.json", "train-000000.safetensors"]
    make_cache(model, small_dataset, tmp_path / "cache", LAYOUT, batch_size=8)
    assert len(LatentCache(tmp_path / "cache").index.shards["train"]) == 3


def _second_time(first: Callable[..., None], then: Callable[..., None]) -> Callable[..., None]:
    calls: list[int] = []

    def call(*arguments: Any) -> None:
        calls.append(1)
        (first if len(calls) == 1 else then)(*arguments)

    return call


def test_a_remote_cache_is_copied_shard_by_shard(cache: Path, made: Path, small_dataset: Path, tmp_path: Path) -> None:
    """Only what is read; checked like a local one; from the copy when it is there."""
    url, copies = f"file://{cache}", tmp_path / "copies"
    data = CachedDataset(LatentCache(url, copies), small_dataset, Split.TRAIN)
    local = CachedDataset(LatentCache(made), small_dataset, Split.TRAIN)
    assert torch.equal(data[10][TOKENS], local[10][TOKENS])
    (copy,) = copies.glob("*/*")
    assert copy.name.startswith("train-000008-")
    (cache / "train-000008.safetensors").unlink()
    again = CachedDataset(LatentCache(url, copies), small_dataset, Split.TRAIN)
    assert torch.equal(again[11][TOKENS], local[11][TOKENS])
    spoil(copy, 0.5)
    spoiled = LatentCache(url, copies)
    with pytest.raises(DataError, match=rf"{copy.name} is damaged.* Delete this copy of file://"):
        print([spoiled.row(Split.TRAIN, index) for index in range(8, 16)])
    with pytest.raises(DataError, match="There is no cache in file://"):
        LatentCache(f"file://{tmp_path}/nowhere")


def test_it_travels_to_reading_processes(made: Path, small_dataset: Path) -> None:
    """Pickled as spawned workers get it, also after files were opened."""
    data = CachedDataset(LatentCache(made), small_dataset, Split.TRAIN)
    first = data[0]
    again = pickle.loads(pickle.dumps(data))[0]  # noqa: S301
    assert torch.equal(first[TOKENS], again[TOKENS])


def test_keys_say_what_differs() -> None:
    one = CacheKey(vae="a", reference_encoder="b", garment_input="c", image_size="64x48", data="d", reading="e")
    assert one.differences(one) == []
    assert one.differences(replace(one, image_size="128x96")) == ["image size 64x48 instead of 128x96"]


def altered(**changes: Any) -> Callable[[dict[str, Any]], object]:
    """Sets dotted names (``__`` for the dot) of an index to other values; a shard's in its first shard."""

    def alter(index: dict[str, Any]) -> None:
        for name, value in changes.items():
            *path, last = name.split("__")
            place: Any = index
            for word in path:
                place = place[int(word) if word.isdigit() else word]
            place[int(last) if last.isdigit() else last] = value

    return alter


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (altered(format=1), "format 1, expected 2"),
        (lambda index: index.pop("key"), "no 'key'"),
        (lambda index: index["key"].pop("vae"), r"key\.vae is required"),
        (altered(key=[]), "no attribute"),
        (altered(key__vae=None), r"key\.vae=null .* a text"),
        (altered(key__image_size="big"), r"key\.image_size=big, expected HEIGHTxWIDTH"),
        (altered(key__image_size="0x5"), r"key\.image_size=0x5, expected"),
        (altered(key__more="x"), r"no option 'key\.more'"),
        (altered(layout__dtype="int4"), r"layout\.dtype=int4 .* float32, float16"),
        (altered(layout__shard_samples=0), r"layout\.shard_samples=0, expected at least 1"),
        (altered(layout__variants=-1), r"layout\.variants=-1"),
        (altered(layout__seed="x"), r"layout\.seed=x .* a whole number"),
        (altered(samples__train="many"), r"samples\.train=many, expected a number above 0"),
        (altered(samples__train=True), r"samples\.train=True"),
        (altered(samples__train=-1), r"samples\.train=-1"),
        (altered(samples__valid=1), "'valid' is not a valid Split"),
        (altered(shards__train=None), "not iterable"),
        (altered(shards__train__0="x"), "no attribute"),
        (altered(shards__train__0__file=5), r"shards\.file=5, expected such as"),
        (altered(shards__train__0__file="../train-000000.safetensors"), r"file=\.\./train"),
        (altered(shards__train__0__file="/etc/passwd"), r"file=/etc/passwd"),
        (altered(shards__train__0__first=3), "do not fit each other"),
        (altered(shards__train__0__samples=7), "do not fit each other"),
        (altered(shards__train__0__crc32=[1]), "do not fit each other"),
        (altered(shards__train__0__crc32="x"), r"crc32=x .* a list"),
        (altered(shards__train__0__bytes="x"), r"bytes=x .* a whole number"),
    ],
)
def test_an_index_of_nonsense_is_one_sentence(
    made: Path, tmp_path: Path, alter: Callable[[dict[str, Any]], object], message: str
) -> None:
    """Missing entries, other types, and numbers that contradict each other or lead out of the folder."""
    index = json.loads((made / "index.json").read_text())
    alter(index)
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=rf"is not the index of a cache \(.*{message}"):
        LatentCache(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"1", b"null", b"{", b"[" * 99999, b"\xff\xfe\x00"])
def test_another_file_is_no_index(content: bytes, tmp_path: Path, small_dataset: Path, model: Any) -> None:
    """Neither for training nor for making a cache, which leaves it as it is."""
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(DataError, match="is not the index of a cache"):
        LatentCache(tmp_path)
    with pytest.raises(DataError, match="is not the index of a cache"):
        make_cache(model, small_dataset, tmp_path, LAYOUT)
    assert [file.name for file in tmp_path.iterdir()] == ["index.json"]
    assert (tmp_path / "index.json").read_bytes() == content
