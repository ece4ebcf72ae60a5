"""The embedded data: deterministic, exact, and written in the VITON-HD layout."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest

from i2am_train.data.synthetic import FIRST_TEST_INDEX, FOLDERS, make_dataset
from i2am_train.data.synthetic.rendering import SyntheticSample, render_sample
from i2am_train.entry import stopped_by_signals
from i2am_train.errors import CommandStopped, DataError, RunFolderError
from i2am_train.locks import LOCK, Owner
from i2am_train.types import GridSize

SIZE = GridSize(64, 48)


def arrays(sample: SyntheticSample) -> list[np.ndarray]:
    values = [getattr(sample, field.name) for field in fields(sample)]
    return [value for value in values if isinstance(value, np.ndarray)]


def test_a_sample_depends_on_seed_and_index_alone() -> None:
    # Proves that neither call order nor other samples change a picture, and that seeds and indices do.
    first = render_sample(3, 7, SIZE)
    later = [render_sample(3, index, SIZE) for index in range(5, 8)][2]
    for a, b in zip(arrays(first), arrays(later), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first.person, render_sample(4, 7, SIZE).person)
    assert not np.array_equal(first.garment, render_sample(3, 8, SIZE).garment)


@pytest.mark.parametrize("index", range(6))
def test_the_correspondence_reproduces_the_garments_colours(index: int) -> None:
    # Proves exactness: the flat garment read at the correspondence is the person's unshaded garment.
    sample = render_sample(0, index, GridSize(128, 96), shading=False)
    inside = cv2.erode(sample.warped_garment_mask.astype(np.uint8), np.ones((3, 3))) > 0
    where = sample.correspondence * np.float32([128, 96]) - np.float32(0.5)
    x, y = np.nan_to_num(where[..., 1]), np.nan_to_num(where[..., 0])
    read = cv2.remap(sample.garment, x, y, cv2.INTER_LINEAR)
    difference = np.abs(read.astype(int) - sample.person.astype(int)).max(axis=-1)[inside]
    assert np.median(difference) <= 2
    assert np.quantile(difference, 0.75) <= 25  # the rest lies at edges of the pattern, where both are blurred


@pytest.mark.parametrize("index", range(8))
def test_masks_and_correspondence_agree(index: int) -> None:
    # Proves the contract of one sample: range, NaN exactly off the garment, garment inside the region to paint.
    sample = render_sample(1, index, SIZE)
    known = ~np.isnan(sample.correspondence)
    np.testing.assert_array_equal(known.all(axis=-1), sample.warped_garment_mask)
    np.testing.assert_array_equal(known.any(axis=-1), sample.warped_garment_mask)
    values = sample.correspondence[sample.warped_garment_mask]
    assert values.min() >= 0.0
    assert values.max() <= 1.0
    covered = sample.inpaint_mask[sample.warped_garment_mask]
    assert covered.mean() > 0.995
    assert (sample.agnostic[sample.inpaint_mask] == 128).all()
    np.testing.assert_array_equal(sample.agnostic[~sample.inpaint_mask], sample.person[~sample.inpaint_mask])
    assert (
        sample.garment[~cv2.dilate(sample.garment_mask.astype(np.uint8), np.ones((5, 5))).astype(bool)] == 255
    ).all()


def test_left_stays_left_and_up_stays_up() -> None:
    # Proves that order is preserved, which the distance-centering loss relies on.
    for sample in (render_sample(2, index, SIZE) for index in range(10)):
        rows, columns = np.nonzero(sample.warped_garment_mask)
        y, x = sample.correspondence[rows, columns].T
        assert np.corrcoef(columns, x)[0, 1] > 0.6
        assert np.corrcoef(rows, y)[0, 1] > 0.6


def test_what_the_model_is_told_does_not_show_the_garment() -> None:
    # Proves that pose and inpainting region are the person's: another garment leaves them as they are.
    for person in range(5):
        own, other = (render_sample(0, person, SIZE, garment=garment) for garment in (person, person + 20))
        np.testing.assert_array_equal(own.densepose, other.densepose)
        assert (own.inpaint_mask == other.inpaint_mask).mean() > 0.985  # a wide cuff may cover part of a hand
        assert not np.array_equal(own.garment, other.garment)


def test_sizes_show_the_same_scene() -> None:
    # Proves that geometry is relative: the small picture is the large one reduced.
    small, large = render_sample(0, 4, SIZE), render_sample(0, 4, GridSize(256, 192))
    reduced = cv2.resize(large.warped_garment_mask.astype(np.float32), (48, 64), interpolation=cv2.INTER_AREA) >= 0.5
    assert (reduced == small.warped_garment_mask).mean() > 0.97


def test_the_layout_is_that_of_viton_hd(small_dataset: Path) -> None:
    # Proves names, folders and pair lists; unpaired tests get another garment.
    for split, count in (("train", 20), ("test", 6)):
        for folder in FOLDERS:
            assert len(list((small_dataset / split / folder).iterdir())) == count
    assert (small_dataset / "train/agnostic-mask/00017_00_mask.png").is_file()
    train = (small_dataset / "train_pairs.txt").read_text().splitlines()
    test = [line.split() for line in (small_dataset / "test_pairs.txt").read_text().splitlines()]
    assert train[17] == "00017_00.jpg 00017_00.jpg"
    assert test[0] == [f"{FIRST_TEST_INDEX}_00.jpg", f"{FIRST_TEST_INDEX + 1}_00.jpg"]
    assert all(person != garment for person, garment in test)
    assert json.loads((small_dataset / "dataset.json").read_text())["height"] == 64


def test_an_existing_dataset_is_kept_and_another_folder_is_refused(tmp_path: Path) -> None:
    # Proves that nothing is ever overwritten, and that the same request is answered by what is there.
    root = tmp_path / "set"
    make_dataset(root, 3, 2, SIZE, 0, workers=1, progress=False)
    before = (root / "train/image/00000_00.jpg").stat().st_mtime_ns
    make_dataset(root, 3, 2, SIZE, 0, workers=1, progress=False)
    assert (root / "train/image/00000_00.jpg").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="holds another dataset"):
        make_dataset(root, 4, 2, SIZE, 0, workers=1, progress=False)
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match=r"no readable dataset\.json"):
        make_dataset(tmp_path / "mine", 3, 2, SIZE, 0, workers=1, progress=False)


def test_a_half_written_dataset_is_begun_again(tmp_path: Path) -> None:
    # Proves that an interruption leaves no folder that looks complete, and does not stand in the way.
    half_made = tmp_path / "set.partial"
    (half_made / "content/train/image").mkdir(parents=True)
    (half_made / "content/train/image/left_over.jpg").touch()
    dead = replace(Owner.this_process(), born="another time")
    (half_made / LOCK).write_text(json.dumps(asdict(dead)))
    root = make_dataset(tmp_path / "set", 3, 2, SIZE, 0, workers=1, progress=False)
    assert not (root / "train/image/left_over.jpg").exists()
    assert not half_made.exists()


def test_a_partial_folder_of_somebody_else_stays(tmp_path: Path) -> None:
    # Proves that a name is not enough to take a folder for our own, and delete it.
    theirs = tmp_path / "set.partial/weeks_of_work.jpg"
    theirs.parent.mkdir()
    theirs.touch()
    with pytest.raises(RunFolderError, match=r"set\.partial .* no command of ours left there"):
        make_dataset(tmp_path / "set", 3, 2, SIZE, 0, workers=1, progress=False)
    assert theirs.exists()
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("train", "test", "size"), [(0, 4, SIZE), (4, 1, SIZE), (4, 4, GridSize(8, 6)), (60_000, 2, SIZE)]
)
def test_impossible_requests_are_refused(tmp_path: Path, train: int, test: int, size: GridSize) -> None:
    # Proves that counts and sizes are checked before anything is written.
    with pytest.raises(DataError, match=r"Change data\."):
        make_dataset(tmp_path / "set", train, test, size, 0, workers=1, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_processes_write_the_same_files(tmp_path: Path) -> None:
    # Proves that the number of drawing processes does not matter.
    for workers in (1, 2):
        make_dataset(tmp_path / str(workers), 70, 2, GridSize(32, 24), 5, workers=workers, progress=False)
    for file in sorted((tmp_path / "1").rglob("*.*")):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "2" / file.relative_to(tmp_path / "1")).read_bytes()


def helpers() -> list[psutil.Process]:
    """The processes that draw."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it ends at this moment
            found += [child] * any("spawn_main" in word for word in child.cmdline())
    return found


