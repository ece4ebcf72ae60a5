"""The paper's figures as files: drawn from explained folders, each saying what it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from i2am_train.environment import command_line, git_state
from i2am_train.errors import ConfigError
from i2am_train.evaluation.explanation import Explanation, explanation_folders, manifest_of, read_explanation
from i2am_train.files import numbered
from i2am_train.reporting.figures.canvas import save_figure
from i2am_train.reporting.figures.paper import PAPER_FIGURES, Layers, PlannedFigure, plan
from i2am_train.reporting.figures.sheet import draw_sheet
from i2am_train.reporting.pages import Picture, Section, embedded_figure
from i2am_train.reporting.provenance import code_state
from i2am_train.types import FigureName

FOLDER = "figures"


@dataclass(frozen=True, slots=True)
class Input:
    """One explained sample, its name in files, and what made it."""

    label: str
    sample: Explanation
    origin: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class FigureSet:
    """Figures that will be drawn, and those that these inputs do not allow."""

    inputs: tuple[Input, ...]
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
            sheet = figure.sheet(samples, self.layers)
            drawing = draw_sheet(sheet)
            files = [f"{FOLDER}/{stem}.{file_format}" for file_format in formats]
            for file in files:
                save_figure(drawing, folder / file, dpi, self._description(figure, sheet.caption))
            kind = PAPER_FIGURES[figure.name]
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
        lines += [_sentence(self.inputs[index]) for index in figure.group]
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
        Input(label, read_explanation(folder, model), origin_of(folder))
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


def _sentence(entry: Input) -> str:
    origin = entry.origin
    return (
        f"{entry.label}: '{origin['command']}', checkpoint {entry.sample.origin['checkpoint']}, "
        f"data {origin['data']}, code {code_state(origin['git'])}"
    )
