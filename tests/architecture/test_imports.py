"""The direction of imports, and a public interface that is complete and costs nothing to import."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import i2am_train

ROOT = Path(i2am_train.__file__).parents[1]


def test_imports_point_downwards() -> None:
    """The contracts of import-linter in pyproject.toml hold."""
    program = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert program is not None, "import-linter is missing: pip install -e .[dev]"
    done = subprocess.run(
        [program, "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", i2am_train.__all__)
def test_public_names_exist(name: str) -> None:
    """Each name of the lazy table can be had, and is documented."""
    value = getattr(i2am_train, name)
    assert name == "__version__" or value.__doc__


def test_the_lazy_table_equals_the_typed_imports() -> None:
    """What type checkers see is what Python loads."""
    tree = ast.parse((ROOT / "i2am_train" / "__init__.py").read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If)).body
    typed = {
        alias.asname: node.module.removeprefix("i2am_train.")
        for node in guarded
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert typed == i2am_train._HOME_OF


def test_unknown_names_are_attribute_errors() -> None:
    """A misspelled name fails as in any other module."""
    with pytest.raises(AttributeError, match="no attribute 'trase'"):
        _ = i2am_train.trase  # type: ignore[attr-defined]


def test_no_pickled_weights_and_no_device_calls() -> None:
    """Rules that no linter knows: nothing unpickles, empties caches or calls `.cuda()`."""
    forbidden = (".cuda()", "empty_cache", "gc.collect", "pickle.load", "weights_only=False")
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in sorted((ROOT / "i2am_train").rglob("*.py"))
        for word in forbidden
        if word in path.read_text(encoding="utf-8")
    ]
    advice = "i2am_train/weight_files.py: weights_only=False"  # text of an error, for a container
    capture = "i2am_train/models/graphs.py: empty_cache"  # as torch.cuda.graph does: a graph's memory is its own
    assert found == [capture, advice]


def test_weights_are_opened_in_one_place() -> None:
    """torch, safetensors and torchvision read files of weights where they are checked, and nowhere else."""
    readers = ("torch.load(", "jit.load(", "load_state_dict_from_url", "weights=weights", "weights=True")
    found = {
        (path.name, word)
        for path in sorted((ROOT / "i2am_train").rglob("*.py"))
        for word in readers
        if word in path.read_text(encoding="utf-8")
    }
    given = ("detectors.py", "weights=weights")  # with tensors that were read before
    assert found == {("weight_files.py", "torch.load("), given}


def test_modules_have_names_that_say_something() -> None:
    """No drawer for odds and ends."""
    drawers = {"utils", "util", "helpers", "common", "misc"}
    assert not [path for path in (ROOT / "i2am_train").rglob("*") if path.stem in drawers]
