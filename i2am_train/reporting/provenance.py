"""How something was made, in words: command, machine, commit, data, settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def code_state(git: Mapping[str, Any] | None) -> str:
    """The commit, and whether files differed from it.

    >>> code_state({"commit": "0123456789abcdef", "dirty": True})
    '0123456789ab with changes'
    """
    if git is None:
        return "of an installed package"
    return f"{git['commit'][:12]}{' with changes' if git['dirty'] else ''}"


def provenance_rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """How something was made, as pairs of term and text, present ones only.

    Args:
        facts: a run's manifest or ``results.json``.
    """
    rows = {
        "Command": facts.get("command"),
        "Started": facts.get("started"),
        "Machine": describe_machine(facts.get("machine") or {}),
        "Commit": flat(facts.get("git")),
        "Data": flat(facts.get("data")),
        "Versions": flat(facts.get("versions")),
    }
    yield from ((term, str(text)) for term, text in rows.items() if text)


def flat(facts: Mapping[str, Any] | str | None) -> str:
    """One line for a mapping of any depth, or the text itself.

    >>> flat({"variant": "reward", "weights": {"dcml": 0.1}})
    'variant reward, dcml 0.1'
    """
    if not isinstance(facts, Mapping):
        return str(facts or "")
    nested = (flat(value) for value in facts.values() if isinstance(value, Mapping))
    return ", ".join(text for text in (describe(facts), *nested) if text)


def describe(facts: Mapping[str, Any]) -> str:
    """A flat mapping as one line.

    >>> describe({"cpu": "Xeon", "cores": 2, "gpu": None})
    'cpu Xeon, cores 2'
    """
    texts = (_fact(key.replace("_", " "), value) for key, value in facts.items())
    return ", ".join(text for text in texts if text)


def _fact(name: str, value: object) -> str:
    if isinstance(value, bool):
        return name if value else ""
    return f"{name} {value}" if isinstance(value, (str, int, float)) and value != "" else ""


def describe_machine(machine: Mapping[str, Any]) -> str:
    """Processor, cores, memory and GPU as one phrase; other facts follow by name.

    >>> describe_machine({"cpu": "Xeon", "cores": 2, "memory_gib": 15.6, "gpu": None})
    'Xeon, 2 cores, 15.6 GiB memory'
    """
    units = {"cpu": "{}", "cores": "{} cores", "memory_gib": "{} GiB memory", "gpu": "{}"}
    known = [text.format(machine[name]) for name, text in units.items() if machine.get(name)]
    others = describe({name: value for name, value in machine.items() if name not in units})
    return ", ".join([*known, *filter(None, [others])])
