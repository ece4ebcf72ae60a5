"""One process at a time writes a folder.

The lock is a file in the folder that names machine and process. It is created with O_EXCL, which network file systems
keep, and removed at the end. What a dead process left is taken over:

- on the same machine a process is dead if its number is unused or belongs to a process that began at another time;
- of another machine (or container) only the file's age is known: the owner touches it every ``BEAT`` seconds, and is
  given up after ``SILENCE`` seconds, by the clock of the disk;
- a job that SLURM starts again is the only one of its number, so what it left elsewhere is dead.

With the lock of a dead process go the files that it was writing.

The processes of one distributed run share the lock of the first.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from i2am_train.environment import first_process
from i2am_train.errors import FolderInUseError, RunFolderError
from i2am_train.files import UNFINISHED, flush, flush_tree, named_errors, share

LOCK = ".i2am.lock"
"""The lock's name, in the folder that it locks. A folder that holds one is ours."""
HIDDEN = "hidden"
"""In place of the time of birth of a process that is there and that this user may not see."""
BEAT, SILENCE = 15.0, 300.0
"""Seconds between two signs of life, and without one before a process of another machine is given up; chosen by us."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that holds a lock."""

    host: str
    machine: str
    """Tells apart where process numbers mean the same: one boot of a machine, one container."""
    pid: int
    born: str
    """When the process began, so that another one of the same number is not taken for it."""
    since: str
    job: str | None = None
    """Number of its SLURM job."""
    restarts: int = 0
    """How often SLURM had started the job again."""
    key: str = field(default_factory=lambda: secrets.token_hex(8))

    @classmethod
    def this_process(cls) -> Owner:
        """The process that asks."""
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            born=_born(os.getpid()) or "",
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            job=os.environ.get("SLURM_JOB_ID"),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        )

    def is_dead(self, asking: Owner, silent: float) -> bool:
        """Whether the process has certainly ended, as far as ``asking`` can know; ``silent``: see ``SILENCE``."""
        if self.machine == asking.machine and (born := _born(self.pid)) != HIDDEN:
            return born != self.born
        if self.job is not None and self.job == asking.job and self.restarts < asking.restarts:
            return True
        return silent > SILENCE


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is missing, and removed again if nothing came into it.

    Raises:
        FolderInUseError: another process holds it.
        OSError: the folder cannot be made or written.
    """
    if not first_process():
        yield
        return
    made = _make(folder)
    lock = folder / LOCK
    try:
        owner, taken_over = _take(lock)
        if taken_over:
            _remove_unfinished(folder)
            made = made or [folder]
        ended = threading.Event()
        beats = threading.Thread(target=_beat, args=(lock, ended), daemon=True)
        beats.start()
        try:
            yield
        finally:
            ended.set()
            if os.getpid() == owner.pid:  # not in a copy of the process that reads samples
                beats.join()
                _release(lock, owner)
    finally:
        _remove_empty(made)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which takes the place of ``folder`` at the end, flushed to the disk.

    It lies in ``<folder>.partial``, which has a lock. What a killed process left there is removed; a folder of that
    name without our lock is somebody's. What ``folder`` held is removed: whoever calls knows that it may be.

    Raises:
        FolderInUseError: another process fills it.
        RunFolderError: ``<folder>.partial`` is not ours.
        OSError: it cannot be written.
    """
    stage = folder.with_name(f"{folder.name}.partial")
    if not (stage / LOCK).is_file() and stage.is_dir() and any(stage.iterdir()):
        raise RunFolderError(
            f"{stage} is where {folder.name} would be made, and holds something that no command of ours left there "
            f"(no {LOCK}). Nothing was changed. Move it away, or give another folder."
        )
    content, previous = stage / "content", stage / "previous"
    with locked(stage), named_errors(folder):
        if previous.is_dir() and not folder.exists():  # killed between the two steps below
            previous.replace(folder)
        _remove_tree(content, previous)
        content.mkdir(parents=True)
        try:
            yield content
            for weights in content.rglob("*.safetensors"):
                share(weights)
            flush_tree(content)
            if folder.exists():
                folder.replace(previous)
            content.replace(folder)
            flush(folder.parent)
        finally:
            _remove_tree(content, previous)


