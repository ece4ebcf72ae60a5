"""What an option is: a field of a dataclass with a type and legal values, and a text for ``--help`` below it.

    steps: Annotated[int, within(1, 1000)] = 10

A rule stands in the annotation of a field, of a list's elements or of a member of a union; rules between fields stand
in ``Options.check``. ``build`` is the border of the program: what it returns has the right types, legal values and no
unknown keys, and what it refuses it names by its dotted path. ``plain`` is the way back to YAML's values.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from i2am_train.config.locations import absolute
from i2am_train.doors import is_import_path
from i2am_train.errors import ConfigError
from i2am_train.types import GridSize, LayoutName

T = TypeVar("T")

REQUIRED = "???"
"""Plain value of an option that has no default (the mark that Hydra uses)."""
LARGEST = 2**63 - 1
"""Largest whole number of an option: what libraries can count with."""
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
"""Characters that no name holds on purpose; tabs may be there."""
LARGEST_IMAGE, MOST_SAMPLES, MOST_WORKERS = 16_384, 10_000_000, 512
"""Pixels of a side, samples that a program draws, processes: above all uses, to keep a slip from taking all memory."""


class Rule(NamedTuple):
    """What a value must be.

    >>> at_least(1).holds(0), at_least(1).expected
    (False, 'at least 1')
    """

    expected: str
    """How a message ends that begins with "expected"."""
    holds: Callable[[Any], bool]


def at_least(low: float) -> Rule:
    """``low`` or more.

    >>> at_least(1)[0]
    'at least 1'
    """
    return Rule(f"at least {low}", lambda value: value >= low)


def within(low: float, high: float) -> Rule:
    """``low`` to ``high``, both included.

    >>> [within(0, 2).holds(value) for value in (-1, 0, 2, 3)]
    [False, True, True, False]
    """
    return Rule(f"a number between {low} and {high}", lambda value: low <= value <= high)


def _matching(expected: str, pattern: str) -> Rule:
    return Rule(expected, lambda text: re.fullmatch(pattern, text) is not None)


Count = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
NotNegative = Annotated[float, at_least(0.0)]
Positive = Annotated[float, Rule("more than 0.0", lambda value: value > 0.0)]
Share = Annotated[float, within(0.0, 1.0)]
BelowOne = Annotated[float, Rule("a number in [0, 1)", lambda value: 0.0 <= value < 1.0)]
Guidance = Annotated[float, at_least(1.0)]
"""Scale of classifier-free guidance; 1 is none."""
SamplingSteps = Annotated[int, within(1, 1000)]
Samples = Annotated[int, within(1, MOST_SAMPLES)]
Workers = Annotated[int, within(0, MOST_WORKERS)]
Threads = Annotated[int, within(1, MOST_WORKERS)]
Pixels = Annotated[int, within(1, LARGEST_IMAGE)]
ImageSide = Annotated[
    int,
    # Latents (a quarter or an eighth of it) and encoder patches (8 pixels) must be whole.
    Rule(
        f"a multiple of 16 between 16 and {LARGEST_IMAGE}",
        lambda value: 16 <= value <= LARGEST_IMAGE and value % 16 == 0,
    ),
]
LAYER = Rule(
    "one of the paper's layers 1...9, or a name like up_blocks.1.attentions.1",
    lambda layer: 1 <= layer <= 9 if isinstance(layer, int) else layer != "",
)
Layer = Annotated[int | str, LAYER]
Layers = Annotated[list[Layer], Rule("null for all, or a list that is not empty", bool)]
"""Beside None."""
PatchPosition = tuple[Natural, Natural]
"""Row and column in a grid of patches, from 0."""

Layout = Annotated[
    str,
    Rule(
        f"one of {', '.join(get_args(LayoutName))}, or package.module:name",
        lambda text: text in get_args(LayoutName) or is_import_path(text),
    ),
]
NOT_BLANK = Rule("a folder or a URL, or null", lambda text: bool(text.strip()))
ModelFolder = Annotated[str, NOT_BLANK._replace(expected="a folder, or tiny for the shipped weights")]
HubModel = Annotated[str, NOT_BLANK._replace(expected="a folder or a name on the hub")]
Name = Annotated[
    str,
    _matching(
        "a word without spaces and slashes (it names a folder), of at most 60 signs, the first one no point",
        r"(?!\.)[^\s/\\\x00-\x1f\x7f]{1,60}",
    ),
]
LABEL = Rule(
    "one line of at most 100 letters", lambda text: text.isprintable() and bool(text.strip()) and len(text) <= 100
)
"""What tables and figures can show; each of their formats escapes its own signs."""
Label = Annotated[str, LABEL]
Project = Annotated[str, _matching(r"1 to 128 signs without / \ # ? % :", r"[^/\\#?%:]{1,128}")]
"""What Weights & Biases takes as one."""
Tag = Annotated[str, Rule("1 to 64 signs in a tag", lambda text: 1 <= len(text) <= 64)]


def _distinct(values: list[Any]) -> bool:
    return not any(value in values[:place] for place, value in enumerate(values))


DISTINCT = Rule("a list that names nothing twice", _distinct)
SOME_DISTINCT = Rule("a list that is not empty and names nothing twice", lambda values: values and _distinct(values))
SEVERAL = SOME_DISTINCT._replace(expected="one value, or a list of values that are all different")


class OptionError(ConfigError):
    """An option with a value that it cannot have."""

    def __init__(self, name: str, value: object, expected: str, hint: str = "") -> None:
        if isinstance(value, str) and not (value.strip() and value.isprintable()):
            value = repr(value)
        shown = "null" if value is None else shortened(value)
        super().__init__(f"{name}={shown} is not possible: expected {expected}.{hint}")
        self.parts = (name, value, expected, hint)

    def below(self, path: str) -> OptionError:
        """The same with the path of the group that the option stands in, ``sampling.``.

        >>> print(OptionError("steps", 0, "at least 1").below("sampling."))
        sampling.steps=0 is not possible: expected at least 1.
        """
        name, value, expected, hint = self.parts
        return OptionError(f"{path}{name}", value, expected, hint)


class Options:
    """Base of all groups of options: values have the declared types and are legal, however an instance is made.

    >>> from i2am_train.config.models import SamplingConfig
    >>> SamplingConfig(steps=0)
    Traceback (most recent call last):
        ...
    i2am_train.config.options.OptionError: steps=0 is not possible: expected a number between 1 and 1000.
    """

    __slots__ = ()

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            setattr(self, name, convert(hint, getattr(self, name), name))
        self.check()

    def check(self) -> None:
        """Rules between options; raises ``OptionError`` or another ``ConfigError``."""


class Sized(Options):
    """Options with a size of images, height and width in pixels."""

    __slots__ = ()
    height: int
    width: int

    @property
    def size(self) -> GridSize:
        """Image size, height first.

        >>> from i2am_train.config.data import DataConfig
        >>> DataConfig(height=256, width=192).size
        GridSize(height=256, width=192)
        """
        return GridSize(self.height, self.width)


_hints: Callable[[Any], dict[str, Any]] = cache(partial(get_type_hints, include_extras=True))
"""Types of a class's fields, with their rules."""


