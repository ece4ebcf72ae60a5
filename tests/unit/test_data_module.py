"""Loaders: what is held out, in which order samples come, and how processes share them."""

from pathlib import Path

import lightning as L
import pytest
import torch

from i2am_train.config.data import DataConfig
from i2am_train.data.dataset import TryOnDataset
from i2am_train.data.module import EpochSampler, ExactSampler, TryOnDataModule
from i2am_train.errors import DataError
from i2am_train.types import GridSize, Pairing, Split

SIZE = GridSize(64, 48)


def module(
    root: Path, batch_size: int = 3, workers: int = 0, augment: bool = True, **changes: object
) -> TryOnDataModule:
    data = DataConfig(height=64, width=48, batch_size=batch_size, workers=workers, augment=augment)
    return TryOnDataModule(data, root, **{"eval_batch_size": 4, "validation_samples": 5, **changes})


def test_validation_is_the_held_out_end_of_the_training_list(small_dataset: Path) -> None:
    # Proves that training and validation share no sample and that test is the test list.
    data = module(small_dataset, augment=False)
    train = torch.cat([batch["index"] for batch in data.train_dataloader()]).tolist()
    validation = [index for batch in data.val_dataloader() for index in batch["index"].tolist()]
    assert sorted(train) == list(range(15))
    assert validation == [15, 16, 17, 18, 19]
    names = [name for batch in module(small_dataset).test_dataloader() for name in batch["name"]]
    assert names == [f"5000{index}_00" for index in range(6)]


def test_test_samples_and_pairing_are_chosen(small_dataset: Path) -> None:
    # Proves the test options.
    data = module(small_dataset, test_samples=3, test_pairing=Pairing.UNPAIRED)
    (batch,) = list(data.test_dataloader())
    assert batch["garment_name"] == ["50001_00", "50002_00", "50003_00"]
    assert not batch["paired"].any()


def test_an_epochs_order_depends_on_seed_and_epoch_alone(small_dataset: Path) -> None:
    # Proves what resuming at an epoch's border needs, and that loading does not draw from the global stream.
    loader = module(small_dataset).train_dataloader()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    orders, pictures = [], []
    for epoch in (0, 1, 2):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        orders.append(torch.cat([batch["index"] for batch in batches]).tolist())
        pictures.append(batches[0]["person"])
    resumed = module(small_dataset).train_dataloader()
    resumed.sampler.set_epoch(2)
    first = next(iter(resumed))
    assert first["index"].tolist() == orders[2][:3]
    assert torch.equal(first["person"], pictures[2])
    assert len({tuple(order) for order in orders}) == 3
    assert torch.equal(before, torch.get_rng_state())


def test_worker_processes_change_nothing(small_dataset: Path) -> None:
    # Proves that augmentation in workers that live for several epochs follows the epoch.
    alone, workers = (module(small_dataset, workers=count).train_dataloader() for count in (0, 1))
    for epoch in (0, 1):
        for loader in (alone, workers):
            loader.sampler.set_epoch(epoch)
        for expected, found in zip(alone, workers, strict=True):
            assert torch.equal(expected["person"], found["person"])


def test_two_processes_share_an_epoch_as_one_would_see_it(small_dataset: Path) -> None:
    # Proves that rank batches interleave to the batches of a single process twice as large.
    data = TryOnDataset(small_dataset, Split.TRAIN, Pairing.PAIRED, SIZE)
    one = [item.position for item in EpochSampler(data, seed=4, epoch=2)]
    ranks = [[item.position for item in EpochSampler(data, 4, 2, replicas=2, rank=rank)] for rank in (0, 1)]
    assert [position for pair in zip(*ranks, strict=True) for position in pair] == one


def test_too_little_data_is_refused(small_dataset: Path) -> None:
    # Proves the messages for impossible requests.
    with pytest.raises(DataError, match="fewer than one batch of 16"):
        module(small_dataset, batch_size=16).train_dataloader()
    with pytest.raises(DataError, match="between 0 and 19"):
        module(small_dataset, validation_samples=20).val_dataloader()
    with pytest.raises(DataError, match="7 test samples were asked for"):
        module(small_dataset, test_samples=7).test_dataloader()
    assert module(small_dataset, validation_samples=0).val_dataloader() == []


def test_exact_sampler_is_a_plain_order_for_one_process(small_dataset: Path) -> None:
    # Proves the single-process case.
    data = TryOnDataset(small_dataset, Split.TEST, Pairing.PAIRED, SIZE)
    assert list(ExactSampler(data)) == list(range(6))


class Recorder(L.LightningModule):
    """Trains nothing and writes down which samples each epoch showed, and their pictures' sums."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int], float]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_index: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch["index"].tolist(), batch["person"].sum().item()))
        return self.weight * 0

    def validation_step(self, batch: dict[str, torch.Tensor], batch_index: int) -> None:
        """There is none, but Lightning warns without it."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")  # Lightning's own, on tiny epochs and deprecated torch functions
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(small_dataset: Path, tmp_path: Path) -> None:
    # Proves that order and augmentation go on at the border of an epoch, although Lightning makes the first iterator of
    # a resumed run before it tells the sampler the epoch.
    def run(epochs: int, checkpoint: str | None = None) -> tuple[Recorder, L.Trainer]:
        trainer = L.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, limit_val_batches=0,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        recorder = Recorder()
        data = module(small_dataset, validation_samples=0, batch_size=8, workers=1)
        trainer.fit(recorder, datamodule=data, ckpt_path=checkpoint)
        return recorder, trainer

    whole, _ = run(3)
    begun, trainer = run(1)
    trainer.save_checkpoint(tmp_path / "border.ckpt")
    resumed, _ = run(3, str(tmp_path / "border.ckpt"))
    assert begun.seen + resumed.seen == whole.seen
    assert len(whole.seen) == 6


def test_a_process_without_samples_is_refused(small_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Proves that two processes do not wait for ever for the scores of an empty one.
    data = module(small_dataset, validation_samples=1)
    monkeypatch.setattr(data, "_processes", lambda: 2)
    with pytest.raises(DataError, match="1 samples cannot be evaluated on 2 processes"):
        data.val_dataloader()


def test_processes_take_whole_test_batches_in_turn(small_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Proves that a test batch holds the same samples on any number of processes, and that none has nothing to do.
    data = module(small_dataset)
    data.test_batches = [range(2), range(4, 6), range(2, 3)]
    monkeypatch.setattr(data, "_processes", lambda: 4)
    seen = []
    for rank in range(4):
        monkeypatch.setattr(data, "_rank", lambda rank=rank: rank)
        seen.append([batch["index"].tolist() for batch in data.test_dataloader()])
    assert seen == [[[0, 1]], [[4, 5]], [[2]], [[0, 1]]]
