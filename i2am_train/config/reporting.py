"""Options of ``i2am report``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from i2am_train.config.build import Options
from i2am_train.config.constraints import Folders, Label, Layers, distinct, distinct_some, within
from i2am_train.types import FigureFormat, FigureName


@dataclass(kw_only=True, slots=True)
class ReportConfig(Options):
    """Make tables and figures for a paper from the folders of finished commands, without a model."""

    runs: Folders = field(default_factory=list)
    """Folders with finished evaluations: of `i2am evaluate`, of a training run, or of a study."""
    names: list[Label] = field(default_factory=list)
    """How tables call the model of each folder in runs; empty: by its label, or its folder."""
    mixed: bool = False
    """Report evaluations of different data, samples, sampling or protocol beside each other; they
    are refused otherwise."""
    explained: Folders = field(default_factory=list)
    """Folders that `i2am explain` wrote. Two of one sample are compared if they differ in their
    checkpoint (refinement) or in sampling.guidance (guidance)."""
    detected: Folders = field(default_factory=list)
    """Folders that `i2am detect` wrote; each has its own tables and figure."""
    figures: Annotated[list[FigureName], distinct] = field(default_factory=list)
    """Which ones of explained samples: layers, time_heads, flow, specific_layers, reverse_layers,
    refinement, guidance, specific_reference, scores, daam, two_axis, unpaired; empty: all that the
    folders allow."""
    formats: Annotated[list[FigureFormat], distinct_some] = field(default_factory=lambda: ["png", "pdf"])
    """File formats: png, svg, pdf."""
    layers: Layers | None = field(default_factory=lambda: list[int | str]((2, 5, 8)))
    """Layers in figures by layer; the default is the paper's, one per resolution; null: all."""
    models: list[Label] = field(default_factory=list)
    """How figures call the models of the samples, in the same order; empty: by their folders."""
    dpi: Annotated[int, within(50, 1200)] = 300
    """Pixels per inch of PNG files and of pictures in the others."""
    output: Path | None = None
    """Folder of the report; null: runs/report."""

    @property
    def folder(self) -> Path:
        """The folder of the report, absolute."""
        return self.output or Path.cwd() / "runs" / "report"
