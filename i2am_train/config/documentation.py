"""``--help`` of a command, from the docstrings under the fields of its schema."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields
from enum import Enum
from functools import cache
from itertools import pairwise
from textwrap import fill
from typing import Any, Literal, get_args, get_origin, get_type_hints

from i2am_train.config.build import group_of, plain
from i2am_train.config.commands import COMMANDS
from i2am_train.config.locations import conf_folder, experiment_names

WIDTH = 100
NAME_WIDTH = 36


def help_text(command: str, usage: str, examples: str) -> str:
    """All options of a command with defaults: those that people use first, then the others by group."""
    schema, first = COMMANDS[command].options, COMMANDS[command].first.split()
    known = ", ".join(experiment_names([item.name for item in fields(schema)]))
    experiment = f"Options that belong together, of a file in conf/experiment: {known}."
    entries = {"experiment": _entry("experiment=null", experiment), **_entries(schema)}
    parts = [
        f"usage: {usage}",
        str(schema.__doc__),
        f"examples:\n{examples.rstrip()}",
        _block("options that are used first (name=value, without dashes)", first, entries),
        *_groups(schema, "", {n: text for n, text in entries.items() if n not in first}),
        _files(schema),
        "also: --cfg job shows the composed options, --info searchpath where they come from,\n"
        "      --debug shows the traceback of an error, -m seed=0,1,2 runs a sweep (as SLURM jobs with\n"
        "      hydra/launcher=submitit_slurm, after pip install hydra-submitit-launcher).",
    ]
    return "\n\n".join(part for part in parts if part)


def field_docstrings(schema: type[Any]) -> dict[str, str]:
    """The text under each field of a class of options.

    >>> from i2am_train.config.data import SyntheticConfig
    >>> field_docstrings(SyntheticConfig)["test"]
    'Number of held-out samples.'
    """
    body = _class_bodies(schema.__module__)[schema.__name__]
    found: dict[str, str] = {}
    for field_node, text_node in pairwise(body):
        match field_node, text_node:
            case (ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text)))):
                found[name] = " ".join(text.split())
    return found


@cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}


def _entries(schema: type[Any], prefix: str = "") -> dict[str, str]:
    """The entry of each option by its dotted name, options of groups included."""
    texts, defaults, hints = field_docstrings(schema), plain(schema), get_type_hints(schema)
    entries: dict[str, str] = {}
    for item in fields(schema):
        name = f"{prefix}{item.name}"
        if group := group_of(item):
            entries |= _entries(group, f"{name}.")
        else:
            text = texts[item.name] + _choices(hints[item.name])
            entries[name] = _entry(f"{name}={_shown(defaults[item.name])}", text)
    return entries


def _block(title: str, names: Iterable[str], entries: Mapping[str, str]) -> str:
    lines = [entries[name] for name in names if name in entries]
    return "\n".join([f"{title}:", *lines]) if lines else ""


def _choices(hint: Any) -> str:
    """The legal values of an option that has only a few."""
    values: tuple[Any, ...] = get_args(hint) if get_origin(hint) is Literal else ()
    if isinstance(hint, type) and issubclass(hint, Enum):
        values = tuple(member.value for member in hint)
    return f" One of {', '.join(values)}." if values else ""


def _groups(schema: type[Any], prefix: str, entries: Mapping[str, str]) -> list[str]:
    """One block for the options of a schema, and one per group in it."""
    title = f"{prefix[:-1]}: {schema.__doc__}".removesuffix(".") if prefix else "options"
    blocks = [_block(title, [f"{prefix}{item.name}" for item in fields(schema)], entries)]
    for item in fields(schema):
        if group := group_of(item):
            blocks += _groups(group, f"{prefix}{item.name}.", entries)
    return blocks


def _files(schema: type[Any]) -> str:
    """The choices of files in conf/ for this command's groups."""
    options = [item.name for item in fields(schema)]
    choices = {group: sorted(path.stem for path in (conf_folder() / group).glob("*.yaml")) for group in options}
    lines = [f"  {group}={'|'.join(names)}" for group, names in choices.items() if names]
    return "\n".join(["files of options, each a file in conf/<group>/:", *lines]) if lines else ""


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    return "(required)" if value == "???" else str(value)


def _entry(name: str, text: str) -> str:
    """An option and its meaning in two columns; a long option gets a line of its own."""
    indent = " " * (NAME_WIDTH + 2)
    wrapped = fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
    if len(name) + 3 > NAME_WIDTH:
        return f"  {name}\n{wrapped}"
    return f"  {name}".ljust(len(indent)) + wrapped.lstrip()
