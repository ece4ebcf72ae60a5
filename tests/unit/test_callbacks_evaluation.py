"""callbacks/evaluation.py: one validated training, read back (tests/tracking reads what W&B got)."""

from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from i2am_train.config.store import compose
from i2am_train.results.run_files import read_panels
from i2am_train.workflows.train import train

pytestmark = pytest.mark.filterwarnings("default")  # Lightning's, TensorBoard's and W&B's own


@pytest.fixture(scope="module")
def run(training: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two refined steps and a validation of three samples, two of them with panels, one made again."""
    options = [
        *training, "experiment=refined", "optimization.steps=2", "validation.samples=3", "evaluation.batch_size=2",
        "validation.faithful_samples=1", "evaluation.faithfulness.layers=[2]", "evaluation.faithfulness.shares=[0.5]",
        "evaluation.faithfulness.controls=[]", "evaluation.faithfulness.perceptual=null",
    ]  # fmt: skip
    output = tmp_path_factory.mktemp("logged") / "run"
    return train(compose("train", [*options, f"output={output}"]))


@pytest.fixture(scope="module")
def events(run: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    return accumulator


def test_pictures_are_logged(events: EventAccumulator) -> None:
    """The attribution panel and the sample grid, to TensorBoard."""
    assert "val/attribution" in events.Tags()["images"]
    assert any(tag.startswith("val/samples") for tag in events.Tags()["images"])


def test_faithfulness_is_logged_and_drawn(run: Path, events: EventAccumulator) -> None:
    """Of the one sample: the figures that tables show, the layer's own, and the picture of both kinds of curves."""
    scalars = set(events.Tags()["scalars"])
    assert {
        f"val/{name}" for name in ("use", "where_all", "deletion", "deletion/top@0.5", "insertion/top@0.5")
    } <= scalars
    assert "val/deletion_perceptual" not in scalars
    (use,), (same,) = (events.Scalars(f"val/{name}") for name in ("use", "use/up_blocks.1.attentions.1"))
    assert use.value == same.value > 0
    assert "val/faithfulness" in events.Tags()["images"]
    with Image.open(run / "validation" / "epoch-0000" / "faithfulness.png") as picture:
        assert min(picture.size) > 200


def test_panels_are_kept(run: Path) -> None:
    """The first two validation samples as an archive and as a picture."""
    folder = run / "validation" / "epoch-0000"
    assert [one.garment.shape for one in read_panels(folder)] == [(64, 48, 3)] * 2
    with Image.open(folder / "panel.png") as picture:
        assert min(picture.size) > 200
