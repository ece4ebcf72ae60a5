"""The table, and its writers for terminal, Markdown, HTML and LaTeX; each makes a user's text mean itself.

What stands in a table is decided in ``model_tables`` and ``ablation_tables``; nothing here knows a metric.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from html import escape
from itertools import accumulate, groupby
from typing import Any, Self

from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

Interval = tuple[float, float]


# ---- numbers -------------------------------------------------------------------------------------


def number(value: float, digits: int, signed: bool = False) -> str:
    """A number with fixed digits, never "-0.00".

    >>> number(-0.0004, 3), number(0.25, 2, signed=True)
    ('0.000', '+0.25')
    """
    rounded = round(value, digits) + 0.0  # minus zero plus zero is zero
    return f"{rounded:{'+' if signed and rounded else ''}.{digits}f}"


def interval_text(interval: Interval | None, digits: int) -> str:
    """An interval as tables print it; empty where there is none.

    >>> interval_text((0.12345, 0.5), 3)
    '[0.123, 0.500]'
    """
    return f"[{', '.join(number(end, digits) for end in interval)}]" if interval else ""


def percent(share: float) -> str:
    """A share as text.

    >>> percent(0.95)
    '95 %'
    """
    return f"{share:.0%}".replace("%", " %")


def minus(text: str) -> str:
    """The text with real minus signs before numbers; hyphens in words stay.

    >>> minus("ST-LPIPS -0.1")
    'ST-LPIPS −0.1'
    """
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


_NUMBER = re.compile(r"[-+]?\d[\d.]*|\[[-+\d., ]+\]")
"""A printed number or interval: a mathematical text, whose hyphen is a minus."""


# ---- the table -----------------------------------------------------------------------------------


class Mark(StrEnum):
    """How an entry stands out."""

    BEST = "best"
    SECOND = "second"
    BETTER = "better"
    WORSE = "worse"
    CHANGED = "changed"
    """Different, where neither direction is better."""
    FAINT = "faint"


@dataclass(frozen=True, slots=True)
class Cell:
    """One entry: how it is printed, and the number behind it."""

    text: str
    spread: str = ""
    """Printed smaller: ``± 0.01`` beside the text, or ``[0.1, 0.3]`` below it."""
    mark: Mark | None = None
    pictures: Mapping[str, str] = field(default_factory=dict)
    """Addresses by description; HTML shows them after the text, the other formats leave them out."""
    value: float | None = None
    """As it was computed; None where the entry is a word."""
    interval: Interval | None = None
    n: int = 1
    """Training seeds (or points) that the number is a mean of."""

    @classmethod
    def of(
        cls, value: float, digits: int, *, std: float | None = None, interval: Interval | None = None, n: int = 1
    ) -> Self:
        """A number with its standard deviation or its interval.

        >>> Cell.of(0.5, 2, interval=(0.4, 0.6)).spread, Cell.of(0.5, 2, std=0.1).spread
        ('[0.40, 0.60]', '± 0.10')
        """
        spread = interval_text(interval, digits) if std is None else f"± {number(std, digits)}"
        return cls(number(value, digits), spread, value=value, interval=interval, n=n)

    @property
    def rank(self) -> int:
        """1 for the best, 2 for the second, else 0."""
        return 1 if self.mark is Mark.BEST else 2 if self.mark is Mark.SECOND else 0

    def as_json(self) -> dict[str, Any]:
        """The number without loss."""
        return {name: getattr(self, name) for name in ("value", "interval", "rank", "n")}


@dataclass(frozen=True, slots=True)
class Heading:
    """Head of a column."""

    label: str
    arrow: str = ""
    """Where better values lie."""
    group: str = ""
    """Title over this and its neighbours of the same group."""
    unit: str = ""
    description: str = ""
    words: bool = False
    """The column holds words and no numbers."""

    @property
    def text(self) -> str:
        """Label with arrow."""
        return f"{self.label} {self.arrow}".strip()


@dataclass(frozen=True, slots=True)
class Row:
    """One model, or whatever the table has a row for; an entry that is not known is None."""

    label: str
    cells: tuple[Cell | None, ...]
    group: str = ""
    """Title over this row and its neighbours of the same group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table ready to be written in any format."""

    corner: str
    """Over the labels of the rows."""
    headings: tuple[Heading, ...]
    rows: tuple[Row, ...]
    title: str = ""
    source: str = ""
    """What it is in the paper."""
    name: str = ""
    """Of its files."""
    notes: tuple[str, ...] = ()

    @property
    def caption(self) -> str:
        """Title with source."""
        return f"{self.title} ({self.source})" if self.source else self.title

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Titles over the headings and how many columns each spans."""
        return [(title, len(list(of))) for title, of in groupby(h.group for h in self.headings)]

    @property
    def row_groups(self) -> list[tuple[str, list[Row]]]:
        """Rows by group, in order; one group without a title where there are none."""
        return [(title, list(rows)) for title, rows in groupby(self.rows, key=lambda row: row.group)]

    def by_group(self) -> Iterator[Table]:
        """A narrower table for each group of columns, which is its title."""
        for first, (title, count) in zip(_starts(self), self.groups, strict=True):
            part = slice(first, first + count)
            rows = tuple(replace(row, cells=row.cells[part]) for row in self.rows)
            headings = tuple(replace(heading, group="") for heading in self.headings[part])
            yield replace(self, title=title, headings=headings, rows=rows)

    def as_json(self) -> dict[str, Any]:
        """The numbers without loss, for programs."""
        return {
            "name": self.name,
            "title": self.title,
            "paper": self.source,
            "columns": [{"label": h.label, "group": h.group} for h in self.headings],
            "rows": [
                {"label": row.label, "group": row.group, "cells": [cell and cell.as_json() for cell in row.cells]}
                for row in self.rows
            ],
            "notes": list(self.notes),
        }


