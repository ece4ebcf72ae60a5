"""A study of the user's own loss and metric: its training goes down, goes on, and its model is judged again.

The loss stands in the file of an arm, so that it is imported only where the user allows its module; the metric stands
on the command line. One training serves all tests.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from i2am_train.config.store import compose
from i2am_train.doors import VARIABLE
from i2am_train.errors import ConfigError
from i2am_train.files import read_json
from i2am_train.workflows.ablate import ablate
from i2am_train.workflows.evaluate import evaluate
from tests.support.own_metrics import forget_own_metrics
from tests.support.trainings import curves, going_down

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("default"),  # Lightning's and torch's own deprecations
]

PACKAGE = "code_of_a_user"
FILES = {
    f"{PACKAGE}/losses.py": '''
def peak(attention, *, scale=1.0):
    """Mean largest score of the garment's patches."""
    largest = attention.scores.flatten(3).amax(dim=-1).where(attention.mask, 0.0)
    return scale * largest.sum(dim=(1, 2)) / attention.mask.sum(dim=(1, 2)).clamp(min=1)
''',
    f"{PACKAGE}/metrics.py": '''
def brightness(generated, real):
    """Difference of the two pictures' mean brightness."""
    return (generated - real).mean(dim=(1, 2, 3)).abs()

brightness.label, brightness.higher_is_better = "Brightness", False
''',
    "mine.yaml": f"""
defaults: [refined]
label: Mine
objective: {{terms: {{peak: {{fn: "{PACKAGE}.losses:peak", scale: 2.0, weight: 0.05}}}}}}
""",
}
METRICS = f"evaluation.metrics=[ssim,{PACKAGE}.metrics:brightness]"


def imported() -> set[str]:
    return {name for name in sys.modules if name.startswith(f"{PACKAGE}.")}


def forget() -> None:
    """What another process would not know: the modules, and what they registered."""
    for name in (*imported(), PACKAGE):
        sys.modules.pop(name, None)
    forget_own_metrics()


@pytest.fixture(autouse=True)
def another_process() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the user works."""
    root = tmp_path_factory.mktemp("user")
    (root / PACKAGE).mkdir()
    for name, content in FILES.items():
        (root / name).write_text(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(sys, "path", [*sys.path])
        yield root


@pytest.fixture(scope="module")
def options(folder: Path, training: list[str]) -> list[str]:
    """A study of the checkpoint and of one training."""
    own = ["arms=[base,mine.yaml]", "reference=base", "seeds=[0]", "bootstrap_samples=200", METRICS]
    return [*training, *own, "device=cpu", f"output={folder / 'study'}"]


@pytest.fixture(scope="module")
def study(options: list[str]) -> dict[str, Any]:
    """Its results; the training went down in its second epoch, and went on with the same command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, f"{PACKAGE}.losses")
        with going_down(patch):
            ablate(compose("ablate", options))
        forget()
        return ablate(compose("ablate", options))


@pytest.fixture
def run(study: dict[str, Any], folder: Path) -> Path:
    """The folder of the training."""
    return folder / "study" / study["cells"][1]["folder"]


def test_the_loss_is_there_before_and_after(run: Path) -> None:
    """Every step of both parts of the run has the term, and the run knows that it went on."""
    assert len([row for row in curves(run) if "loss/peak" in row]) == 4
    assert len(read_json(run / "manifest.json")["resumed"]) == 1


def test_the_study_compares_by_the_metric(study: dict[str, Any]) -> None:
    """Both cells have it, and the results say what it is."""
    assert [set(cell["metrics"]) >= {"ssim", "brightness"} for cell in study["cells"]] == [True, True]
    assert study["metrics"]["brightness"]["label"] == "Brightness"
    arm = study["cells"][1]
    assert study["summary"][arm["arm"]]["brightness"]["mean"] == arm["metrics"]["brightness"]


def test_it_goes_on_only_where_the_loss_is_allowed(study: dict[str, Any], options: list[str]) -> None:
    """The file of an arm does not import it, whatever is finished already; the user does."""
    message = rf"objective\.terms\.peak\.fn=.*read from a file.*{VARIABLE}={PACKAGE} in front"
    with pytest.raises(ConfigError, match=message):
        ablate(compose("ablate", options))
    assert imported() == set()


def test_the_model_is_judged_without_its_loss(run: Path, folder: Path, overrides: list[str]) -> None:
    """Its settings name its loss, and its model needs none: nothing is imported but the metric that is asked for."""
    options = [*overrides, f"checkpoint={run}", "device=cpu", "progress_bar=false", "evaluation.samples=2"]
    results = evaluate(compose("evaluate", [*options, "evaluation.metrics=[ssim]"]), folder / "plain")
    assert "ssim" in results["metrics"]
    assert imported() == set()
    results = evaluate(compose("evaluate", [*options, METRICS]), folder / "own")
    assert "brightness" in results["metrics"]
    assert imported() == {f"{PACKAGE}.metrics"}
