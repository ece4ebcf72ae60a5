"""i2am export, as a user would: folder and card, push to the hub and back, against a stand-in of the hub's file API."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import ModelCard

from i2am_train.config.store import compose
from i2am_train.models.tryon import TryOnModel
from i2am_train.workflows.evaluate import evaluate
from i2am_train.workflows.models import export as run_export
from i2am_train.workflows.train import train

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("default"),  # Lightning's and diffusers' own deprecations
]

TOKEN = "hf_of_the_tests"


class Hub(ThreadingHTTPServer):
    """Keeps one commit of each model in memory."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.models: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit_of(self, name: str) -> str:
        digest = hashlib.sha1()
        for path, content in sorted(self.models[name].items()):
            digest.update(path.encode() + content)
        return digest.hexdigest()


class HubHandler(BaseHTTPRequestHandler):
    """The part of the hub's API that uploads and downloads of folders use."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Silence."""

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
        elif parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.models.setdefault(name, {})
            self.server.private[name] = asked.get("visibility") == "private" or asked["private"]
            self.answer(200, {"url": f"{self.server.address}/{name}"})
        elif parts == ["api", "validate-yaml"]:
            self.answer(200, {"errors": [], "warnings": []})
        elif parts[4] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        else:
            name = "/".join(parts[2:4])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.models[name][line["value"]["path"]] = content
            commit = self.server.commit_of(name)
            url = f"{self.server.address}/{name}/commit/{commit}"
            self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts == ["api", "whoami-v2"]:
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self.answer(*((200, {"name": "me"}) if known else (401, {"error": "Invalid user token."})))
            return
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.server.models.get(name)
        if files is None:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return
        commit = self.server.commit_of(name)
        if parts[0] == "api" and parts[4] == "revision" and parts[5] not in ("main", commit):
            self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        elif parts[0] == "api" and parts[4] == "revision":
            siblings = [{"rfilename": path} for path in files]
            self.answer(200, {"id": name, "sha": commit, "siblings": siblings})
        elif parts[0] == "api":
            tree = [
                {"type": "file", "path": path, "size": len(content), "oid": etag(content)}
                for path, content in files.items()
            ]
            self.answer(200, tree)
        else:
            content = files["/".join(parts[4:])]
            self.answer(200, content, X_Repo_Commit=commit, ETag=f'"{etag(content)}"')

    do_HEAD = do_GET  # noqa: N815


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def i2am(words: Sequence[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command with a hub's cache of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    clean |= {"HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-m", "i2am_train", *words],
        capture_output=True,
        text=True,
        check=False,
        env=clean | environment,
    )


def same_weights(one: Path, other: Path) -> bool:
    states = [TryOnModel.from_pretrained(folder).state_dict() for folder in (one, other)]
    return states[0].keys() == states[1].keys() and all(
        value.equal(states[1][name]) for name, value in states[0].items()
    )


@pytest.mark.slow
def test_pushed_and_pulled(hub: Hub, small_checkpoint: Path, tmp_path: Path) -> None:
    """What comes back is what was sent, also without the hub once it is in the cache; revisions are told apart."""
    export = ["export", f"checkpoint={small_checkpoint}", f"output={tmp_path / 'out'}", "push=me/model"]
    done = i2am(export, tmp_path, HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/me/model/commit/" in done.stdout
    assert hub.private == {"me/model": True}
    sent = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert set(hub.models["me/model"]) >= sent
    again = ["export", f"output={tmp_path / 'again'}"]
    commit = hub.commit_of("me/model")
    done = i2am([*again, f"checkpoint=hub:me/model@{commit}"], tmp_path, HF_ENDPOINT=hub.address)
    assert done.returncode == 0, done.stderr
    assert same_weights(tmp_path / "again", small_checkpoint)
    for name, words in {
        "hub:me/model@old": "could not be fetched (hub:me/model@old): there is no such revision",
        "hub:me/other": "could not be fetched (hub:me/other): there is no such model, or it is private",
        "hub:model": "names no model on the hub. Write hub:USER/NAME[@REVISION]",
    }.items():
        failed = i2am(["export", f"output={tmp_path / 'no'}", f"checkpoint={name}"], tmp_path, HF_ENDPOINT=hub.address)
        assert failed.returncode == 2, failed.stderr
        assert words in failed.stderr
        assert "Traceback" not in failed.stderr
        assert not (tmp_path / "no").exists()
    offline = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "1"}
    cached = ["export", f"output={tmp_path / 'cached'}", f"checkpoint=hub:me/model@{commit}"]
    done = i2am(cached, tmp_path, **offline)
    assert done.returncode == 0, done.stderr
    missing = ["export", f"output={tmp_path / 'no'}", "checkpoint=hub:me/unknown"]
    done = i2am(missing, tmp_path, **offline)
    assert done.returncode == 2
    assert "could not be fetched (hub:me/unknown)" in done.stderr
    assert "HF_HUB_OFFLINE" in done.stderr


def test_nobody_is_logged_in(hub: Hub, small_checkpoint: Path, tmp_path: Path) -> None:
    """One paragraph that says what to do, before the folder is made: with no token, and with an unknown one."""
    export = ["export", f"checkpoint={small_checkpoint}", f"output={tmp_path / 'out'}", "push=me/model"]
    for token, reason in ({}, "nobody is logged in"), ({"HF_TOKEN": "hf_old"}, "the hub answered 401"):
        done = i2am(export, tmp_path, HF_ENDPOINT=hub.address, **token)
        assert done.returncode == 2
        assert f"could not be pushed to me/model (nothing was written): {reason}" in done.stderr
        assert "hf auth login" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()
    assert hub.models == {}


def test_no_hub(small_checkpoint: Path, tmp_path: Path) -> None:
    """Where nothing answers the error names the connection."""
    export = ["export", f"output={tmp_path / 'out'}", "checkpoint=hub:me/model"]
    done = i2am(export, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2
    assert "could not be fetched (hub:me/model)" in done.stderr
    assert "Check the network" in done.stderr


def test_the_card_of_a_run(training: list[str], overrides: list[str], tmp_path: Path) -> None:
    """Header and text hold what the run and its evaluation say: intervals, commit, fingerprint, settings."""
    options = [*training, "experiment=refined", f"output={tmp_path / 'run'}"]
    run = train(compose("train", options))
    judged = [*overrides, f"checkpoint={run}", "device=cpu", "progress_bar=false", "evaluation.metrics=[ssim]"]
    results = evaluate(compose("evaluate", [*judged, "tracking.wandb=disabled"]), run / "evaluation-paired")
    words = [f"checkpoint={run}", f"output={tmp_path / 'out'}", "license=apache-2.0"]
    run_export(compose("export", [*words, "base_model=me/start", "dtype=bfloat16"]))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "image-to-image"
    assert card.data.base_model == "me/start"
    scores = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert scores["ssim"] == pytest.approx(results["metrics"]["ssim"], abs=1e-5)
    assert {"imacs_g", "imacs_r", "correspondence_error"} <= set(scores)
    low, high = (results["intervals"]["ssim"][end] for end in ("low", "high"))
    manifest = json.loads((run / "manifest.json").read_text())
    for text in (
        f"| SSIM ↑ | {results['metrics']['ssim']:.4f} | [{low:.4f}, {high:.4f}] |",
        manifest["data"],
        manifest["git"]["commit"],
        "| `objective.terms.cwg.weight` | 0.03 |",
        "| `optimization.steps` | 4 |",
        "6 held-out samples",
        "64x48",
        "stored as bfloat16",
    ):
        assert text in card.text, text
    model = TryOnModel.from_pretrained(tmp_path / "out")
    trained = TryOnModel.from_pretrained(run / "model")
    for name, value in trained.state_dict().items():
        assert model.state_dict()[name].equal(value.to(torch.bfloat16).float()), name
