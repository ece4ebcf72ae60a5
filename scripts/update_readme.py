"""Puts committed results and the support table into the documents: ``python scripts/update_readme.py``.

``data/results/study.json`` is the ``results.json`` of ``i2am ablate experiment=study``, and
``data/results/benchmark.json`` the last line of ``scripts/benchmark_capture.py``; the support table is the registry of
recipes. The text between the markers ``<!-- name -->`` and ``<!-- /name -->`` is replaced; a test checks that the
documents are what this script makes of them.
"""

import json
import re
from pathlib import Path
from typing import Any

from i2am_train.attribution.recipes import KNOWN_MODELS
from i2am_train.reporting.table_formats import markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "data" / "results"


DOCUMENTS = ("README.md", "data/README.md", "data/results/study.md")


def rendered(document: str) -> str:
    """The document with every marked part renewed."""
    for name, text in (
        ("arms", arms((RESULTS / "study.json").read_text())),
        ("study", study((RESULTS / "study.json").read_text())),
        ("benchmark", benchmark((RESULTS / "benchmark.json").read_text())),
        ("recipes", recipes()),
    ):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        document = re.sub(
            pattern, lambda m, t=text: f"{m[1]}{t}\n{m[2]}", document, flags=re.DOTALL
        )
    return document


def study(text: str) -> str:
    """Tables and notes of an ablation, as its own ``results.md`` has them, for the arm that it is about."""
    return markdown(json.loads(text), compared=["refined"]).strip()


def arms(text: str) -> str:
    """The first of these tables."""
    return study(text).split("\n\n")[0]


def recipes() -> str:
    """The support table: a row for each known model."""
    lines = [
        "| model | `recipe` | sites | grids; reference tokens | its maps | licence (code / weights) | loaded |",
        "|---|---|---|---|---|---|---|",
    ]
    for known in KNOWN_MODELS:
        meaning = ", ".join(known.meaning).replace("not functional", "**not functional**")
        cells = (known.title, f"`{known.name}`", known.sites, known.grids, meaning)
        lines.append(f"| {' | '.join((*cells, known.licence, known.loading))} |")
    return "\n".join(lines)


def benchmark(text: str) -> str:
    """One row for each case of the benchmark, beside its rival."""
    cases: dict[str, Any] = json.loads(text)
    lines = [
        "| case | time ratio (median) | extra memory (MiB) | plain softmax: ratio | MiB | runs |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, case in cases.items():
        rival = case["rivals"].get("plain_softmax")
        other = f"{rival['ratio']:.3f} | {rival['extra_mib']:.1f}" if rival else "– | –"
        lines.append(
            f"| `{name}` | {case['ratio']:.3f} | {case['extra_mib']:.1f} | {other} | {case['runs']} |"
        )
    return "\n".join(lines)


def main() -> None:
    for document in (ROOT / name for name in DOCUMENTS):
        document.write_text(rendered(document.read_text()))


if __name__ == "__main__":
    main()
