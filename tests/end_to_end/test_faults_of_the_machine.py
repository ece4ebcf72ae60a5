"""Full disks, read-only folders, impossible paths: one paragraph from every command, and nothing half-written."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from i2am_train.config.store import compose
from i2am_train.detection.bench import make_shapes
from i2am_train.files import UNFINISHED
from i2am_train.locks import LOCK, locked
from i2am_train.workflows import explain
from tests.support.commands import exit_status

pytestmark = [
    pytest.mark.long,
    pytest.mark.usefixtures("fresh_process"),
    pytest.mark.filterwarnings("default"),  # Lightning's and torch's own deprecations
]


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small disk of its own."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("mounting a disk takes the rights of root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# -- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few photographs with parsing maps and keypoints, and none of what is derived."""
    from i2am_train.data.synthetic import make_dataset
    from i2am_train.types import GridSize

    root = tmp_path_factory.mktemp("photographs") / "set"
    make_dataset(root, 2, 2, GridSize(128, 96), 3, annotations=True, workers=1, progress=False)
    for folder in [*root.glob("*/agnostic*"), *root.glob("*/gt_cloth*"), *root.glob("*/cloth-mask")]:
        shutil.rmtree(folder)
    return root


@pytest.fixture(scope="session")
def explained(overrides: list[str], small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished folder of `i2am explain`."""
    output = tmp_path_factory.mktemp("explained") / "run"
    options = [*overrides, f"checkpoint={small_checkpoint}", "device=cpu", f"output={output}"]
    return explain.explain(compose("explain", options))


@pytest.fixture
def commands(
    request: pytest.FixtureRequest, training: list[str], overrides: list[str], small_dataset: Path,
    small_checkpoint: Path, paint_by_example: Path,
) -> Callable[[str, Path], tuple[str, list[str]]]:  # fmt: skip
    """A command by name, and its words with an output in some folder."""
    judged = [*overrides, f"checkpoint={small_checkpoint}", "device=cpu"]
    few = ["progress_bar=false", "tracking=files", "evaluation.metrics=[ssim]"]

    def words(name: str, place: Path) -> tuple[str, list[str]]:
        output = f"output={place / 'out'}"
        if name == "detect":
            make_shapes(place.parent / "coco", 2)
        if name == "data derive":
            copy = shutil.copytree(request.getfixturevalue("photographs"), place / "set", dirs_exist_ok=True)
            return name, [f"root={copy}", "workers=1"]
        if name == "data match":
            copy = shutil.copytree(small_dataset, place / "set", dirs_exist_ok=True)
            for folder in copy.glob("*/correspondence"):
                shutil.rmtree(folder)
            return name, [f"root={copy}", "workers=1"]
        if name == "report":
            return name, [f"explained=[{request.getfixturevalue('explained')}]", output]
        return {
            "train": ("train", [*training, output]),
            "train, tracked": ("train", [*training, "tracking.wandb=offline", output]),
            "evaluate": ("evaluate", [*judged, *few, "evaluation.samples=2", output]),
            "evaluate images": (
                "evaluate", [f"{n}={small_dataset}/test/image" for n in ("images", "reference")] + [*few, output],
            ),
            "ablate": ("ablate", [*training, "arms=[base,baseline]", "seeds=[0]", output]),
            "explain": ("explain", [*judged, output]),
            "detect": (
                "detect", [f"root={place.parent / 'coco'}", f"pipeline={paint_by_example}", "height=32", "width=48",
                           "steps=1", "pictures=1", "device=cpu", "progress_bar=false", "tracking=files", output],
            ),
            "export": ("export", [f"checkpoint={small_checkpoint}", output]),
            "data make": ("data make", [f"root={place / 'out'}", "train=2", "test=2", "height=64", "width=48"]),
            "data cache": (
                "data cache",
                [f"root={small_dataset}", f"init={small_checkpoint}", "workers=0", "progress_bar=false", output],
            ),
            "data check": ("data check", [f"root={small_dataset}", f"json={place / 'out.json'}"]),
            "dashboard": ("dashboard", [f"output={place / 'out.json'}"]),
        }[name]  # fmt: skip

    return words


COMMANDS = (
    "train", "evaluate", "evaluate images", "ablate", "explain", "detect", "report", "export",
    "data make", "data derive", "data match", "data cache", "data check", "dashboard",
)  # fmt: skip


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one paragraph on standard error."""
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("i2am: ")]
    assert len(errors) == 1, errors
    return errors[0]


