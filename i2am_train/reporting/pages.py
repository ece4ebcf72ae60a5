"""HTML pages that need nothing else: sections of tables, pictures and notes in one file; and how something was made."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from i2am_train.reporting.table import Table, html, html_label


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure of a page: embedded file, caption, and text for those who cannot see it."""

    source: str
    caption: str
    alt: str
    pixels: int | None = None
    """Width that it is drawn for, at most."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page."""

    title: str
    html: str = ""
    """A table, escaped where it was made."""
    notes: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    lead: str = ""
    """A paragraph before everything else."""
    terms: list[tuple[str, str]] = field(default_factory=list)
    """Words and what they stand for."""
    details: Mapping[str, str] = field(default_factory=dict)
    """Long texts by title, folded."""

    @classmethod
    def of(cls, table: Table, before: str = "", notes: Iterable[str] = ()) -> Section:
        """A table with its notes and more of them; ``before`` stands before its title.

        >>> Section.of(Table(title="Models", source="Table 2", corner="Model", headings=(), rows=()), "tiny: ").title
        'tiny: Models (Table 2)'
        """
        return cls(before + table.caption, html=html(table), notes=[*table.notes, *notes])


def page(title: str, sections: Sequence[Section], *, kind: str = "tables and figures", **parts: Any) -> str:
    """A whole page.

    Args:
        title: of the page.
        sections: in their order.
        kind: of page, above the title.
        parts: ``facts`` for the head (pairs of a value and what it counts), ``verdicts`` and ``warnings`` (sentences).

    >>> "<h1>My &amp; run</h1>" in page("My & run", [Section("Results", notes=["one seed"])])
    True
    """
    given = {"facts": (), "verdicts": (), "warnings": (), **parts}
    template = page_environment().get_template("page.html.j2")
    return template.render(title=title, kind=kind, sections=sections, **given)


def page_environment() -> Environment:
    """Templates of this package; HTML is escaped and an undefined name is an error.

    >>> page_environment().from_string("{{ arm }}").render(arm="<b>")
    '&lt;b&gt;'
    """
    environment = Environment(
        loader=PackageLoader("i2am_train.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["label"] = html_label
    return environment


# ---- embedded files ------------------------------------------------------------------------------


def embedded_file(path: Path) -> str:
    """A PNG or SVG file as a ``data:`` address."""
    return _address(path.read_bytes(), {".png": "image/png", ".svg": "image/svg+xml"}[path.suffix])


def embedded_figure(figure: Figure, dpi: int = 130) -> str:
    """A figure as a ``data:`` address (PNG).

    >>> embedded_figure(Figure(figsize=(0.1, 0.1)))[:27]
    'data:image/png;base64,iVBOR'
    """
    file = BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format="png", dpi=dpi)
    return _address(file.getvalue())


def embedded_picture(picture: PictureArray) -> str:
    """A picture as a ``data:`` address, without loss (PNG).

    >>> import numpy as np
    >>> embedded_picture(np.zeros((2, 3, 3), np.uint8))[:27]
    'data:image/png;base64,iVBOR'
    """
    file = BytesIO()
    PillowImage.fromarray(picture).save(file, format="PNG", optimize=True)
    return _address(file.getvalue())


def _address(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{as_base64(content)}"


def as_base64(content: bytes) -> str:
    """Base64 as text.

    >>> as_base64(b"i2am")
    'aTJhbQ=='
    """
    return base64.b64encode(content).decode("ascii")


# ---- how something was made ----------------------------------------------------------------------


def making(
    facts: Mapping[str, Any],
    settings: Any,
    left_out: Mapping[str, str] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Section:
    """The last section: how it was made, what is left out and why, settings, and what it was made from.

    >>> making({"command": "i2am report"}, {}, {"table3": "more evaluations"}).notes
    ['Left out: table3, which needs more evaluations.']
    """
    details = {"Settings": settings, **(inputs or {})}
    return Section(
        "How this was made",
        terms=list(provenance_rows(facts)),
        notes=[f"Left out: {n}, which needs {need}." for n, need in (left_out or {}).items()],
        details={name: json.dumps(text, indent=2, default=str) for name, text in details.items()},
    )


def provenance_rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """How something was made, as pairs of term and text, present ones only.

    Args:
        facts: a run's manifest or ``results.json``.

    >>> dict(provenance_rows({"command": "i2am train", "git": {"commit": "01ab", "dirty": True}}))
    {'Command': 'i2am train', 'Commit': 'commit 01ab, dirty'}
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


def code_state(git: Mapping[str, Any] | None) -> str:
    """The commit, and whether files differed from it.

    >>> code_state({"commit": "0123456789abcdef", "dirty": True})
    '0123456789ab with changes'
    """
    if git is None:
        return "of an installed package"
    return f"{git['commit'][:12]}{' with changes' if git['dirty'] else ''}"


def flat(facts: Mapping[str, Any] | str | None) -> str:
    """One line for a mapping of any depth, or the text itself.

    >>> flat({"commit": "0123", "dirty": False, "machine": {"cores": 2}})
    'commit 0123, cores 2'
    """
    if not isinstance(facts, Mapping):
        return str(facts or "")
    nested = (flat(value) for value in facts.values() if isinstance(value, Mapping))
    own = (_fact(key.replace("_", " "), value) for key, value in facts.items())
    return ", ".join(text for text in (*own, *nested) if text)


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
    others = flat({name: value for name, value in machine.items() if name not in units})
    return ", ".join([*known, *filter(None, [others])])
