"""Puts committed results and the support table into the documents: ``python scripts/update_readme.py``.

``data/results/study.json`` and ``trajectory.json`` are the ``results.json`` of ``i2am ablate experiment=study`` and
``experiment=trajectory``, whose differences are worked out anew; ``benchmark.json`` is the last line of
``scripts/benchmark_capture.py``, ``layers.json`` is of ``scripts/layer_effect.py``, ``trajectory_checkpoints.json`` of
``scripts/keep_checkpoints.py``; the support table is the registry of recipes; the packages are those
of ``pyproject.toml``. The text between the markers
``<!-- name -->`` and ``<!-- /name -->`` is replaced; a test checks that the documents are what this script makes.
"""

import ast
import json
import re
import tomllib
from pathlib import Path
from typing import Any

from i2am_train.attention.known import KNOWN_MODELS
from i2am_train.reporting.ablation_tables import as_markdown
from i2am_train.reporting.figures.canvas import save_figure
from i2am_train.reporting.model_tables import correlation_figure, correlation_table
from i2am_train.reporting.pages import describe_machine
from i2am_train.reporting.table import markdown, markdown_lines
from i2am_train.results.evaluations import Evaluation
from i2am_train.results.study import recompared
from i2am_train.types import Pairing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "data" / "results"

STUDIES = ("study.json", "trajectory.json")
DOCUMENTS = (
    *("README.md", "data/README.md"),
    *("i2am_train/README.md", "i2am_train/attention/README.md"),
    *(f"data/results/{name}.md" for name in ("study", "trajectory", "correlation")),
)
SHOWN = ("IMACS_g", "IMACS_r", "Correspondence error", "SSIM", "ST-LPIPS")
"""Scores of the README's table, which has to fit a screen; ``data/results/study.md`` has all."""
FIGURE = ROOT / "data" / "figures" / "correlation.png"


def rendered(document: str) -> str:
    """The document with every marked part renewed."""
    for name, text in (
        ("arms", arms((RESULTS / "study.json").read_text())),
        ("study", study((RESULTS / "study.json").read_text())),
        ("trajectory", study((RESULTS / "trajectory.json").read_text())),
        ("layers", layers((RESULTS / "layers.json").read_text())),
        ("correlation", correlation((RESULTS / "trajectory_checkpoints.json").read_text())),
        ("benchmark", benchmark((RESULTS / "benchmark.json").read_text())),
        ("recipes", recipes()),
        ("packages", packages()),
    ):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        document = re.sub(pattern, lambda m, t=text: f"{m[1]}{t}\n{m[2]}", document, flags=re.DOTALL)
    return document


def study(text: str) -> str:
    """Tables and notes of an ablation, as its own ``results.md`` has them, for the arm that it is about."""
    return as_markdown(json.loads(text), compared=["refined"]).strip()


def arms(text: str) -> str:
    """The first of these tables, with the scores that are shown."""
    rows = [line.split(" | ") for line in study(text).split("\n\n")[0].splitlines()]
    kept = [0, *(n for n, name in enumerate(rows[0]) if name.startswith(SHOWN))]
    return "\n".join(" | ".join(row[n] for n in kept) + " |" for row in rows)


def renewed(text: str) -> str:
    """The ``results.json`` of a study with means and differences by this version's rules."""
    return json.dumps(recompared(json.loads(text)), indent=2) + "\n"


def layers(text: str) -> str:
    """What uniform attention of each layer changes in the picture, and how it was measured."""
    result: dict[str, Any] = json.loads(text)
    numbers = list(result["mean"])
    rows = [
        ["Change of the pixels, mean", *(f"{result['mean'][n]:.4f}" for n in numbers)],
        ["Largest of a sample", *(f"{result['largest'][n]:.4f}" for n in numbers)],
    ]
    note = (
        f"`{result['command']}`: {result['samples']} held-out samples, {result['steps']} steps, guidance "
        f"{result['guidance']:g}; {describe_machine(result['machine'])}."
    )
    header = ["Attention made uniform: layer", *numbers]
    return f"{markdown_lines(header, rows, range(1, len(header)))}\n\n{note}"


def checkpoints(text: str) -> tuple[Evaluation, ...]:
    """The kept checkpoints as evaluations, of which nothing but origin and scores is known."""
    return tuple(
        Evaluation(
            folder=Path(), model=row["label"], seed=None, truth=False, pairing=Pairing.PAIRED,
            intervals={}, samples=(), protocol={}, settings={}, manifest={}, **row,
        )
        for row in json.loads(text)["checkpoints"]
    )  # fmt: skip


def correlation(text: str) -> str:
    """The table over the kept checkpoints, as `i2am report` writes it."""
    table = correlation_table(checkpoints(text))
    assert table is not None
    return markdown(table).strip()


def recipes() -> str:
    """The support table: a row for each known model."""
    heads = ("model", "`recipe`", "sites", "grids; reference tokens", "its maps")
    rows = []
    for known in KNOWN_MODELS:
        meaning = ", ".join(known.meaning).replace("not functional", "**not functional**")
        about = (known.title, f"`{known.name}`", known.sites, known.grids, meaning)
        rows.append((*about, known.licence, known.loading))
    return markdown_lines((*heads, "licence (code / weights)", "loaded"), rows, right=())


def packages() -> str:
    """The layers that import-linter checks, above to below, with the first sentence of each one's docstring."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layered,) = (one for one in contracts["contracts"] if one["type"] == "layers")
    rows = []
    for number, layer in enumerate(layered["layers"], start=1):
        for name in layer.split(" | "):
            place = ROOT / "i2am_train" / name
            file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            said = ast.get_docstring(ast.parse(file.read_text())) or ""
            first = re.split(r"(?<=\.)\s|\n\n", said)[0]
            rows.append(f"| {number} | `{name}` | {' '.join(first.split())} |")
    return "\n".join(["| layer | package | what it holds |", "| ---: | --- | --- |", *rows])


def benchmark(text: str) -> str:
    """One row for each case of the benchmark, beside its rival."""
    heads = ("case", "time ratio (median)", "extra memory (MiB)", "plain softmax: ratio", "MiB", "runs")
    rows = []
    for name, case in json.loads(text).items():
        pairs = [
            (f"{one['ratio']:.3f}", f"{one['extra_mib']:.1f}") if one else ("–", "–")
            for one in (case, case["rivals"].get("plain_softmax"))
        ]
        rows.append((f"`{name}`", *pairs[0], *pairs[1], str(case["runs"])))
    return markdown_lines(heads, rows, right=range(1, len(heads)))


def main() -> None:
    for study_file in (RESULTS / name for name in STUDIES):
        study_file.write_text(renewed(study_file.read_text()))
    kept = (RESULTS / "trajectory_checkpoints.json").read_text()
    figure = correlation_figure(checkpoints(kept))
    assert figure is not None
    save_figure(figure, FIGURE, dpi=200)
    for document in (ROOT / name for name in DOCUMENTS):
        document.write_text(rendered(document.read_text()))


if __name__ == "__main__":
    main()
