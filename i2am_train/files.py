"""Files that appear whole or not at all, and that survive a power cut once they are there; JSON files of results.

Whoever writes a file of a command writes it through :func:`written`. Errors of the operating system stay ``OSError``
and carry the path, whichever library wrote; ``entry`` says them to the user. Errors of JSON files name the file.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2s, file_digest
from pathlib import Path
from typing import Any

from i2am_train.environment import shown
from i2am_train.errors import RunFolderError

UNFINISHED = ".i2am.tmp"
"""Ending of files that are being written. Only such files are ever removed as left over."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors that mean that there is no room."""
RUST_ERROR = re.compile(r"\(os error (\d+)\)")
"""How safetensors, which is written in Rust, reports an error of the operating system."""


_MASK = os.umask(0o077)  # it can only be read by setting it: here, before there are threads
os.umask(_MASK)
_RIGHTS = 0o666 & ~_MASK


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
            share(unfinished)
            flush(unfinished)
            unfinished.replace(path)
            flush(path.parent)
        finally:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)


def share(file: Path) -> None:
    """Give a file the rights of any new one: safetensors makes files that their owner alone can read."""
    if stat.S_IMODE(file.stat().st_mode) == 0o600:
        file.chmod(_RIGHTS)


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: readers see the old content or the new, never a part.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_text(Path(folder, "new", "a.txt"), "a")
    ...     [path.name for path in Path(folder).rglob("*")]
    ['new', 'a.txt']
    """
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
    """Errors of the operating system carry a path, and come as ``OSError`` from libraries that have their own.

    >>> with named_errors(Path("a.safetensors")):
    ...     raise RuntimeError("Error while serializing: I/O error (os error 28)")
    Traceback (most recent call last):
        ...
    OSError: [Errno 28] No space left on device: 'a.safetensors'
    """
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
    if len(paths) > 200:  # one takes about 4 ms; chosen by us
        os.sync()
        return
    for path in paths:
        flush(path)


def free_space(folder: Path) -> tuple[Path, int]:
    """The nearest folder that exists of where a folder lies or will lie, and the bytes that are free there.

    >>> free_space(Path("/of/nobody"))[0]
    PosixPath('/')
    """
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    return existing, shutil.disk_usage(existing).free


def file_fingerprint(path: Path) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits.

    >>> file_fingerprint(Path("/dev/null"))[:8]
    'e3b0c442'
    """
    with path.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


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


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON: paths become text, NaN and infinity null, secrets in addresses ``***``.

    >>> json_text({"cache": "s3://key:secret@host/a", "score": float("nan"), "root": Path("a")})
    '{"cache": "s3://***@host/a", "score": null, "root": "a"}'
    """
    return json.dumps(shown(_without_nan(value)), indent=indent, default=str, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Write :func:`json_text`, indented, in one step.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_json(Path(folder) / "a.json", {"steps": 10})
    ...     read_object(Path(folder) / "a.json")
    {'steps': 10}
    """
    write_text(path, json_text(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        RunFolderError: it is missing or damaged.

    >>> read_json(Path("/dev/null"))
    Traceback (most recent call last):
        ...
    i2am_train.errors.RunFolderError: /dev/null is not readable JSON ...
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(f"{path} is missing: {path.parent} is not the folder of a run.") from None
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} is not readable JSON ({error}). Delete {path.parent} and run again.") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        RunFolderError: it is missing, damaged, or holds something else.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise RunFolderError(
            f"{path} holds a value of type {type(found).__name__} where an object is expected, so {path.parent} is not "
            "the folder of a run, or the file was damaged. Run the command that made it again."
        )
    return found


@contextmanager
def entries_of(path: Path) -> Iterator[None]:
    """While the entries of a file of ours are looked up: one that is missing or of another type names the file.

    Raises:
        RunFolderError: an entry is missing or has an impossible value.

    >>> with entries_of(Path("results.json")):
    ...     {}["metrics"]
    Traceback (most recent call last):
        ...
    i2am_train.errors.RunFolderError: results.json has not the entries that this program writes ('metrics' is ...
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise RunFolderError(
            f"{path} has not the entries that this program writes ({reason}): it was changed, or is another program's. "
            "Run the command that made its folder again."
        ) from error


def require_own_json(path: Path, names: Collection[str]) -> None:
    """Fails where a file that is to be written is there already and is not an older one of the same kind.

    Args:
        path: of the file.
        names: that every such file has at its top, or those of its first entry if it is a list.

    Raises:
        RunFolderError: it is something else.

    >>> require_own_json(Path("/dev/null"), ["root", "ok"])
    Traceback (most recent call last):
        ...
    i2am_train.errors.RunFolderError: /dev/null exists and is no file that this command writes. ...
    """
    if not os.path.lexists(path):
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        there = content[0] if isinstance(content, list) else content
        ours = isinstance(there, dict) and set(names) <= there.keys()
    except (OSError, ValueError, IndexError):
        ours = False
    if not ours:
        raise RunFolderError(
            f"{path} exists and is no file that this command writes. Nothing was changed. Give another name, or move "
            "that file away."
        )
