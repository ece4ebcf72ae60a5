"""A stand-in for W&B's server, and a reader of the files that an offline run leaves."""

import gzip
import json
import re
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from wandb.proto.wandb_internal_pb2 import Record

# -- what an offline run stored ----------------------------------------------------------------------------------------


def raw_records(file: Path) -> Iterator[bytes]:
    """Records of a run: LevelDB's log format (blocks of 32 KiB) after a header of 7 bytes."""
    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@dataclass
class StoredRun:
    """What one ``.wandb`` file says."""

    folder: Path
    run: Any
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[Any] = field(default_factory=list)
    metrics: list[Any] = field(default_factory=list)

    def of_type(self, kind: str) -> list[Any]:
        """Artifacts of a type."""
        return [artifact for artifact in self.artifacts if artifact.type == kind]

    def scalars(self, name: str) -> dict[int, float]:
        """Values of a scalar by optimiser step."""
        return {
            int(row["trainer/global_step"]): row[name]
            for row in self.history
            if name in row and "trainer/global_step" in row
        }

    def table(self, name: str) -> list[dict[str, Any]]:
        """Rows of the last table of a name; pictures as paths of their files."""
        assert any(f"{name}/path" in row for row in self.history)
        contents = [
            {entry.path: entry.local_path for entry in artifact.manifest.contents}
            for artifact in self.of_type("run_table")
        ]
        files = [of_table for of_table in contents if f"{name}.table.json" in of_table][-1]
        table = json.loads(Path(files[f"{name}.table.json"]).read_text())
        return [
            {
                column: files[value["path"]] if isinstance(value, dict) else value
                for column, value in zip(table["columns"], row, strict=True)
            }
            for row in table["data"]
        ]


def stored_run(folder: Path) -> StoredRun:
    """The run in ``.../wandb/offline-run-...``; waits until W&B's service has written its end."""
    (file,) = folder.glob("*.wandb")
    deadline = time.monotonic() + 60
    while True:
        records = [Record.FromString(data) for data in raw_records(file)]
        if records and records[-1].WhichOneof("record_type") == "exit":
            break
        assert time.monotonic() < deadline, "W&B did not finish its file"
        time.sleep(0.1)
    kept = StoredRun(folder, next(r.run for r in records if r.WhichOneof("record_type") == "run"))
    for record in records:
        for item in (*record.run.config.update, *record.config.update):
            kept.config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        if record.history.item:
            kept.history.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
        if record.WhichOneof("record_type") == "artifact":
            kept.artifacts.append(record.artifact)
        if record.WhichOneof("record_type") == "metric":
            kept.metrics.append(record.metric)
    return kept


@pytest.fixture(scope="session")
def read_runs() -> Callable[[Path], list[StoredRun]]:
    """All runs below a folder, oldest first."""

    def read(folder: Path) -> list[StoredRun]:
        found = {file.parent.resolve() for file in folder.rglob("*.wandb") if "latest-run" not in file.parts}
        return [stored_run(run) for run in sorted(found, key=lambda path: path.name.split("-")[-2])]

    return read


# -- the dashboard's definition -------------------------------------------------------------------------------------


def dashboard_panels(definition: Any) -> Iterator[dict[str, Any]]:
    """Every panel in a specification, wherever it lies."""
    if isinstance(definition, dict):
        if "viewType" in definition:
            yield definition
        for value in definition.values():
            yield from dashboard_panels(value)
    elif isinstance(definition, list):
        for value in definition:
            yield from dashboard_panels(value)


