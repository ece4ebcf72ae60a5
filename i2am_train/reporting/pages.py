"""What the HTML pages share: their templates and the pictures inside the page."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image as PillowImage

from i2am_train.reporting.figures.canvas import STYLE
from i2am_train.reporting.figures.canvas import Picture as PictureArray


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
