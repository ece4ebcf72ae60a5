"""What the HTML pages share: their templates, pictures inside the page, and where they come from."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image as PillowImage

from i2am_train.reporting.figures.canvas import STYLE
from i2am_train.reporting.figures.canvas import Picture as PictureArray
from i2am_train.reporting.tables import describe, describe_machine


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure of a page: embedded file, caption, and text for those who cannot see it."""

    source: str
    caption: str
    alt: str


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page."""

    title: str
    html: str = ""
    """A table, escaped where it was made."""
    notes: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def code_state(git: Mapping[str, Any] | None) -> str:
    """The commit, and whether files differed from it.

    >>> code_state({"commit": "0123456789abcdef", "dirty": True})
    '0123456789ab with changes'
    """
    if git is None:
        return "of an installed package"
    return f"{git['commit'][:12]}{' with changes' if git['dirty'] else ''}"


def page_environment() -> Environment:
    """Templates of this package; HTML is escaped and an undefined name is an error."""
    return Environment(
        loader=PackageLoader("i2am_train.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def embedded_file(path: Path) -> str:
    """A PNG or SVG file as a ``data:`` address."""
    kind = {".png": "image/png", ".svg": "image/svg+xml"}[path.suffix]
    return f"data:{kind};base64,{as_base64(path.read_bytes())}"


def embedded_figure(figure: Figure, dpi: int = 130) -> str:
    """A figure as a ``data:`` address (PNG)."""
    file = BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format="png", dpi=dpi)
    return f"data:image/png;base64,{as_base64(file.getvalue())}"


def embedded_picture(picture: PictureArray) -> str:
    """A picture as a ``data:`` address, without loss (PNG)."""
    file = BytesIO()
    PillowImage.fromarray(picture).save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{as_base64(file.getvalue())}"


def as_base64(content: bytes) -> str:
    """Base64 as text."""
    return base64.b64encode(content).decode("ascii")


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
