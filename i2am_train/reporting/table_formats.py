"""Tables of results written down: for the terminal (rich), Markdown, HTML and LaTeX.

What is said (best values, verdicts, digits, notes) is decided in ``reporting.tables``; here it is
only put into the words of each format. Labels are the user's: each format has one function here
that makes a text mean itself (``markdown_text``, ``html_label`` and ``escape``, ``latex_text``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from html import escape

from rich.console import Group, JustifyMethod, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from i2am_train.reporting.tables import (
    ArmRow,
    DifferenceRow,
    DifferenceTable,
    MainTable,
    MetricColumn,
    Value,
    Verdict,
    collapse_warnings,
    difference_tables,
    main_table,
    notes,
    percent,
)
from i2am_train.results.finished_runs import Results

# ---- terminal ----------------------------------------------------------------------------------

_STYLES = {
    Verdict.BETTER: "bold green",
    Verdict.WORSE: "bold red",
    Verdict.HIGHER: "cyan",
    Verdict.LOWER: "cyan",
    Verdict.NOT_SHOWN: "dim",
    Verdict.NOT_TESTED: "dim",
}


def terminal(results: Results) -> RenderableType:
    """Tables, warnings and notes for a ``rich`` console; one table per group of metrics."""
    table = main_table(results)
    parts: list[RenderableType] = [_terminal_group(table, *group) for group in table.groups]
    parts += [_terminal_differences(of_arm) for of_arm in difference_tables(results)]
    parts += [Text(f"Warning: {text}", style="bold yellow") for text in collapse_warnings(results)]
    parts.append(Text("\n".join(notes(results)), style="dim"))
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def _terminal_group(table: MainTable, title: str, indices: Sequence[int]) -> Table:
    shown = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    shown.add_column("Arm", no_wrap=True)
    for index in indices:
        shown.add_column(table.columns[index].heading, justify="right")
    for row in table.rows:
        shown.add_row(row.label, *(_terminal_value(row.values[index]) for index in indices))
    return shown


def _terminal_value(value: Value | None) -> Text:
    if value is None:
        return Text("–", style="dim")
    text = Text(value.mean, style="bold" if value.rank == 1 else "")
    return text if value.std is None else text.append(f" ±{value.std}", style="not bold dim")


def _terminal_differences(table: DifferenceTable) -> Table:
    title = f"{table.title}, paired over {table.over}"
    shown = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for heading in _difference_headings(table):
        justify: JustifyMethod = "left" if heading in {"Metric", "Shows"} else "right"
        shown.add_column(heading, justify=justify, no_wrap=heading != "Metric")
    for row in table.rows:
        interval = row.interval or "–"
        shows = Text(str(row.verdict), style=_STYLES[row.verdict])
        shown.add_row(
            row.column.heading, row.difference, interval, row.in_favour or "–", str(row.n), shows
        )
    return shown


def _difference_headings(table: DifferenceTable) -> tuple[str, ...]:
    level = percent(table.confidence)
    return ("Metric", "Difference", f"{level} interval", "In favour", "n", "Shows")


# ---- Markdown ----------------------------------------------------------------------------------


def markdown(results: Results, compared: Collection[str] | None = None) -> str:
    """Main table, differences (of the arms ``compared``; None for all) and notes as GitHub-flavoured Markdown."""
    table = main_table(results)
    parts = [_markdown_main(table)]
    for of_arm in difference_tables(results):
        if compared is not None and of_arm.arm not in compared:
            continue
        parts.append(f"**{markdown_text(of_arm.title)}**, paired over {of_arm.over}:")
        parts.append(_markdown_differences(of_arm))
    parts += [f"> **Warning.** {markdown_text(text)}" for text in collapse_warnings(results)]
    parts.append("\n".join(f"- {markdown_text(note)}" for note in notes(results)))
    return "\n\n".join(parts) + "\n"


_MARKDOWN_SPECIAL = re.compile(r"[\\`*<~$]|(?<!\w)_|_(?!\w)|(?<=\])\(|&(?=[#\w])")
"""Signs where GitHub's Markdown would read more than themselves; an underscore inside a word is none."""


