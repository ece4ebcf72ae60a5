"""Between typed dataclasses and the plain values of YAML: ``build`` one way, ``plain`` the other.

``build`` is the border of the program: what it returns has the right types, legal values and no
unknown keys; what it refuses, it names by its dotted path.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from i2am_train.config.schema import group_of, option_names
from i2am_train.errors import ConfigError

T = TypeVar("T")

LARGEST = 2**63 - 1
"""Largest whole number of an option: what libraries can count with."""
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
"""Characters that no name holds on purpose; tabs may be there."""
LONGEST_SHOWN = 80
"""Characters of a value that messages repeat."""
REQUIRED = "???"
"""Plain value of an option that has no default (the mark that Hydra uses)."""


def build(schema: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Make an instance of a schema from plain values; options left out keep their defaults.

    Args:
        schema: a dataclass of ``i2am_train.config.schema``.
        values: nested plain values, as YAML gives them.
        path: dotted prefix for error messages.

    Raises:
        ConfigError: an option is unknown, missing, of another type or out of range.

    >>> from i2am_train.config.schema import SamplingConfig
    >>> build(SamplingConfig, {"steps": 4}).steps
    4
    """
    known = {item.name: item for item in fields(schema)}  # type: ignore[arg-type]
    hints = get_type_hints(schema)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(unknown_option(f"{path}{name}", option_names(schema, path)))
        if value != REQUIRED:
            arguments[name] = _convert(hints[name], value, f"{path}{name}")
    for name, item in known.items():
        if name not in arguments and _is_required(item):
            raise ConfigError(
                f"{path}{name} is required and was not given. Add {path}{name}=VALUE."
            )
    return schema(**arguments)


def plain(value: Any) -> Any:
    """The plain value (dict, list, number, text, None) of a dataclass, enum or path.

    The inverse of ``build``. Given a schema class instead of an instance, returns its defaults,
    with ``???`` where there is none.

    >>> from i2am_train.config.schema import SyntheticConfig
    >>> plain(SyntheticConfig)
    {'train': 2000, 'test': 200, 'seed': 0}
    """
    if is_dataclass(value):
        if isinstance(value, type):
            return {item.name: _plain_default(item) for item in fields(value)}
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [plain(element) for element in value]
    if isinstance(value, Mapping):
        return {name: plain(element) for name, element in value.items()}
    return value


def unknown_option(name: str, known: Sequence[str]) -> str:
    """The message for an option that does not exist: the nearest ones, or where the list is.

    >>> unknown_option("layer", ["label", "objective.layer"])
    "There is no option 'layer'. Did you mean 'objective.layer'?"
    """
    # A right word without its group is as common as a typing error.
    leaf = name.rsplit(".", 1)[-1]
    near = [option for option in known if option.rsplit(".", 1)[-1] == leaf]
    near = near or get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:
        leaves = {option.rsplit(".", 1)[-1]: option for option in reversed(known)}
        near = [leaves[word] for word in get_close_matches(leaf, list(leaves), n=1, cutoff=0.7)]
    choices = " or ".join(f"'{option}'" for option in near[:3])
    hint = f"Did you mean {choices}?" if near else "See --help for all options."
    return f"There is no option '{name}'. {hint}"


def shortened(value: object, most: int = LONGEST_SHOWN) -> str:
    """A value as messages repeat it, in one line and not endless.

    >>> shortened("a" * 200).count("a"), shortened([1, 2])
    (80, '[1, 2]')
    """
    try:
        text = " ".join(str(value).split())
    except ValueError:  # Python's own refusal of numbers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= most else f"{text[:most]}..."


def _is_required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _plain_default(item: Field[Any]) -> Any:
    if item.default is not MISSING:
        return plain(item.default)
    if item.default_factory is not MISSING:
        return plain(group_of(item) or item.default_factory())
    return REQUIRED


