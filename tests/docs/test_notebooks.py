"""The notebooks are valid, committed without outputs, and run from top to bottom; what they show is there and right.

Notebook 1 runs as it is. Notebooks 2 and 3 train, so `make test-long` runs the same cells with fewer steps and samples
(set in their cell tagged `parameters`), and `make test-all` runs them as they are.
"""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RENDER = runpy.run_path(str(ROOT / "scripts" / "render_notebooks.py"))
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))

PICTURES = {
    "01_explain_a_model": {"unified_maps", "specific_reference", "attention_centres"},
    "02_refine_your_model": {"loss_curves", "refined_centres", "paired_samples"},
    "03_read_the_report": {"differences", "changed_samples", "sweep", "correlation"},
}
TINY = {"training_samples": 32, "test_samples": 4, "training_steps": 2, "sampling_steps": 2}
TIME_LIMIT = 300
"""Seconds for each cell, so that a notebook that hangs ends."""


def run(name: str, folder: Path, parameters: dict[str, Any] | None = None) -> str:
    """Execute a notebook and return its text; its pictures are those that it promises, as PNG."""
    notebook = RENDER["read"](ROOT / "notebooks" / f"{name}.ipynb")
    done = RENDER["executed"](notebook, folder, parameters, TIME_LIMIT)
    pictures = dict(RENDER["pictures"](done))
    assert set(pictures) == PICTURES[name]
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())
    text: str = RENDER["text"](done)
    assert not re.search(r"\bnan\b", text)
    return text


def numbers(text: str, pattern: str) -> list[float]:
    """The groups of the first match, as numbers."""
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} is not in:\n{text}"
    return [float(group) for group in found.groups()]


def test_there_are_three() -> None:
    assert [path.stem for path in PATHS] == list(PICTURES)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_committed_without_outputs(path: Path) -> None:
    """Valid, and exactly what the render script leaves: no outputs, counts or metadata of a machine."""
    notebook = RENDER["read"](path)
    assert RENDER["stripped"](notebook) == notebook
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert len(notebook.cells) > len(code) + 5  # narrated


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_rendered(name: str) -> None:
    """What the notebook shows is kept for the README."""
    rendered = ROOT / "data" / "figures" / "notebooks"
    assert all((rendered / f"{picture}.png").is_file() for picture in PICTURES[name])


@pytest.mark.long
def test_explain_a_model(tmp_path: Path) -> None:
    """Capture changes nothing, scores by hand are those of the command, made-up attentions score as named."""
    text = run("01_explain_a_model", tmp_path)
    assert "bit-identical: True" in text
    (by_hand,) = numbers(text, r"imacs_g: .* = (-?[\d.]+)")
    (by_command,) = numbers(text, r"'imacs_g': (-?[\d.]+)")
    assert by_hand == pytest.approx(by_command, abs=1e-3)  # printed with three digits
    row = r" \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|"
    error, spread, _ = numbers(text, "right" + row)
    assert error < 0.1
    assert spread > 0.9
    scattered = numbers(text, "scattered" + row)
    assert scattered[0] > 2
    assert scattered[1] > 0.9
    assert numbers(text, "uniform" + row)[1:] == [0.0, 1.0]
    _, spread, entropy = numbers(text, "one point" + row)
    assert spread == 0.0
    assert entropy < 0.8
    pages = list(tmp_path.rglob("explorer.html"))
    assert len(pages) == 1


@pytest.mark.long
def test_refine_your_model(tmp_path: Path) -> None:
    """Both arms train and are judged on the same samples, in two steps."""
    text = run("02_refine_your_model", tmp_path, TINY)
    for name in ("base", "baseline", "refined"):
        (error,) = numbers(text, rf"{name}: attention is ([\d.]+) patches")
        assert 0 < error < 20  # the grid has a diagonal of 20
    assert re.search(r"SSIM ↑ \| [+-][\d.]+ \| \[.*\] \| \d/4 \|", text)
    assert re.search(r"variant=<LossVariant.REWARD", text)


@pytest.mark.slow
def test_refine_your_model_in_full(tmp_path: Path) -> None:
    """As the reader runs it: what its text says of the attention is what the numbers show."""
    text = run("02_refine_your_model", tmp_path)
    (baseline,) = numbers(text, r"baseline: attention is ([\d.]+) patches")
    (refined,) = numbers(text, r"refined: attention is ([\d.]+) patches")
    assert refined < 0.85 * baseline  # the heap begins to unfold, says the text
    assert re.search(r"Correspondence error ↓ .*\| better \|", text)


@pytest.mark.long
def test_read_the_report(tmp_path: Path) -> None:
    """A study in two steps an arm: all tables are there, and the small simulation shows what the text says."""
    text = run("03_read_the_report", tmp_path, TINY)
    for title in ("**Refined − Baseline**", "(Table 2)", "(Table 3)", "Correlation of IMACS"):
        assert title in text
    gained, count, lost = numbers(text, r"(\d+) of (\d+) samples gained, (\d+) lost")
    assert gained + lost <= count == 4
    for count, bootstrap in ((2, 0), (30, 88)):
        found = numbers(text, rf"{count:2} values: Student's t .* in (\d+)%, a bootstrap in (\d+)%")
        assert 91 <= found[0] <= 98
        assert bootstrap <= found[1] <= (60 if count == 2 else 98)
    assert len(list(tmp_path.rglob("report.html"))) == 2  # of the study, and of i2am report


@pytest.mark.slow
def test_read_the_report_in_full(tmp_path: Path) -> None:
    """As the reader runs it: both seeds favour the refined arm's attention."""
    text = run("03_read_the_report", tmp_path)
    assert re.search(r"Correspondence error ↓ \| -[\d.]+ \| \[.*\] \| 2/2 \|", text)
