"""Which dataset a run reads: what counts, and which change is only a repair."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from i2am_train.errors import RunFolderError
from i2am_train.fingerprints import DataState, data_state, folder_state, note_unreadable
from i2am_train.runs import RunFolder

BROKEN = "train/image/b.jpg"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "train/image").mkdir(parents=True)
    (root / "train_pairs.txt").write_text("a.jpg a.jpg\nb.jpg b.jpg\n")
    (root / "train/image/a.jpg").write_bytes(b"aaa")
    (root / BROKEN).write_bytes(b"b")
    return root


def test_links_to_folders_count_and_circles_end(root: Path, tmp_path: Path) -> None:
    """A folder on another disk is part of the dataset; links that lead back are not followed."""
    before = data_state(root)
    shutil.move(root / "train/image", tmp_path / "elsewhere")
    (root / "train/image").symlink_to(tmp_path / "elsewhere")
    assert data_state(root) == before
    (root / "train/up").symlink_to(root)
    (root / "train/self").symlink_to(root / "train/self")
    assert data_state(root) == before
    (tmp_path / "elsewhere/c.jpg").write_bytes(b"c")
    assert data_state(root) != before


@pytest.mark.parametrize("name", ["runs/a/metrics.csv", "report.json", "previews/a.jpg", "notes.txt"])
def test_what_lies_beside_the_data_does_not_count(root: Path, name: str) -> None:
    """Outputs may lie in a dataset's folder; of a folder of pictures everything counts."""
    before, whole = data_state(root), folder_state(root)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("1")
    assert data_state(root) == before
    assert folder_state(root) != whole


def test_a_run_beside_the_data_goes_on(root: Path) -> None:
    """`cd dataset; i2am train data.root=.` writes to runs/ there."""
    for resumed in (False, True):
        folder = RunFolder.open(root / "runs/a", {"seed": 1})
        folder.start(data=data_state(root))
        (folder.path / "weights").write_bytes(b"1")
        assert folder.resumed is resumed


@pytest.mark.parametrize("name", ["test_pairs.txt", "dataset.json", "dresses/images/a.jpg"])
def test_what_belongs_to_the_data_counts(root: Path, name: str) -> None:
    """Both layouts' folders, the lists and the description."""
    before = data_state(root)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("1")
    assert data_state(root) != before


def test_the_fingerprint_of_older_runs_stays(root: Path) -> None:
    """Manifests and caches that were written before know their data again."""
    assert data_state(root).fingerprint == "3e5f430eef526beb"


def replaced(root: Path) -> None:
    (root / BROKEN).write_bytes(b"bbbbb")


def saved_as_png(root: Path) -> None:
    (root / BROKEN).unlink()
    (root / "train/image/b.png").write_bytes(b"bbbbb")


def a_sound_one_changed(root: Path) -> None:
    replaced(root)
    (root / "train/image/a.jpg").write_bytes(b"a")


def removed(root: Path) -> None:
    (root / BROKEN).unlink()


def added(root: Path) -> None:
    replaced(root)
    (root / "train/image/c.jpg").write_bytes(b"c")


def listed_otherwise(root: Path) -> None:
    replaced(root)
    (root / "train_pairs.txt").write_text("b.jpg b.jpg\na.jpg a.jpg\n")


@pytest.mark.parametrize("change", [replaced, saved_as_png])
def test_a_replaced_broken_file_lets_a_run_go_on(root: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    """Only where the run said that it could not read the file; the manifest tells of it."""
    run = RunFolder.open(tmp_path / "study/run", {"seed": 0})
    run.start(data=data_state(root))
    shutil.copytree(tmp_path / "study", tmp_path / "other")
    note_unreadable(tmp_path / "study", f"{root / BROKEN} cannot be decoded. Copy it again.")
    change(root)
    now = data_state(root)
    with pytest.raises(RunFolderError, match=r"began with other data"):
        RunFolder.open(tmp_path / "other/run", {"seed": 0}).start(data=now)
    with pytest.warns(UserWarning, match=r"could not read were replaced \(train/image/b\."):
        RunFolder.open(run.path, {"seed": 0}).start(data=now)
    assert run.manifest["data"] == now.fingerprint
    assert BROKEN in run.manifest["repaired"]
    RunFolder.open(run.path, {"seed": 0}).start(data=now)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (a_sound_one_changed, r"since: 2 changed \(train/image/a\.jpg\)\. Nothing was changed"),
        (removed, r"since: 1 removed \(train/image/b\.jpg\)"),
        (added, r"since: 1 added \(train/image/c\.jpg\), 1 changed \(train/image/b\.jpg\)"),
        (listed_otherwise, r"since: 2 changed \(train/image/b\.jpg\)"),
    ],
)
def test_any_other_change_is_another_dataset(
    root: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    run = RunFolder.open(tmp_path / "run", {"seed": 0})
    run.start(data=data_state(root))
    note_unreadable(run.path, f"{root / BROKEN} cannot be decoded. Copy it again.")
    change(root)
    before = run.manifest
    with pytest.raises(RunFolderError, match=said):
        RunFolder.open(run.path, {"seed": 0}).start(data=data_state(root))
    assert run.manifest == before


def test_a_damaged_record_repairs_nothing(root: Path, tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "run", {"seed": 0})
    run.start(data=data_state(root))
    note_unreadable(run.path, f"{root / BROKEN} cannot be decoded.")
    (run.path / "data_files.json.gz").write_bytes(b"\x1f\x8b")
    replaced(root)
    state: DataState = data_state(root)
    with pytest.raises(RunFolderError, match=r"began with other data"):
        RunFolder.open(run.path, {"seed": 0}).start(data=state)
