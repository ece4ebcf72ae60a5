"""An ablation as a group of runs, read back from its offline files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from i2am_train.config.store import compose
from i2am_train.config.training import AblateConfig
from i2am_train.files import read_json
from i2am_train.tracking.scores import ARM_COLUMNS, DIFFERENCE_COLUMNS
from i2am_train.tracking.session import sync_advice
from i2am_train.workflows.ablate import ablate, tracked

pytestmark = pytest.mark.filterwarnings("default")  # Lightning's, TensorBoard's and W&B's own


@pytest.fixture(scope="module")
def config(training: list[str], tmp_path_factory: pytest.TempPathFactory) -> AblateConfig:
    """Base, baseline and refined with one seed and two steps."""
    options = [
        *training, "optimization.steps=2", "validation.samples=2", "validation.panel_samples=1", "evaluation.samples=4",
        "evaluation.panel_samples=1", "device=cpu", "bootstrap_samples=100", "seeds=[3]", "tracking.wandb=offline",
        "tracking.tags=[mine]", "name=three-arms",
        f"output={tmp_path_factory.mktemp('study') / 'three-arms'}",
    ]  # fmt: skip
    built: AblateConfig = compose("ablate", options)
    return built


@pytest.fixture(scope="module")
def results(config: AblateConfig) -> dict[str, Any]:
    return ablate(config)


@pytest.fixture(scope="module")
def runs(config: AblateConfig, results: dict[str, Any], read_runs: Callable[[Path], list[Any]]) -> dict[str, Any]:
    """By display name."""
    return {run.run.display_name: run for run in read_runs(config.folder)}


def test_runs_are_grouped_and_tagged(runs: dict[str, Any]) -> None:
    """Every cell's training and evaluation, and the study itself, in one group."""
    found = {name: (run.run.job_type, set(run.run.tags) - {"mine"}) for name, run in runs.items()}
    assert found == {
        "base-evaluation": ("evaluation", {"base"}),
        "baseline-seed3": ("train", {"baseline", "seed3"}),
        "baseline-seed3-evaluation": ("evaluation", {"baseline", "seed3"}),
        "refined-seed3": ("train", {"refined", "seed3"}),
        "refined-seed3-evaluation": ("evaluation", {"refined", "seed3"}),
        "three-arms": ("study", set()),
    }
    assert {run.run.run_group for run in runs.values()} == {"three-arms"}
    assert all("mine" in run.run.tags for run in runs.values())


def test_one_command_sends_all_of_it(config: AblateConfig, runs: dict[str, Any]) -> None:
    """All runs lie in one folder, and with them what they will send."""
    assert {run.folder.parent for run in runs.values()} == {config.folder / "wandb"}
    advice = sync_advice(tracked(config).tracking, config.folder)
    assert advice is not None
    assert advice.endswith(f"wandb sync {config.folder / 'wandb'}")
    entries = [e for run in runs.values() for one in run.artifacts for e in one.manifest.contents]
    outside = {Path(e.local_path) for e in entries if not Path(e.local_path).is_relative_to(config.folder)}
    assert {path for path in outside if "checkpoint" not in str(path)} == set()  # the start's own weights


def test_tables_of_the_study(runs: dict[str, Any], results: dict[str, Any]) -> None:
    """Arms and paired differences are those of results.json."""
    study = runs["three-arms"]
    arms = {(row["arm"], row["metric"]): row for row in study.table("study/arms")}
    assert list(next(iter(arms.values()))) == list(ARM_COLUMNS)
    assert {arm for arm, _ in arms} == {"base", "baseline", "refined"}
    for (arm, metric), row in arms.items():
        assert row["mean"] == pytest.approx(results["summary"][arm][metric]["mean"])
    differences = study.table("study/differences")
    assert list(differences[0]) == list(DIFFERENCE_COLUMNS)
    assert len(differences) == len(results["paired"])
    for row, entry in zip(differences, results["paired"], strict=True):
        assert (row["arm"], row["metric"]) == (entry["arm"], entry["metric"])
        assert row["difference"] == pytest.approx(entry["difference"])
    assert study.history[-1]["study/refined/imacs_g"] == pytest.approx(results["summary"]["refined"]["imacs_g"]["mean"])


def test_lineage_of_the_study(runs: dict[str, Any]) -> None:
    """Each evaluation reads the model that its training logged; the study reads the evaluations."""
    for arm in ("baseline", "refined"):
        (made,) = runs[f"{arm}-seed3"].of_type("model")
        (read,) = runs[f"{arm}-seed3-evaluation"].of_type("model")
        assert (made.name, made.digest) == (read.name, read.digest)
    made_by = {
        one.name: one.digest for run in runs.values() for one in run.of_type("evaluation") if not one.use_after_commit
    }
    read_by = {one.name: one.digest for one in runs["three-arms"].of_type("evaluation")}
    assert read_by == made_by
    assert len(made_by) == 3


def test_nothing_is_logged_twice(
    config: AblateConfig, runs: dict[str, Any], read_runs: Callable[[Path], list[Any]]
) -> None:
    """The same command on a finished study leaves its runs alone."""
    ablate(config)
    assert len(read_runs(config.folder)) == len(runs)
    assert read_json(config.folder / "wandb.json")["id"] == runs["three-arms"].run.run_id