def _starts(table: Table) -> list[int]:
    """Index of the first column of each group."""
    return [0, *accumulate(count for _, count in table.groups)][:-1]


def with_best(
    cells: Sequence[Cell | None], higher_is_better: bool | None, competing: Sequence[bool] | None = None
) -> list[Cell | None]:
    """The entries with marks at the best and the second among the numbers as they are printed.

    Equal print is equal rank. Nothing is best where there is one number only, where all are equal,
    or where neither direction is better.

    Args:
        cells: of one column or row.
        higher_is_better: None where neither end is good.
        competing: False for entries that are not ranked; all are where None.

    >>> [cell.rank for cell in with_best([Cell.of(v, 2) for v in (0.701, 0.702, 0.6)], True)]
    [1, 1, 2]
    """
    competing = [True] * len(cells) if competing is None else competing
    printed = [float(cell.text) if cell and ranked else None for cell, ranked in zip(cells, competing, strict=True)]
    order = sorted({value for value in printed if value is not None}, reverse=bool(higher_is_better))
    marks: dict[float | None, Mark] = {}
    if higher_is_better is not None and len(order) > 1:
        marks = dict(zip(order, (Mark.BEST, Mark.SECOND), strict=False))
    return [cell and replace(cell, mark=marks.get(value)) for cell, value in zip(cells, printed, strict=True)]


# ---- terminal ------------------------------------------------------------------------------------

_STYLES: Mapping[Mark | None, str] = {
    Mark.BEST: "bold",
    Mark.SECOND: "underline",
    Mark.BETTER: "bold green",
    Mark.WORSE: "bold red",
    Mark.CHANGED: "cyan",
    Mark.FAINT: "dim",
}
_UNBROKEN = 20
"""Characters of words that are not broken into lines, however narrow the window."""


