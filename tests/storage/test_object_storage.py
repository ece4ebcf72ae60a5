"""data/cache.py's files against real servers: what arrives, what is refused, and what remains of a failure."""

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from i2am_train.data.cache import fetch, read_bytes
from i2am_train.errors import DataError
from i2am_train.files import UNFINISHED

CONTENT = bytes(range(256)) * 4096
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def url(storage: Any, tmp_path: Path) -> str:
    """Address of a file of a megabyte."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_bytes(CONTENT)
    (folder / "text").write_text("ψ = 1\n", encoding="utf-8")
    return f"{storage.put(folder, 'place')}/file"


def test_files_arrive_whole(url: str, tmp_path: Path) -> None:
    fetch(url, tmp_path / "copies" / "file", DIGEST)
    assert [file.name for file in (tmp_path / "copies").iterdir()] == ["file"]
    assert (tmp_path / "copies" / "file").read_bytes() == CONTENT
    assert read_bytes(url.replace("/file", "/text")) == "ψ = 1\n".encode()


def test_parts_left_by_killed_processes_are_removed(url: str, tmp_path: Path) -> None:
    """Once they are old: another process may be at work on a young one."""
    names = (f".file.17{UNFINISHED}", f".file.18{UNFINISHED}", ".theirs.19.tmp")
    old, young, theirs = (tmp_path / name for name in names)
    for part in (old, young, theirs):
        part.write_bytes(b"part")
    for part in (old, theirs):
        os.utime(part, (0, 0))
    fetch(url, tmp_path / "file", DIGEST)
    assert [part.exists() for part in (old, young, theirs)] == [False, True, True]


def test_a_missing_file_is_no_failure_of_the_line(url: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere|key does not exist"):
        fetch(url.replace("/file", "/nowhere"), tmp_path / "copies" / "file", DIGEST)
    with pytest.raises(FileNotFoundError, match=r"nowhere|key does not exist"):
        read_bytes(url.replace("/file", "/nowhere"))
    assert not list((tmp_path / "copies").iterdir())


def test_other_bytes_than_expected_are_refused(url: str, tmp_path: Path) -> None:
    """Nothing of them stays."""
    with pytest.raises(DataError, match=r"/place/file is damaged: 1048576 bytes came .* expected 00"):
        fetch(url, tmp_path / "copies" / "file", "00" * 32)
    assert not list((tmp_path / "copies").iterdir())


def test_a_line_that_dies_in_the_middle(storage: Any, url: str, tmp_path: Path) -> None:
    """Refused by name with nothing half kept; when the line is sound again, the same call succeeds.

    S3's client goes on where the line broke, a few times: it breaks too early for that.
    """
    storage.relay.limit = len(CONTENT) // 16
    with pytest.raises(DataError, match=r"/place/file cannot be read .*Check the address, the network"):
        fetch(url, tmp_path / "copies" / "file", DIGEST)
    assert storage.relay.broken >= 3
    assert not list((tmp_path / "copies").iterdir())
    storage.relay.limit = None
    fetch(url, tmp_path / "copies" / "file", DIGEST)
    assert (tmp_path / "copies" / "file").read_bytes() == CONTENT


def test_a_line_that_dies_twice_is_no_failure(storage: Any, url: str, tmp_path: Path) -> None:
    storage.relay.limit, storage.relay.breaks = len(CONTENT) // 2, 2
    fetch(url, tmp_path / "copies" / "file", DIGEST)
    assert storage.relay.broken == 2
    assert (tmp_path / "copies" / "file").read_bytes() == CONTENT


def test_a_server_that_is_down(storage: Any, url: str, tmp_path: Path) -> None:
    storage.relay.shutdown()
    storage.relay.server_close()
    with pytest.raises(DataError, match=r"/place/text cannot be read \(\w+: .*Check the address"):
        read_bytes(url.replace("/file", "/text"))


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_client_is_named(protocol: str, package: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(DataError, match=rf"{protocol}://b/file cannot be read: .*nstall {package} "):
        fetch(f"{protocol}://b/file", tmp_path / "file", DIGEST)
    with pytest.raises(DataError, match="Protocol not known: s4"):
        read_bytes("s4://b/file")
