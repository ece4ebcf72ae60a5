"""callbacks/evaluation.py: one validated training, read back from every place that it is logged to."""

import csv
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from i2am_train.commands.train import train
from i2am_train.config.store import compose
from i2am_train.reporting.records import read_panels

pytestmark = pytest.mark.filterwarnings("default")  # Lightning's, TensorBoard's and W&B's own


@pytest.fixture(scope="module")
def run(
    small_dataset: Path, small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two refined steps and a validation of three samples, two of them with panels."""
    options = [
        "experiment=refined", f"data.root={small_dataset}", f"init={small_checkpoint}", "data.height=64",
        "data.width=48", "data.workers=0", "data.batch_size=8", "optimization.steps=2", "sampling.steps=2",
        "validation.samples=3", "validation.panel_samples=2", "evaluation.metrics=[ssim]", "evaluation.batch_size=2",
        "trainer.progress_bar=false", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu",
        "tracking.wandb=offline",
    ]  # fmt: skip
    output = tmp_path_factory.mktemp("logged") / "run"
    return train(compose("train", [*options, f"output={output}"]))


@pytest.fixture(scope="module")
def from_csv(run: Path) -> dict[str, float]:
    """The last value of every column."""
    last: dict[str, float] = {}
    with (run / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            last |= {name: float(value) for name, value in row.items() if value}
    return last


def wandb_records(file: Path) -> Iterator[bytes]:
    """Records of an offline run: LevelDB's log format (blocks of 32 KiB) after a header of 7 bytes."""
    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def finished_records(file: Path) -> list[Record]:
    """All records; W&B's service process may still be writing the last ones when the run has been finished."""
    deadline = time.monotonic() + 60
    while True:
        records = [Record.FromString(data) for data in wandb_records(file)]
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        assert time.monotonic() < deadline, "W&B did not finish its file"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def from_wandb(run: Path) -> dict[str, Any]:
    """The last value of every key in the offline run's own file."""
    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    last: dict[str, Any] = {}
    for record in finished_records(file):
        for item in record.history.item:
            last[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return last


@pytest.fixture(scope="module")
def events(run: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    return accumulator


def test_all_loggers_hold_the_same_scores(
    from_csv: dict[str, float], from_wandb: dict[str, Any], events: EventAccumulator
) -> None:
    """Every loss and every score is in CSV, TensorBoard and W&B, with one value."""
    names = {name for name in from_csv if name.startswith(("loss/", "val/"))}
    assert {"loss/total", "loss/denoising", "loss/dcml", "loss/tv", "loss/cwg"} <= names
    assert {"val/imacs_g", "val/imacs_r", "val/correspondence_error", "val/ssim"} <= names
    assert names <= set(events.Tags()["scalars"])
    for name in names:
        assert events.Scalars(name)[-1].value == pytest.approx(from_csv[name], rel=1e-5), name
        assert from_wandb[name] == pytest.approx(from_csv[name], rel=1e-5), name


def test_pictures_are_logged(
    run: Path, from_wandb: dict[str, Any], events: EventAccumulator
) -> None:
    """The attribution panel and the sample grid, to TensorBoard and to W&B, each sample with its name."""
    assert "val/attribution" in events.Tags()["images"]
    assert any(tag.startswith("val/samples") for tag in events.Tags()["images"])
    assert from_wandb["val/attribution/count"] == 1
    panels = read_panels(run / "validation" / "epoch-0000" / "panels.safetensors")
    assert panels is not None
    assert from_wandb["val/samples/captions"] == list(panels.names)
    assert from_wandb["val/samples/width"] == 3 * 48  # garment, truth, generated
    assert from_wandb["val/samples/height"] == 64


def test_panels_are_kept(run: Path) -> None:
    """The first two validation samples as an archive and as a picture."""
    folder = run / "validation" / "epoch-0000"
    panels = read_panels(folder / "panels.safetensors")
    assert panels is not None
    assert panels.garment.shape == (2, 64, 48, 3)
    with Image.open(folder / "panel.png") as picture:
        assert min(picture.size) > 200


def test_the_tracking_run_is_ended(run: Path) -> None:
    """The next training in this process gets a W&B run of its own."""
    assert (run / "wandb").is_dir()
    assert wandb.run is None
