"""``--help`` says everything about every option."""

from __future__ import annotations

from dataclasses import fields

import pytest

from i2am_train.config.commands import COMMANDS, WIDTH, command_help, field_docstrings
from i2am_train.config.options import group_of, option_names


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_option(command: str) -> None:
    """Each option of a command stands in its help, with examples, in lines that fit a terminal."""
    text = command_help(command)
    groups = {name.rpartition(".")[0] for name in option_names(COMMANDS[command].options)}
    for name in set(option_names(COMMANDS[command].options)) - groups:
        assert text.count(f"\n  {name}=") == 1
    assert text.startswith(f"usage: i2am {command.replace('_', ' ')} ")
    assert max(map(len, text.splitlines())) <= WIDTH
    assert f"\n  i2am {command.replace('_', ' ')}" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_described(command: str) -> None:
    """No field of a schema is without a docstring that ends with a full stop."""
    schemas = [COMMANDS[command].options]
    for schema in schemas:
        texts = field_docstrings(schema)
        for item in fields(schema):
            if group := group_of(item):
                schemas.append(group)
            else:
                assert texts[item.name].endswith("."), f"{schema.__name__}.{item.name}"


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_used_first_stands_first(command: str) -> None:
    """At most ten options, each one that exists, before all others."""
    first = COMMANDS[command].first.split()
    assert len(first) <= 10
    assert set(first) <= {"experiment", *option_names(COMMANDS[command].options)}
    places = [command_help(command).index(f"\n  {name}=") for name in first]
    assert places == sorted(places)


def test_training_has_no_more_options_than_that() -> None:
    """A new one takes the place of another."""
    assert len(option_names(COMMANDS["train"].options)) <= 120


def test_help_offers_the_experiments_of_its_command() -> None:
    """Arms are offered by train, studies by ablate, and neither by evaluate."""
    train, ablate = command_help("train"), command_help("ablate")
    arms, studies = (text.split("\n  experiment=")[1].split("=")[0] for text in (train, ablate))
    assert "refined" in arms
    assert "demo" not in arms
    assert "demo" in studies
    assert "  experiment=" not in command_help("evaluate")


def test_help_lists_the_legal_values() -> None:
    """An option with a few legal values names them all, also where they are members of an enum."""
    train, explain = (" ".join(command_help(name).split()) for name in ("train", "explain"))
    assert "One of paper, paper_without_factor, authors_v1, authors_v2, hinge, reward," in train
    assert "One of auto, cpu, cuda." in explain
    assert "One of paired, unpaired." in explain
