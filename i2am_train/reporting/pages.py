"""HTML pages that need nothing else: sections of tables, pictures and notes in one file."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
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
from i2am_train.reporting.formatting import html_label
from i2am_train.reporting.provenance import provenance_rows
from i2am_train.reporting.table import Table, html


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
        """A table with its notes and more of them; ``before`` stands before its title."""
        return cls(before + table.caption, html=html(table), notes=[*table.notes, *notes])


def page(title: str, sections: Sequence[Section], *, kind: str = "tables and figures", **parts: Any) -> str:
    """A whole page.

    Args:
        title: of the page.
        sections: in their order.
        kind: of page, above the title.
        parts: ``facts`` for the head (pairs of a value and what it counts), ``verdicts`` and ``warnings`` (sentences).
    """
    given = {"facts": (), "verdicts": (), "warnings": (), **parts}
    template = page_environment().get_template("page.html.j2")
    return template.render(title=title, kind=kind, sections=sections, **given)


def report_page(index: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """The page of ``i2am report``.

    Args:
        index: what ``index.json`` of the report says: provenance, settings, inputs, what is left out.
        sections: tables and figures in their order.
    """
    models = dict.fromkeys(entry["model"] for entry in index.get("evaluations", ()))
    named = list(models) or list(index.get("inputs") or index.get("detections", {}))
    counted = {
        "evaluations": "evaluations",
        "tables": "tables",
        "inputs": "explained samples",
        "detections": "detection experiments",
        "figures": "figures",
    }
    made = {**index.get("inputs", {}), **index.get("detections", {})}
    return page(
        ", ".join(named[:4]) + (" and others" if len(named) > 4 else ""),
        [*sections, making(index, index["settings"], left_out(index), made)],
        facts=[(str(len(index[name])), text) for name, text in counted.items() if index.get(name)],
    )


def left_out(index: Mapping[str, Any]) -> dict[str, str]:
    """Tables and figures that the inputs do not allow, and what they need."""
    return {**index.get("tables_left_out", {}), **index.get("left_out", {})}


def making(
    facts: Mapping[str, Any],
    settings: Any,
    left_out: Mapping[str, str] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Section:
    """The last section: how it was made, what is left out and why, settings, and what it was made from."""
    details = {"Settings": settings, **(inputs or {})}
    return Section(
        "How this was made",
        terms=list(provenance_rows(facts)),
        notes=[f"Left out: {n}, which needs {need}." for n, need in (left_out or {}).items()],
        details={name: json.dumps(text, indent=2, default=str) for name, text in details.items()},
    )


def page_environment() -> Environment:
    """Templates of this package; HTML is escaped and an undefined name is an error."""
    environment = Environment(
        loader=PackageLoader("i2am_train.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["label"] = html_label
    return environment


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
