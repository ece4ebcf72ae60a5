"""Puts committed results and the support table into the documents: ``python scripts/update_readme.py``.

``data/results/{losses,sweep,long,trajectory}.json`` are the ``results.json`` of ``i2am ablate`` with the experiment of
that name, whose differences are worked out anew; ``diagnosis.json`` is of ``i2am diagnose checkpoint=tiny``, without
samples and heads; ``benchmark.json`` is the last line of ``scripts/benchmark_capture.py``,
``trajectory_checkpoints.json`` of ``scripts/keep_checkpoints.py``; the support table is the registry of recipes; the
packages are those of ``pyproject.toml``. The text between the markers
``<!-- name -->`` and ``<!-- /name -->`` is replaced; a test checks that the documents are what this script makes.
"""

import ast
import json
import re
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from i2am_train.attention.known import KNOWN_MODELS
from i2am_train.reporting.ablation_tables import as_markdown
from i2am_train.reporting.diagnosis import layer_table
from i2am_train.reporting.figures.arms import tradeoff_plot
from i2am_train.reporting.figures.canvas import save_figure
from i2am_train.reporting.model_tables import correlation_figure, correlation_table
from i2am_train.reporting.pages import describe_machine
from i2am_train.reporting.table import markdown, markdown_lines, markdown_rows
from i2am_train.results.evaluations import Evaluation
from i2am_train.results.study import recompared
from i2am_train.types import Pairing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "data" / "results"

COMPARED: dict[str, tuple[str, ...]] = {"losses": ("refined",), "trajectory": ("reward",), "sweep": (), "long": ()}
"""The studies, and the arms whose differences are shown: with one seed none can be tested."""
DOCUMENTS = (
    *("README.md", "data/README.md"),
    *("i2am_train/README.md", "i2am_train/attention/README.md"),
    *(f"data/results/{name}.md" for name in ("losses", "trajectory", "correlation")),
)
SHOWN = ("Correspondence error", "Spread ratio", "Use", "Where ", "Deletion ", "SSIM")
"""Scores of the README's table, which has to fit a screen; ``data/results/losses.md`` has all."""
FIGURES = ROOT / "data" / "figures"


def rendered(document: str) -> str:
    """The document with every marked part renewed."""
    for name, text in (
        ("arms", arms_shown((RESULTS / "losses.json").read_text())),
        *((name, study((RESULTS / f"{name}.json").read_text(), arms)) for name, arms in COMPARED.items()),
        ("layers", layers((RESULTS / "diagnosis.json").read_text())),
        ("correlation", correlation((RESULTS / "trajectory_checkpoints.json").read_text())),
        ("benchmark", benchmark((RESULTS / "benchmark.json").read_text())),
        ("recipes", recipes()),
        ("packages", packages()),
    ):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        document = re.sub(pattern, lambda m, t=text: f"{m[1]}{t}\n{m[2]}", document, flags=re.DOTALL)
    return document


def study(text: str, arms: Collection[str]) -> str:
    """Tables and notes of an ablation, as its own ``results.md`` has them, with the differences of some arms."""
    return as_markdown(json.loads(text), compared=arms).strip()


def arms_shown(text: str) -> str:
    """The first of these tables, with the scores that are shown."""
    lines = study(text, ()).split("\n\n")[0].splitlines()
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]
    kept = [0, *(n for n, name in enumerate(rows[0]) if name.startswith(SHOWN))]
    return "\n".join(f"| {' | '.join(row[n] for n in kept)} |" for row in rows)


def renewed(text: str) -> str:
    """The ``results.json`` of a study with means and differences by this version's rules."""
    return json.dumps(recompared(json.loads(text)), indent=2) + "\n"


def layers(text: str) -> str:
    """The diagnosis of the shipped model by layer, and how it was measured."""
    result: dict[str, Any] = json.loads(text)
    asked = result["settings"]
    note = (
        f"`{result['provenance']['command']}`: {asked['samples']} held-out samples, "
        f"{asked['sampling']['steps']} steps, guidance {asked['sampling']['guidance']:g}; "
        f"{describe_machine(result['provenance']['machine'])}."
    )
    return f"{markdown_rows(layer_table(result)).strip()}\n\n{note}"


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
    for study_file in (RESULTS / f"{name}.json" for name in COMPARED):
        study_file.write_text(renewed(study_file.read_text()))
    kept = (RESULTS / "trajectory_checkpoints.json").read_text()
    figure = correlation_figure(checkpoints(kept))
    assert figure is not None
    save_figure(figure, FIGURES / "correlation.png", dpi=200)
    save_figure(tradeoff_plot(json.loads((RESULTS / "losses.json").read_text())), FIGURES / "losses.png", dpi=150)
    for document in (ROOT / name for name in DOCUMENTS):
        document.write_text(rendered(document.read_text()))


if __name__ == "__main__":
    main()