def _convert(hint: Any, value: Any, path: str) -> Any:
    """The value as the type ``hint``, or a ConfigError that names ``path``."""
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(get_args(hint), value, path)
    if origin is list:
        return _convert_list(get_args(hint)[0], value, path)
    if origin is dict:
        return _convert_dict(get_args(hint)[1], value, path)
    if origin is tuple:
        return _convert_tuple(get_args(hint), value, path)
    if origin is Literal:
        return _choice({str(choice): choice for choice in get_args(hint)}, value, path)
    if is_dataclass(hint):
        return _convert_group(hint, value, path)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _choice({member.value: member for member in hint}, value, path)
    return _convert_scalar(hint, value, path)


def _convert_group(hint: Any, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise _mismatch(
            path, value, f"a group of options such as {path}.{fields(hint)[0].name}=..."
        )
    return build(hint, value, f"{path}.")


def _convert_union(hints: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in hints:
        return None
    members = [hint for hint in hints if hint is not type(None)]
    exact = [hint for hint in members if type(value) is hint]
    if (isinstance(value, bool) and not exact) or value is None:
        raise _mismatch(path, value, " or ".join(map(_type_name, members)))
    shape = (
        dict if isinstance(value, Mapping) else list if isinstance(value, (list, tuple)) else None
    )
    origins = {member: get_origin(member) for member in members}
    alike = [m for m, o in origins.items() if (o if o in (dict, list) else None) is shape]
    return _convert((exact or alike[-1:] or members[-1:])[0], value, path)


def _convert_list(element: Any, value: Any, path: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise _mismatch(path, value, f"a list, such as {path}=[...]")
    return [_convert(element, item, f"{path}[{index}]") for index, item in enumerate(value)]


def _convert_dict(element: Any, value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _mismatch(path, value, f"a mapping, such as {path}={{name: value}}")
    return {str(name): _convert(element, item, f"{path}.{name}") for name, item in value.items()}


def _convert_tuple(hints: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)) or len(value) != len(hints):
        raise _mismatch(path, value, f"a list of {len(hints)} values")
    return tuple(
        _convert(hint, item, f"{path}[{index}]")
        for index, (hint, item) in enumerate(zip(hints, value, strict=True))
    )


def _choice(choices: Mapping[str, Any], value: Any, path: str) -> Any:
    key = str(value.value if isinstance(value, Enum) else value)
    if key not in choices:
        near = get_close_matches(key, choices, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise _mismatch(path, value, f"one of {', '.join(choices)}", hint)
    return choices[key]


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if isinstance(value, bool) or value is None:
        raise _mismatch(path, value, _type_name(hint))
    if hint is float and isinstance(value, (int, float)):
        return _number(value, path)
    if hint is int and isinstance(value, (int, float)) and _number(value, path).is_integer():
        if abs(value) > LARGEST:
            raise _mismatch(path, value, f"a whole number of at most {LARGEST}")
        return int(value)
    if hint is str and isinstance(value, (str, int, float)):
        return _text(str(value), path)
    if hint is Path and isinstance(value, (str, int, Path)):
        return _path(_text(str(value), path), path)
    raise _mismatch(path, value, _type_name(hint))


def _number(value: float, path: str) -> float:
    """The number, which arithmetic can go on with."""
    try:
        number = float(value)
    except OverflowError:  # a whole number of more than 308 digits
        number = math.inf
    if not math.isfinite(number):
        raise _mismatch(path, value, "a finite number")
    return number


def _text(value: str, path: str) -> str:
    """The text, which files can be named after and written with."""
    if "\0" in value:
        raise _mismatch(path, repr(value), "a text without the character NUL")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # what the system gave as bytes of another encoding
        shown = ascii(value)
        raise _mismatch(path, shown, "text in UTF-8", " Rename the file or folder.") from error
    return value


def _path(value: str, path: str) -> Path:
    if not value.strip():
        raise _mismatch(path, repr(value), "a path")  # Path("") would be the current folder
    if CONTROL.search(value):
        raise _mismatch(path, repr(value), "a path without line breaks and other control signs")
    return Path(value)


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    names |= {Path: "a path", list: "a list", dict: "a mapping"}
    return names[get_origin(hint) or hint]


def _mismatch(path: str, value: object, expected: str, hint: str = "") -> ConfigError:
    shown = "null" if value is None else shortened(value)
    return ConfigError(f"{path}={shown} is not possible: expected {expected}.{hint}")
