"""Which values options take, declared where an option is: ``steps: Annotated[int, within(1, 1000)] = 10``.

A rule stands in the annotation of a field, of a list's elements or of a member of a union. ``config.build`` checks it
once the value has its type, and puts ``expected`` into the message of a refusal.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

from i2am_train.doors import is_import_path
from i2am_train.types import LayoutName


class Rule(NamedTuple):
    """What a value must be.

    >>> at_least(1).holds(0), at_least(1).expected
    (False, 'at least 1')
    """

    expected: str
    """How a message ends that begins with "expected"."""
    holds: Callable[[Any], bool]


def at_least(low: float) -> Rule:
    """``low`` or more."""
    return Rule(f"at least {low}", lambda value: value >= low)


def above(low: float) -> Rule:
    """More than ``low``."""
    return Rule(f"more than {low}", lambda value: value > low)


def within(low: float, high: float) -> Rule:
    """``low`` to ``high``, both included."""
    return Rule(f"a number between {low} and {high}", lambda value: low <= value <= high)


def _matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


LARGEST_IMAGE = 16_384
"""Pixels of a side: what no image model has come near. It keeps a slip from taking all memory."""
MOST_SAMPLES = 10_000_000
"""Likewise, of what is drawn by a program."""
MOST_WORKERS = 512
"""Likewise, of processes that are started at once."""

Count = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
NotNegative = Annotated[float, at_least(0.0)]
Positive = Annotated[float, above(0.0)]
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
Layer = Annotated[
    int | str,
    Rule(
        "one of the paper's layers 1...9, or a name like up_blocks.1.attentions.1",
        lambda layer: 1 <= layer <= 9 if isinstance(layer, int) else layer != "",
    ),
]
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
    Rule(
        "a word without spaces and slashes (it names a folder), of at most 60 signs, the first one no point",
        _matches(r"(?!\.)[^\s/\\\x00-\x1f\x7f]{1,60}"),
    ),
]
LABEL = Rule(
    "one line of at most 100 letters", lambda text: text.isprintable() and bool(text.strip()) and len(text) <= 100
)
"""What tables and figures can show; each of their formats escapes its own signs."""
Label = Annotated[str, LABEL]
Project = Annotated[str, Rule(r"1 to 128 signs without / \ # ? % :", _matches(r"[^/\\#?%:]{1,128}"))]
"""What Weights & Biases takes as one."""
Tag = Annotated[str, Rule("1 to 64 signs in a tag", lambda text: 1 <= len(text) <= 64)]


def _distinct(values: list[Any]) -> bool:
    return len(set(values)) == len(values)


distinct = Rule("a list that names nothing twice", _distinct)
distinct_some = Rule(
    "a list that is not empty and names nothing twice", lambda values: bool(values) and _distinct(values)
)
several = Rule(
    "one value, or a list of values that are all different", lambda values: bool(values) and _distinct(values)
)
Folders = Annotated[list[Path], distinct]