def markdown_text(text: str) -> str:
    r"""Text with everything escaped that GitHub's Markdown would read as markup.

    >>> markdown_text("IMACS_g of *new* _run_, [0.1, 0.2]")
    'IMACS_g of \\*new\\* \\_run\\_, [0.1, 0.2]'
    """
    return _MARKDOWN_SPECIAL.sub(r"\\\g<0>", text)


def _markdown_main(table: MainTable) -> str:
    header = ["Arm", *(column.heading for column in table.columns)]
    rows = [[markdown_text(row.label), *map(_markdown_value, row.values)] for row in table.rows]
    return markdown_table(header, rows, right=range(1, len(header)))


def _markdown_value(value: Value | None) -> str:
    if value is None:
        return "–"
    mean = f"**{value.mean}**" if value.rank == 1 else value.mean
    return mean if value.std is None else f"{mean} ± {value.std}"


def _markdown_differences(table: DifferenceTable) -> str:
    rows = [
        [r.column.heading, r.difference, r.interval or "–", r.in_favour or "–", str(r.n), r.verdict]
        for r in table.rows
    ]
    return markdown_table(_difference_headings(table), rows, right=range(1, 5))


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int]
) -> str:
    """A GitHub-flavoured table; ``right`` numbers the columns that are aligned to the right."""
    right = set(right)
    rule = ["---:" if index in right else "---" for index in range(len(header))]
    lines = ([*header], rule, *rows)
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


# ---- HTML --------------------------------------------------------------------------------------


def html_main(results: Results) -> str:
    """The main table as an HTML ``table`` element."""
    table = main_table(results)
    first = '<th rowspan="2" scope="col" class="arm">Arm</th>'
    groups = "".join(
        f'<th colspan="{len(of)}" scope="colgroup" class="group">{escape(title)}</th>'
        for title, of in table.groups
    )
    starts = {of[0] for _, of in table.groups}
    headings = "".join(
        f'<th scope="col"{_start(index in starts)} title="{escape(column.description)}">'
        f"{_html_heading(column)}{_unit(column)}</th>"
        for index, column in enumerate(table.columns)
    )
    body = "".join(_html_row(row, starts) for row in table.rows)
    return (
        f'<table class="main"><thead><tr>{first}{groups}</tr><tr>{headings}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def html_label(label: str) -> str:
    """A label with its index set low, escaped: ``IMACS_g``.

    >>> html_label("IMACS_g")
    'IMACS<sub>g</sub>'
    """
    return _INDEX.sub(r"<sub>\1</sub>", escape(label))


_INDEX = re.compile(r"(?<=[A-Z])_([A-Za-z0-9])\b")
"""The index of a metric's name; a user's label such as run_a has none."""


def _html_heading(column: MetricColumn) -> str:
    return f"{html_label(column.label)}&nbsp;{column.arrow}".removesuffix("&nbsp;")


def _start(first_of_group: bool) -> str:
    return ' class="start"' if first_of_group else ""


def _unit(column: MetricColumn) -> str:
    return f"<small>{escape(column.unit)}</small>" if column.unit else ""


def _html_row(row: ArmRow, starts: set[int]) -> str:
    cells = "".join(
        f"<td{_start(index in starts)}>{_html_value(value)}</td>"
        for index, value in enumerate(row.values)
    )
    return f'<tr><th scope="row" class="arm">{escape(row.label)}</th>{cells}</tr>'


def _html_value(value: Value | None) -> str:
    if value is None:
        return "–"
    tag = {1: "strong", 2: "u"}.get(value.rank)
    mean = minus(value.mean)
    mean = f"<{tag}>{mean}</{tag}>" if tag else mean
    return mean if value.std is None else f"{mean}<small>±&nbsp;{value.std}</small>"


def minus(text: str) -> str:
    """The text with real minus signs before numbers; hyphens in words stay.

    >>> minus("ST-LPIPS -0.1")
    'ST-LPIPS −0.1'
    """
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


def html_differences(table: DifferenceTable) -> str:
    """One table of differences as an HTML ``table`` element."""
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in _difference_headings(table))
    body = "".join(_html_difference(row) for row in table.rows)
    return f'<table class="differences"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _html_difference(row: DifferenceRow) -> str:
    values = (
        minus(row.difference),
        minus(row.interval or "–"),
        row.in_favour or "–",
        str(row.n),
    )
    cells = "".join(f"<td>{value}</td>" for value in values)
    kind = str(row.verdict).replace(" ", "-")
    return (
        f'<tr><th scope="row">{_html_heading(row.column)}</th>{cells}'
        f'<td class="shows"><span class="chip {kind}">{row.verdict}</span></td></tr>'
    )


