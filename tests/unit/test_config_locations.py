"""Shipped files in a checkout and in a wheel; names that are no folders here: paths refused, the hub asked once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from i2am_train.config import locations
from i2am_train.config.locations import pull, revisions
from i2am_train.errors import CheckpointError
from i2am_train.models.annotators import HumanParser
from i2am_train.models.pretrained import load_encoder
from i2am_train.types import GridSize


def test_checkout_layout() -> None:
    """In a checkout conf/ and data/weights/ lie beside the package."""
    root = Path(locations.__file__).parents[2]
    assert locations.conf_folder() == root / "conf"
    assert locations.weights_folder() == root / "data" / "weights"
    folder = locations.dataset_folder(GridSize(64, 48), 20, 10, 3)
    assert folder == root / "data" / "synthetic-64x48-train20-test10-seed3"


def test_wheel_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a wheel both lie inside the package, and the dataset goes to the user's cache."""
    package = tmp_path / "site-packages" / "i2am_train"
    (package / "conf").mkdir(parents=True)
    monkeypatch.setattr(locations, "PACKAGE", package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert locations.conf_folder() == package / "conf"
    assert locations.checkpoint_folder("tiny") == package / "weights" / "tiny"
    folder = locations.dataset_folder(GridSize(128, 96), 2000, 200, 0)
    assert folder.parent == tmp_path / "cache" / "i2am_train"


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    """The message holds the absolute path and the way out."""
    assert locations.checkpoint_folder(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match=r"no checkpoint folder /.*/nowhere\. .*'tiny'"):
        locations.checkpoint_folder(str(tmp_path / "nowhere"))


NOBODY = "http://127.0.0.1:9"
"""Where connections are refused: the discard port, which nothing listens on."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Sets the hub's address; gives its cache, an empty folder."""

    def at(address: str) -> Path:
        constants = "huggingface_hub.constants"
        monkeypatch.setattr(f"{constants}.ENDPOINT", address)
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
        return tmp_path / "hub"

    return at


@pytest.fixture
def refusing() -> Iterator[tuple[str, list[str]]]:
    """A hub without models: its address, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815 - BaseHTTPRequestHandler's name

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "path", ["./dino", "../dino", "/no/dino", "~/dino", "a/b/dino", "weights/", ".dino", "my dino"]
)
def test_a_path_without_a_file_is_no_name(
    refusing: tuple[str, list[str]], hub: Callable[[str], Path], path: str
) -> None:
    """Said without a question to the hub."""
    address, asked = refusing
    hub(address)
    with pytest.raises(CheckpointError, match=rf"no file or folder '{path}', .*Check the path"):
        load_encoder(path)
    assert asked == []


@pytest.mark.parametrize("load", [load_encoder, HumanParser.from_pretrained])
def test_without_network_the_answer_is_fast(hub: Callable[[str], Path], load: Callable[[str], Any]) -> None:
    """The libraries' own questions take 25 seconds; the message names the network and the way around it."""
    hub(NOBODY)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"fetched \(nobody/none; .*Check the network.*hf download"):
        load("nobody/none")
    assert time.monotonic() - started < 5


def test_an_unknown_name_is_asked_for_once(refusing: tuple[str, list[str]], hub: Callable[[str], Path]) -> None:
    """One question for the model, none for its files."""
    address, asked = refusing
    hub(address)
    with pytest.raises(CheckpointError, match=r"fetched \(dino; .*there is no such model, or it is"):
        load_encoder("dino")
    assert asked == ["/api/models/dino"]


def test_what_is_in_the_cache_needs_no_network(hub: Callable[[str], Path], make_parts: Callable[..., Any]) -> None:
    """The hub is not asked for a model of which a part was fetched before."""
    cached, commit = hub(NOBODY) / "models--me--dino", "0123456789abcdef0123456789abcdef01234567"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text(commit)
    absent = cached / ".no_exist" / commit / "adapter_config.json"  # the library notes what is not there
    absent.parent.mkdir(parents=True)
    absent.touch()
    encoder = make_parts("dinov2")
    encoder.save_pretrained(cached / "snapshots" / commit)
    loaded = load_encoder("me/dino")
    assert loaded.config.hidden_size == encoder.config.hidden_size


COMMITS = {"main": "a" * 40, "v2": "b" * 40}
"""Of the model below, by branch and tag."""


@pytest.fixture
def fetched(hub: Callable[[str], Path], make_parts: Callable[..., Any]) -> Path:
    """The hub's cache with two revisions of an encoder, as a download leaves them; nothing can be fetched."""
    repository = hub(NOBODY) / "models--someone--encoder"
    for number, (name, commit) in enumerate(COMMITS.items()):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / name).write_text(commit)
        encoder = make_parts("dinov2")
        encoder.layernorm.bias.data.fill_(number)
        encoder.save_pretrained(repository / "snapshots" / commit)
    return repository


@pytest.mark.parametrize(("asked", "bias"), [("", 0.0), ("@v2", 1.0), (f"@{'b' * 40}", 1.0)])
def test_a_revision_is_the_one_that_is_read(
    fetched: Path, monkeypatch: pytest.MonkeyPatch, asked: str, bias: float
) -> None:
    """By branch, tag or commit; the commit is what a manifest gets."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = f"someone/encoder{asked}"
    assert load_encoder(name).layernorm.bias.data.unique().tolist() == [bias]
    commit = COMMITS["v2" if asked else "main"]
    assert revisions(name, "/nowhere", None) == {"revisions": {name: commit}}
    assert revisions(f"hub:{name}")["revisions"].popitem()[1] == commit
    assert Path(pull(f"hub:{name}")).name == commit


def test_a_revision_that_is_not_there(fetched: Path) -> None:
    """Another one is not taken in its place."""
    with pytest.raises(CheckpointError, match="someone/encoder@v3"):
        load_encoder("someone/encoder@v3")
    assert revisions("someone/encoder@v3", "tiny", "a/b/c") == {}


def test_nan_from_the_hub_is_found(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fetched is checked like what lies here: values, and types in the files."""
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = fetched / "snapshots" / COMMITS["main"] / "model.safetensors"
    weights = load_file(file)
    for value, message in (
        (weights["layernorm.bias"] * float("nan"), "not finite"),
        (weights["layernorm.bias"].int(), "whole numbers"),
    ):
        save_file(weights | {"layernorm.bias": value}, file, {"format": "pt"})
        with pytest.raises(
            CheckpointError, match=rf"'someone/encoder' hold .*{message}.* .layernorm.bias|hold {message}"
        ):
            load_encoder("someone/encoder")
