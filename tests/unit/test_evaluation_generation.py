"""evaluation/generation.py: what a stopped evaluation has, what is still to be made, and how it comes together."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from i2am_train.data.dataset import TryOnDataset
from i2am_train.errors import DataError
from i2am_train.evaluation.generation import GeneratedSamples, joined_result, person_names, real_images
from i2am_train.evaluation.scoring import ImageScores
from i2am_train.files import UNFINISHED
from i2am_train.ops.images import to_uint8
from i2am_train.results.panels import SamplePanels
from i2am_train.types import GridSize, Pairing, Split

SIZE = GridSize(64, 48)
NAMES = tuple("abcde")


def panels_of(index: int) -> SamplePanels:
    draw = np.random.default_rng(index)
    picture = draw.integers(0, 256, (16, 12, 3), dtype=np.uint8)
    pictures = ("garment", "agnostic", "densepose", "person", "generated")
    return SamplePanels(
        name=NAMES[index],
        garment_name=NAMES[index],
        **dict.fromkeys(pictures, picture),
        map_generated=draw.random((16, 12)),
        map_reference=draw.random((16, 12)),
        centers=draw.random((12, 2)),
        target_centers=draw.random((12, 2)),
        mask=draw.random(12) > 0.5,
        inpaint_mask=draw.random((16, 12)) > 0.5,
        garment_mask=draw.random((16, 12)) > 0.5,
        layer="up_blocks.1.attentions.1",
        generated_grid=GridSize(4, 3),
        reference_grid=GridSize(8, 6),
    )


def row(index: int) -> dict[str, Any]:
    return {"index": index, "name": NAMES[index], "imacs_g": index / 3}


@pytest.fixture
def samples(tmp_path: Path) -> GeneratedSamples:
    return GeneratedSamples(folder=tmp_path, names=NAMES, batch_size=2)


def make(samples: GeneratedSamples, *positions: int, panels: tuple[int, ...] = ()) -> None:
    images = [np.full((16, 12, 3), 7, np.uint8)] * len(positions)
    samples.write([row(at) for at in positions], images, [panels_of(at) for at in panels])


def test_batches_are_made_once(samples: GeneratedSamples) -> None:
    """Whole batches of fixed content; finished ones, in any order, are not pending; then all rows in order."""
    assert samples.pending() == samples.batches() == [range(2), range(2, 4), range(4, 5)]
    make(samples, 4)
    make(samples, 0, 1)
    assert samples.pending() == [range(2, 4)]
    make(samples, 2, 3)
    assert samples.pending() == []
    assert samples.rows() == [row(index) for index in range(5)]


def test_a_batch_without_its_rows_or_an_image_is_made_again(samples: GeneratedSamples) -> None:
    """Rows are written last, so their absence means that the batch was interrupted; a deleted image is noticed."""
    for positions in ((0, 1), (2, 3), (4,)):
        make(samples, *positions)
    (samples.folder / "partial" / "batch-00000" / "rows.json").unlink()
    samples.image_path(3).unlink()
    assert samples.pending() == [range(2), range(2, 4)]


def test_panels_of_batches_come_together(samples: GeneratedSamples) -> None:
    """In order of the samples, arrays beside their names, and none where none were wanted."""
    make(samples, 2, 3, panels=(2,))
    make(samples, 0, 1, panels=(0, 1))
    make(samples, 4)
    panels = samples.panels()
    assert [one.name for one in panels] == ["a", "b", "c"]
    for position, one in enumerate(panels):
        assert np.array_equal(one.centers, panels_of(position).centers)
        assert np.array_equal(one.generated, panels_of(position).generated)
    bare = GeneratedSamples(folder=samples.folder / "other", names=NAMES[:2], batch_size=2)
    make(bare, 0, 1)
    assert bare.panels() == []


def test_a_finished_evaluation_keeps_its_images_only(samples: GeneratedSamples) -> None:
    """Neither partial files nor what a killed process left half-written."""
    for positions in ((0, 1), (2, 3), (4,)):
        make(samples, *positions)
    (samples.folder / "images" / f".c.77{UNFINISHED}").write_bytes(b"half")
    samples.clear()
    assert [path.name for path in samples.folder.iterdir()] == ["images"]
    assert sorted(path.name for path in (samples.folder / "images").iterdir()) == [f"{name}.png" for name in NAMES]


def test_rows_and_image_scores_join_by_position() -> None:
    """Means over both, a missing value counted, set scores beside them."""
    rows = [row(index) | {"attention_entropy": 1.0} for index in (0, 3)]
    scores = ImageScores(pairs={"ssim": [None, 0.5]}, sets={"fid": 9.0}, protocol={"image_size": "2x1"})
    result = joined_result(rows, scores)
    assert result.rows[1] == row(3) | {"attention_entropy": 1.0, "ssim": 0.5}
    assert result.metrics == {"imacs_g": 0.5, "attention_entropy": 1.0, "ssim": 0.5, "fid": 9.0}
    assert result.skipped == {"ssim": 1}
    assert result.protocol == {"image_size": "2x1"}


def test_real_images_are_the_persons_of_the_samples(small_dataset: Path) -> None:
    """The very bytes that a sample's person has, under the person's name, whatever garment they get."""
    dataset = TryOnDataset(small_dataset, Split.TEST, Pairing.UNPAIRED, SIZE, indices=[1, 4])
    real = real_images(dataset)
    assert real.size == SIZE
    for position in (0, 1):
        sample = dataset[position]
        assert real.names[position] == sample["name"]
        assert torch.equal(real.read(position), to_uint8(sample["person"]))


def test_a_person_that_comes_twice_is_refused(small_dataset: Path) -> None:
    """Images are named after persons: the second would overwrite the first."""
    dataset = TryOnDataset(small_dataset, Split.TEST, Pairing.PAIRED, SIZE)
    dataset.pairs[3] = dataset.pairs[1]
    with pytest.raises(DataError, match=r"1 persons come more than once in the test list .*50001_00"):
        person_names(dataset)
