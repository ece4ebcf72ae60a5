"""``i2am explain --recipes``: the models whose attention is known, and what their maps mean."""

from __future__ import annotations

from shutil import get_terminal_size

from rich.console import Console
from rich.table import Table

from i2am_train.attention.known import KnownModel, known_models

WIDTH = 150
"""Characters of the table where the terminal has fewer; it is wider than most."""
COLUMNS = ("name", "model", "sites", "grids; reference", "maps", "options", "loading", "licence")


def print_recipes() -> None:
    """Print one row per model, and below what "partial" and "not functional" mean."""
    table = Table(*COLUMNS, box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.columns[0].no_wrap = True
    models = list(known_models())
    for known in models:
        table.add_row(*_row(known))
    console = Console(width=max(get_terminal_size().columns, WIDTH), highlight=False, markup=False)
    console.print(table)
    console.print()
    console.print(
        "not functional: a single reference token, so queries and keys cannot influence the image; "
        "the maps are a probe of what the text model left in them."
    )
    for known in models:
        if reason := known.made().partial:
            console.print(f"partial, {known.name}: {reason}.")
    console.print()
    console.print(
        "By folder: i2am explain model=NAME checkpoint=FOLDER image=... mask=... reference=...\n"
        "By your code: i2am explain model=factory factory=package.module:function reference=...\n"
        "Layers have names and numbers: attribution.layer=which, an unknown one, lists those of the loaded model."
    )


def _row(known: KnownModel) -> tuple[str, ...]:
    return (
        known.name,
        known.title,
        known.sites,
        known.grids,
        ", ".join(known.meaning),
        ", ".join(known.options) or "-",
        known.loading.replace("`", ""),
        known.licence,
    )
