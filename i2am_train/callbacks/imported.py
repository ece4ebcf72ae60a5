"""Callbacks of the user's own, by their import paths: the option ``callbacks``."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback

from i2am_train.doors import calls, make, path_and_keywords, resolve
from i2am_train.errors import ConfigError

EXPECTED = (
    "a callback of Lightning: a class derived from lightning.Callback, a function that returns one (both may take "
    "keywords), or an object of such a class"
)

Entry = str | Mapping[str, Any]


def check_callbacks(entries: Sequence[Entry]) -> None:
    """Fail as `imported_callbacks` would, without making a callback.

    Raises:
        ConfigError: an entry cannot be imported, or is no callback and cannot be called for one.
    """
    list(_found(entries))


def imported_callbacks(entries: Sequence[Entry]) -> list[Callback]:
    """The callbacks that the option names, in its order.

    Args:
        entries: ``package.module:name``, or a mapping of it (``fn``) and keywords.

    Raises:
        ConfigError: as `check_callbacks`; or making a callback fails, or gives something else.

    >>> imported_callbacks(["lightning.pytorch.callbacks:Timer"])
    Traceback (most recent call last):
        ...
    i2am_train.errors.ConfigError: callbacks[0]=lightning.pytorch.callbacks:Timer was read from a file, ...
    """
    made = []
    for named, found, keywords in _found(entries):
        callback = found if isinstance(found, Callback) else make(found, named, **keywords)
        if not isinstance(callback, Callback):
            raise ConfigError(f"{named} returned a {type(callback).__name__}. Expected {EXPECTED}.")
        made.append(callback)
    return made


def _found(entries: Sequence[Entry]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each entry's name in messages, object and keywords."""
    for index, entry in enumerate(entries):
        option = f"callbacks[{index}]"
        path, keywords = path_and_keywords(entry, option)

        def check(found: Any, keywords: dict[str, Any] = keywords) -> str | None:
            if isinstance(found, Callback):
                return "is an object already and takes no keywords" if keywords else None
            if isinstance(found, type) and not issubclass(found, Callback):
                return "is a class that does not derive from lightning.Callback"
            return calls(**keywords)(found)

        yield f"{option}={path}", resolve(path, option, EXPECTED, check), keywords
