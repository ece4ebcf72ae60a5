"""The README is true: its commands compose, its Python runs, its links exist, its table is the committed study's."""

import re
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


def test_tables_are_generated() -> None:
    """Tables are what `scripts/update_readme.py` makes of `data/results` and the recipes, not typed by hand."""
    script = ROOT / "scripts" / "update_readme.py"
    namespace: dict[str, Any] = {"__file__": str(script)}
    exec(script.read_text(), namespace)
    for name in namespace["DOCUMENTS"]:
        text = (ROOT / name).read_text()
        assert "<!-- " in text
        assert namespace["rendered"](text) == text, name
