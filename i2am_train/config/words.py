"""Words of a command line as Hydra can read them: a text or a path is what was typed, whatever signs are in it.

Hydra's grammar knows few signs outside of quotation marks: ä, #, &, (, = and others end in an error, a comma makes a
sweep, 1e5 a number. Where an option is a text, the marks are set here. Lists, interpolations, sweeps (with -m) and what
is quoted already stay Hydra's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from i2am_train.config.build import group_of, shortened
from i2am_train.config.commands import COMMANDS
from i2am_train.errors import ConfigError

TEXTS = (str, Path)

ELEMENT = re.compile(r"""\s*(?P<element>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^,]*?)\s*,""", re.DOTALL)
"""One element of a typed list and the comma after it: quoted, or up to the next comma."""
HALF_INTERPOLATION = re.compile(r"\$\{(?![^{}]+\})")
"""A ``${`` that refers to nothing, since it is not closed."""


class Kind(NamedTuple):
    """Which values an option takes, as far as reading its word depends on it."""

    text: bool
    """Texts and nothing else, lists of them apart."""
    texts: bool
    """Lists of texts."""
    lists: bool
    """Lists of anything."""
    mapping: bool = False
    """Names of the user's own."""


TEXT = Kind(text=True, texts=False, lists=False)


def as_typed(command: str, words: Sequence[str], *, sweep: bool = False) -> list[str]:
    """The words ``name=value`` of a command, quoted where Hydra would not read a value as what was typed.

    Args:
        command: key of ``COMMANDS``; words that name no option of it are left alone.
        sweep: a comma separates values of a sweep (-m), and is not part of a text.

    Raises:
        ConfigError: a group of options is given something that cannot be the name of a file.

    >>> as_typed("train", ["output=runs/a (1)", "data.root=köln,1", "seed=1", "name=1e5"])
    ["output='runs/a (1)'", "data.root='köln,1'", 'seed=1', "name='1e5'"]
    >>> as_typed("train", ["objective.terms.mine.weight=0.1"])
    ['++objective.terms.mine.weight=0.1']
    """
    kinds = {"experiment": TEXT, **_kinds(COMMANDS[command].options)}
    groups = {"experiment", *(item.name for item in fields(COMMANDS[command].options) if group_of(item))}
    free = [name for name, kind in kinds.items() if kind.mapping]
    typed = []
    for word in words:
        name, equals, value = word.partition("=")
        if any(f"{name}.".startswith(f"{mapping}.") for mapping in free):
            typed.append(f"++{word}")  # else Hydra wants it only for names that exist
            continue
        known = equals and name in kinds
        typed.append(f"{name}={_readable(value, kinds[name], sweep)}" if known else word)
        if known and name in groups:
            _check_group(name, value)
    return typed


def _check_group(name: str, value: str) -> None:
    """Hydra has no message for a group that is given anything but the name of a file."""
    read = _read(value)
    whole = (type(None), bool, int, float, list)
    if read is not None and isinstance(read._value, whole):
        raise ConfigError(
            f"{name}={shortened(value)} is not possible: expected the name of a file of conf/{name}, or nothing for "
            f"the default. --help lists the files and the single options."
        )


def _readable(value: str, kind: Kind, sweep: bool) -> str:
    if value.startswith(("'", '"')) and _read(value) is None:
        return value  # a mark that was not closed: Hydra says so
    if kind.lists and value.startswith("["):
        return _readable_list(value) if kind.texts and value.endswith("]") else value
    read = _read(value)
    if read is None:
        # Quoted also where no text is meant: the option then says what it expects.
        hydra_s = (value.startswith(("[", "{")) and not kind.text) or (sweep and "," in value)
        return value if hydra_s else _quoted(value)
    if not kind.text or (read.is_sweep_override() and sweep):
        return value
    found = read._value
    kept = found is None or isinstance(found, QuotedString)
    # A backslash before a sign that Hydra would not read is its own way of quoting; at the end it
    # would quote what follows in a list.
    alike = isinstance(found, str) and (found == value or "\\" in value)
    kept = kept or (alike and not value.endswith("\\"))
    return value if kept else _quoted(value)


def _readable_list(value: str) -> str:
    read = _read(value)
    if read is not None and _all_texts(read._value):
        return value
    elements = [match["element"] for match in ELEMENT.finditer(value[1:-1] + ",")]
    if not all(elements):  # two commas in a row, or one at the end: Hydra says so
        return value
    return f"[{','.join(_readable(element, TEXT, sweep=False) for element in elements)}]"


def _all_texts(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(item, (str, QuotedString)) for item in found)


def _read(value: str) -> Override | None:
    """What Hydra makes of a value; None where it cannot read it."""
    try:
        return OverridesParser.create().parse_override(f"name={value}")
    except (HydraException, ValueError):  # Python's own refusal of numbers of 5000 digits
        return None


def _quoted(value: str) -> str:
    text = HALF_INTERPOLATION.sub(r"\\${", value)
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _kinds(schema: type[Any], prefix: str = "") -> dict[str, Kind]:
    hints = get_type_hints(schema)
    kinds: dict[str, Kind] = {}
    for item in fields(schema):
        kinds[prefix + item.name] = _kind(hints[item.name])
        if group := group_of(item):
            kinds |= _kinds(group, f"{prefix}{item.name}.")
    return kinds


def _kind(hint: Any) -> Kind:
    members = [hint] if get_origin(hint) in (None, list, tuple) else list(get_args(hint))
    lists = [get_args(member)[0] for member in members if get_origin(member) in (list, tuple)]
    single = [m for m in members if get_origin(m) not in (list, tuple) and m is not type(None)]
    return Kind(
        text=all(member in TEXTS for member in single) and bool(single),
        texts=all(element in TEXTS for element in lists) and bool(lists),
        lists=bool(lists),
        mapping=get_origin(hint) is dict,
    )