def left_over(folder: Path) -> list[str]:
    """Files that were being written, locks, and folders that were being made."""
    names = [path.name for path in folder.rglob("*")]
    return [n for n in names if n.endswith((UNFINISHED, LOCK, ".partial", ".tmp", ".unfinished"))]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_folder(
    command: str, commands: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "disk", "size=20m") as disk:
        name, words = commands(command, disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        capsys.readouterr()
        assert exit_status(name, words) == 2
        assert "read-only file system. Give another folder" in said(capsys)


def fill_up(disk: Path, room: int) -> None:
    """Leave about ``room`` bytes of it."""
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(b"\0" * max(0, free - room))


@pytest.mark.parametrize(
    ("command", "room"),
    [
        *((command, 4_000) for command in ("evaluate images", "data derive", "data match", "dashboard")),
        *((c, 60_000) for c in ("train", "evaluate", "explain", "report", "detect", "data make")),
        *((command, 400_000) for command in ("export", "data cache")),
        pytest.param("ablate", 400_000, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk(
    command: str, room: int, commands: Callable[..., Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Found in the middle of the work, although there was room enough at its beginning."""
    with mounted(tmp_path / "disk", "size=20m") as disk:
        name, words = commands(command, disk)
        fill_up(disk, room)
        usage = shutil.disk_usage(disk)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**12))
        capsys.readouterr()
        assert exit_status(name, words) == 2
        assert "no space left on device. Make room" in said(capsys)
        assert left_over(disk) == []


@pytest.mark.parametrize("command", COMMANDS[:-2])
def test_a_folder_in_use(
    command: str, commands: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of the same command: the second is refused, and leaves the first's files alone."""
    place = tmp_path / "place"
    name, words = commands(command, place)
    elsewhere = {"export": "out.partial", "data make": "out.partial", "data derive": "set", "data match": "set"}
    folder = place / elsewhere.get(command, "out")
    with locked(folder):
        before = sorted(place.rglob("*"))
        capsys.readouterr()
        assert exit_status(name, words) == 2
        assert f"{folder} is in use by another i2am command: process {os.getpid()}" in said(capsys)
        assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("command", ["train", "evaluate images", "export", "data make", "data check"])
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("file", "file"),  # is a file, or: not a directory
        ("loop", "too many levels of symbolic links. Links in that path lead in a circle"),
        ("a" * 300, "file name too long. A name in that path is longer than the disk allows"),
    ],
    ids=["below a file", "links in a circle", "300 letters"],
)
def test_an_impossible_path(
    command: str, part: str, message: str, commands: Callable[..., Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    place = tmp_path / "place"
    place.mkdir()
    (place / "file").touch()
    (place / "loop").symlink_to("loop2")
    (place / "loop2").symlink_to("loop")
    before = sorted(place.iterdir())
    name, words = commands(command, place / part)
    capsys.readouterr()
    assert exit_status(name, words) == 2
    assert message in said(capsys)
    assert sorted(place.iterdir()) == before


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A limit of the size of files, as of a quota; reached by what is large, in the middle of it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("command", ["train", "export", "explain", "data cache"])
def test_a_file_that_is_too_large(
    command: str, commands: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, checkpoints, maps and shards are written by different libraries."""
    name, words = commands(command, tmp_path / "place")
    capsys.readouterr()
    with files_of_at_most(50_000):
        assert exit_status(name, words) == 2
    assert "file too large. Raise the limit of the size of files" in said(capsys)
    assert left_over(tmp_path / "place") == []


def test_tracking_on_a_full_disk(
    commands: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """W&B writes in a process of its own; whatever becomes of its files, the command does not hang."""
    with mounted(tmp_path / "disk", "size=20m") as disk:
        name, words = commands("train, tracked", disk)
        fill_up(disk, 100_000)
        usage = shutil.disk_usage(disk)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**12))
        capsys.readouterr()
        assert exit_status(name, words) == 2
        assert "no space left on device. Make room" in said(capsys)


# -- what is the user's ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["data check", "data derive", "dashboard"])
def test_a_file_of_another_kind_is_not_overwritten(
    command: str, commands: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A slip of the finger must not cost a thesis; an older report is replaced."""
    place = tmp_path / "place"
    place.mkdir()
    name, words = commands(command, place)
    theirs = place / "out.json"
    if command == "data derive":
        words = [*words, f"json={theirs}"]
    theirs.write_text('{"chapter": 1}')
    capsys.readouterr()
    assert exit_status(name, words) == 2
    assert f"{theirs} exists and is no file that this command writes" in said(capsys)
    assert theirs.read_text() == '{"chapter": 1}'
    theirs.unlink()
    assert exit_status(name, words) == 0
    made = theirs.read_bytes()
    assert exit_status(name, words) == 0
    assert bool(made)


@pytest.mark.parametrize("command", ["evaluate", "explain", "ablate", "data cache", "data check"])
def test_an_output_among_the_data(
    command: str, commands: Callable[..., Any], small_dataset: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """No run on a dataset can be continued that it changes itself; training: test_stopped_training.py."""
    before = sorted(small_dataset.rglob("*"))
    name, words = commands(command, small_dataset / "train" / "runs")
    capsys.readouterr()
    assert exit_status(name, words) == 2
    assert f"lies among the data in {small_dataset}" in said(capsys)
    assert sorted(small_dataset.rglob("*")) == before