def shown_names(definition: Any) -> set[str]:
    """Names of scalars, media and tables that the panels show."""
    found: set[str] = set()
    for panel in dashboard_panels(definition):
        config = panel["config"]
        found |= {*config.get("metrics", ()), *config.get("mediaKeys", ())}
        if panel["viewType"] == "Weave":
            found.add(config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"])
    return found


@pytest.fixture(scope="session")
def panels() -> Callable[[Any], Iterator[dict[str, Any]]]:
    """Lists the panels of a definition."""
    return dashboard_panels


@pytest.fixture(scope="session")
def shown() -> Callable[[Any], set[str]]:
    """Lists the names that a definition shows."""
    return shown_names


# -- the server --------------------------------------------------------------------------------------------------------

USER = "tester"


class StandIn:
    """Answers what wandb 0.31 asks, and keeps what it is told.

    ``runs``: history lines, summary, config and settings by run id. ``artifacts``: by id, with name, type, metadata,
    and the run that made it; ``inputs``: pairs (run, artifact name). ``views``: workspaces and reports.
    """

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.inputs: set[tuple[str, str]] = set()
        self.views: list[dict[str, Any]] = []
        self.operations: list[str] = []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                """Silent."""

            def do_POST(self) -> None:
                self.reply(stand_in.posted(self.path, self.body()))

            def do_PUT(self) -> None:
                self.body()
                self.reply({})

            def do_GET(self) -> None:
                self.reply({})

            def body(self) -> bytes:
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

            def reply(self, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Clients hang up when they are done."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """From here on connections are refused."""
        self.server.shutdown()
        self.server.server_close()

    def history(self, run: str) -> list[dict[str, Any]]:
        """Rows of a run in order."""
        lines = self.runs[run]["history"]
        return [json.loads(lines[number]) for number in sorted(lines)]

    def posted(self, path: str, body: bytes) -> Any:
        if path.startswith("/graphql"):
            query = json.loads(body)
            name = query.get("operationName") or re.search(r"(?:query|mutation)\s+(\w+)", query["query"])[1]  # type: ignore[index]
            self.operations.append(name)
            variables = query.get("variables") or {}
            answer = getattr(self, f"on_{name}", None)
            return {"data": answer(variables.get("input") or variables) if answer else {}}
        if path.endswith("/file_stream"):
            run = self.runs[path.split("/")[4]]
            for file, part in (json.loads(body or b"{}").get("files") or {}).items():
                if file == "wandb-history.jsonl":
                    run["history"] |= dict(enumerate(part["content"], part["offset"]))
                elif file == "wandb-summary.json":
                    run["summary"] = json.loads(part["content"][-1])
        return {}

    # -- GraphQL operations, by name

    def on_Viewer(self, _: Any) -> Any:
        return {"viewer": {"id": "1", "entity": USER, "username": USER, "flags": "{}", "admin": False,
                           "email": "", "teams": {"edges": []}}}  # fmt: skip

    def on_ServerFeaturesQuery(self, _: Any) -> Any:
        return {"serverInfo": {"features": []}}

    def on_GetDefaultEntity(self, _: Any) -> Any:
        return self.on_Viewer(_)

    def on_ProjectInternalId(self, v: Any) -> Any:
        known = {run["project"] for run in self.runs.values()}
        name = v["projectName"]
        return {"project": {"id": name, "internalId": f"id of {name}"} if name in known else None}

    def on_GetProjects(self, v: Any) -> Any:
        nodes = [
            {"id": name, "name": name, "entityName": USER, "createdAt": "2026-01-01", "isBenchmark": False,
             "user": None}
            for name in {run["project"] for run in self.runs.values()}
        ]  # fmt: skip
        page = {"hasNextPage": False, "endCursor": None}
        return {"models": {"pageInfo": page, "edges": [{"node": node} for node in nodes]}}

    def on_Runs(self, v: Any) -> Any:
        group = json.loads(v["filters"]).get("group")
        found = {
            name: run
            for name, run in self.runs.items()
            if run["project"] == v["project"] and group in (None, run.get("groupName"))
        }
        if v["project"] not in {run["project"] for run in self.runs.values()}:
            return {"project": None}
        nodes = [
            {"id": name, "name": name, "projectId": "1", "tags": [], "config": "{}", "state": "finished",
             "summaryMetrics": json.dumps(run["summary"]), "systemMetrics": "{}",
             "user": {"name": USER, "username": USER}}
            for name, run in found.items()
        ]  # fmt: skip
        # One run a page, so that a client has to turn it.
        at = 0 if v.get("cursor") is None else int(v["cursor"]) + 1
        page = {"endCursor": str(at), "hasNextPage": at + 1 < len(nodes)}
        edges = [{"node": node, "cursor": str(at)} for node in nodes[at : at + 1]]
        return {"project": {"runCount": len(nodes), "runs": {"edges": edges, "pageInfo": page}}}

    def on_upsertView(self, v: Any) -> Any:
        answer = self.on_UpsertView2(v)
        project = {"id": "p", "name": v["projectName"], "entityName": USER}
        answer["upsertView"]["view"] |= {"displayName": v["displayName"], "description": "", "project": project,
                                         "spec": v["spec"], "type": "runs", "updatedAt": None}  # fmt: skip
        return answer

    def on_UpsertView2(self, v: Any) -> Any:
        self.views.append({**v, "spec": json.loads(v["spec"])})
        return {"upsertView": {"view": {"id": str(len(self.views)), "name": v["name"]}, "inserted": True}}  # fmt: skip

    def on_ArtifactType(self, _: Any) -> Any:
        return {"project": {"artifact": None}}

    def on_RunResumeStatus(self, v: Any) -> Any:
        run, bucket = self.runs.get(v["name"]), None
        if run:
            tail = [run["history"][number] for number in sorted(run["history"])[-1:]]
            bucket = {"id": v["name"], "name": v["name"], "summaryMetrics": json.dumps(run["summary"]),
                      "displayName": "", "logLineCount": 0, "historyLineCount": len(run["history"]),
                      "eventsLineCount": 0, "historyTail": json.dumps(tail), "eventsTail": "[]", "config": "{}",
                      "tags": [], "notes": "", "wandbConfig": json.dumps({"t": 1})}  # fmt: skip
        project = {"id": "p", "name": v["project"], "entity": {"id": "e", "name": USER}}
        return {"model": {**project, "bucket": bucket}}

    def on_UpsertBucket(self, v: Any) -> Any:
        run = self.runs.setdefault(v["name"], {"history": {}, "summary": {}, "config": {}})
        run["config"] = json.loads(v["config"] or "{}") or run["config"]
        for key in ("groupName", "jobType", "tags", "displayName", "project"):
            run[key] = v.get(key) or run.get(key)
        project = {"id": "p", "name": run["project"], "entity": {"id": "e", "name": USER}}
        return {"upsertBucket": {"inserted": True, "bucket": {
            "id": v["name"], "name": v["name"], "displayName": run["displayName"], "description": "", "config": "{}",
            "sweepName": None, "historyLineCount": len(run["history"]), "project": project}}}  # fmt: skip

    def on_CreateRunFiles(self, v: Any) -> Any:
        files = [{"name": name, "uploadUrl": f"{self.url}/files"} for name in v["files"]]
        return {"createRunFiles": {"runID": v["run"], "uploadHeaders": [], "files": files}}

    def on_CreateArtifact(self, v: Any) -> Any:
        name = v["artifactCollectionName"]
        artifact = {"id": f"{name}:{v['digest']}", "digest": v["digest"], "state": "PENDING", "aliases": [],
                    "artifactSequence": {"id": name, "latestArtifact": None}}  # fmt: skip
        self.artifacts[artifact["id"]] = {"name": name, "type": v["artifactTypeName"], "run": v["runName"],
                                          "metadata": json.loads(v["metadata"] or "{}"), "files": []}  # fmt: skip
        return {"createArtifact": {"artifact": artifact}}

    def on_CreateArtifactManifest(self, v: Any) -> Any:
        manifest = {"id": "m", "file": {"id": "f", "uploadUrl": f"{self.url}/m", "uploadHeaders": []}}  # fmt: skip
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def on_CreateArtifactFiles(self, v: Any) -> Any:
        edges = []
        for file in v["artifactFiles"]:
            self.artifacts[file["artifactID"]]["files"].append(file["name"])
            edges.append({"node": {"id": file["name"], "name": file["name"], "displayName": file["name"],
                                   "uploadUrl": f"{self.url}/a", "uploadHeaders": [], "storagePath": "x",
                                   "uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]}}})  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def on_CommitArtifact(self, v: Any) -> Any:
        self.artifacts[v["artifactID"]]["committed"] = True
        return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": ""}}}

    def on_UseArtifact(self, v: Any) -> Any:
        self.inputs.add((v["runName"], self.artifacts[v["artifactID"]]["name"]))
        artifact = {"id": v["artifactID"], "digest": "", "description": "", "state": "COMMITTED",
                    "createdAt": "2026-01-01T00:00:00Z", "metadata": "{}"}  # fmt: skip
        return {"useArtifact": {"artifact": artifact}}


@pytest.fixture
def make_server() -> Iterator[Callable[[], StandIn]]:
    """Starts stand-ins, which end with the test."""
    servers: list[StandIn] = []

    def make() -> StandIn:
        servers.append(StandIn())
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def wandb_server(make_server: Callable[[], StandIn], monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A stand-in, with this process logged in to it."""
    server = make_server()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return server
