"""data/README.md is true: its commands compose, and the trial of own photographs runs as it is written."""

import re
import shlex
from pathlib import Path

import pytest

from i2am_train.config.store import compose

README = (Path(__file__).parents[2] / "data" / "README.md").read_text()


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [
        part.strip()
        for line in lines
        for part in line.split("&&")
        if part.strip().startswith("i2am ")
    ]


def test_there_are_commands() -> None:
    # Proves that the pattern above still finds them.
    assert len(commands()) > 12


@pytest.mark.parametrize("command", commands())
def test_commands_compose(command: str) -> None:
    # Proves that every line names options that exist, with legal values.
    _, name, *overrides = shlex.split(command)
    if name == "data":
        name = f"data_{overrides.pop(0)}"
    compose(name, overrides)
