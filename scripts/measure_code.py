"""Measures the house: ``python scripts/measure_code.py [--json]``.

What a reader meets: files, lines and names of the package, lengths of functions, imports inside functions, examples
and sources in docstrings, options of ``i2am train``, words and sentences of the README, tests. Only the working tree
is read; nothing is imported but the options.
"""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "i2am_train"
LONG = 500
"""Lines of a module that a reader still finds his way in."""

SOURCE = re.compile(r"paper|eq\.|equation|section|et al\.|https?://|arXiv", re.IGNORECASE)
UNIT = re.compile(r"\b(pixels?|patch(es)?|seconds?|steps?|bytes|GiB|MiB|percent|in \[|between)\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST, outer: str = "") -> Iterator[tuple[str, Function]]:
    """All functions and methods with their dotted names, nested ones left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield f"{outer}{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{outer}{node.name}.")


def is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


def inner_imports(tree: ast.AST) -> int:
    """Imports of our own modules inside functions."""
    return sum(
        isinstance(node, ast.ImportFrom) and (node.module or "").startswith("i2am_train")
        for _, function in functions(tree)
        for node in ast.walk(function)
    )


def public_names(tree: ast.Module) -> list[str]:
    """Classes and functions that a module defines."""
    defined = [node.name for node in tree.body if isinstance(node, Function | ast.ClassDef)]
    return [name for name in defined if not name.startswith("_")]


def of_package(texts: dict[Path, str]) -> dict[str, Any]:
    trees = {path: ast.parse(text) for path, text in texts.items()}
    lines = {path: text.count("\n") for path, text in texts.items()}
    named = Counter(name for tree in trees.values() for name in set(public_names(tree)))
    every = [pair for tree in trees.values() for pair in functions(tree)]
    lengths = [(node.end_lineno or 0) - node.lineno + 1 for _, node in every]
    documents = [ast.get_docstring(node) or "" for name, node in every if is_public(name)]
    code = [line.strip() for text in texts.values() for line in text.splitlines() if line.strip()]
    share = {
        "runnable example": sum(">>>" in text for text in documents) / len(documents),
        "names a source": sum(bool(SOURCE.search(text)) for text in documents) / len(documents),
        "names a unit": sum(bool(UNIT.search(text)) for text in documents) / len(documents),
    }
    return {
        "modules": len(texts),
        "lines": sum(lines.values()),
        f"modules over {LONG} lines": sum(count > LONG for count in lines.values()),
        "largest module": max(lines.values()),
        "public classes and functions": sum(named.values()),
        "of them named like another": sum(count > 1 for count in named.values()),
        "file names used more than once": sum(
            count > 1 for name, count in Counter(path.name for path in texts).items() if name != "__init__.py"
        ),
        "function length, median": median(lengths),
        "function length, 90 %": round(quantiles(lengths, n=10)[-1]),
        "function length, largest": max(lengths),
        "imports of own modules inside functions": sum(map(inner_imports, trees.values())),
        **{f"public functions: {name}, %": round(100 * value) for name, value in share.items()},
        "comment lines, %": round(100 * sum(line.startswith("#") for line in code) / len(code), 1),
    }


def of_readme(text: str) -> dict[str, Any]:
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith(("|", "#", "<", "!")))
    sentences = [s.split() for s in re.split(r"(?<=[.!?:])\s+|\n\n", prose) if len(s.split()) > 2]
    return {
        "README lines": text.count("\n"),
        "README words": len(text.split()),
        "README words of a sentence, 90 %": round(quantiles(map(len, sentences), n=10)[-1]),
        "README longest line": max(map(len, text.splitlines())),
    }


def train_options() -> int:
    """Options that ``i2am train --help`` lists."""
    text = subprocess.run(
        [sys.executable, "-m", "i2am_train", "train", "--help"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    ).stdout  # fmt: skip
    return len(re.findall(r"^  [a-z][a-z0-9_.]*=", text, re.MULTILINE))


def of_tests(texts: dict[Path, str]) -> dict[str, Any]:
    names = [name for text in texts.values() for name, _ in functions(ast.parse(text))]
    return {
        "lines of tests": sum(text.count("\n") for text in texts.values()),
        "test functions": sum(name.rpartition(".")[2].startswith("test_") for name in names),
    }


def tracked(folder: Path) -> dict[Path, str]:
    paths = subprocess.run(
        ["git", "ls-files", "*.py"], capture_output=True, text=True, check=True, cwd=folder
    ).stdout.split()
    return {folder / path: (folder / path).read_text() for path in paths}


def measure() -> dict[str, Any]:
    """All figures of the working tree, by name."""
    return {
        **of_package(tracked(PACKAGE)),
        "options of i2am train": train_options(),
        **of_readme((ROOT / "README.md").read_text()),
        **of_tests(tracked(ROOT / "tests")),
    }


if __name__ == "__main__":
    figures = measure()
    if "--json" in sys.argv[1:]:
        print(json.dumps(figures, indent=2))
    else:
        for name, value in figures.items():
            print(f"{name:45}{value:>8}")
