"""Doors for code from outside: ``package.module:name`` in an option becomes the object that it names.

To import a module is to run it. So a name that stands in a file (an experiment, a run folder, a checkpoint, an archive)
is imported only if the user named its module on the command line, or allowed it by the environment variable
``I2AM_ALLOW_IMPORTS``, which no such file can set.
"""

from __future__ import annotations

import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from i2am_train.errors import ConfigError

VARIABLE = "I2AM_ALLOW_IMPORTS"
"""Modules that may be imported, with all below them, separated by commas; child processes inherit it."""

_PATH = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_IMPORT_PATH = re.compile(rf"(?<![\w.:/-])(?P<module>{_PATH}):(?P<name>{_PATH})(?![\w.:/-])")

Check = Callable[[Any], str | None]
"""Says what is wrong with an object, as the end of a sentence that begins with its name; None if nothing is."""


def is_import_path(text: str) -> bool:
    """Whether a text has the form ``package.module:name``.

    >>> is_import_path("my_package.losses:mine"), is_import_path("s3://bucket"), is_import_path("ssim")
    (True, False, False)
    """
    return _IMPORT_PATH.fullmatch(text) is not None


def allow_named(words: Iterable[str]) -> None:
    """Allow the modules of all import paths in words that the user typed, in this process and in those it starts.

    >>> allow_named(["objective.terms.mine={fn: json.decoder:scanstring, weight: 1}"])
    >>> resolve("json.decoder:scanstring", "fn", "a function").__name__
    'scanstring'
    """
    named = [found["module"] for word in words for found in _IMPORT_PATH.finditer(word)]
    if names := dict.fromkeys([*_allowed(), *named]):
        os.environ[VARIABLE] = ",".join(names)


def path_and_keywords(entry: str | Mapping[str, Any], option: str) -> tuple[str, dict[str, Any]]:
    """An option's entry as import path and keywords: ``my:f``, or ``{fn: my:f, every: 5}``.

    Raises:
        ConfigError: a mapping without the import path under ``fn``.

    >>> path_and_keywords({"fn": "my_package:Timer", "every": 5}, "callbacks[0]")
    ('my_package:Timer', {'every': 5})
    """
    if isinstance(entry, str):
        return entry, {}
    keywords = {str(name): value for name, value in entry.items()}
    path = keywords.pop("fn", None)
    if not isinstance(path, str):
        raise ConfigError(
            f"{option}={dict(entry)} is not possible: expected package.module:name, or "
            "{fn: package.module:name, ...} with keywords behind it."
        )
    return path, keywords


def resolve(path: str, option: str, expected: str, *checks: Check) -> Any:
    """The object at an import path. Modules of the working directory are found, too.

    Args:
        path: ``package.module:name``; the name may have dots (``module:Class.method``).
        option: which option holds the path, for messages: ``callbacks[0]``.
        expected: what the object must be, for messages: ``a function of an Attention``.
        checks: what it must pass: `calls`, `derives` or your own.

    Raises:
        ConfigError: the path has another form, its module is not allowed or fails to import, has no such name, or the
            object does not pass a check.

    >>> resolve("json:loads", "option", "a function of a text", calls("text"))
    Traceback (most recent call last):
        ...
    i2am_train.errors.ConfigError: option=json:loads was read from a file, and a file may not have code imported. ...
    >>> allow_named(["json:loads"])
    >>> resolve("json:loads", "option", "a function of a text", calls("text"))("[1]")
    [1]
    """
    named = f"{option}={path}"
    match = _IMPORT_PATH.fullmatch(path)
    if match is None:
        raise ConfigError(f"{named} is not possible: expected package.module:name, the import path of {expected}.")
    module = match["module"]
    if not any(f"{module}.".startswith(f"{allowed}.") for allowed in _allowed()):
        package = module.partition(".")[0]
        others = [allowed for allowed in _allowed() if not allowed.startswith(f"{package}.")]
        raise ConfigError(
            f"{named} was read from a file, and a file may not have code imported. If you trust {package} with all its "
            f"modules, put {VARIABLE}={','.join([*others, package])} in front of the command (several are separated by "
            "commas), or give the option itself on the command line."
        )
    found = _imported(module, named)
    for name in match["name"].split("."):
        if not hasattr(found, name):
            raise ConfigError(f"{named}: {_missing(module, name, found)} Expected {expected}.")
        found = getattr(found, name)
    for check in checks:
        if wrong := check(found):
            raise ConfigError(f"{named} {wrong}. Expected {expected}.")
    return found


