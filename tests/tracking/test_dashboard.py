"""`i2am dashboard`: what its panels refer to is logged, and it reaches a stand-in server."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from i2am_train.config.store import compose
from i2am_train.errors import TrackingError
from i2am_train.metrics.registry import METRICS
from i2am_train.tracking import dashboard, names
from i2am_train.workflows.report import dashboard as run

pytestmark = pytest.mark.filterwarnings("default")  # wandb_workspaces' own deprecations


Panels = Callable[[Any], Iterator[dict[str, Any]]]
Shown = Callable[[Any], set[str]]


@pytest.fixture(autouse=True)
def _as_a_fresh_process() -> None:
    """W&B remembers server and login for the life of a process."""
    wandb.teardown()


def test_the_definition_is_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shown: Shown, panels: Panels
) -> None:
    """Without login or network: both parts with the same panels, of the group only."""
    file = tmp_path / "dashboard.json"
    run(compose("dashboard", [f"output={file}", "group=study"]))
    assert str(file) in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert shown(written["workspace"]) == shown(written["report"])
    assert len(list(panels(written["workspace"]))) == len(list(panels(written["report"]))) > 30
    sections = written["workspace"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [s.name for s in dashboard.sections()]
    assert '"value": "study"' in json.dumps(written["workspace"])
    assert '"value": "study"' in json.dumps(written["report"])


def test_panels_show_what_is_documented(shown: Shown, panels: Panels) -> None:
    """Every score of attention or faithfulness and default image metric has its curve, and nothing else has; of losses
    those that every run has."""
    found = shown(dashboard.dashboard_json("p", None))
    scalars = {name for name in found if name.split("/")[-1] in METRICS}
    groups = ("attention", "faithfulness", "image")
    default = {name for name, info in METRICS.items() if info.group in groups and not info.needs_download}
    assert scalars == {names.VALIDATION + n for n in default} | {names.EVALUATION + n for n in default}
    others = {*names.LOSSES[:2], names.LEARNING_RATE, names.STUDY_ARMS, names.STUDY_DIFFERENCES}
    others |= {names.VALIDATION + n for n in (names.ATTRIBUTION, names.ATTRIBUTION_GENERATED)}
    others |= {"val/attribution_reference", "val/table", "eval/table"}
    detection = {name for name in found if name.startswith(names.DETECTION)}
    assert {names.DETECTION_METHODS, names.DETECTION_TABLE, "detect/sweep/i2am"} <= detection
    assert found - scalars - detection == others
    axes = {panel["config"]["xAxis"] for panel in panels(dashboard.dashboard_json("p", None))
            if panel["viewType"] == "Run History Line Plot"}  # fmt: skip
    assert axes == {names.STEP, names.DETECTION_DELTA}
    patterns = [panel["config"].get("metricRegex") for panel in panels(dashboard.dashboard_json("p", None))]
    assert {pattern for pattern in patterns if pattern} == {"^loss/"}  # terms of a user's own, too


def test_bars_are_grouped_by_arm(panels: Panels) -> None:
    """Mean and standard deviation over the runs of an arm."""
    bars = [p["config"] for p in panels(dashboard.dashboard_json("p", None)["workspace"])
            if p["viewType"] == "Bar Chart"]  # fmt: skip
    assert {(bar["groupBy"], bar["groupAgg"], bar["groupArea"]) for bar in bars} == {("arm.value", "mean", "stddev")}


def test_saving(wandb_server: Any, capsys: pytest.CaptureFixture[str], shown: Shown) -> None:
    """Report and workspace arrive as they are defined, and their addresses are printed, before anything is logged."""
    wandb_server.runs["x"] = {"project": "there", "groupName": "study", "summary": {}}
    run(compose("dashboard", ["project=there", "group=study"]))
    report, workspace = wandb_server.views
    assert (report["type"], workspace["type"]) == ("runs", "project-view")
    assert {view["projectName"] for view in wandb_server.views} == {"there"}
    defined = dashboard.dashboard_json("there", "study")
    assert shown(workspace["spec"]) == shown(defined["workspace"])
    assert shown(report["spec"]) == shown(defined["report"])
    printed = capsys.readouterr().out
    assert f"Workspace: {wandb_server.url}/tester/there" in printed
    assert f"Report:    {wandb_server.url}/tester/there/reports/" in printed


def test_panels_of_what_is_logged(wandb_server: Any, shown: Shown, panels: Panels) -> None:
    """Those of the group's runs together: terms that are on, one's own too; no empty panel, no empty section."""
    of_runs = [
        ("study", ["loss/total", "loss/denoising", "loss/tv", "loss/mine", "loss/mine@2", "lr", "step_seconds"]),
        ("study", ["loss/total", "loss/denoising", "lr", "val/ssim", "val/table", "_step"]),
        ("other", ["loss/cwg", "eval/ssim"]),
    ]
    for number, (group, logged) in enumerate(of_runs):
        record = {"project": "there", "groupName": group, "summary": dict.fromkeys(logged, 1.0)}
        wandb_server.runs[str(number)] = record
    run(compose("dashboard", ["project=there", "group=study"]))
    report, workspace = wandb_server.views
    expected = {"loss/total", "loss/denoising", "loss/tv", "loss/mine", "lr", "val/ssim", "val/table"}
    assert shown(report["spec"]) == shown(workspace["spec"]) == expected
    assert len(list(panels(workspace["spec"]))) == len(expected) + 1  # all terms
    sections = workspace["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == ["Image quality", "Losses", "Attribution and samples"]
    run(compose("dashboard", ["project=there"]))
    assert shown(wandb_server.views[-1]["spec"]) == expected | {"loss/cwg", "eval/ssim"}


def test_what_a_user_can_put_right(wandb_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No such project, no server, no login: each says what to do, and nothing is saved."""
    with pytest.raises(TrackingError, match=r"not find project nowhere\. .*give project=NAME"):
        run(compose("dashboard", ["project=nowhere"]))
    assert wandb_server.views == []
    wandb.teardown()
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(TrackingError, match=r"wandb login.*output=dashboard"):
        run(compose("dashboard", ["entity=someone"]))


@pytest.mark.slow
def test_an_unreachable_server(wandb_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B gives up after 20 seconds."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"cannot be used now.*check the network"):
        run(compose("dashboard", []))
