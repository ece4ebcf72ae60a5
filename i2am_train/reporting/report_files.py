"""What ``i2am report`` writes: tables over models and the paper's figures as files, each saying what it was made from,
and the page that shows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from i2am_train.environment import command_line, git_state
from i2am_train.errors import ConfigError
from i2am_train.evaluation.explanation import Explanation, explanation_folders, manifest_of, read_explanation
from i2am_train.files import numbered, write_json, write_text
from i2am_train.reporting.figures.canvas import save_figure
from i2am_train.reporting.figures.paper import PAPER_FIGURES, Layers, PlannedFigure, plan
from i2am_train.reporting.figures.sheet import draw_sheet
from i2am_train.reporting.model_tables import (
    CORRELATION_CAPTION,
    CORRELATION_NEEDS,
    correlation_figure,
    correlation_table,
    models_of,
    score_tables,
)
from i2am_train.reporting.pages import Picture, Section, code_state, embedded_figure, making, page
from i2am_train.reporting.table import LATEX_NEEDS, Cell, Heading, Row, Table, html, latex, markdown
from i2am_train.results.evaluations import Evaluation, incomparable, read_evaluations
from i2am_train.types import FigureName, Pairing

TABLES, FIGURES = "tables", "figures"
"""Folders of a report."""
_CORRELATION = "correlation"


# ---- tables over models --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TableSet:
    """Tables that will be written, and those that these evaluations do not allow."""

    evaluations: tuple[Evaluation, ...]
    tables: tuple[Table, ...]
    left_out: Mapping[str, str]

    def write(self, folder: Path, file_formats: Sequence[str], dpi: int) -> tuple[dict[str, Any], list[Section]]:
        """Write ``tables/*`` and the figure; the index of it, and the page's sections."""
        # One line for each model; ``index.json`` says it of each evaluation.
        origins = [_origin_of_model(of) for of in models_of(self.evaluations).values()]
        entries = [write_table(table, folder, table.name, origins) for table in self.tables]
        sections = [self._section(table) for table in self.tables]
        figure = correlation_figure(self.evaluations)
        if figure is not None:
            description = "\n".join([CORRELATION_CAPTION, f"Made by '{command_line()}' from", *origins])
            entries[-1]["files"] += write_figure(figure, folder, _CORRELATION, file_formats, dpi, description)
            alt = "Scatter plots; the table gives the numbers."
            sections[-1].pictures.append(Picture(embedded_figure(figure), CORRELATION_CAPTION, alt))
        read = html(_evaluation_table(self.evaluations), "origins")
        sections.append(Section("Evaluations that were read", html=read))
        index = {
            "tables": entries,
            "tables_left_out": dict(self.left_out),
            "evaluations": [_origin(evaluation) for evaluation in self.evaluations],
        }
        return index, sections

    def _section(self, table: Table) -> Section:
        differences = () if table.name == _CORRELATION else self._differences()
        return Section.of(table, notes=[f"Not alike: {text}." for text in differences])

    def _differences(self) -> Iterator[str]:
        for pairing in Pairing:
            yield from incomparable(e for e in self.evaluations if e.pairing is pairing)


def plan_tables(runs: Sequence[Path], names: Sequence[str], *, mixed: bool) -> TableSet:
    """Read the evaluations and decide what they allow.

    Raises:
        I2AMError: as ``evaluations.read_evaluations``.
    """
    evaluations = read_evaluations(runs, names, mixed=mixed)
    tables, left_out = score_tables(evaluations)
    correlated = correlation_table(evaluations)
    if correlated is None:
        left_out[_CORRELATION] = CORRELATION_NEEDS
    else:
        tables.append(correlated)
    return TableSet(evaluations, tuple(tables), left_out)


def write_table(table: Table, folder: Path, name: str, origins: Sequence[str]) -> dict[str, Any]:
    """Write ``tables/<name>`` as Markdown, LaTeX and JSON into a report's folder; its entry of the index.

    ``origins`` say in the LaTeX file what the table was made from, a line each.
    """
    made = [f"Made by '{command_line()}', code {code_state(git_state())}, from", *origins]
    comments = "\n".join(f"% {line}" for line in made)
    stem = f"{TABLES}/{name}"
    write_text(folder / f"{stem}.md", markdown(table))
    write_text(folder / f"{stem}.tex", f"{LATEX_NEEDS}\n{comments}\n{latex(table)}")
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


def _evaluation_table(evaluations: Sequence[Evaluation]) -> Table:
    """The evaluations that were read, and what made each."""
    columns = ("Seed", "Step", "Pairing", "Samples", "Data", "Code", "Checkpoint", "Command")
    return Table(
        corner="Model",
        headings=tuple(Heading(name, words=True) for name in columns),
        rows=tuple(Row(e.label, _origin_cells(e)) for e in evaluations),
    )


def _origin_cells(evaluation: Evaluation) -> tuple[Cell | None, ...]:
    manifest = evaluation.manifest
    known = (
        *(evaluation.seed, evaluation.step, evaluation.pairing, evaluation.protocol["samples"]),
        *(manifest.get("data"), code_state(manifest.get("git")), evaluation.judged, manifest.get("command")),
    )
    return tuple(None if one is None else Cell(str(one)) for one in known)


# ---- figures of explained samples ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Input:
    """One explained sample, its name in files, and what made it."""

    label: str
    sample: Explanation
    origin: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class FigureSet:
    """Figures that will be drawn, and those that these inputs do not allow."""

    inputs: tuple[_Input, ...]
    planned: tuple[PlannedFigure, ...]
    left_out: Mapping[str, str]
    """What each kind of figure that is not drawn would need."""
    layers: Layers

    def write(self, folder: Path, formats: Sequence[str], dpi: int) -> tuple[dict[str, Any], list[Section]]:
        """Write all figures into ``folder/figures``; the index of them, and the page's sections."""
        samples = [entry.sample for entry in self.inputs]
        stems = numbered([self._stem(figure) for figure in self.planned])
        entries, sections = [], []
        for figure, stem in zip(self.planned, stems, strict=True):
            sheet, kind = figure.sheet(samples, self.layers), PAPER_FIGURES[figure.name]
            drawing = draw_sheet(sheet)
            files = write_figure(drawing, folder, stem, formats, dpi, self._description(figure, sheet.caption))
            entries.append(
                {"figure": figure.name, "paper": kind.source, "caption": sheet.caption}
                | {"files": files, "inputs": [self.inputs[index].label for index in figure.group]}
            )
            picture = Picture(embedded_figure(drawing), sheet.caption, kind.about)
            title = stem.replace("_", " ").replace("-", ", ", 1)
            sections.append(Section(f"{kind.source}: {title}", pictures=[picture]))
        index = {
            "figures": entries,
            "left_out": dict(self.left_out),
            "inputs": {entry.label: {**entry.sample.origin, **entry.origin} for entry in self.inputs},
        }
        return index, sections

    def _stem(self, figure: PlannedFigure) -> str:
        """Kind of figure, and the folder or the sample that it shows unless it shows all."""
        first = self.inputs[figure.group[0]]
        if PAPER_FIGURES[figure.name].single:
            return f"{figure.name}-{first.label}"
        shows_all = len(figure.group) == len(self.inputs)
        return figure.name if shows_all else f"{figure.name}-{first.sample.name}"

    def _description(self, figure: PlannedFigure, caption: str) -> str:
        lines = [caption, f"Made by '{command_line()}', code {code_state(git_state())}, from"]
        for index in figure.group:
            label, sample, origin = self.inputs[index].label, self.inputs[index].sample, self.inputs[index].origin
            lines.append(
                f"{label}: '{origin['command']}', checkpoint {sample.origin['checkpoint']}, "
                f"data {origin['data']}, code {code_state(origin['git'])}"
            )
        return "\n".join(lines)


def plan_figures(
    runs: Sequence[Path], names: Sequence[FigureName] = (), models: Sequence[str] = (), layers: Layers = None
) -> FigureSet:
    """Read the runs and decide what can be drawn of them.

    Args:
        runs: folders of finished ``i2am explain``.
        names: kinds of figures; all that are possible where empty.
        models: how figures call the checkpoint of each sample, in the order of the runs; by their
            folders where empty.
        layers: which ones the figures by layer show; all where None.

    Raises:
        ConfigError: a figure was asked for by name and cannot be drawn, or ``models`` do not fit.
        RunFolderError: a folder is not one of ``i2am explain``.
    """
    folders = [folder for run in runs for folder in explanation_folders(run)]
    if models and len(models) != len(folders):
        raise ConfigError(
            f"models has {len(models)} names for {len(folders)} explained samples. Give one name "
            "per sample, in the order of explained, or none."
        )
    given: Sequence[str | None] = models or (None,) * len(folders)
    labels = numbered([folder.name for folder in folders])
    inputs = tuple(
        _Input(label, read_explanation(folder, model), origin_of(folder))
        for label, folder, model in zip(labels, folders, given, strict=True)
    )
    planned, left_out = plan([entry.sample for entry in inputs], names)
    if names and left_out:
        needs = "; ".join(f"{name} needs {need}" for name, need in left_out.items())
        raise ConfigError(
            f"Not all figures can be drawn of these {len(folders)} explained samples: {needs}. Add "
            "such folders to explained, or leave these names out of figures."
        )
    return FigureSet(inputs, tuple(planned), left_out, layers)


def origin_of(folder: Path) -> dict[str, Any]:
    """What the index of a report says of a folder that it reads.

    Raises:
        RunFolderError: there is no manifest, or the run did not come to its end.
    """
    manifest = manifest_of(folder)
    kept = ("command", "data", "git", "finished", "settings")
    return {"folder": str(folder), **{name: manifest[name] for name in kept}}


def write_figure(
    figure: Figure, folder: Path, stem: str, formats: Sequence[str], dpi: int, description: str
) -> list[str]:
    """Write ``figures/<stem>`` in each format; the files' names."""
    files = [f"{FIGURES}/{stem}.{ending}" for ending in formats]
    for file in files:
        save_figure(figure, folder / file, dpi, description)
    return files


# ---- the page ------------------------------------------------------------------------------------


def report_page(index: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """The page of ``i2am report``.

    Args:
        index: what ``index.json`` of the report says: provenance, settings, inputs, what is left out.
        sections: tables and figures in their order.

    >>> text = report_page({"settings": {}, "tables": [{}], "left_out": {"daam": "score matrices"}}, [])
    >>> "<b>1</b> tables" in text, "Left out: daam, which needs score matrices." in text
    (True, True)
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
    """Tables and figures that the inputs do not allow, and what they need.

    >>> left_out({"tables_left_out": {"table3": "several thresholds"}, "figures": []})
    {'table3': 'several thresholds'}
    """
    return {**index.get("tables_left_out", {}), **index.get("left_out", {})}
