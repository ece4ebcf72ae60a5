"""What the frozen encoders make of a dataset, on disk: written by ``i2am data cache``, read by ``i2am train``.

A cache is a folder: ``index.json`` and shards, safetensors files of as many samples each. A row of a shard is a sample
(or one augmented variant of it): mean and standard deviation of the VAE's posterior of person, agnostic image and
pose, all tokens of the reference encoder before the projector, the masks of the garment on the person and of the flat
one with a bit a pixel, and the correspondence where there is one. Masks stay at the pictures' size because the losses
reduce them to the grid of whichever layer they train, and at a bit a pixel they are nothing beside the tokens.

Why not one of the usual libraries: order, noise and augmentation of a training run here are functions of
(seed, epoch, index), and the cache must give any sample by its index, so that a run is the same with and without it,
on any number of processes and after a restart. webdataset reads tar files from front to back; litdata (0.2.76) calls
access by index "more for debugging than anything else" (its issue 388), owns order and resuming itself, and keeps no
checksums; mosaicml-streaming (0.13) has both, but wants transformers below 5 and four clouds' clients. Safetensors give
a row by its index from a memory map and are a dependency already. Shards of a remote cache are copied whole at first
use and stay: order is random over the whole set, so every process would touch every shard in its first minutes anyway.

Files in object storage are read through fsspec (``s3://``, ``gs://``, ``https://``, ``file://`` and others). Each
protocol has a client library of its own, and each client its own errors; here they become a DataError that names the
URL and says what to do.

Every row has a CRC-32 in the index that is checked when it is read; whole shards have a SHA-256 that is checked when
one is fetched and when making continues.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

import fsspec
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from i2am_train.config.locations import expanded
from i2am_train.config.options import build, shortened
from i2am_train.environment import without_secrets
from i2am_train.errors import ConfigError, DataError
from i2am_train.files import DISK_FULL, UNFINISHED, file_fingerprint, free_space, write_json, written
from i2am_train.types import GridSize, Split

_NONSENSE = (ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError)
"""What a file that is no index raises, wherever it differs from one."""
_SHARD_FILE = re.compile(r"(train|test)-\d+\.safetensors")
FORMAT = 2
INDEX_FILE = "index.json"
ENCODED = ("person", "agnostic", "densepose")
"""Pictures that the VAE encodes, in the order of their noise in ``training.step``."""
TOKENS = "encoded_garment"
"""The reference encoder's last hidden state, before the projector."""
WARPED_MASK, GARMENT_MASK, CORRESPONDENCE = "warped_garment_mask", "garment_mask", "correspondence"
MASKS = (WARPED_MASK, GARMENT_MASK)
PAUSES = (1.0, 5.0)
"""Seconds before the second and the third attempt at a file; chosen by us. Clients may try by themselves, too."""
ABANDONED = 3600.0
"""Seconds without a byte after which a part of a file was left by a process that was killed; chosen by us."""
REPAIR = "Run 'i2am data cache' again with its options: it checks every shard and makes damaged ones anew."


