"""The documents are true: commands compose, Python runs, links lead somewhere, numbers are those of the results."""

import json
import re
import runpy
import shlex
import tomllib
from functools import partialmethod
from pathlib import Path
from statistics import quantiles
from typing import Any

import pytest
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

from i2am_train.config.store import compose
from i2am_train.metrics.registry import METRICS
from i2am_train.models.ip_adapter import load_ip_adapter
from i2am_train.models.traceable import Source
from tests.support.pipelines import tiny_ip_adapter

ROOT = Path(__file__).parents[2]
PLACES = ("*.md", "conf/*.md", "data/**/*.md", "i2am_train/**/*.md", "tests/*.md")
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for place in PLACES for path in sorted(ROOT.glob(place))}
README = TEXTS["README.md"]
HOW_TO = "i2am_train/EXTENDING.md"
"""Is about files of the reader's; test_extending.py carries out its commands."""


def commands() -> list[tuple[str, str]]:
    """Every `i2am` line of every document, with the document; bare names and `--help` are mentions."""
    found = []
    for name, text in TEXTS.items():
        if name == HOW_TO:
            continue
        for block in re.findall(r"```bash\n(.*?)```", text.replace("\\\n", " "), re.DOTALL):
            lines = [line.split("#")[0].strip() for line in block.splitlines()]
            found += [(name, part.strip()) for line in lines for part in line.split("&&")]
        found += [(name, line) for line in re.findall(r"`(i2am [^`]*=[^`]*)`", text)]
    found = [(name, line.removeprefix(".venv/bin/")) for name, line in found]
    return [(name, line) for name, line in found if line.startswith("i2am ") and "--" not in line]


@pytest.mark.parametrize("command", dict.fromkeys(line for _, line in commands()))
def test_commands_compose(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `i2am` line names options that exist, with legal values; a file of the reader's is one of `diagnose`."""
    _, name, *overrides = shlex.split(command.replace("...", "SOMETHING"))
    monkeypatch.chdir(tmp_path)
    for file in (word.removeprefix("experiment=") for word in overrides if re.match("experiment=.*yaml", word)):
        Path(file).parent.mkdir(parents=True)
        Path(file).write_text(
            "name: repair\nlabel: Repair\nobjective: {layers: {5: 1.0}, terms: {tv: {weight: 0.002}}}\n"
        )
    if name == "data":
        name = f"data_{overrides.pop(0)}"
    compose(name, overrides)


def test_there_are_commands() -> None:
    """The pattern still finds them."""
    counts = {name: sum(of == name for of, _ in commands()) for name in TEXTS}
    assert counts["README.md"] > 12
    assert counts["data/README.md"] > 12
    assert counts["conf/README.md"] > 12


def test_python_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's example runs as it stands, on a small pipeline of a known model, in few steps."""
    base, adapter = tiny_ip_adapter(tmp_path)
    source = Source(model="ip_adapter", checkpoint=str(base), adapter=adapter)
    parts = load_ip_adapter(source).target.components
    pipeline = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    few = partialmethod(type(pipeline).__call__, height=64, width=64, num_inference_steps=2)
    monkeypatch.setattr(type(pipeline), "__call__", few)
    names: dict[str, Any] = {"pipeline": pipeline}
    for name, color in {"person": "navy", "mask": "white", "shirt": "red"}.items():
        names[name] = Image.new("RGB", (64, 64), color)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), names)
    assert "up_blocks.1.attentions.1" in capsys.readouterr().out
    assert names["on_person"].values.isfinite().all()


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_pictures_exist(name: str) -> None:
    """Relative links lead to a file, and to a heading that it has."""
    for target in re.findall(r"\]\(\s*([^)\s:]+)\)", TEXTS[name]):
        file, _, place = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        if place:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert place in map(anchor, headings), target