def meanwhile(is_time: Callable[[], object], act: Callable[[], None]) -> None:
    """Act in a thread as soon as it is time."""

    def watch() -> None:
        while not is_time():
            time.sleep(0.001)
        act()

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.parametrize(("number", "drawing"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_signal_ends_all_processes_without_a_word(
    tmp_path: Path, number: signal.Signals, drawing: bool, own_signals: None, capfd: pytest.CaptureFixture[str]
) -> None:
    # Proves that a signal to the whole group, as a terminal sends it, is this process's affair alone: while the
    # others start and while they draw, they print no traceback, and end at once with thousands of samples to go.
    def to_all() -> None:
        for process in (*helpers(), psutil.Process()):
            os.kill(process.pid, number)

    meanwhile(lambda: any(tmp_path.rglob("*.jpg")) if drawing else helpers(), to_all)
    with stopped_by_signals(), pytest.raises(CommandStopped, match=f"{number.name} received"):
        make_dataset(tmp_path / "set", 20_000, 2, GridSize(32, 24), 0, workers=2, progress=False)
    assert capfd.readouterr() == ("", "")
    assert helpers() == []
    assert not (tmp_path / "set").exists()


def test_a_killed_process_is_said(tmp_path: Path) -> None:
    # Proves that a process that the system kills ends the command (with `entry`'s advice), which would wait else.
    meanwhile(lambda: any(tmp_path.rglob("*.jpg")), lambda: helpers()[0].kill())
    with pytest.raises(BrokenProcessPool, match="a process that draws ended with status -9"):
        make_dataset(tmp_path / "set", 20_000, 2, GridSize(32, 24), 0, workers=2, progress=False)
    assert helpers() == []


def test_what_a_process_cannot_write_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Proves that an error in a process that draws arrives with its file, as if it were this one's.
    monkeypatch.setattr("i2am_train.data.synthetic.FOLDERS", ("image", "cloth"))
    with pytest.raises(FileNotFoundError, match=r"agnostic-v3\.2/\d+_00\.jpg"):
        make_dataset(tmp_path / "set", 70, 2, GridSize(32, 24), 0, workers=2, progress=False)
