"""Loaders of training, validation and test samples for Lightning.

Validation is the last ``validation_samples`` of the training list, which training then leaves out; tests
use the test list. The order of an epoch is a function of (seed, epoch), and the loader of training
(torchdata's) knows its position in it, so a run that was stopped anywhere goes on exactly as an uninterrupted one.

Several processes: the samplers here split the data themselves (``Trainer(use_distributed_sampler=False)``; they are
DistributedSamplers, so Lightning would keep them anyway). Training gives every process equally many samples and
interleaves them, so that W processes with batch B see the samples that one process with batch W x B would. Validation
and test are split without padding: no sample is seen twice and none is left out, so a set's score does not change
with the number of processes; processes may differ by one sample, hence nothing may synchronise inside an
evaluation step. ``i2am evaluate`` lists its test batches itself; processes take whole batches in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from i2am_train.config.data import DataConfig
from i2am_train.data.cache import LatentCache
from i2am_train.data.dataset import CachedDataset, EpochPosition, TryOnDataset, TryOnSample, list_length, reading_of
from i2am_train.environment import ignore_interrupts
from i2am_train.errors import DataError
from i2am_train.types import Pairing, Split


class EpochSampler(DistributedSampler[Any]):
    """Shuffles by (seed, epoch) and tells the dataset the epoch together with each position."""

    def __init__(self, dataset: Dataset[Any], seed: int, epoch: int = 0, replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=replicas, rank=rank, shuffle=True, seed=seed, drop_last=True)
        self.epoch = epoch
        self._samples: tuple[int, list[int]] | None = None

    def __iter__(self) -> Iterator[EpochPosition]:
        """Positions of this process, in this epoch's order."""
        positions = list(super().__iter__())
        return iter([EpochPosition(self.epoch, position) for position in positions])

    def samples(self) -> list[int]:
        """Dataset indices of this process's samples, in this epoch's order."""
        if self._samples is None or self._samples[0] != self.epoch:  # asked for at every batch
            dataset = cast(TryOnDataset | CachedDataset, self.dataset)
            self._samples = self.epoch, [dataset.indices[position] for _, position in self]
        return self._samples[1]


class ExactSampler(DistributedSampler[Any]):
    """Splits a dataset over processes in order, each sample once."""

    def __init__(self, dataset: Dataset[Any], replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=replicas, rank=rank, shuffle=False)
        self.positions = range(rank, len(cast(TryOnDataset, dataset)), replicas)

    def __iter__(self) -> Iterator[int]:
        """Every ``replicas``-th position, beginning with the rank."""
        return iter(self.positions)

    def __len__(self) -> int:
        return len(self.positions)