class CachedBatch(TypedDict, total=False):
    """What training needs of a :class:`~i2am_train.data.dataset.TryOnBatch`, encoded; moments are unscaled."""

    name: list[str]
    garment_name: list[str]
    index: Int[Tensor, " batch"]
    paired: Bool[Tensor, " batch"]
    person_mean: Float[Tensor, "batch 4 latent_height latent_width"]
    person_std: Float[Tensor, "batch 4 latent_height latent_width"]
    agnostic_mean: Float[Tensor, "batch 4 latent_height latent_width"]
    agnostic_std: Float[Tensor, "batch 4 latent_height latent_width"]
    densepose_mean: Float[Tensor, "batch 4 latent_height latent_width"]
    densepose_std: Float[Tensor, "batch 4 latent_height latent_width"]
    encoded_garment: Float[Tensor, "batch encoder_token width"]
    warped_garment_mask: Bool[Tensor, "batch height width"]
    garment_mask: Bool[Tensor, "batch height width"]
    correspondence: Float[Tensor, "batch height width 2"]


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """What a cache was made by and of; training refuses a cache of another key."""

    vae: str
    """Digest of the VAE's encoder: its class and weights."""
    reference_encoder: str
    """The same of the reference encoder."""
    garment_input: str
    """Size and normalisation of the garment before the reference encoder."""
    image_size: str
    """Height x width."""
    data: str
    """Fingerprint of the dataset folder."""
    reading: str
    """Categories, and how other aspects were dealt with."""

    def differences(self, other: CacheKey) -> list[str]:
        """Each entry that is not the same: its name, here, there.

        >>> from dataclasses import replace
        >>> key = CacheKey(vae="a", reference_encoder="b", garment_input="c", image_size="64x48", data="d", reading="")
        >>> key.differences(replace(key, image_size="128x96"))
        ['image size 64x48 instead of 128x96']
        """
        others = asdict(other)
        return [
            f"{name.replace('_', ' ')} {value} instead of {others[name]}"
            for name, value in asdict(self).items()
            if value != others[name]
        ]


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """How a cache stores its samples."""

    dtype: Literal["float32", "float16"] = "float32"
    """Of moments and tokens."""
    variants: int = 0
    """Augmented variants of each training sample; 0: the sample as it is."""
    seed: int = 0
    """Of the augmentations: variant v is what epoch v of a run with this seed would see."""
    shard_samples: int = 128
    """Samples in a shard."""

    def rows_per_sample(self, split: Split) -> int:
        """Rows that a sample takes: only training samples have variants.

        >>> CacheLayout(variants=3).rows_per_sample(Split.TRAIN), CacheLayout(variants=3).rows_per_sample(Split.TEST)
        (3, 1)
        """
        return max(1, self.variants) if split is Split.TRAIN else 1


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a cache."""

    file: str
    first: int
    """Index of its first sample in the pair list."""
    samples: int
    bytes: int
    sha256: str
    crc32: list[int]
    """Of each row: of its tensors' bytes in the order of their names."""


@dataclass(kw_only=True)
class CacheIndex:
    """Content of ``index.json``."""

    key: CacheKey
    layout: CacheLayout
    samples: dict[str, int]
    """Samples of each split that the cache is to have."""
    shards: dict[str, list[Shard]] = field(default_factory=dict)
    """Of each split, in order; fewer than needed while the cache is being made."""

    def write(self, folder: Path) -> None:
        """Write the file in one step."""
        write_json(folder / INDEX_FILE, {"format": FORMAT, **asdict(self)})

    @classmethod
    def parse(cls, content: bytes, where: str) -> CacheIndex:
        """Read the file's content; a DataError says that it is not the index of a cache that this version reads."""
        try:
            values = json.loads(content)
            if (found := values.pop("format")) != FORMAT:
                raise ValueError(f"format {found}, expected {FORMAT}")
            index = cls(
                key=build(CacheKey, values["key"], "key."),
                layout=build(CacheLayout, values["layout"], "layout."),
                samples={str(Split(split)): n for split, n in values["samples"].items()},
                shards={
                    str(Split(split)): [build(Shard, shard, "shards.") for shard in shards]
                    for split, shards in values["shards"].items()
                },
            )
            index._check()
        except _NONSENSE as error:
            reason = f"no {error}" if isinstance(error, KeyError) else shortened(error)
            raise DataError(
                f"{where}/{INDEX_FILE} is not the index of a cache ({reason}). "
                "Make the cache anew with 'i2am data cache', in an empty folder."
            ) from error
        return index

    def _check(self) -> None:
        """Fails where rows could not be found by their index, or a file would be looked for elsewhere."""
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.key.image_size):
            raise ValueError(f"key.image_size={self.key.image_size}, expected HEIGHTxWIDTH")
        for name, low in (("shard_samples", 1), ("variants", 0)):
            if (found := getattr(self.layout, name)) < low:
                raise ValueError(f"layout.{name}={found}, expected at least {low}")
        for split, total in self.samples.items():
            if type(total) is not int or total < 1:
                raise ValueError(f"samples.{split}={total}, expected a number above 0")
        for split, shards in self.shards.items():
            rows = self.layout.rows_per_sample(Split(split))
            for shard in shards:
                if not _SHARD_FILE.fullmatch(shard.file):
                    raise ValueError(f"shards.file={shard.file}, expected such as train-000000.safetensors")
                whole = shard.first >= 0 and shard.first % self.layout.shard_samples == 0
                if not whole or len(shard.crc32) != shard.samples * rows:
                    raise ValueError(f"first, samples and crc32 of {shard.file} do not fit each other")