def make(found: Callable[..., Any], named: str, **keywords: Any) -> Any:
    """What a class or function gives; where it fails, its name in the option is said.

    Raises:
        ConfigError: in place of the error of the user's code.
    """
    try:
        return found(**keywords)
    except Exception as error:
        raise ConfigError(
            f"{named} cannot be made: {type(error).__name__}: {error}. --debug shows where it fails."
        ) from error


def calls(*arguments: str, **keywords: Any) -> Check:
    """A check that an object can be called with so many arguments, and with these keywords.

    >>> calls("generated", "real")(len)
    'cannot be called with (generated, real): too many positional arguments; its arguments are (obj, /)'
    """

    def check(found: Any) -> str | None:
        if not callable(found):
            return f"cannot be called: it is of type {type(found).__name__}"
        try:
            inspect.signature(found).bind(*arguments, **keywords)
        except TypeError as error:
            given = ", ".join((*arguments, *(f"{name}=" for name in keywords)))
            return f"cannot be called with ({given}): {error}; its arguments are {inspect.signature(found)}"
        except ValueError:  # compiled, and does not say what it takes
            return None
        return None

    return check


def derives(base: type) -> Check:
    """A check that an object is a class derived from ``base``, with nothing left abstract.

    >>> derives(int)(bool), derives(int)(3), derives(int)(str)
    (None, 'is of type int and no class', 'is a class that does not derive from int')
    """

    def check(found: Any) -> str | None:
        if not isinstance(found, type):
            return f"is of type {type(found).__name__} and no class"
        if not issubclass(found, base):
            return f"is a class that does not derive from {base.__name__}"
        lacking = sorted(getattr(found, "__abstractmethods__", ()))
        return f"lacks {', '.join(lacking)}" if lacking else None

    return check


def _allowed() -> list[str]:
    return [name for name in re.split(r"[\s,]+", os.environ.get(VARIABLE, "")) if name]


def _imported(module: str, named: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last: it hides no installed package
    try:
        return import_module(module)
    except Exception as error:
        wrong = f"{named} cannot be imported: {type(error).__name__}: {error}."
        raise ConfigError(f"{wrong} {_remedy(module, error)}; --debug shows where it fails.") from error


def _remedy(module: str, error: Exception) -> str:
    """What helps against an error of an import."""
    if isinstance(error, SyntaxError):
        return f"Python cannot read {error.filename}, line {error.lineno}: correct it there"
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return f"The module {module} was found, and fails by itself: correct it there"
    package, _, name = error.name.rpartition(".")
    if package and f"{module}.".startswith(f"{error.name}."):
        paths = getattr(sys.modules[package], "__path__", ())
        there = [found.name for found in pkgutil.iter_modules(paths)]
        return f"The package {package} was found in {', '.join(paths) or 'one file'}; it has: {_named(name, there)}"
    if error.name == module.partition(".")[0]:
        return f"Run from the folder that holds {error.name} (this one is {Path.cwd()}), or install it here"
    return f"{module} was found, and needs {error.name}: install it here"


def _missing(module: str, name: str, found: Any) -> str:
    there = [key for key in vars(found) if not key.startswith("_")] if hasattr(found, "__dict__") else []
    return f"{module} has no '{name}' (it has: {_named(name, there)})."


def _named(name: str, there: Sequence[str]) -> str:
    """Those that a misspelled name may mean, or the first of all."""
    near = get_close_matches(name, there, n=3) or sorted(there)
    return ", ".join(near[:8]) + (f", and {len(near) - 8} more" if len(near) > 8 else "") or "nothing"
