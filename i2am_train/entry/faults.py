"""Faults of the machine as errors that the user can act on: the one place where they are told from the program's own.

Only errors that no program can cause by itself are taken: a full disk, a folder that may not be written, a path that
cannot be, a process that the system killed. A missing file, a closed descriptor and the like keep their traceback.
"""

from __future__ import annotations

import errno
import os
import re
import traceback
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from i2am_train.errors import I2AMError, OutputError, ProcessKilledError
from i2am_train.files import RUST_ERROR

FULL = "Make room, or give a folder on another disk; the same command then goes on where it can."
FORBIDDEN = "Give another folder (output=FOLDER), or the right to write there."

NEEDS_NO_PATH = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: "Raise the limit of the size of files (ulimit -f), or give a folder on another disk.",
    errno.EROFS: FORBIDDEN,
    errno.EIO: "The disk or its connection fails: look at the system's messages (dmesg).",
    errno.ESTALE: "The network disk was mounted anew meanwhile: give the same command again.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n), or lower the number of workers.",
    errno.ENFILE: "The whole machine has too many open files: end other programs, or lower the number of workers.",
}
"""What to do about errors that are the machine's wherever they come from."""
OF_A_PATH = {
    errno.EACCES: FORBIDDEN,
    errno.EPERM: FORBIDDEN,
    errno.ENOTDIR: "A part of that path is a file. Give another folder.",
    errno.ELOOP: "Links in that path lead in a circle. Give a path without them.",
    errno.ENAMETOOLONG: "A name in that path is longer than the disk allows. Give a shorter one.",
}
"""The same where the error names a path."""

SAMPLES_ARRIVE = (
    str(Path("torch", "multiprocessing", "reductions.py")),
    str(Path("multiprocessing", "resource_sharer.py")),
)
"""Code that fetches tensors from the process that read them."""
SYMLINK_LOOP = re.compile(r"Symlink loop from (.+)")
"""What pathlib says instead of ELOOP."""
KILLED_READER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:is killed by signal: ([^.]+)|exited unexpectedly)"
)


def as_user_error(error: BaseException) -> I2AMError | None:
    """What the user can be told of an error; None if it is the program's own."""
    if isinstance(error, I2AMError):
        return error
    if isinstance(error, (OSError, EOFError)) and _is_of_a_reader(error):
        return _killed("")
    if isinstance(error, OSError):
        return _refusal(error.errno, error.filename)
    if isinstance(error, BrokenProcessPool):
        return _killed("")
    if isinstance(error, RuntimeError):
        if found := SYMLINK_LOOP.search(str(error)):
            return _refusal(errno.ELOOP, found[1])
        if found := KILLED_READER.search(str(error)):
            return _killed(f" ({found[1]})" if found[1] else "")
    if found := RUST_ERROR.search(str(error)):
        return _refusal(int(found[1]), None)
    return None


def _is_of_a_reader(error: BaseException) -> bool:
    """Whether a sample was to be taken over from a process that is gone: its file, socket or pipe is, too."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_filename.endswith(SAMPLES_ARRIVE) for frame, _ in frames)


def _refusal(number: int | None, path: object) -> OutputError | None:
    advice = NEEDS_NO_PATH.get(number or 0) or (OF_A_PATH.get(number or 0) if path else None)
    if advice is None or number is None:
        return None
    place = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else "A file"
    return OutputError(f"{place} cannot be used: {os.strerror(number).lower()}. {advice}")


def _killed(how: str) -> ProcessKilledError:
    return ProcessKilledError(
        f"A process that helps this one was killed{how}, most often by the system because memory, or shared memory "
        "(/dev/shm), ran out. Lower the number of workers (data.workers=0 reads in this process), or free memory; the "
        "same command then goes on where it can."
    )