def pack_row(values: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a sample as they are stored: numbers in ``dtype``, masks in bits.

    The correspondence keeps its 32 bits: half precision would move it by more than a hundredth of a patch.

    >>> row = pack_row({"person_mean": torch.ones(1), WARPED_MASK: torch.tensor([[True, False]])}, torch.float16)
    >>> row["person_mean"].dtype, row[WARPED_MASK].tolist()
    (torch.float16, [128])
    """
    packed = {
        name: value.to(dtype).contiguous().cpu()
        for name, value in values.items()
        if name not in (*MASKS, CORRESPONDENCE)
    }
    for name in (mask for mask in MASKS if mask in values):
        packed[name] = torch.from_numpy(np.packbits(values[name].cpu().numpy().reshape(-1)))
    if CORRESPONDENCE in values:
        packed[CORRESPONDENCE] = values[CORRESPONDENCE].float().contiguous().cpu()
    return packed


def _unpack_row(values: Mapping[str, Tensor], size: GridSize) -> dict[str, Tensor]:
    """Inverse of :func:`pack_row`; numbers keep the type that they are stored in."""
    unpacked = {name: value for name, value in values.items() if name not in MASKS}
    for name in MASKS:
        bits = np.unpackbits(values[name].numpy(), count=size.tokens)
        unpacked[name] = torch.from_numpy(bits.astype(np.bool_)).view(*size)
    return unpacked


def _row_checksum(values: Mapping[str, Tensor]) -> int:
    """CRC-32 of a stored row."""
    checksum = 0
    for name in sorted(values):
        checksum = zlib.crc32(values[name].contiguous().numpy().view(np.uint8).data, checksum)
    return checksum


def write_shard(folder: Path, split: Split, first: int, samples: int, rows: Sequence[Mapping[str, Tensor]]) -> Shard:
    """Write packed rows as one file; it appears complete or not at all."""
    file = f"{split}-{first:06d}.safetensors"
    with written(folder / file) as unfinished:
        save_file({name: torch.stack([row[name] for row in rows]) for name in rows[0]}, unfinished)
        return Shard(
            file=file, first=first, samples=samples, bytes=unfinished.stat().st_size,
            sha256=file_fingerprint(unfinished), crc32=[_row_checksum(row) for row in rows],
        )  # fmt: skip


class LatentCache:
    """A finished cache, opened for reading.

    Args:
        place: folder, or URL that fsspec understands (``s3://bucket/folder``).
        copies: where shards of a URL are kept; default a folder in the user's cache.

    Raises:
        DataError: there is no cache, it is not finished, or a shard is missing or of another size.
    """

    def __init__(self, place: str | Path, copies: Path | None = None) -> None:
        self.place = str(place).rstrip("/")
        self.shown = without_secrets(self.place)
        self.remote = "://" in self.place
        digest = hashlib.sha256(self.shown.encode()).hexdigest()[:16]
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "i2am_train"
        self.folder = (copies or home / "latents") / digest if self.remote else expanded(self.place)
        self.index = CacheIndex.parse(self._read_index(), self.shown)
        self.size = GridSize(*map(int, self.index.key.image_size.split("x")))
        self._open: dict[str, Any] = {}
        for split, total in self.index.samples.items():
            self._check(split, total)

    def _read_index(self) -> bytes:
        try:
            return read_bytes(self._address(INDEX_FILE))
        except FileNotFoundError as error:
            copy = f", and copy that folder to {self.shown}" if self.remote else ""
            raise DataError(
                f"There is no cache in {self.shown}: it has no {INDEX_FILE}. Make one with 'i2am data cache root=... "
                f"init=... output=FOLDER'{copy}."
            ) from error

    def _address(self, file: str) -> str:
        """Of a file of the cache; what a URL says behind a question mark stays at its end."""
        if not self.remote:
            return f"{self.place}/{file}"
        folder, mark, query = self.place.partition("?")
        return f"{folder.rstrip('/')}/{file}{mark}{query}"

    def _check(self, split: str, total: int) -> None:
        shards = self.index.shards.get(split, [])
        done = sum(shard.samples for shard in shards)
        if done < total:
            raise DataError(
                f"The cache in {self.shown} is not finished: {done} of {total} {split} samples are there. "
                "Run its 'i2am data cache' command again; it goes on where it was."
            )
        for shard in shards:
            if not self.remote:
                self._check_file(shard)

    def _path(self, shard: Shard) -> Path:
        """Where a shard lies on this machine. A copy's name has its digest: a cache made anew has other copies."""
        if not self.remote:
            return self.folder / shard.file
        name = Path(shard.file)
        return self.folder / f"{name.stem}-{shard.sha256[:8]}{name.suffix}"

    def _check_file(self, shard: Shard) -> None:
        path = self._path(shard)
        found = path.stat().st_size if path.is_file() else None
        if found != shard.bytes:
            state = "is missing" if found is None else f"has {found} bytes instead of {shard.bytes}"
            raise DataError(f"{path} {state}. {self._advice(shard)}")

    def _advice(self, shard: Shard) -> str:
        if self.remote:
            return f"Delete this copy of {self.shown}/{shard.file}; it is fetched again."
        return REPAIR

    def require_space(self, split: Split) -> None:
        """Refuse a disk that does not hold the copies that are still to be fetched."""
        shards = self.index.shards[split] if self.remote else []
        needed = sum(shard.bytes for shard in shards if not self._path(shard).is_file())
        existing, free = free_space(self.folder)
        if needed > free:
            raise DataError(
                f"{existing} has {free / 2**20:.0f} MiB free, and copies of the {split} shards in {self.shown} take "
                f"{needed / 2**20:.0f} MiB. Make room, or set data.cache_copies to a folder on another disk."
            )

    def require(self, key: CacheKey, *, augment: bool) -> None:
        """Refuse a cache that would train something else.

        Raises:
            DataError: it was made by other encoders, at another size, of other data, or with other augmentation.
        """
        if differences := self.index.key.differences(key):
            raise DataError(
                f"The cache in {self.shown} was made by another model or of other data: "
                f"{'; '.join(differences)}. Make one for this run with 'i2am data cache', or leave data.cache out."
            )
        variants = self.index.layout.variants
        if augment and not variants:
            raise DataError(
                f"data.augment=true, and the cache in {self.shown} holds each sample once, as it is: encoded samples "
                "cannot be augmented. Make a cache with variants=N (N augmented variants of each sample, shown in "
                "turn from epoch to epoch), set data.augment=false, or leave data.cache out."
            )
        if variants and not augment:
            raise DataError(
                f"data.augment=false, and the cache in {self.shown} holds {variants} augmented variants of each "
                "sample. Set data.augment=true, or make a cache with variants=0."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Reading processes open the files themselves."""
        return self.__dict__ | {"_open": {}}

    def row(self, split: Split, index: int, variant: int = 0) -> dict[str, Tensor]:
        """The stored tensors of a sample, checked: a shard that is damaged, missing or out of reach is a DataError."""
        shard = self.index.shards[split][index // self.index.layout.shard_samples]
        row = (index - shard.first) * self.index.layout.rows_per_sample(split) + variant
        path, file = self._path(shard), self._file(shard)
        try:
            values = {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118
            sound = _row_checksum(values) == shard.crc32[row]
        except (SafetensorError, IndexError, OSError) as error:
            raise self._damaged(shard, error) from error
        if not sound:
            raise DataError(
                f"{path} is damaged: {split} sample {index} has another checksum than when it was written. "
                f"{self._advice(shard)}"
            )
        return _unpack_row(values, self.size)

    def _file(self, shard: Shard) -> Any:
        if shard.file not in self._open:
            path = self._path(shard)
            if self.remote and not path.is_file():
                self._fetch(shard)
            self._check_file(shard)
            try:
                self._open[shard.file] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise self._damaged(shard, error) from error
        return self._open[shard.file]

    def _fetch(self, shard: Shard) -> None:
        """Copy a shard; processes that want the same one each bring a copy, and the last one stays."""
        url = self._address(shard.file)
        try:
            fetch(url, self._path(shard), shard.sha256)
        except FileNotFoundError as error:
            raise DataError(
                f"{without_secrets(url)} is missing, and the cache's index names it: the cache was not copied whole. "
                "Copy its folder there again from where it was made."
            ) from error

    def _damaged(self, shard: Shard, error: Exception) -> DataError:
        return DataError(f"{self._path(shard)} is damaged and cannot be read ({error}). {self._advice(shard)}")


# -- files in object storage -------------------------------------------------------------------------------------------


class TransferError(DataError):
    """A file did not come, or not as it should be; another attempt may do."""


def read_bytes(url: str) -> bytes:
    """The content of a small file: a URL, or a path; an error is FileNotFoundError or a DataError."""
    with _errors_named(url):
        files, place = fsspec.url_to_fs(url)
        # Not files.open: over HTTP it calls a server that is down a missing file.
        return bytes(files.cat_file(place))


def fetch(url: str, path: Path, sha256: str) -> None:
    """Copy a file to a path, where it appears whole and sound or not at all. Three attempts.

    Errors are those of :func:`read_bytes`, and a DataError where it has another digest than it should.
    """
    _remove_abandoned(path.parent)
    with written(path) as unfinished:
        for pause in PAUSES:
            try:
                _copy(url, unfinished, sha256)
                break
            except TransferError:
                time.sleep(pause)
        else:
            _copy(url, unfinished, sha256)


def _remove_abandoned(folder: Path) -> None:
    """Removes parts of files that nobody brings any more: a process that is killed cannot remove its own."""
    for part in folder.glob(f".*{UNFINISHED}"):
        with suppress(FileNotFoundError):  # its own process was faster
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()


def _copy(url: str, path: Path, sha256: str) -> None:
    with _errors_named(url):
        files, place = fsspec.url_to_fs(url)
        files.get_file(place, str(path))
    if (found := file_fingerprint(path)) != sha256:
        raise TransferError(
            f"{without_secrets(url)} is damaged: {path.stat().st_size} bytes came with the SHA-256 {found[:16]}..., "
            f"expected {sha256[:16]}... Copy the folder there again from where it was made."
        )


@contextmanager
def _errors_named(url: str) -> Iterator[None]:
    """The clients' many errors as one that says what to do; only a missing file stays what it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in DISK_FULL:  # not the storage's fault: the copy here has no room
            raise
        raise _unreadable(url, error) from error
    except ImportError as error:
        raise DataError(
            f"{without_secrets(url)} cannot be read: {error}. Install that package where i2am_train is "
            "installed (pip install ...)."
        ) from error
    except Exception as error:  # each client fails in its own words
        raise _unreadable(url, error) from error


def _unreadable(url: str, error: Exception) -> TransferError:
    reason = without_secrets((str(error).strip() or "no reason given").splitlines()[0])
    return TransferError(
        f"{without_secrets(url)} cannot be read ({type(error).__name__}: {reason}). Check the address, the network "
        "and the credentials; the same command then goes on where it was."
    )