class TryOnDataModule(L.LightningDataModule):
    """All loaders of a run.

    Args:
        data: options: sizes, layout, augmentation, reading processes (per loader).
        root: dataset folder, which is there.
        seed: of the shuffling and the augmentations.
        eval_batch_size: samples per process and step elsewhere than in training.
        validation_samples: how many of the last training samples are held out for validation.
        test_samples: how many of the test samples to use; None for all.
        test_pairing: whether tests give people their own garment.
        cache: where training samples are read from instead, encoded; it was checked to fit.

    Attributes:
        test_batches: positions in the test dataset that ``test_dataloader`` reads, batch by batch; None for all.
            Processes take whole batches in turn, so that a batch is the same on any number of them.
    """

    def __init__(
        self, data: DataConfig, root: Path, *, seed: int = 0, eval_batch_size: int = 16, validation_samples: int = 0,
        test_samples: int | None = None, test_pairing: Pairing = Pairing.PAIRED, cache: LatentCache | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.data, self.root, self.reading = data, root, reading_of(data)
        self.seed, self.eval_batch_size, self.cache = seed, eval_batch_size, cache
        self.validation_samples, self.test_samples, self.test_pairing = validation_samples, test_samples, test_pairing
        self.test_batches: Sequence[Sequence[int]] | None = None

    # -- datasets ------------------------------------------------------------------------------------------------------

    def train_dataset(self) -> TryOnDataset | CachedDataset:
        """The training list without the samples held out for validation, as pictures or from the cache."""
        indices = range(self._train_total() - self.validation_samples)
        batch = self.data.batch_size * self._processes()
        if len(indices) < batch:
            raise DataError(
                f"{self.root} has {self._train_total()} training samples; with {self.validation_samples} held out for "
                f"validation, {len(indices)} are left, fewer than one batch of {batch}. "
                "Use more samples, or lower data.batch_size or validation.samples."
            )
        if self.cache is not None:
            return CachedDataset(self.cache, self.root, Split.TRAIN, self.reading, indices, self.seed)
        return self._dataset(Split.TRAIN, Pairing.PAIRED, indices, augment=self.data.augment, seed=self.seed)

    def validation_dataset(self) -> TryOnDataset:
        """The held-out end of the training list, never augmented and read like test samples."""
        total = self._train_total()
        indices = range(total - self.validation_samples, total)
        return self._dataset(Split.TRAIN, Pairing.PAIRED, indices, small_mask_rule=False)

    def test_dataset(self) -> TryOnDataset:
        """The test list, or its first ``test_samples``."""
        total = list_length(self.root, Split.TEST, self.test_pairing, self.reading)
        if self.test_samples is not None and self.test_samples > total:
            raise DataError(
                f"{self.test_samples} test samples were asked for, but {self.root} has {total}. "
                f"Ask for {total} or fewer."
            )
        indices = range(total if self.test_samples is None else self.test_samples)
        return self._dataset(Split.TEST, self.test_pairing, indices)

    def _dataset(self, split: Split, pairing: Pairing, indices: Sequence[int], **options: Any) -> TryOnDataset:
        return TryOnDataset(self.root, split, pairing, self.data.size, self.reading, indices=indices, **options)

    def _train_total(self) -> int:
        total = list_length(self.root, Split.TRAIN, Pairing.PAIRED, self.reading)
        if not 0 <= self.validation_samples < total:
            raise DataError(
                f"{self.validation_samples} validation samples cannot be held out of the {total} training samples in "
                f"{self.root}. Set validation.samples between 0 and {total - 1}."
            )
        return total

    # -- loaders -------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        dataset = self.train_dataset()
        sampler = EpochSampler(dataset, self.seed, self._epoch(), self._processes(), self._rank())
        loader: DataLoader[Any] = StatefulDataLoader(
            dataset, batch_size=self.data.batch_size, sampler=sampler, drop_last=True, **self._loading()
        )
        return loader

    def val_dataloader(self) -> DataLoader[TryOnSample] | list[Any]:
        if self.validation_samples == 0:
            return []
        return self._evaluation_loader(self.validation_dataset())

    def test_dataloader(self) -> DataLoader[TryOnSample]:
        dataset = self.test_dataset()
        if self.test_batches is None:
            return self._evaluation_loader(dataset)
        # A process without a batch repeats the first: Lightning's processes must all take part.
        mine = self.test_batches[self._rank() :: self._processes()] or self.test_batches[:1]
        return DataLoader(
            dataset, batch_sampler=[list(batch) for batch in mine], num_workers=self.data.workers,
            worker_init_fn=ignore_interrupts, pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),
        )  # fmt: skip

    def _evaluation_loader(self, dataset: TryOnDataset) -> DataLoader[TryOnSample]:
        if len(dataset) < self._processes():  # an idle process would never join the others' scores
            raise DataError(
                f"{len(dataset)} samples cannot be evaluated on {self._processes()} processes. Set validation.samples "
                f"or evaluation.samples to {self._processes()} or more."
            )
        sampler = ExactSampler(dataset, self._processes(), self._rank())
        return DataLoader(dataset, batch_size=self.eval_batch_size, sampler=sampler, **self._loading())

    def _loading(self) -> dict[str, Any]:
        """How loaders read, whatever they read."""
        return {
            "num_workers": self.data.workers,
            "worker_init_fn": ignore_interrupts,
            "persistent_workers": self.data.workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # They would otherwise draw a seed from the global stream, and so change what training draws next.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """All but the samples' indices: Python reads them, and would wait for the device."""
        index = batch["index"]
        moved = super().transfer_batch_to_device({**batch, "index": None}, device, dataloader_idx)
        for name, value in moved.items():
            if isinstance(value, Tensor) and value.dtype == torch.float16:  # of a cache; here and not before, since
                moved[name] = value.float()  # half as many bytes are read, collated and copied
        return {**moved, "index": index}

    # -- the trainer that this belongs to ------------------------------------------------------------------------------

    def _processes(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    def _epoch(self) -> int:
        """The epoch that the loader starts with.

        Lightning makes the first iterator before it tells the sampler the epoch, so a resumed run would begin
        with the order of epoch 0; what it will tell is read here instead.
        """
        if self.trainer is None:
            return 0
        return int(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