@pytest.mark.parametrize("name", sorted(TEXTS.keys() - {HOW_TO}))
def test_files_and_targets_exist(name: str) -> None:
    """Files of ours that a text names are there, and so is what it tells `make` to do."""
    folders = (ROOT, ROOT / "i2am_train", (ROOT / name).parent)
    for file in re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|yaml|md|txt))`", TEXTS[name]):
        assert any((folder / file).exists() for folder in folders), file
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|\n)make ([a-z-]+)", TEXTS[name])) <= set(targets)


def test_versions_agree() -> None:
    """The changelog and the citation are about the version of the package."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\n## [{version}]" in TEXTS["CHANGELOG.md"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def sentences(text: str) -> list[int]:
    """Words of each sentence and list entry of the prose."""
    prose = re.sub(r"```.*?```|<!-- .*? -->", "", text, flags=re.DOTALL)
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith(("|", "#", "!")))
    parts = re.split(r"(?<=[.!?:;])\s+|\n\n|\n- ", prose)
    return [len(part.split()) for part in parts if len(part.split()) > 2]


def test_length() -> None:
    """A README that a stranger finishes: lines, words, width, and sentences that can be read at once."""
    lines = README.splitlines()
    assert len(lines) <= 130
    assert len(README.split()) <= 1200
    assert max(map(len, lines)) <= 120
    assert quantiles(sentences(README), n=10)[-1] <= 25


UPDATE, KEEP = (runpy.run_path(str(ROOT / "scripts" / f"{name}.py")) for name in ("update_readme", "keep_checkpoints"))
RESULTS = ROOT / "data" / "results"


@pytest.mark.parametrize("name", UPDATE["DOCUMENTS"])
def test_tables_are_generated(name: str) -> None:
    """Tables are what `scripts/update_readme.py` makes of `data/results` and the recipes, not typed by hand."""
    text = (ROOT / name).read_text()
    assert "<!-- " in text
    assert UPDATE["rendered"](text) == text


def test_the_last_column_can_be_shown() -> None:
    """A table of chosen columns ends each line once, whichever they are."""
    results = {"arms": [{"name": "ours"}], "cells": [], "paired": [], "command": "i2am ablate"}
    scores = {name: {"mean": 0.5, "n": 1} for name in ("stlpips", "ssim")}
    metrics = {name: METRICS[name].as_json() for name in scores}
    text = json.dumps({**results, "metrics": metrics, "summary": {"ours": scores}})
    assert UPDATE["arms_shown"](text).splitlines() == ["| Arm | SSIM ↑ |", "| --- | ---: |", "| ours | 0.5000 |"]


@pytest.mark.parametrize("name", UPDATE["COMPARED"])
def test_differences_are_those_of_the_cells(name: str) -> None:
    """The committed results hold the intervals that this version makes of their cells."""
    text = (RESULTS / f"{name}.json").read_text()
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
    return {key: value for name, branch in items for key, value in leaves(branch, f"{path}/{name}").items()}


def test_kept_checkpoints_have_the_ends_of_the_committed_study() -> None:
    """Whatever else is kept, the ends are those of `trajectory.json`."""
    kept = json.loads((RESULTS / "trajectory_checkpoints.json").read_text())["checkpoints"]
    ends = KEEP["of_results"](RESULTS / "trajectory.json")["checkpoints"]
    assert [row for row in kept if not row["snapshot"]] == ends


SAID_IN = {"losses": "README.md", "trajectory": "data/results/trajectory.md"}
ARM = {"losses": "refined", "trajectory": "reward"}


def short(value: float, digits: int) -> str:
    """As sentences print it: no zero before the point."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.{digits}f}")


@pytest.mark.parametrize(
    ("study", "metric", "digits", "start"),
    [
        ("losses", "correspondence_error", 2, "correspondence error -.78 "),
        ("losses", "where", 2, "(where +.33 "),
        ("losses", "ssim", 4, "SSIM -.0013 "),
        ("trajectory", "stlpips", 3, "ST-LPIPS is better, -.016 "),
        ("trajectory", "ssim", 3, "SSIM +.009 "),
        ("trajectory", "kd_efficientnet_lite0", 3, "KD -.015 "),
        ("trajectory", "fd_efficientnet_lite0", 1, "FD -4.2 "),
    ],
)
def test_sentences_have_the_numbers_of_the_results(study: str, metric: str, digits: int, start: str) -> None:
    """Difference and interval of the arm in question, as `results.json` has them."""
    results = json.loads((RESULTS / f"{study}.json").read_text())
    (found,) = (p for p in results["paired"] if (p["arm"], p["metric"]) == (ARM[study], metric))
    said = " ".join(TEXTS[SAID_IN[study]].split())
    assert f"{start}[{short(found['low'], digits)}, {short(found['high'], digits)}]" in said
    assert short(abs(found["difference"]), digits) in start


def test_from_scratch_one_image_score_differs() -> None:
    """ST-LPIPS alone, as the text says."""
    results = json.loads((RESULTS / "trajectory.json").read_text())
    image = {name for name, of in results["metrics"].items() if of["group"] == "image"}
    shown = {
        entry["metric"] for entry in results["paired"] if entry["arm"] == "reward" and entry["low"] * entry["high"] > 0
    }
    assert shown & image == {"stlpips"}


def means(study: str, arm: str) -> dict[str, float]:
    """Of an arm over its seeds, by metric."""
    summary = json.loads((RESULTS / f"{study}.json").read_text())["summary"][arm]
    return {name: value["mean"] for name, value in summary.items()}


def test_the_default_does_not_overshoot() -> None:
    """Not worse in 1,300 steps than in 300, neither too far apart nor one-hot, and as telling as the baseline's."""
    short_run, long_run = means("sweep", "refined"), means("long", "refined")
    assert long_run["correspondence_error"] <= short_run["correspondence_error"]
    for found, study in ((short_run, "sweep"), (long_run, "long")):
        assert 0.8 <= found["spread_ratio"] <= 1.2
        assert found["attention_entropy"] > means("sweep", "supervised")["attention_entropy"] / 2
        assert found["where"] > means(study, "baseline")["where"]
        assert found["where_all"] > means(study, "baseline")["where_all"]
    assert long_run["deletion"] >= means("long", "baseline")["deletion"]
    baseline = means("sweep", "baseline")["deletion"]
    for arm in ("refined", "supervised"):  # after 300 steps, as the text says
        assert means("sweep", arm)["deletion"] < baseline
    paired = json.loads((RESULTS / "losses.json").read_text())["paired"]
    (deletion,) = (one for one in paired if (one["arm"], one["metric"]) == ("refined", "deletion"))
    assert deletion["low"] < 0 < deletion["high"], "no difference shown over five seeds"
    assert means("losses", "base")["use"] >= 0.02


def test_less_weight_costs_less_and_comes_as_far() -> None:
    """What the text says of `capped`."""
    early, late, refined = means("sweep", "capped"), means("long", "capped"), means("long", "refined")
    assert early["ssim"] >= means("sweep", "baseline")["ssim"]
    assert early["deletion"] >= means("sweep", "baseline")["deletion"]
    assert late["correspondence_error"] < early["correspondence_error"] / 3
    assert 0.8 <= late["spread_ratio"] <= 1.2
    assert late["use"] > refined["use"]
    assert late["deletion"] >= refined["deletion"]


def test_the_correlations_in_the_text_are_the_tables() -> None:
    """And no count of checkpoints is claimed that the repository does not hold."""
    table = (RESULTS / "correlation.md").read_text()
    said = table.replace("\n", " ")
    for name, column in (("SSIM ↑", 1), ("ST-LPIPS ↓", 3)):
        row = next(line for line in table.splitlines() if f"All checkpoints: {name}" in line)
        value, low, high = re.findall(r"-?[\d.]+", row.split("|")[column + 1])
        assert f"{short(float(value), 2)} [{short(float(low), 2)}, {short(float(high), 2)}]" in said
    kept = json.loads((RESULTS / "trajectory_checkpoints.json").read_text())["checkpoints"]
    assert f"All checkpoints: {len(kept)} checkpoints of 6 training runs." in table
