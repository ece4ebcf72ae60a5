"""Options of logging to files and to Weights & Biases."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from i2am_train.config.build import Options
from i2am_train.config.constraints import Natural, Positive, Project, Tag


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
