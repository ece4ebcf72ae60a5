"""Score tables written down: for the terminal (rich), Markdown, HTML and LaTeX.

HTML escapes every text that comes from a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from i2am_train.reporting.score_tables import Cell, Row, ScoreTable
from i2am_train.reporting.table_formats import (
    html_label,
    latex_label,
    latex_line,
    latex_text,
    markdown_table,
    markdown_text,
    minus,
)


def terminal(table: ScoreTable) -> RenderableType:
    """A table with its notes for a ``rich`` console, values and intervals in one cell."""
    shown = Table(title=table.title, title_justify="left", title_style="bold", header_style="bold")
    shown.add_column(table.corner)
    for heading in table.headings:
        shown.add_column("\n".join(filter(None, (heading.group, heading.text))), justify="right")
    for title, rows in _row_groups(table):
        if title:
            shown.add_row(Text(title, style="italic dim"))
        for row in rows:
            shown.add_row(row.label, *map(_terminal_cell, row.cells))
    return Group(shown, Text("\n".join(f"- {note}" for note in table.notes), style="dim"))


def _terminal_cell(cell: Cell | None) -> Text:
    if cell is None:
        return Text("–", style="dim")
    text = Text(cell.text, style="bold" if cell.rank == 1 else "")
    return (
        text.append(f" {cell.interval_text}", style="not bold dim") if cell.interval_text else text
    )


def markdown(table: ScoreTable) -> str:
    """GitHub-flavoured Markdown with title and notes; second best values are in ``<u>``."""
    header = [table.corner, *(_grouped(heading.group, heading.text) for heading in table.headings)]
    rows = [
        [markdown_text(_grouped(row.group, row.label)), *map(_markdown_cell, row.cells)]
        for row in table.rows
    ]
    body = markdown_table(header, rows, right=range(1, len(header)))
    notes = "\n".join(f"- {markdown_text(note)}" for note in table.notes)
    return f"## {table.title} ({table.source})\n\n{body}\n\n{notes}\n"


def _grouped(group: str, text: str) -> str:
    return f"{group}: {text}" if group else text


def _row_groups(table: ScoreTable) -> Iterator[tuple[str, list[Row]]]:
    """Rows by group, in order; one group without a title where there are none."""
    for title, rows in groupby(table.rows, key=lambda row: row.group):
        yield title, list(rows)


def _markdown_cell(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    text = ("{}", "**{}**", "<u>{}</u>")[cell.rank].format(cell.text)
    return f"{text} {cell.interval_text}".rstrip()


def html(table: ScoreTable) -> str:
    """An HTML ``table`` element."""
    starts = _starts(table)
    body = "".join(_html_rows(table, starts))
    return f'<table class="main scores"><thead>{_html_head(table, starts)}</thead><tbody>{body}</tbody></table>'


def _html_rows(table: ScoreTable, starts: set[int]) -> Iterator[str]:
    for title, rows in _row_groups(table):
        if title:
            span = len(table.headings) + 1
            yield f'<tr><th colspan="{span}" scope="rowgroup"><small>{escape(title)}</small></th></tr>'
        for row in rows:
            cells = "".join(
                f"<td{_class(index in starts)}>{_html_cell(cell)}</td>"
                for index, cell in enumerate(row.cells)
            )
            yield f'<tr><th scope="row" class="arm">{html_label(row.label)}</th>{cells}</tr>'


def _html_head(table: ScoreTable, starts: set[int]) -> str:
    grouped = any(heading.group for heading in table.headings)
    span = 2 if grouped else 1
    corner = f'<th rowspan="{span}" scope="col" class="arm">{escape(table.corner)}</th>'
    groups = "".join(
        f'<th colspan="{count}" scope="colgroup" class="group">{html_label(title)}</th>'
        for title, count in table.groups
    )
    columns = "".join(
        f'<th scope="col"{_class(index in starts)} title="{escape(heading.description)}">'
        f"{html_label(heading.label)}{'&nbsp;' if heading.arrow else ''}{heading.arrow}</th>"
        for index, heading in enumerate(table.headings)
    )
    if not grouped:
        return f"<tr>{corner}{columns}</tr>"
    return f"<tr>{corner}{groups}</tr><tr>{columns}</tr>"


def _starts(table: ScoreTable) -> set[int]:
    """The first column of each group."""
    starts, position = set(), 0
    for _, count in table.groups:
        starts.add(position)
        position += count
    return starts if len(table.groups) > 1 else set()


def _class(first_of_group: bool) -> str:
    return ' class="start"' if first_of_group else ""


def _html_cell(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    text = ("{}", "<strong>{}</strong>", "<u>{}</u>")[cell.rank].format(minus(cell.text))
    interval = f"<small>{minus(cell.interval_text)}</small>" if cell.interval_text else ""
    return text + interval


def latex(table: ScoreTable) -> str:
    """A ``tabular`` for a paper (needs ``booktabs``), intervals in a small line under the values."""
    return "\n".join(_latex_lines(table)) + "\n"


def _latex_lines(table: ScoreTable) -> Iterator[str]:
    yield f"% {latex_text(table.title)} ({table.source})"
    yield rf"\begin{{tabular}}{{l{'r' * len(table.headings)}}}"
    yield r"\toprule"
    if any(heading.group for heading in table.headings):
        groups = (rf"\multicolumn{{{n}}}{{c}}{{{latex_label(title)}}}" for title, n in table.groups)
        yield latex_line(["", *groups])
        first = 2
        rules = []
        for _, count in table.groups:
            rules.append(rf"\cmidrule(lr){{{first}-{first + count - 1}}}")
            first += count
        yield " ".join(rules)
    yield latex_line([latex_text(table.corner), *(latex_label(h.text) for h in table.headings)])
    yield r"\midrule"
    for title, rows in _row_groups(table):
        if title:
            span = len(table.headings) + 1
            yield latex_line([rf"\multicolumn{{{span}}}{{l}}{{\textit{{{latex_text(title)}}}}}"])
        for row in rows:
            yield latex_line([latex_label(row.label), *map(_latex_cell, row.cells)])
            if any(cell is not None and cell.interval_text for cell in row.cells):
                yield latex_line(["", *map(_latex_interval, row.cells)])
    yield r"\bottomrule"
    yield r"\end{tabular}"
    yield from (f"% {latex_text(note)}" for note in table.notes)


def _latex_cell(cell: Cell | None) -> str:
    if cell is None:
        return "--"
    return (r"${}$", r"$\mathbf{{{}}}$", r"\underline{{${}$}}")[cell.rank].format(cell.text)


def _latex_interval(cell: Cell | None) -> str:
    if cell is None or not cell.interval_text:
        return ""
    return rf"{{\scriptsize ${cell.interval_text}$}}"
