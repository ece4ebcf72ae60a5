"""The README is true: its commands compose, its Python runs, its links exist, its table is the committed study's."""

import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest

from i2am_train.config.store import compose

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    inline = re.findall(r"`(i2am [^`]*=[^`]*)`", README)  # a bare name is a mention, not a command
    return [line for line in [*lines, *inline] if line.startswith("i2am ") and "--" not in line]


@pytest.mark.parametrize("command", commands())
def test_commands_compose(command: str) -> None:
    """Every `i2am` line names options that exist, with legal values."""
    _, name, *overrides = shlex.split(command)
    if name == "data":
        name = f"data_{overrides.pop(0)}"
    compose(name, overrides)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The Python examples run as they stand, on the shipped weights; what defines functions only defines them."""
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "build" in names or "up_blocks.1.attentions.1" in capsys.readouterr().out


def test_links_and_pictures_exist() -> None:
    """Relative links lead somewhere."""
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_length() -> None:
    """A README that is read: under 250 lines."""
    assert len(README.splitlines()) < 250


UPDATE, KEEP = (
    runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))
    for name in ("update_readme", "keep_checkpoints")
)
RESULTS = ROOT / "data" / "results"


@pytest.mark.parametrize("name", UPDATE["DOCUMENTS"])
def test_tables_are_generated(name: str) -> None:
    """Tables are what `scripts/update_readme.py` makes of `data/results` and the recipes, not typed by hand."""
    text = (ROOT / name).read_text()
    assert "<!-- " in text
    assert UPDATE["rendered"](text) == text


@pytest.mark.parametrize("name", UPDATE["STUDIES"])
def test_differences_are_those_of_the_cells(name: str) -> None:
    """The committed results hold the intervals that this version makes of their cells."""
    text = (RESULTS / name).read_text()
    renewed, kept = leaves(json.loads(UPDATE["renewed"](text))), leaves(json.loads(text))
    numbers = {path for path, value in kept.items() if isinstance(value, float)}
    assert {path: renewed.pop(path) for path in numbers} == pytest.approx(
        {path: kept.pop(path) for path in numbers}, rel=1e-9, nan_ok=True
    )  # scipy's last digits vary
    assert renewed == kept


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Values by their path."""
    if not isinstance(tree, dict | list):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {
        key: value
        for name, branch in items
        for key, value in leaves(branch, f"{path}/{name}").items()
    }


def test_kept_checkpoints_have_the_ends_of_the_committed_study() -> None:
    """Whatever else is kept, the ends are those of `trajectory.json`."""
    kept = json.loads((RESULTS / "trajectory_checkpoints.json").read_text())["checkpoints"]
    ends = KEEP["of_results"](RESULTS / "trajectory.json")["checkpoints"]
    assert [row for row in kept if not row["snapshot"]] == ends


def short(value: float, digits: int) -> str:
    """As sentences print it: no zero before the point."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.{digits}f}")


@pytest.mark.parametrize(
    ("study", "metric", "digits", "start"),
    [
        ("study", "imacs_g", 3, "IMACS_g +0.232 "),
        ("study", "imacs_r", 3, "IMACS_r +0.017 "),
        ("trajectory", "stlpips", 3, "ST-LPIPS is better, -.016 "),
        ("trajectory", "ssim", 3, "SSIM +.009 "),
        ("trajectory", "kd_efficientnet_lite0", 3, "KD -.015 "),
        ("trajectory", "fd_efficientnet_lite0", 1, "FD -4.2 "),
    ],
)
def test_sentences_have_the_numbers_of_the_results(
    study: str, metric: str, digits: int, start: str
) -> None:
    """Difference and interval of the refined arm, as `results.json` has them."""
    results = json.loads((RESULTS / f"{study}.json").read_text())
    (found,) = (p for p in results["paired"] if (p["arm"], p["metric"]) == ("refined", metric))
    said = " ".join(README.split())
    printed = (lambda value: f"{value:.3f}") if study == "study" else (lambda v: short(v, digits))
    assert f"{start}[{printed(found['low'])}, {printed(found['high'])}]" in said
    assert printed(abs(found["difference"])) in start


def test_sentences_claim_what_the_intervals_show() -> None:
    """From scratch ST-LPIPS alone differs among image scores; in the study SSIM alone does not."""
    for study, metrics in (
        ("trajectory", {"stlpips"}),
        ("study", {"stlpips", "fd_efficientnet_lite0", "kd_efficientnet_lite0"}),
    ):
        results = json.loads((RESULTS / f"{study}.json").read_text())
        image = {name for name, of in results["metrics"].items() if of["group"] == "image"}
        shown = {
            entry["metric"]
            for entry in results["paired"]
            if entry["arm"] == "refined" and entry["low"] * entry["high"] > 0
        }
        assert shown & image == metrics


def test_the_correlations_in_the_text_are_the_tables() -> None:
    """And no count of checkpoints is claimed that the repository does not hold."""
    table = (RESULTS / "correlation.md").read_text()
    said = README.replace("\n", " ")
    for name, column in (("SSIM ↑", 1), ("ST-LPIPS ↓", 3)):
        row = next(line for line in table.splitlines() if f"All checkpoints: {name}" in line)
        value, low, high = re.findall(r"-?[\d.]+", row.split("|")[column + 1])
        assert f"{short(float(value), 2)} [{short(float(low), 2)}, {short(float(high), 2)}]" in said
    kept = json.loads((RESULTS / "trajectory_checkpoints.json").read_text())["checkpoints"]
    assert f"All checkpoints: {len(kept)} checkpoints of 6 training runs." in table