def terminal(table: Table) -> RenderableType:
    """For a ``rich`` console, with title and notes."""
    shown = RichTable(title=table.title or None, title_justify="left", title_style="bold", header_style="bold")
    shown.add_column(table.corner)
    for index, heading in enumerate(table.headings):
        text = "\n".join(filter(None, (heading.group, heading.text)))
        longest = max((len(cell.text) for row in table.rows if (cell := row.cells[index])), default=0)
        justify: JustifyMethod = "left" if heading.words else "right"
        shown.add_column(text, justify=justify, no_wrap=heading.words and longest <= _UNBROKEN)
    for title, rows in table.row_groups:
        if title:
            shown.add_row(Text(title, style="italic dim"))
        for row in rows:
            shown.add_row(row.label, *map(_terminal_cell, row.cells))
    notes = "\n".join(f"- {note}" for note in table.notes)
    return Group(shown, Text(notes, style="dim")) if notes else shown


def _terminal_cell(cell: Cell | None) -> Text:
    if cell is None:
        return Text("–", style="dim")
    spread = f" {cell.spread.replace('± ', '±')}" if cell.spread else ""
    return Text(cell.text, style=_STYLES.get(cell.mark, "")).append(spread, style="not bold not underline dim")


# ---- Markdown ------------------------------------------------------------------------------------

_MARKDOWN_SPECIAL = re.compile(r"[\\`*<~$]|(?<!\w)_|_(?!\w)|(?<=\])\(|&(?=[#\w])")
"""Signs where GitHub's Markdown would read more than themselves; an underscore inside a word is none."""


def markdown_text(text: str) -> str:
    r"""Text with everything escaped that GitHub's Markdown would read as markup.

    >>> markdown_text("IMACS_g of *new* _run_, [0.1, 0.2]")
    'IMACS_g of \\*new\\* \\_run\\_, [0.1, 0.2]'
    """
    return _MARKDOWN_SPECIAL.sub(r"\\\g<0>", text)


def markdown(table: Table) -> str:
    """Title, rows and notes as GitHub-flavoured Markdown."""
    notes = "\n".join(f"- {markdown_text(note)}" for note in table.notes)
    return "\n\n".join(filter(None, (f"## {table.caption}", markdown_rows(table), notes))) + "\n"


def markdown_rows(table: Table, *, underline: bool = True) -> str:
    """The rows alone; second best values are in ``<u>``, which GitHub does not show, unless ``underline`` is False.

    >>> print(markdown_rows(Table(corner="Arm", headings=(Heading("SSIM", "↑"),), rows=(Row("ours", (None,)),))))
    | Arm | SSIM ↑ |
    | --- | ---: |
    | ours | – |
    """
    header = [table.corner, *(_grouped(heading.group, heading.text) for heading in table.headings)]
    marks: dict[Mark | None, str] = {Mark.BEST: "**{}**", Mark.SECOND: "<u>{}</u>" if underline else "{}"}
    rows = (
        [markdown_text(_grouped(row.group, row.label)), *(_markdown_cell(cell, marks) for cell in row.cells)]
        for row in table.rows
    )
    right = (place for place, heading in enumerate(table.headings, start=1) if not heading.words)
    return markdown_lines(header, rows, right)


def _grouped(group: str, text: str) -> str:
    return f"{group}: {text}" if group else text


def _markdown_cell(cell: Cell | None, marks: Mapping[Mark | None, str]) -> str:
    if cell is None:
        return "–"
    text = marks.get(cell.mark, "{}").format(markdown_text(cell.text))
    return f"{text} {cell.spread}".rstrip()


def markdown_lines(header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int]) -> str:
    """Texts that are Markdown already as a table; ``right`` numbers the columns that are aligned to the right.

    >>> print(markdown_lines(("Score", "Value"), [("SSIM", "0.5")], right=[1]))
    | Score | Value |
    | --- | ---: |
    | SSIM | 0.5 |
    """
    right = set(right)
    rule = ["---:" if index in right else "---" for index in range(len(header))]
    lines = (" | ".join(text.replace("|", "\\|") for text in line) for line in (header, rule, *rows))
    return "\n".join(f"| {line} |" for line in lines)