def _remove_tree(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _make(folder: Path) -> list[Path]:
    """Makes a folder with its parents; those that are new, innermost first."""
    new = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(new)
        if isinstance(error, FileExistsError):
            raise RunFolderError(
                f"{folder} is a file, or a link to nothing. Nothing was changed. Give another output=FOLDER."
            ) from error
        raise
    return new


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # in use now, which is as it should be
            folder.rmdir()


def _take(lock: Path) -> tuple[Owner, bool]:
    """Waits for nobody; this process as the owner, and whether a dead one had left its lock."""
    owner = Owner.this_process()
    content = json.dumps(asdict(owner)).encode()
    taken_over = False
    while not _create(lock, content):
        found, silent = _read(lock), _silence(lock)
        if silent is None:  # released meanwhile
            continue
        if not (silent > SILENCE if found is None else found.is_dead(owner, silent)):
            raise _in_use(lock, found, silent)
        _remove_dead(lock, found)
        taken_over = True
    return owner, taken_over


def _create(lock: Path, content: bytes) -> bool:
    """Whether the lock is now ours; False if there is one."""
    try:
        descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with named_errors(lock):
            os.write(descriptor, content)
            os.fsync(descriptor)
    except BaseException:
        lock.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return True


def _remove_dead(lock: Path, dead: Owner | None) -> None:
    """Removes a dead process's lock, and never one that another process has made in its place meanwhile.

    Of all that found it dead only one gets the name that is made of its key, and looks once more before it removes it.
    """
    turn = lock.with_name(f"{LOCK}.{dead.key if dead else 'unreadable'}")
    try:
        os.close(os.open(turn, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        if (silent := _silence(turn)) is None or silent < BEAT:
            time.sleep(0.05)  # another is at it
            return
    try:
        if _read(lock) == dead:
            lock.unlink(missing_ok=True)
    finally:
        turn.unlink(missing_ok=True)


def _remove_unfinished(folder: Path) -> None:
    """Removes what a dead process was writing, wherever no other process has a lock of its own."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not (Path(place) / name / LOCK).exists()]
        for name in files:
            if name.endswith(UNFINISHED):
                (Path(place) / name).unlink(missing_ok=True)


def _release(lock: Path, owner: Owner) -> None:
    with suppress(OSError):  # a folder that was removed, or a disk that became read-only, meanwhile
        if _read(lock) == owner:
            lock.unlink(missing_ok=True)


def _read(lock: Path) -> Owner | None:
    """Who holds a lock; None if it says nothing that can be read, or is gone."""
    for _ in range(10):
        with suppress(OSError, ValueError, TypeError):
            return Owner(**json.loads(lock.read_bytes()))
        if not lock.exists():
            return None
        time.sleep(0.05)  # it may be about to be written
    return None


def _silence(lock: Path) -> float | None:
    """Seconds since a lock's last sign of life; None if it is gone."""
    probe = lock.with_name(f"{LOCK}.{os.getpid()}.{threading.get_ident()}.now")
    try:
        last = lock.stat().st_mtime
        probe.touch()  # the clock of the disk, which may not be this machine's
        return max(0.0, probe.stat().st_mtime - last)
    except FileNotFoundError:
        return None
    finally:
        probe.unlink(missing_ok=True)


def _beat(lock: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(lock)


def _in_use(lock: Path, owner: Owner | None, silent: float) -> FolderInUseError:
    folder = lock.parent
    if owner is None:
        return FolderInUseError(
            f"{folder} is in use by another i2am command: {lock} is there, and cannot be read. Nothing was changed. "
            "Wait for that command, or delete that file if there is none."
        )
    here = owner.host == socket.gethostname()
    where = f"process {owner.pid}" + ("" if here else f" on {owner.host}")
    if owner.machine == _machine():
        last, way_out = "", f"Wait for it, stop it (kill {owner.pid})"
    else:
        last = f", with a sign of life {silent:.0f} s ago"
        way_out = (
            f"Wait for it, or if it has died, {max(1, round((SILENCE - silent) / 60))} minutes until that is certain; "
            f"if you know that it has, delete {lock}"
        )
    return FolderInUseError(
        f"{folder} is in use by another i2am command: {where}, since {owner.since}{last}. Two would spoil each "
        f"other's files. Nothing was changed. {way_out}, or give this command another folder."
    )


def _machine() -> str:
    """Boot and process namespace, within which a number names one process; the host's name where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _born(pid: int) -> str | None:
    """When a living process began; None if there is none of that number, or it has ended.

    In ticks since the machine started where the system tells: psutil's time moves with the clock, as after a sleep.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        if psutil.LINUX:
            about = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            return about.rpartition(")")[2].split()[19]
        return str(process.create_time())
    except (psutil.Error, FileNotFoundError, ProcessLookupError):
        return HIDDEN if psutil.pid_exists(pid) else None
