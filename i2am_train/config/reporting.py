"""Options of what a run has to show: logs, Weights & Biases, and ``i2am dashboard | report``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from i2am_train.config.options import (
    DISTINCT,
    SOME_DISTINCT,
    Label,
    Layers,
    Natural,
    Options,
    Positive,
    Project,
    Tag,
    within,
)
from i2am_train.types import FigureFormat, FigureName


@dataclass(kw_only=True, slots=True)
class TrackingConfig(Options):
    """Where curves, tables, pictures and models are logged."""

    csv: bool = True
    """Write metrics.csv into the run folder (the report reads it)."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases mode; online goes on offline where the server cannot be reached."""
    project: Project = "i2am-train"
    """Weights & Biases project."""
    entity: str | None = None
    """User or team that owns the project; null: the default of whoever is logged in."""
    name: str | None = None
    """Name of the run in Weights & Biases; null: the name of the run folder."""
    group: str | None = None
    """Group of runs in Weights & Biases; an ablation sets its name."""
    arm: str | None = None
    """Under which name charts put runs of several seeds together; null: the name of the training
    run, or of the folder that is judged."""
    tags: list[Tag] = field(default_factory=list)
    """More tags of the run in Weights & Biases."""
    folder: Path | None = None
    """Folder that gets `wandb/`; null: the run folder (an ablation collects its runs in its own)."""
    table_samples: Natural = 16
    """Samples in the table of each validation, with pictures and scores; 0: no table."""
    upload_model: bool = True
    """Send the weights as an artifact; false: only names, sizes and digests of their files."""
    finish_timeout: Positive = 60.0
    """Seconds to wait for uploads at the end; what is not sent by then can be synced later."""


@dataclass(kw_only=True, slots=True)
class DashboardConfig(Options):
    """Make a workspace and a report for the project's runs in Weights & Biases."""

    entity: str | None = None
    """User or team that owns the project; null: the default of whoever is logged in."""
    project: Project = "i2am-train"
    """Weights & Biases project."""
    group: str | None = None
    """Show the runs of this group only, for example of one ablation; null: all of the project."""
    output: Path | None = None
    """JSON file for the definition; nothing is sent then, and no login or network is needed."""


@dataclass(kw_only=True, slots=True)
class ReportConfig(Options):
    """Make tables and figures for a paper from the folders of finished commands, without a model."""

    runs: Annotated[list[Path], DISTINCT] = field(default_factory=list)
    """Folders with finished evaluations: of `i2am evaluate`, of a training run, or of a study."""
    names: list[Label] = field(default_factory=list)
    """How tables call the model of each folder in runs; empty: by its label, or its folder."""
    mixed: bool = False
    """Report evaluations of different data, samples, sampling or protocol beside each other; they
    are refused otherwise."""
    explained: Annotated[list[Path], DISTINCT] = field(default_factory=list)
    """Folders that `i2am explain` wrote. Two of one sample are compared if they differ in their
    checkpoint (refinement) or in sampling.guidance (guidance)."""
    detected: Annotated[list[Path], DISTINCT] = field(default_factory=list)
    """Folders that `i2am detect` wrote; each has its own tables and figure."""
    figures: Annotated[list[FigureName], DISTINCT] = field(default_factory=list)
    """Which ones of explained samples: layers, time_heads, flow, specific_layers, reverse_layers,
    refinement, guidance, specific_reference, scores, daam, two_axis, unpaired; empty: all that the
    folders allow."""
    formats: Annotated[list[FigureFormat], SOME_DISTINCT] = field(default_factory=lambda: ["png", "pdf"])
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
        """The folder of the report, absolute.

        >>> ReportConfig().folder == Path.cwd() / "runs" / "report"
        True
        """
        return self.output or Path.cwd() / "runs" / "report"