def build(schema: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Make an instance of a dataclass from plain values; options left out keep their defaults.

    Args:
        schema: a class of options, or any dataclass.
        values: nested plain values, as YAML gives them.
        path: dotted prefix for error messages.

    Raises:
        ConfigError: an option is unknown, missing, of another type or out of range.

    >>> from i2am_train.config.models import SamplingConfig
    >>> build(SamplingConfig, {"steps": 4}).steps
    4
    """
    known = {item.name: item for item in fields(schema)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(unknown_option(f"{path}{name}", option_names(schema, path)))
        if value != REQUIRED:
            arguments[name] = convert(_hints(schema)[name], value, f"{path}{name}")
    for name, item in known.items():
        if name not in arguments and _plain_default(item) == REQUIRED:
            raise ConfigError(f"{path}{name} is required and was not given. Add {path}{name}=VALUE.")
    try:
        return schema(**arguments)
    except OptionError as error:
        raise error.below(path) from None


def plain(value: Any) -> Any:
    """The plain value (dict, list, number, text, None) of a dataclass, enum or path.

    The inverse of ``build``. Given a schema class instead of an instance, returns its defaults,
    with ``???`` where there is none.

    >>> from i2am_train.config.data import SyntheticConfig
    >>> plain(SyntheticConfig)
    {'train': 2000, 'test': 200, 'seed': 0}
    """
    if is_dataclass(value):
        if isinstance(value, type):
            return {item.name: _plain_default(item) for item in _ordered(value)}
        return {item.name: plain(getattr(value, item.name)) for item in _ordered(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [plain(element) for element in value]
    if isinstance(value, Mapping):
        return {name: plain(element) for name, element in value.items()}
    return value


def option_names(schema: type[Any], prefix: str = "") -> list[str]:
    """Dotted names of all options and groups of a schema, in order.

    >>> from i2am_train.config.data import SyntheticConfig
    >>> option_names(SyntheticConfig, "data.synthetic.")
    ['data.synthetic.train', 'data.synthetic.test', 'data.synthetic.seed']
    """
    names: list[str] = []
    for item in _ordered(schema):
        names.append(prefix + item.name)
        if group := group_of(item):
            names += option_names(group, f"{prefix}{item.name}.")
    return names


def group_of(item: Field[Any]) -> type[Any] | None:
    """The schema of a field that is a group of options, None for a single option.

    >>> from i2am_train.config.data import DataConfig
    >>> {item.name: group_of(item).__name__ for item in fields(DataConfig) if group_of(item)}
    {'synthetic': 'SyntheticConfig'}
    """
    factory: Any = item.default_factory
    return factory if isinstance(factory, type) and is_dataclass(factory) else None


def unknown_option(name: str, known: Sequence[str]) -> str:
    """The message for an option that does not exist: the nearest ones, or where the list is.

    >>> unknown_option("layer", ["label", "attribution.layer"])
    "There is no option 'layer'. Did you mean 'attribution.layer'?"
    """
    # A right word without its group is as common as a typing error.
    leaf = name.rsplit(".", 1)[-1]
    near = get_close_matches(name, known, n=1, cutoff=0.9) if "." in name else []
    near = near or [option for option in known if option.rsplit(".", 1)[-1] == leaf]
    near = near or get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:
        leaves = {option.rsplit(".", 1)[-1]: option for option in reversed(known)}
        near = [leaves[word] for word in get_close_matches(leaf, list(leaves), n=1, cutoff=0.7)]
    choices = " or ".join(f"'{option}'" for option in near[:3])
    hint = f"Did you mean {choices}?" if near else "See --help for all options."
    return f"There is no option '{name}'. {hint}"


def shortened(value: object, most: int = 80) -> str:
    """A value as messages repeat it: in one line of at most so many characters.

    >>> shortened("a" * 200).count("a"), shortened([1, 2])
    (80, '[1, 2]')
    """
    try:
        text = " ".join(str(value).split())
    except ValueError:  # Python's own refusal of numbers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= most else f"{text[:most]}..."


def _ordered(schema: Any) -> list[Field[Any]]:
    """The fields as help and files list them: single options before groups, also where a base class has the groups."""
    return sorted(fields(schema), key=lambda item: group_of(item) is not None)


def _plain_default(item: Field[Any]) -> Any:
    if item.default is not MISSING:
        return plain(item.default)
    if item.default_factory is not MISSING:
        return plain(group_of(item) or item.default_factory())
    return REQUIRED


def convert(hint: Any, value: Any, path: str) -> Any:
    """The value as the type ``hint``, under its rules.

    Raises:
        ConfigError: it has another type or breaks a rule; the message names ``path``.

    >>> convert(Count, 2.0, "steps")
    2
    """
    if hint is Any:
        return value
    if (origin := get_origin(hint)) is not None:
        return _BY_ORIGIN[origin](get_args(hint), value, path)
    if is_dataclass(hint):
        return _convert_group(hint, value, path)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _choice({member.value: member for member in hint}, value, path)
    return _convert_scalar(hint, value, path)


def _convert_ruled(hints: tuple[Any, ...], value: Any, path: str) -> Any:
    value = convert(hints[0], value, path)
    for rule in hints[1:]:
        if isinstance(rule, Rule) and not rule.holds(value):
            raise OptionError(path, value, rule.expected)
    return value


def _convert_group(hint: Any, value: Any, path: str) -> Any:
    if isinstance(value, hint):
        return value
    if not isinstance(value, Mapping):
        raise OptionError(path, value, f"a group of options such as {path}.{fields(hint)[0].name}=...")
    return build(hint, value, f"{path}.")


def _convert_union(hints: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in hints:
        return None
    members = [hint for hint in hints if hint is not type(None)]
    exact = [hint for hint in members if type(value) is _bare(hint)]
    if (isinstance(value, bool) and not exact) or value is None:
        raise OptionError(path, value, " or ".join(map(_type_name, members)))
    shape = dict if isinstance(value, Mapping) else list if isinstance(value, (list, tuple)) else None
    origins = {member: get_origin(_bare(member)) for member in members}
    alike = [m for m, o in origins.items() if (o if o in (dict, list) else None) is shape]
    return convert((exact or alike[-1:] or members[-1:])[0], value, path)


def _convert_list(hints: tuple[Any, ...], value: Any, path: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise OptionError(path, value, f"a list, such as {path}=[...]")
    return _convert_items(hints * len(value), value, path)


def _convert_tuple(hints: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)) or len(value) != len(hints):
        raise OptionError(path, value, f"a list of {len(hints)} values")
    return tuple(_convert_items(hints, value, path))


def _convert_items(hints: Sequence[Any], values: Sequence[Any], path: str) -> list[Any]:
    pairs = zip(hints, values, strict=True)
    return [convert(hint, item, f"{path}[{index}]") for index, (hint, item) in enumerate(pairs)]


def _convert_dict(hints: tuple[Any, ...], value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise OptionError(path, value, f"a mapping, such as {path}={{name: value}}")
    return {str(name): convert(hints[1], item, f"{path}.{name}") for name, item in value.items()}


def _convert_literal(hints: tuple[Any, ...], value: Any, path: str) -> Any:
    return _choice({str(choice): choice for choice in hints}, value, path)


def _choice(choices: Mapping[str, Any], value: Any, path: str) -> Any:
    key = str(value.value if isinstance(value, Enum) else value)
    if key not in choices:
        near = get_close_matches(key, choices, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise OptionError(path, value, f"one of {', '.join(choices)}", hint)
    return choices[key]


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if isinstance(value, bool) or value is None:
        raise OptionError(path, value, _type_name(hint))
    if hint is float and isinstance(value, (int, float)):
        return _number(value, path)
    if hint is int and isinstance(value, (int, float)) and _number(value, path).is_integer():
        if abs(value) > LARGEST:
            raise OptionError(path, value, f"a whole number of at most {LARGEST}")
        return int(value)
    if hint is str and isinstance(value, (str, int, float)):
        return _text(str(value), path)
    if hint is Path and isinstance(value, (str, int, Path)):
        return _path(_text(str(value), path), path)
    raise OptionError(path, value, _type_name(hint))


def _number(value: float, path: str) -> float:
    """The number, which arithmetic can go on with."""
    try:
        number = float(value)
    except OverflowError:  # a whole number of more than 308 digits
        number = math.inf
    if not math.isfinite(number):
        raise OptionError(path, value, "a finite number")
    return number


def _text(value: str, path: str) -> str:
    """The text, which files can be named after and written with."""
    if "\0" in value:
        raise OptionError(path, value, "a text without the character NUL")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # what the system gave as bytes of another encoding
        raise OptionError(path, value, "text in UTF-8", " Rename the file or folder.") from error
    return value


def _path(value: str, path: str) -> Path:
    if not value.strip():
        raise OptionError(path, value, "a path")  # Path("") would be the current folder
    if CONTROL.search(value):
        raise OptionError(path, value, "a path without line breaks and other control signs")
    return absolute(Path(value))


def _type_name(hint: Any) -> str:
    bare = _bare(hint)
    if get_origin(bare) in (Union, types.UnionType):
        return " or ".join(map(_type_name, get_args(bare)))
    if get_origin(bare) is Literal:
        return f"one of {', '.join(map(str, get_args(bare)))}"
    return _TYPE_NAMES[get_origin(bare) or bare]


def _bare(hint: Any) -> Any:
    """A type without its rules."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


_TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    list: "a list",
    dict: "a mapping",
}
_BY_ORIGIN: dict[Any, Callable[[tuple[Any, ...], Any, str], Any]] = {
    Annotated: _convert_ruled,
    Union: _convert_union,
    types.UnionType: _convert_union,
    list: _convert_list,
    dict: _convert_dict,
    tuple: _convert_tuple,
    Literal: _convert_literal,
}
"""How types with arguments are converted."""
