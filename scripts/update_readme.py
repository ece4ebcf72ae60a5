"""Puts the committed results into the README: ``python scripts/update_readme.py``.

``data/results/study.json`` is the ``results.json`` of ``i2am ablate experiment=study``, and
``data/results/benchmark.json`` the last line of ``scripts/benchmark_capture.py``. The text between the markers
``<!-- name -->`` and ``<!-- /name -->`` is replaced; a test checks that the README is what this script makes of it.
"""

import json
import re
from pathlib import Path
from typing import Any

from i2am_train.reporting.table_formats import markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "data" / "results"


def rendered(readme: str) -> str:
    """The README with every marked part renewed from its file, if the file is there."""
    for name, file, render in (
        ("results", RESULTS / "study.json", study),
        ("benchmark", RESULTS / "benchmark.json", benchmark),
    ):
        if file.is_file():
            text = render(file.read_text())
            pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
            readme = re.sub(
                pattern, lambda m, t=text: f"{m[1]}{t}\n{m[2]}", readme, flags=re.DOTALL
            )
    return readme


def study(text: str) -> str:
    """Tables and notes of an ablation, as its own ``results.md`` has them, for the arm that it is about."""
    return markdown(json.loads(text), compared=["refined"]).strip()


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
    readme = ROOT / "README.md"
    readme.write_text(rendered(readme.read_text()))


if __name__ == "__main__":
    main()
