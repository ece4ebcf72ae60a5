"""What a process prints and keeps: no password, and no library's own words above an error of ours."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from pathlib import Path

import pytest

from i2am_train.config.reporting import TrackingConfig
from i2am_train.data.cache import INDEX_FILE, LatentCache
from i2am_train.environment import command_line, quiet_libraries, without_secrets
from i2am_train.errors import DataError, RunFolderError
from i2am_train.runs import RunFolder
from i2am_train.tracking.session import open_run

SECRET = "hush-hush"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (f"s3://key:{SECRET}@host/bucket/a", "s3://***@host/bucket/a"),
        (f"s3://key:{SECRET}/more@host/bucket", "s3://***@host/bucket"),
        (f"https://{SECRET}@host/a", "https://***@host/a"),
        (f"https://host:8080/a?token={SECRET}&v=2#x", "https://host:8080/a?token=***&v=***#x"),
        (f"simplecache::ftp://me:{SECRET}@host/a", "simplecache::ftp://***@host/a"),
        (f"'data.cache=s3://a:{SECRET}@h/b' seed=1", "'data.cache=s3://***@h/b' seed=1"),
        ("https://host:8080/a@b/c", "https://host:8080/a@b/c"),
        ("s3://bucket/user@home/a", "s3://bucket/user@home/a"),
        ("mail me@host? a=b", "mail me@host? a=b"),
        ("gs://bucket/folder", "gs://bucket/folder"),
    ],
)
def test_addresses(address: str, expected: str) -> None:
    """What is hidden, and what is not."""
    assert without_secrets(address) == expected
    assert without_secrets(expected) == expected


@pytest.mark.parametrize(
    "place",
    [
        f"memory://key:{SECRET}@nowhere/cache",
        f"http://key:{SECRET}@127.0.0.1:9/cache",
        f"http://127.0.0.1:9/cache?token={SECRET}",
        f"nonsense://key:{SECRET}@host/cache",
    ],
)
def test_errors_of_a_cache(place: str) -> None:
    """Also where a client's own words repeat the address."""
    with pytest.raises(DataError, match="://") as error:
        LatentCache(place)
    assert SECRET not in str(error.value)


def test_a_token_stays_at_the_end_of_an_address() -> None:
    """The files of a cache lie in its folder, not in its token."""
    cache = object.__new__(LatentCache)
    cache.place, cache.remote = "https://host/cache?token=a", True
    assert cache._address(INDEX_FILE) == "https://host/cache/index.json?token=a"


def test_run_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file has the secret, and the run goes on with another one, but not with another cache."""

    def settings(secret: str, cache: str = "cache") -> dict[str, object]:
        return {"data": {"cache": f"s3://key:{secret}@host/{cache}"}, "seed": 0}

    words = ["i2am_train/workflows/train.py", f"data.cache=s3://key:{SECRET}@host/cache"]
    monkeypatch.setattr(sys, "argv", words)
    assert SECRET not in command_line()
    run = RunFolder.open(tmp_path / "run", settings(SECRET))
    run.start()
    for file in (tmp_path / "run").iterdir():
        assert SECRET not in file.read_text()
    assert RunFolder.open(tmp_path / "run", settings("another")).resumed
    with pytest.raises(RunFolderError, match=r"s3://\*\*\*@host/other .there: s3://\*\*\*@host/cache") as error:
        RunFolder.open(tmp_path / "run", settings(SECRET, "other"))
    assert SECRET not in str(error.value)


@pytest.mark.filterwarnings("default")  # W&B's own
def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the configuration nor the command line, which W&B keeps by itself."""
    address = f"s3://key:{SECRET}@host/cache"
    monkeypatch.setattr(sys, "argv", ["i2am_train/workflows/train.py", f"data.cache={address}"])
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = open_run(
        TrackingConfig(wandb="offline"), tmp_path, name="a", job_type="train", arm="b",
        config={"data": {"cache": address}},
    )  # fmt: skip
    run.finish()
    files = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert any(b"***@host/cache" in content for content in files)
    assert not any(SECRET.encode() in content for content in files)
    assert sys.argv[1].endswith(address)


def test_diffusers_says_nothing_above_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logging as it is set up when it is imported: the file that it looks for in vain is in the exception."""
    for name in [name for name in os.environ if name.endswith("_VERBOSITY")]:
        monkeypatch.delenv(name)
    source = importlib.util.find_spec("diffusers.utils.logging")
    assert source is not None
    assert source.origin is not None
    spec = importlib.util.spec_from_file_location("diffusers.utils.logging_anew", source.origin)
    assert spec is not None
    assert spec.loader is not None
    settings = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name, value in (("level", logging.NOTSET), ("handlers", []), ("propagate", True)):
        monkeypatch.setattr(logging.getLogger("diffusers"), name, value)
    with warnings.catch_warnings():
        quiet_libraries()
        spec.loader.exec_module(settings)
    assert not settings.get_logger("diffusers.for_this_test").isEnabledFor(logging.ERROR)
