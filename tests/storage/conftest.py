"""Real servers on this machine: files over HTTP, and S3 where its client and moto's server are installed.

``pip install s3fs 'moto[server]'`` adds the second one; they are not among the development packages, because they
take 160 MB.
"""

import shutil
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from i2am_train.data import cache


class Relay(socketserver.ThreadingTCPServer):
    """Passes connections on to a server, and breaks each after ``limit`` bytes of its answers where one is set."""

    daemon_threads = True

    def __init__(self, target: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Passage)
        self.target = target
        self.limit: int | None = None
        self.broken = 0
        """Connections that were broken off."""
        self.breaks: int | None = None
        """Connections to break off before the line is sound again; None: all."""


class _Passage(socketserver.BaseRequestHandler):
    server: Relay

    def handle(self) -> None:
        with socket.create_connection(self.server.target) as upstream:
            threading.Thread(target=_pass, args=(self.request, upstream), daemon=True).start()
            passed = 0
            while data := upstream.recv(2**14):
                passed += len(data)
                if self.server.limit is not None and passed > self.server.limit:
                    self._break()
                    return
                self.request.sendall(data)

    def _break(self) -> None:
        self.server.broken += 1
        if self.server.breaks == self.server.broken:
            self.server.limit = None
        self.request.shutdown(socket.SHUT_RDWR)


def _pass(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(2**14):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:  # the other end is closed
        return


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""


class Storage:
    """A place in object storage, with the line to it."""

    def __init__(self, url: str, relay: Relay, copy: Callable[[Path, str], None]) -> None:
        self.url = url
        self.relay = relay
        self._copy = copy

    def put(self, folder: Path, name: str) -> str:
        """Copies a folder there, over one that there is; its URL."""
        self._copy(folder, name)
        return f"{self.url}/{name}"


@pytest.fixture
def relay() -> Iterator[Callable[[tuple[str, int]], Relay]]:
    """Starts a relay before a server; stops it after the test."""
    with _Running() as running:
        yield lambda target: running.start(Relay(target))


class _Running:
    """Servers in threads of this process."""

    def __init__(self) -> None:
        self.servers: list[Any] = []

    def start(self, server: Any) -> Any:
        threading.Thread(target=partial(server.serve_forever, 0.05), daemon=True).start()
        self.servers.append(server)
        return server

    def __enter__(self) -> "_Running":
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()


@pytest.fixture(params=["http", "s3"])
def storage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    relay: Callable[[tuple[str, int]], Relay],
) -> Iterator[Storage]:  # fmt: skip
    """An empty place, over each protocol; attempts follow each other at once."""
    monkeypatch.setattr(cache, "PAUSES", (0.0, 0.0))
    if request.param == "s3":
        yield from _s3(relay, monkeypatch)
    else:
        yield from _http(relay, tmp_path)


def _http(relay: Callable[..., Relay], tmp_path: Path) -> Iterator[Storage]:
    root = tmp_path / "served"
    root.mkdir()
    with _Running() as running:
        server = running.start(ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(root))))
        line = relay(server.server_address)
        yield Storage(
            f"http://127.0.0.1:{line.server_address[1]}",
            line,
            lambda folder, name: shutil.copytree(folder, root / name, dirs_exist_ok=True) and None,
        )


def _s3(relay: Callable[..., Relay], monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs")
    moto = pytest.importorskip("moto.server", reason="needs moto[server]")
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    line = relay(server.get_host_and_port())
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{line.server_address[1]}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # the last test's have its address
    files = s3fs.S3FileSystem()
    bucket = f"bucket{line.server_address[1]}"  # moto remembers those of other tests
    files.mkdir(bucket)
    yield Storage(
        f"s3://{bucket}", line, lambda folder, name: files.put(f"{folder}/", f"{bucket}/{name}", recursive=True)
    )
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
