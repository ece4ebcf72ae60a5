"""One tool configuration file, exact versions for everything that is needed, a tidy top level."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import i2am_train

ROOT = Path(i2am_train.__file__).parents[1]
TOP_LEVEL = {
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "conf",
    "data",
    "i2am_train",
    "notebooks",
    "pyproject.toml",
    "scripts",
    "tests",
}


def normal(name: str) -> str:
    """The one spelling of a package's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirement_has_an_exact_version() -> None:
    """`make` installs the versions that the tests ran with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {normal(re.split(r"[<>=!~\[; ]", line)[0]) for line in wanted}
    lines = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {normal(line.split("==")[0]) for line in lines if "==" in line}
    assert names <= pinned
    assert "i2am-train" not in pinned


def test_the_oldest_versions_are_those_that_are_allowed() -> None:
    """`make test-oldest` tests the very versions that pyproject.toml states as lowest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lowest = dict(re.findall(r"([\w-]+)>=([\d.]+)", "\n".join(wanted)))
    lines = (ROOT / "scripts" / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = {normal(name): version for name, _, version in (line.partition("==") for line in lines)}

    different = {
        name: (version, pinned.get(normal(name)))
        for name, version in lowest.items()
        if not f"{pinned.get(normal(name))}.0".startswith(f"{version}.")
    }
    assert not different


def test_top_level_is_tidy() -> None:
    """What is committed lies in the folders that the README names."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True)
    tops = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in tops if not name.startswith(".")} <= TOP_LEVEL


def test_continuous_integration_runs_what_the_makefile_has() -> None:
    """.ci/run is executable and calls targets that exist."""
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    called = re.findall(r"^make (\S+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert called == ["check", "test", "test-long"]
    assert {*called, "demo", "quick", "test-all"} <= set(targets)