# ---- LaTeX -------------------------------------------------------------------------------------

_LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "†": r"$\dagger$",
    "±": r"$\pm$",
    "−": r"$-$",
    "δ": r"$\delta$",
    "λ": r"$\lambda$",
    "ρ": r"$\rho$",
    "²": "$^2$",
    "[": "{[}",  # after a row's end it would be an option
    "*": "{*}",
    "“": "``",
    "”": "''",
}
_LATEX_SPECIAL = re.compile("|".join(map(re.escape, _LATEX_ESCAPES)))


def latex(results: Results) -> str:
    """Main table and differences for a paper; needs ``booktabs``. Best bold, second underlined."""
    table = main_table(results)
    parts = ["% Needs \\usepackage{booktabs}.", "\n".join(_latex_main(table))]
    parts += ["\n".join(_latex_differences(of_arm)) for of_arm in difference_tables(results)]
    parts.append("\n".join(f"% {note}" for note in notes(results)))
    return "\n\n".join(parts) + "\n"


def latex_text(text: str) -> str:
    r"""Text with everything escaped that LaTeX would read as a command.

    >>> latex_text("PCK_1 50 %")
    'PCK\\_1 50 \\%'
    """
    return _LATEX_SPECIAL.sub(lambda match: _LATEX_ESCAPES[match.group()], text)


def latex_label(label: str) -> str:
    """A label with its index set low: ``IMACS$_g$``.

    >>> latex_label("IMACS_g")
    'IMACS$_g$'
    """
    first, *indices = _INDEX.split(label)
    lowered = (
        f"$_{i}${latex_text(rest)}" for i, rest in zip(indices[::2], indices[1::2], strict=True)
    )
    return latex_text(first) + "".join(lowered)


def _latex_main(table: MainTable) -> Iterator[str]:
    yield rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}"
    yield r"\toprule"
    groups = (rf"\multicolumn{{{len(of)}}}{{c}}{{{title}}}" for title, of in table.groups)
    yield latex_line(["", *groups])
    yield " ".join(rf"\cmidrule(lr){{{of[0] + 2}-{of[-1] + 2}}}" for _, of in table.groups)
    yield latex_line(["Arm", *(latex_label(column.heading) for column in table.columns)])
    yield r"\midrule"
    for row in table.rows:
        yield latex_line([latex_text(row.label), *map(_latex_value, row.values)])
    yield r"\bottomrule"
    yield r"\end{tabular}"


def _latex_value(value: Value | None) -> str:
    if value is None:
        return "--"
    mean = _LATEX_RANK[value.rank].format(value.mean)
    return mean if value.std is None else rf"{mean} {{\scriptsize $\pm {value.std}$}}"


_LATEX_RANK = (r"${}$", r"$\mathbf{{{}}}$", r"\underline{{${}$}}")
"""How a value is written by its rank: 0 neither, 1 the best, 2 the second."""


def _latex_differences(table: DifferenceTable) -> Iterator[str]:
    yield f"% {table.title}, paired over {table.over}"
    yield r"\begin{tabular}{lrrrrl}"
    yield r"\toprule"
    yield latex_line(map(latex_text, _difference_headings(table)))
    yield r"\midrule"
    for row in table.rows:
        interval = f"${row.interval}$" if row.interval else "--"
        name, favour = latex_label(row.column.heading), row.in_favour or "--"
        yield latex_line([name, f"${row.difference}$", interval, favour, str(row.n), row.verdict])
    yield r"\bottomrule"
    yield r"\end{tabular}"


def latex_line(cells: Iterable[str]) -> str:
    """One row of a ``tabular``."""
    return " & ".join(cells) + r" \\"
