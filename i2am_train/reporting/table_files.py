"""Tables over several models as files: Markdown, LaTeX, JSON, the correlation's figure, and what the page shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from i2am_train.environment import command_line, git_state
from i2am_train.files import write_json, write_text
from i2am_train.reporting.figures.canvas import save_figure
from i2am_train.reporting.figures.correlation import CAPTION, correlation_figure
from i2am_train.reporting.pages import Picture, Section, embedded_figure
from i2am_train.reporting.provenance import code_state
from i2am_train.reporting.table import LATEX_NEEDS, Cell, Heading, Row, Table, html, latex, markdown
from i2am_train.reporting.tables.correlation import NEED, correlation_table
from i2am_train.reporting.tables.scores import models_of, score_tables
from i2am_train.results.evaluations import Evaluation, incomparable, read_evaluations
from i2am_train.types import Pairing

FOLDER, STEM = "tables", "correlation"


@dataclass(frozen=True, slots=True)
class TableSet:
    """Tables that will be written, and those that these evaluations do not allow."""

    evaluations: tuple[Evaluation, ...]
    tables: tuple[Table, ...]
    left_out: Mapping[str, str]

    def write(self, folder: Path, file_formats: Sequence[str], dpi: int) -> tuple[dict[str, Any], list[Section]]:
        """Write ``tables/*`` and the figure; the index of it, and the page's sections."""
        origins = self._origins()
        entries = [write_table(table, folder, table.name, origins) for table in self.tables]
        sections = [self._section(table) for table in self.tables]
        figure = correlation_figure(self.evaluations)
        if figure is not None:
            entries[-1]["files"] += self._save(figure, folder, file_formats, dpi)
            alt = "Scatter plots; the table gives the numbers."
            sections[-1].pictures.append(Picture(embedded_figure(figure), CAPTION, alt))
        read = html(evaluation_table(self.evaluations), "origins")
        sections.append(Section("Evaluations that were read", html=read))
        index = {
            "tables": entries,
            "tables_left_out": dict(self.left_out),
            "evaluations": [_origin(evaluation) for evaluation in self.evaluations],
        }
        return index, sections

    def _save(self, figure: Figure, folder: Path, file_formats: Sequence[str], dpi: int) -> list[str]:
        description = "\n".join([CAPTION, f"Made by '{command_line()}' from", *self._origins()])
        files = [f"figures/{STEM}.{ending}" for ending in file_formats]
        for file in files:
            save_figure(figure, folder / file, dpi, description)
        return files

    def _section(self, table: Table) -> Section:
        differences = () if table.name == STEM else self._differences()
        return Section.of(table, notes=[f"Not alike: {text}." for text in differences])

    def _differences(self) -> Iterator[str]:
        for pairing in Pairing:
            yield from incomparable(e for e in self.evaluations if e.pairing is pairing)

    def _origins(self) -> list[str]:
        """One line for each model; ``index.json`` says it of each evaluation."""
        return [_origin_of_model(of) for of in models_of(self.evaluations).values()]


def write_table(table: Table, folder: Path, name: str, origins: Sequence[str]) -> dict[str, Any]:
    """Write ``tables/<name>`` as Markdown, LaTeX and JSON into a report's folder; its entry of the index.

    Args:
        table: what is written.
        folder: of the report.
        name: of the files.
        origins: what the table was made from, a line each, for the LaTeX file.
    """
    stem = f"{FOLDER}/{name}"
    write_text(folder / f"{stem}.md", markdown(table))
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


def _latex(table: Table, origins: Sequence[str]) -> str:
    made = [f"Made by '{command_line()}', code {code_state(git_state())}, from", *origins]
    comments = "\n".join(f"% {line}" for line in made)
    return f"{LATEX_NEEDS}\n{comments}\n{latex(table)}"


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


def evaluation_table(evaluations: Sequence[Evaluation]) -> Table:
    """The evaluations that were read, and what made each."""
    columns = ("Seed", "Step", "Pairing", "Samples", "Data", "Code", "Checkpoint", "Command")
    return Table(
        corner="Model",
        headings=tuple(Heading(name, words=True) for name in columns),
        rows=tuple(Row(e.label, tuple(_origin_cells(e))) for e in evaluations),
    )


def _origin_cells(evaluation: Evaluation) -> Iterator[Cell | None]:
    manifest = evaluation.manifest
    for known in (
        *(evaluation.seed, evaluation.step, evaluation.pairing, evaluation.protocol["samples"]),
        *(manifest.get("data"), code_state(manifest.get("git"))),
        *(evaluation.judged, manifest.get("command")),
    ):
        yield None if known is None else Cell(str(known))
