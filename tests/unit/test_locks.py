"""One process at a time writes a folder; what dead ones left is taken over, and nothing else is removed."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from i2am_train.errors import FolderInUseError, RunFolderError
from i2am_train.files import UNFINISHED
from i2am_train.locks import LOCK, SILENCE, Owner, locked, staged

HOLD = """
import sys, time
from pathlib import Path
from i2am_train.files import UNFINISHED
from i2am_train.locks import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds a folder's lock."""
    words = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def leave(folder: Path, silent: float = 0.0, **changes: object) -> Path:
    """The lock of some process, last touched ``silent`` seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    lock.write_text(json.dumps(asdict(replace(Owner.this_process(), **changes))))  # type: ignore[arg-type]
    os.utime(lock, (time.time() - silent,) * 2)
    return lock


def test_a_folder_is_locked_while_it_is_written(tmp_path: Path) -> None:
    """The refusal says who and since when; afterwards no lock is left, and no folder that nothing came into."""
    folder = tmp_path / "new" / "run"
    with locked(folder):
        began = json.loads((folder / LOCK).read_text())["since"]
        me, since = os.getpid(), re.escape(began)
        said = rf"run is in use .* process {me}, since {since}.*Nothing was changed.*kill {me}"
        with pytest.raises(FolderInUseError, match=said), locked(folder):
            pass
        assert (folder / LOCK).is_file()
    assert not list(tmp_path.iterdir())
    with locked(folder):
        (folder / "results.json").touch()
    assert [path.name for path in folder.iterdir()] == ["results.json"]


def test_a_killed_process_is_followed_at_once(tmp_path: Path) -> None:
    """Living it refuses, also while it is stopped; killed it does not, even before its parent took notice."""
    process = holder(tmp_path)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(FolderInUseError, match=rf"process {process.pid}, "), locked(tmp_path):
        pass
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the table of processes
    in_use = holder(tmp_path / "evaluation")
    unfinished = [tmp_path / f"{place}.9.7{UNFINISHED}" for place in ("", "model/", "evaluation/")]
    (tmp_path / "model").mkdir()
    for path in (*unfinished, tmp_path / "step"):
        path.touch()
    with locked(tmp_path):
        assert [path.exists() for path in unfinished] == [False, False, True]  # the last is another's
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    in_use.kill()
    for ended in (process, in_use):
        ended.communicate()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation", "model", "step"]


@pytest.mark.parametrize(
    ("silent", "changes", "taken"),
    [
        pytest.param(0, {"born": "another time"}, True, id="its number belongs to a younger process"),
        pytest.param(9e9, {}, False, id="alive here, however long its disk was away"),
        pytest.param(0, {"machine": "elsewhere"}, False, id="another machine's, alive"),
        pytest.param(SILENCE + 5, {"machine": "elsewhere"}, True, id="another machine's, silent"),
        pytest.param(
            0, {"machine": "elsewhere", "job": "7", "restarts": 0}, True, id="the same job of SLURM, earlier"
        ),
        pytest.param(0, {"machine": "elsewhere", "job": "7", "restarts": 1}, False, id="the same job of SLURM, now"),
        pytest.param(0, {"machine": "elsewhere", "job": "8"}, False, id="another job of SLURM"),
    ],
)  # fmt: skip
def test_only_what_is_certainly_dead_is_followed(
    silent: float, changes: dict[str, object], taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message of another machine's lock names the machine, its last sign of life, and what to delete."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    folder = tmp_path / "run"
    lock = leave(folder, silent, **{"host": "node7"} | changes)
    if taken:
        with locked(folder):
            assert json.loads(lock.read_text())["pid"] == os.getpid()
        assert not folder.exists()  # nothing was in it but the lock
        return
    with pytest.raises(FolderInUseError, match="on node7, since") as refused, locked(folder):
        pass
    if "machine" in changes:
        assert f"delete {lock}" in str(refused.value)
        assert "sign of life 0 s ago" in str(refused.value)
    assert [path.name for path in folder.iterdir()] == [LOCK]


def test_a_lock_without_words_is_judged_by_its_age(tmp_path: Path) -> None:
    """Left by a process that died between making and writing it, or about to be written."""
    lock = tmp_path / LOCK
    lock.touch()
    with (
        pytest.raises(FolderInUseError, match=rf"{LOCK} is there, and cannot be read.*delete that file"),
        locked(tmp_path),
    ):
        pass  # fmt: skip
    os.utime(lock, (0, 0))
    with locked(tmp_path):
        assert lock.stat().st_size


def _contend(folder: Path, number: int, results: Path) -> None:
    for _ in range(20):
        try:
            with locked(folder):
                (folder / "inside").mkdir()  # fails if another one is inside
                (folder / "inside").rmdir()
                (results / f"{number}").write_text("was inside")
        except FolderInUseError:
            time.sleep(0.002)
        except FileExistsError:
            (results / "two at once").touch()


def test_of_many_one_follows_a_dead_process(tmp_path: Path) -> None:
    """Four processes find the same dead lock again and again; never are two of them inside."""
    folder, results = tmp_path / "run", tmp_path / "results"
    results.mkdir()
    leave(folder, born="another time")
    (folder / "kept").touch()
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=_contend, args=(folder, n, results)) for n in range(4)]
    for other in others:
        other.start()
    for other in others:
        other.join(60)
    assert [path.name for path in results.glob("two*")] == []
    assert list(results.iterdir())
    assert [path.name for path in folder.iterdir()] == ["kept"]


def _leave_in_a_child(folder: Path) -> None:
    pid = os.fork()
    if pid == 0:
        raise SystemExit  # as a copy of a process that ends on its own, not by os._exit
    os.waitpid(pid, 0)


def test_copies_of_the_process_do_not_unlock(tmp_path: Path) -> None:
    """A process that reads samples is a copy of the one that holds the lock, and ends before it."""
    with locked(tmp_path):
        try:
            with locked(tmp_path / "inner"):
                _leave_in_a_child(tmp_path)
                assert (tmp_path / "inner" / LOCK).is_file()
        except SystemExit:
            os._exit(0)
        assert (tmp_path / LOCK).is_file()


def test_the_other_processes_of_a_run_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those that Lightning starts nor those of torchrun or SLURM."""
    process = holder(tmp_path)
    for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID", "NODE_RANK"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            with locked(tmp_path):
                pass
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == process.pid
    process.kill()
    process.communicate()


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    """A file, a link to nothing; and parents that were made for it are gone again."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(RunFolderError, match=f"{name} is a file, or a link to nothing"), locked(tmp_path / name):
            pass  # fmt: skip
    with pytest.raises(OSError, match="File name too long"), locked(tmp_path / "new" / ("a" * 300)):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


# -- folders that appear whole ---------------------------------------------------------------------------------------


def fill(folder: Path, text: str, fault: Callable[[], None] = lambda: None) -> None:
    with staged(folder) as content:
        (content / "part").mkdir()
        (content / "part" / "file").write_text(text)
        fault()


def test_a_staged_folder_appears_whole(tmp_path: Path) -> None:
    """It takes the place of the one before; after an error that one is still there, and nothing beside it."""
    fill(tmp_path / "model", "first")
    fill(tmp_path / "model", "second")
    with pytest.raises(ZeroDivisionError, match="division"):
        fill(tmp_path / "model", "third", lambda: print(1 / 0))
    assert (tmp_path / "model/part/file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_staged_is_removed(tmp_path: Path) -> None:
    """Half a folder goes; a whole one that was just moved out of the way comes back."""
    leave(tmp_path / "model.partial", born="another time")
    (tmp_path / "model.partial/content/part").mkdir(parents=True)
    (tmp_path / "model.partial/previous").mkdir()
    (tmp_path / "model.partial/previous/whole").touch()
    with pytest.raises(ZeroDivisionError, match="division"):
        fill(tmp_path / "model", "", lambda: print(1 / 0))
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["whole"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_somebody_elses_partial_folder_stays(tmp_path: Path) -> None:
    """Only a lock of ours says that a folder may be removed."""
    theirs = tmp_path / "data.partial" / "thesis.tex"
    theirs.parent.mkdir()
    theirs.write_text("years of work")
    with pytest.raises(RunFolderError, match=r"data\.partial .* holds something that no command of ours left"):
        fill(tmp_path / "data", "")  # fmt: skip
    assert theirs.read_text() == "years of work"
    assert not (tmp_path / "data").exists()


def test_two_do_not_stage_the_same_folder(tmp_path: Path) -> None:
    process = holder(tmp_path / "data.partial")
    with pytest.raises(FolderInUseError, match=rf"process {process.pid}"):
        fill(tmp_path / "data", "")
    process.kill()
    process.communicate()
