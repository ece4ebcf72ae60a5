"""Makes a cache of what the frozen encoders give for a dataset (:mod:`i2am_train.data.cache`).

It can be stopped and started again: shards that are whole and sound are kept, others are made anew.

Kernels may round differently for another batch size (by about 1e-6), so every batch has the same one: a short one is
filled up by its last sample. On a CPU a cache in float32 that was made with a run's ``data.batch_size`` then gives
that run to the bit; with another size, or on a GPU, to rounding.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from i2am_train.config.data import DataConfig
from i2am_train.data.cache import (
    CORRESPONDENCE,
    ENCODED,
    INDEX_FILE,
    MASKS,
    CacheIndex,
    CacheKey,
    CacheLayout,
    LatentCache,
    Shard,
    pack_row,
    write_shard,
)
from i2am_train.data.dataset import (
    AS_IT_LIES,
    EpochPosition,
    Reading,
    TryOnBatch,
    TryOnDataset,
    list_length,
    reading_of,
)
from i2am_train.data.needed_files import noted_in, refuse_broken_pictures
from i2am_train.environment import ignore_interrupts
from i2am_train.errors import DataError, NotFiniteError
from i2am_train.files import file_fingerprint, free_space
from i2am_train.fingerprints import RECORD_FILE, DataRecord, DataState, data_state
from i2am_train.locks import LOCK
from i2am_train.models.tryon import TryOnModel
from i2am_train.ops.numerics import rows_at_fault
from i2am_train.runs import require_apart
from i2am_train.training.step import encode_pictures
from i2am_train.types import Pairing, Role, Split

_DECODER = ("decoder.", "post_quant_conv.")
"""Weights of a VAE that encoding does not use; a fine-tuned decoder does not make a cache useless."""


def open_cache(data: DataConfig, root: Path, model: TryOnModel) -> LatentCache | None:
    """The cache of ``data.cache``, checked to be what this model would make of this dataset; None without one."""
    if data.cache is None:
        return None
    cache = LatentCache(data.cache, data.cache_copies)
    cache.require(cache_key(model, data_state(root), reading_of(data)), augment=data.augment)
    return cache


def cache_key(model: TryOnModel, data: DataState, reading: Reading = AS_IT_LIES) -> CacheKey:
    """What a cache of these files for this model must have been made by and of."""
    config = model.config
    size = f"{config.reference_height}x{config.reference_width}"
    return CacheKey(
        vae=_digest(model.vae, _DECODER),
        reference_encoder=_digest(model.reference_encoder),
        garment_input=f"{size} mean {config.reference_mean} std {config.reference_std}",
        image_size=str(model.image_size),
        data=data.fingerprint,
        reading=f"{', '.join(reading.categories) or 'all'}; {reading.fit}",
    )


def _digest(network: nn.Module, without: tuple[str, ...] = ()) -> str:
    """16 hexadecimal digits of a network's class and weights."""
    digest = hashlib.sha256(type(network).__name__.encode())
    for name, value in sorted(network.state_dict().items()):
        if not name.startswith(without):
            digest.update(f"{name}\t{value.dtype}\t{tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def make_cache(
    model: TryOnModel,
    root: Path,
    output: Path,
    layout: CacheLayout | None = None,
    *,
    reading: Reading = AS_IT_LIES,
    splits: Sequence[Split] = (Split.TRAIN,),
    batch_size: int = 16,
    workers: int = 0,
    progress: bool = False,
) -> CacheIndex:
    """Encodes the dataset in ``root`` into the folder ``output``, or goes on with one that was begun.

    The model's VAE and reference encoder are used, on its device and in float32. ``batch_size`` pictures of each kind
    are encoded at once, and ``workers`` processes read them.

    Raises:
        DataError: the dataset is broken, the folder holds another cache or something else, or the disk is too full.
    """
    layout = layout or CacheLayout()
    with noted_in(output):
        samples = {str(s): list_length(root, s, Pairing.PAIRED, reading) for s in splits}
        data = data_state(root)
        index = CacheIndex(key=cache_key(model, data, reading), layout=layout, samples=samples)
        _keep_shards(root, output, index, data)
        sources = {split: _Source(model, root, Split(split), layout, reading) for split in index.samples}
        refuse_broken_pictures([source.dataset for source in sources.values()])
        model.eval()
        rows = sum(n * layout.rows_per_sample(Split(name)) for name, n in index.samples.items())
        with tqdm(total=rows, desc="encoded", unit="sample", disable=not progress) as bar:
            bar.update(sum(len(shard.crc32) for kept in index.shards.values() for shard in kept))
            for split, total in index.samples.items():
                kept = index.shards[split]
                there = {shard.first for shard in kept}
                missing = [n for n in range(0, total, layout.shard_samples) if n not in there]
                for shard in sources[split].shards(index, output, missing, batch_size, workers, bar):
                    kept.append(shard)
                    kept.sort(key=lambda one: one.first)
                    index.write(output)
                    DataRecord(output).keep(data)
        index.write(output)
        DataRecord(output).write(data)
        return index


