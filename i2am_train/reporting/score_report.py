"""Tables over several models as files: Markdown, LaTeX, JSON, the correlation's figure, and what the page shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from i2am_train.reporting import score_table_formats as formats
from i2am_train.reporting.correlations import (
    CAPTION,
    NEED,
    correlation_figure,
    correlation_table,
)
from i2am_train.reporting.figures.canvas import save_figure
from i2am_train.reporting.pages import Picture, Section, code_state, embedded_figure
from i2am_train.reporting.score_tables import ScoreTable, models_of, score_tables
from i2am_train.results.evaluations import Evaluation, incomparable, read_evaluations
from i2am_train.runs import command_line, git_state, write_json, write_text
from i2am_train.types import Pairing

FOLDER, STEM = "tables", "correlation"


@dataclass(frozen=True, slots=True)
class TableSet:
    """Tables that will be written, and those that these evaluations do not allow."""

    evaluations: tuple[Evaluation, ...]
    tables: tuple[ScoreTable, ...]
    left_out: Mapping[str, str]

    def write(
        self, folder: Path, file_formats: Sequence[str], dpi: int
    ) -> tuple[dict[str, Any], list[Section]]:
        """Write ``tables/*`` and the figure; the index of it, and the page's sections."""
        origins = self._origins()
        entries = [write_table(table, folder, table.name, origins) for table in self.tables]
        sections = [self._section(table) for table in self.tables]
        figure = correlation_figure(self.evaluations)
        if figure is not None:
            entries[-1]["files"] += self._save(figure, folder, file_formats, dpi)
            alt = "Scatter plots; the table gives the numbers."
            sections[-1].pictures.append(Picture(embedded_figure(figure), CAPTION, alt))
        sections.append(Section("Evaluations that were read", html=_read_table(self.evaluations)))
        index = {
            "tables": entries,
            "tables_left_out": dict(self.left_out),
            "evaluations": [_origin(evaluation) for evaluation in self.evaluations],
        }
        return index, sections

    def _save(
        self, figure: Figure, folder: Path, file_formats: Sequence[str], dpi: int
    ) -> list[str]:
        description = "\n".join([CAPTION, f"Made by '{command_line()}' from", *self._origins()])
        files = [f"figures/{STEM}.{ending}" for ending in file_formats]
        for file in files:
            save_figure(figure, folder / file, dpi, description)
        return files

    def _section(self, table: ScoreTable) -> Section:
        notes = list(table.notes)
        if table.name != STEM:
            notes += [f"Not alike: {text}." for text in self._differences()]
        return Section(f"{table.title} ({table.source})", html=formats.html(table), notes=notes)

    def _differences(self) -> Iterator[str]:
        for pairing in Pairing:
            yield from incomparable(e for e in self.evaluations if e.pairing is pairing)

    def _origins(self) -> list[str]:
        """One line for each model; ``index.json`` says it of each evaluation."""
        return [_origin_of_model(of) for of in models_of(self.evaluations).values()]


def write_table(
    table: ScoreTable, folder: Path, name: str, origins: Sequence[str]
) -> dict[str, Any]:
    """Write ``tables/<name>`` as Markdown, LaTeX and JSON into a report's folder; its entry of the index.

    Args:
        table: what is written.
        folder: of the report.
        name: of the files.
        origins: what the table was made from, a line each, for the LaTeX file.
    """
    stem = f"{FOLDER}/{name}"
    write_text(folder / f"{stem}.md", formats.markdown(table))
    write_text(folder / f"{stem}.tex", _latex(table, origins))
    write_json(folder / f"{stem}.json", table.as_json())
    files = [f"{stem}.{ending}" for ending in ("md", "tex", "json")]
    return {"table": table.name, "paper": table.source, "files": files}


def _origin_of_model(evaluations: Sequence[Evaluation]) -> str:
    manifests = [evaluation.manifest for evaluation in evaluations]
    return (
        f"{evaluations[0].label}: commands {_listed(m.get('command') for m in manifests)}; "
        f"checkpoints {_listed(e.judged for e in evaluations)}; "
        f"data {_listed(m.get('data') for m in manifests)}; "
        f"code {_listed(code_state(m.get('git')) for m in manifests)}"
    )


def _listed(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def plan_tables(runs: Sequence[Path], names: Sequence[str], *, mixed: bool) -> TableSet:
    """Read the evaluations and decide what they allow.

    Raises:
        I2AMError: as ``evaluations.read_evaluations``.
    """
    evaluations = read_evaluations(runs, names, mixed=mixed)
    tables, left_out = score_tables(evaluations)
    correlated = correlation_table(evaluations)
    if correlated is None:
        left_out[STEM] = NEED
    else:
        tables.append(correlated)
    return TableSet(evaluations, tuple(tables), left_out)


def _latex(table: ScoreTable, origins: Sequence[str]) -> str:
    made = [f"Made by '{command_line()}', code {code_state(git_state())}, from", *origins]
    comments = "\n".join(f"% {line}" for line in made)
    return f"% Needs \\usepackage{{booktabs}}.\n{comments}\n{formats.latex(table)}"


def _origin(evaluation: Evaluation) -> dict[str, Any]:
    kept = ("command", "data", "git", "finished")
    return {
        "model": evaluation.label,
        "folder": str(evaluation.folder),
        "checkpoint": evaluation.judged,
        "seed": evaluation.seed,
        "step": evaluation.step,
        "pairing": str(evaluation.pairing),
        **{name: evaluation.manifest.get(name) for name in kept},
    }


def _read_table(evaluations: Sequence[Evaluation]) -> str:
    heads = ("Model", "Seed", "Step", "Pairing", "Samples", "Data", "Code", "Checkpoint", "Command")
    rows = (
        (
            e.label,
            "–" if e.seed is None else str(e.seed),
            "–" if e.step is None else str(e.step),
            str(e.pairing),
            str(e.protocol["samples"]),
            str(e.manifest.get("data")),
            code_state(e.manifest.get("git")),
            e.judged,
            str(e.manifest.get("command")),
        )
        for e in evaluations
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    return f'<table class="origins"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