# ---- HTML ----------------------------------------------------------------------------------------

_INDEX = re.compile(r"(?<=[A-Z])_([a-z])\b")
"""The index of a metric's name; a user's label such as run_a or RUN_1 has none."""


def html_label(label: str) -> str:
    """A label with its index set low, escaped.

    >>> html_label("IMACS_g <1>")
    'IMACS<sub>g</sub> &lt;1&gt;'
    """
    return _INDEX.sub(r"<sub>\1</sub>", escape(label))


def html(table: Table, kind: str = "main scores") -> str:
    """An HTML ``table`` element, without title and notes; ``kind`` is its class.

    >>> page = html(Table(corner="Arm", headings=(Heading("A"),), rows=(Row("x", (Cell("-1", mark=Mark.BEST),)),)))
    >>> page[page.index("<tbody>") :]
    '<tbody><tr><th scope="row" class="arm">x</th><td><strong>−1</strong></td></tr></tbody></table>'
    """
    firsts = set(_starts(table)) if len(table.groups) > 1 else set()
    attributes = [
        ' class="start"' if index in firsts else ' class="words"' if heading.words else ""
        for index, heading in enumerate(table.headings)
    ]
    head, body = _html_head(table, attributes), "".join(_html_rows(table, attributes))
    return f'<table class="{kind}"><thead>{head}</thead><tbody>{body}</tbody></table>'


def _html_head(table: Table, attributes: Sequence[str]) -> str:
    grouped = any(heading.group for heading in table.headings)
    span = ' rowspan="2"' if grouped else ""
    corner = f'<th{span} scope="col" class="arm">{escape(table.corner)}</th>'
    columns = "".join(map(_html_heading, table.headings, attributes))
    if not grouped:
        return f"<tr>{corner}{columns}</tr>"
    spans = (f'<th colspan="{n}" scope="colgroup" class="group">{html_label(title)}</th>' for title, n in table.groups)
    return "".join(("<tr>", corner, *spans, "</tr><tr>", columns, "</tr>"))


def _html_heading(heading: Heading, attribute: str) -> str:
    about = f' title="{escape(heading.description)}"' if heading.description else ""
    text = "&nbsp;".join(filter(None, (html_label(heading.label), heading.arrow)))
    unit = f"<small>{escape(heading.unit)}</small>" if heading.unit else ""
    return f'<th scope="col"{attribute}{about}>{text}{unit}</th>'


def _html_rows(table: Table, attributes: Sequence[str]) -> Iterator[str]:
    for title, rows in table.row_groups:
        if title:
            span = len(table.headings) + 1
            yield f'<tr><th colspan="{span}" scope="rowgroup"><small>{escape(title)}</small></th></tr>'
        for row in rows:
            cells = (f"<td{kind}>{_html_cell(cell)}</td>" for cell, kind in zip(row.cells, attributes, strict=True))
            yield "".join((f'<tr><th scope="row" class="arm">{html_label(row.label)}</th>', *cells, "</tr>"))


def _html_cell(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    text = minus(cell.text) if _NUMBER.fullmatch(cell.text) else escape(cell.text)
    if cell.rank:
        text = f"<strong>{text}</strong>" if cell.mark is Mark.BEST else f"<u>{text}</u>"
    elif cell.mark:
        text = f'<span class="chip {cell.mark}">{text}</span>'
    spread = f"<small>{minus(cell.spread)}</small>" if cell.spread else ""
    pictures = (f'<img src="{source}" alt="{escape(name)}">' for name, source in cell.pictures.items())
    return "".join((text, spread, *pictures))


# ---- LaTeX ---------------------------------------------------------------------------------------

LATEX_NEEDS = "% Needs \\usepackage{booktabs}."

_LATEX_SIGNS = {"↑": "uparrow", "↓": "downarrow", "†": "dagger", "±": "pm", "δ": "delta", "λ": "lambda", "ρ": "rho"}
_LATEX_ESCAPES = {sign: rf"\{sign}" for sign in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: rf"$\{name}$" for sign, name in _LATEX_SIGNS.items()},
    "−": r"$-$",
    "²": "$^2$",
    "“": "``",
    "”": "''",
    "[": "{[}",
    "*": "{*}",  # after a row's end they would be its options
}
_LATEX_SPECIAL = re.compile("|".join(map(re.escape, _LATEX_ESCAPES)))