def _keep_shards(root: Path, output: Path, index: CacheIndex, data: DataState) -> None:
    """Adds the sound shards that are there already, and splits that were made before, to a new index."""
    index.shards |= {split: [] for split in index.samples}
    require_apart(root, output)
    file = output / INDEX_FILE
    if not file.is_file():
        foreign = {p.name for p in output.iterdir()} - {LOCK, RECORD_FILE} if output.is_dir() else set()
        if foreign or output.is_file():
            raise DataError(
                f"{output} is no cache: it holds {', '.join(sorted(foreign)[:5]) or 'a file'} and no {INDEX_FILE}. "
                "Nothing was changed. Give another output=FOLDER."
            )
        return
    there = CacheIndex.parse(file.read_bytes(), str(output))
    repaired = DataRecord(output).repaired(data)
    key = replace(there.key, data=data.fingerprint) if repaired else there.key
    differences = key.differences(index.key)
    mine, others = asdict(index.layout), asdict(there.layout)
    differences += [f"{n} {others[n]} instead of {mine[n]}" for n in mine if mine[n] != others[n]]
    if differences:
        raise DataError(
            f"{output} already holds another cache: {'; '.join(differences)}. Nothing was changed. Give another "
            "output=FOLDER, or delete that one."
        )
    index.samples = there.samples | index.samples
    for split in index.samples:
        index.shards[split] = [shard for shard in there.shards.get(split, []) if _is_sound(output / shard.file, shard)]


def _is_sound(path: Path, shard: Shard) -> bool:
    return path.is_file() and path.stat().st_size == shard.bytes and file_fingerprint(path) == shard.sha256


class _Source:
    """Encodes one split of a dataset."""

    def __init__(self, model: TryOnModel, root: Path, split: Split, layout: CacheLayout, reading: Reading) -> None:
        self.model, self.split, self.layout = model, split, layout
        augment = layout.variants > 0 and split is Split.TRAIN
        self.dataset = TryOnDataset(
            root, split, Pairing.PAIRED, model.image_size, reading, augment=augment, seed=layout.seed
        )
        self.keep = [*MASKS]
        if any(layout.has(Role.CORRESPONDENCE) for layout in self.dataset.layouts[:1]):
            self.keep.append(CORRESPONDENCE)

    def shards(
        self, index: CacheIndex, output: Path, firsts: Sequence[int], batch_size: int, workers: int, bar: Any
    ) -> Iterator[Shard]:
        """Writes the shards that begin with the given samples; first the index, which says whose they are."""
        total = index.samples[self.split]
        variants = self.layout.rows_per_sample(self.split)
        counts = [min(self.layout.shard_samples, total - first) for first in firsts]
        batches = []
        for first, count in zip(firsts, counts, strict=True):  # no batch crosses the border of a shard
            rows = [EpochPosition(v, first + i) for i in range(count) for v in range(variants)]
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                batches.append(batch + batch[-1:] * (batch_size - len(batch)))
        encoded = self._encoded(batches, workers)
        remaining = sum(counts) * variants
        for first, count in zip(firsts, counts, strict=True):
            made: list[dict[str, Tensor]] = []
            while len(made) < count * variants:
                made += next(encoded)
            if first == firsts[0]:
                _check_space(output, made[0], remaining)
                index.write(output)
            yield write_shard(output, self.split, first, count, made)
            bar.update(len(made))

    @torch.no_grad()
    def _encoded(self, batches: list[list[EpochPosition]], workers: int) -> Iterator[list[dict[str, Tensor]]]:
        loader: DataLoader[Any] = DataLoader(
            self.dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=ignore_interrupts
        )
        dtype = getattr(torch, self.layout.dtype)
        for rows, batch in zip(batches, loader, strict=True):
            values = self._encode(batch)
            _check_numbers(values, batch["name"], dtype)
            yield [
                pack_row({name: value[row] for name, value in values.items()}, dtype) for row in range(len(set(rows)))
            ]

    def _encode(self, batch: TryOnBatch) -> dict[str, Tensor]:
        device = self.model.device
        values: dict[str, Tensor] = {name: batch[name] for name in self.keep}  # type: ignore[literal-required]
        pictures = {name: batch[name].to(device) for name in (*ENCODED, "garment")}  # type: ignore[literal-required]
        return values | encode_pictures(self.model, pictures)


def _check_numbers(values: dict[str, Tensor], names: Sequence[str], dtype: torch.dtype) -> None:
    """Refuses what would train a model on NaN: a masked correspondence alone has no numbers in places."""
    for name, value in values.items():
        if name in (*MASKS, CORRESPONDENCE):
            continue
        if bool((bad := rows_at_fault(value.to(dtype))).any()):
            reason = "encoders give NaN or infinity"
            if not bool(rows_at_fault(value).any()):
                reason = f"encoders give numbers that are too large for {dtype}".replace("torch.", "")
            raise NotFiniteError(
                f"{name} of {names[int(bad.int().argmax())]} cannot be stored: the {reason}. Nothing of its shard was "
                "written. Look at the sample's pictures; take another checkpoint, or dtype=float32."
            )


def _check_space(output: Path, row: dict[str, Tensor], rows: int) -> None:
    """Fails before anything is written where the cache would not fit."""
    needed = rows * sum(value.numel() * value.element_size() for value in row.values())
    existing, free = free_space(output)
    if needed > free:
        raise DataError(
            f"{existing} has {free / 2**20:.1f} MiB free, and the cache takes {needed / 2**20:.1f} MiB "
            f"({rows} rows). Give an output=FOLDER on another disk, use dtype=float16, or fewer variants."
        )
