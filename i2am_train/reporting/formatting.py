"""How numbers and labels are printed; each format has one function that makes a text of the user mean itself."""

from __future__ import annotations

import re
from html import escape

Interval = tuple[float, float]


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
    """A share as text: ``95 %``."""
    return f"{share:.0%}".replace("%", " %")


def minus(text: str) -> str:
    """The text with real minus signs before numbers; hyphens in words stay.

    >>> minus("ST-LPIPS -0.1")
    'ST-LPIPS −0.1'
    """
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


_MARKDOWN_SPECIAL = re.compile(r"[\\`*<~$]|(?<!\w)_|_(?!\w)|(?<=\])\(|&(?=[#\w])")
"""Signs where GitHub's Markdown would read more than themselves; an underscore inside a word is none."""


def markdown_text(text: str) -> str:
    r"""Text with everything escaped that GitHub's Markdown would read as markup.

    >>> markdown_text("IMACS_g of *new* _run_, [0.1, 0.2]")
    'IMACS_g of \\*new\\* \\_run\\_, [0.1, 0.2]'
    """
    return _MARKDOWN_SPECIAL.sub(r"\\\g<0>", text)


_INDEX = re.compile(r"(?<=[A-Z])_([a-z])\b")
"""The index of a metric's name; a user's label such as run_a or RUN_1 has none."""


def html_label(label: str) -> str:
    """A label with its index set low, escaped.

    >>> html_label("IMACS_g <1>")
    'IMACS<sub>g</sub> &lt;1&gt;'
    """
    return _INDEX.sub(r"<sub>\1</sub>", escape(label))


_LATEX_ESCAPES = {sign: rf"\{sign}" for sign in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
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
