"""Files that appear whole or not at all, and that survive a power cut once they are there.

Whoever writes a file of a command writes it through :func:`written`. Errors of the operating system stay ``OSError``
and carry the path, whichever library wrote; ``commands.faults`` says them to the user.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2s
from pathlib import Path

UNFINISHED = ".i2am.tmp"
"""Ending of files that are being written. Only such files are ever removed as left over."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors that mean that there is no room."""

MANY = 200
"""Files for which flushing the whole disk is faster than one by one (about 4 ms each); chosen by us."""

RUST_ERROR = re.compile(r"\(os error (\d+)\)")
"""How safetensors, which is written in Rust, reports an error of the operating system."""


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; what lies there takes its place, flushed to the disk, at the end.

    After an error ``path`` is what it was, and nothing lies beside it. Its folder is made if it is missing.

    Raises:
        OSError: the disk is full, the folder is read-only, and the like; its ``filename`` is ``path`` where the
            writing library named none.
    """
    # A digest, because name and ending together may be longer than a name can be; the process id keeps two writers
    # of the same file apart.
    digest = blake2s(path.name.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    unfinished = path.with_name(f".{digest}.{os.getpid()}{UNFINISHED}")
    with named_errors(path):
        _make_folder(path.parent)
        try:
            yield unfinished
            flush(unfinished)
            unfinished.replace(path)
            flush(path.parent)
        finally:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: readers see the old content or the new, never a part."""
    with written(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # a file, or a link that leads nowhere: the error of reading it says which
        folder.stat()
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Errors of the operating system carry a path, and come as ``OSError`` from libraries that have their own."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except Exception as error:
        if (found := RUST_ERROR.search(str(error))) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems cannot do it with folders
            raise
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """:func:`flush` for all files and folders below one, and itself."""
    paths = [path for path in (*folder.rglob("*"), folder) if path.is_dir() or path.is_file()]
    if len(paths) > MANY:
        os.sync()
        return
    for path in paths:
        flush(path)


def free_space(folder: Path) -> tuple[Path, int]:
    """Bytes that are free where a folder lies or will lie, and the nearest folder of it that exists."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    return existing, shutil.disk_usage(existing).free


def numbered(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that occur more than once.

    >>> numbered(["x", "x", "y"])
    ['x-1', 'x-2', 'y']
    """
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if names.count(name) == 1 else f"{name}-{seen[name]}")
    return result