def latex_text(text: str) -> str:
    r"""Text with everything escaped that LaTeX would read as a command.

    >>> latex_text("PCK_1 50 %")
    'PCK\\_1 50 \\%'
    """
    return _LATEX_SPECIAL.sub(lambda match: _LATEX_ESCAPES[match.group()], text)


def latex_label(label: str) -> str:
    """A label with its index set low.

    >>> latex_label("IMACS_g")
    'IMACS$_g$'
    """
    first, *indices = _INDEX.split(label)
    rest = zip(indices[::2], indices[1::2], strict=True)
    return latex_text(first) + "".join(f"$_{index}${latex_text(text)}" for index, text in rest)


def latex(table: Table) -> str:
    """A ``tabular`` for a paper (``LATEX_NEEDS``), title and notes as comments; best bold, second underlined."""
    return "\n".join(_latex_lines(table)) + "\n"


def _latex_lines(table: Table) -> Iterator[str]:
    if table.title:
        yield f"% {table.caption}"
    alignment = "".join("l" if heading.words else "r" for heading in table.headings)
    yield rf"\begin{{tabular}}{{l{alignment}}}"
    yield r"\toprule"
    if any(heading.group for heading in table.headings):
        spans = [(first + 2, *group) for first, group in zip(_starts(table), table.groups, strict=True)]
        titles = (rf"\multicolumn{{{n}}}{{c}}{{{latex_label(title)}}}" for _, title, n in spans)
        yield _latex_line(["", *titles])
        yield " ".join(rf"\cmidrule(lr){{{first}-{first + n - 1}}}" for first, _, n in spans)
    yield _latex_line([latex_text(table.corner), *(latex_label(h.text) for h in table.headings)])
    yield r"\midrule"
    for title, rows in table.row_groups:
        if title:
            span = len(table.headings) + 1
            yield _latex_line([rf"\multicolumn{{{span}}}{{l}}{{\textit{{{latex_text(title)}}}}}"])
        for row in rows:
            yield _latex_line([latex_label(row.label), *map(_latex_cell, row.cells)])
            below = [_latex_below(cell) for cell in row.cells]
            if any(below):
                yield _latex_line(["", *below])
    yield r"\bottomrule"
    yield r"\end{tabular}"
    yield from (f"% {note}" for note in table.notes)


def _latex_line(texts: Iterable[str]) -> str:
    return " & ".join(texts) + r" \\"


_LATEX_MARKS: Mapping[Mark | None, str] = {Mark.BEST: r"$\mathbf{{{}}}$", Mark.SECOND: r"\underline{{${}$}}"}


def _latex_cell(cell: Cell | None) -> str:
    if cell is None:
        return "--"
    if not _NUMBER.fullmatch(cell.text):
        return latex_text(cell.text)
    text = _LATEX_MARKS.get(cell.mark, "${}$").format(cell.text)
    spread = cell.spread.removeprefix("±")
    return text if spread == cell.spread else rf"{text} {{\scriptsize $\pm{spread}$}}"


def _latex_below(cell: Cell | None) -> str:
    """An interval is as wide as its column, so it stands in a line of its own."""
    return rf"{{\scriptsize ${cell.spread}$}}" if cell and cell.spread.startswith("[") else ""
