"""Files in object storage, read through fsspec: ``s3://``, ``gs://``, ``https://``, ``file://`` and others.

Each protocol has a client library of its own, and each client its own errors; here they become a
:class:`~i2am_train.errors.DataError` that names the URL and says what to do.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec

from i2am_train.environment import without_secrets
from i2am_train.errors import DataError
from i2am_train.files import DISK_FULL, UNFINISHED, file_fingerprint, written

PAUSES = (1.0, 5.0)
"""Seconds before the second and the third attempt at a file; chosen by us. Clients may try by themselves, too."""
ABANDONED = 3600.0
"""Seconds without a byte after which a part of a file was left by a process that was killed; chosen by us."""


class TransferError(DataError):
    """A file did not come, or not as it should be; another attempt may do."""


def read_bytes(url: str) -> bytes:
    """The content of a small file: a URL, or a path.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it cannot be read, or its protocol needs a package that is not installed.
    """
    with _errors_named(url):
        files, place = fsspec.url_to_fs(url)
        # Not files.open: over HTTP it calls a server that is down a missing file.
        return bytes(files.cat_file(place))


def fetch(url: str, path: Path, sha256: str) -> None:
    """Copy a file to a path, where it appears whole and sound or not at all. Three attempts.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it cannot be read, or has another digest than it should.
    """
    _remove_abandoned(path.parent)
    with written(path) as unfinished:
        for pause in PAUSES:
            try:
                _copy(url, unfinished, sha256)
                break
            except TransferError:
                time.sleep(pause)
        else:
            _copy(url, unfinished, sha256)


def _remove_abandoned(folder: Path) -> None:
    """Removes parts of files that nobody brings any more: a process that is killed cannot remove its own."""
    for part in folder.glob(f".*{UNFINISHED}"):
        with suppress(FileNotFoundError):  # its own process was faster
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()


def _copy(url: str, path: Path, sha256: str) -> None:
    with _errors_named(url):
        files, place = fsspec.url_to_fs(url)
        files.get_file(place, str(path))
    if (found := file_fingerprint(path)) != sha256:
        raise TransferError(
            f"{without_secrets(url)} is damaged: {path.stat().st_size} bytes came with the SHA-256 {found[:16]}..., "
            f"expected {sha256[:16]}... Copy the folder there again from where it was made."
        )


@contextmanager
def _errors_named(url: str) -> Iterator[None]:
    """The clients' many errors as one that says what to do; only a missing file stays what it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in DISK_FULL:  # not the storage's fault: the copy here has no room
            raise
        raise _unreadable(url, error) from error
    except ImportError as error:
        raise DataError(
            f"{without_secrets(url)} cannot be read: {error}. Install that package where i2am_train is "
            "installed (pip install ...)."
        ) from error
    except Exception as error:  # each client fails in its own words
        raise _unreadable(url, error) from error


def _unreadable(url: str, error: Exception) -> TransferError:
    reason = without_secrets((str(error).strip() or "no reason given").splitlines()[0])
    return TransferError(
        f"{without_secrets(url)} cannot be read ({type(error).__name__}: {reason}). Check the address, the network "
        "and the credentials; the same command then goes on where it was."
    )
