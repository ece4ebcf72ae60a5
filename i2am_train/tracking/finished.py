"""What finished evaluations and ablations tell W&B: scores, tables and results, with what they judged as inputs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from i2am_train.config.reporting import TrackingConfig
from i2am_train.evaluation.evaluator import EvaluationResult
from i2am_train.results.panels import PANELS, SamplePanels
from i2am_train.results.sample_scores import RESULTS
from i2am_train.results.sample_scores import SAMPLES as SAMPLES_FILE
from i2am_train.results.statistics import verdict
from i2am_train.results.study import arm_labels
from i2am_train.runs import RunFolder
from i2am_train.tracking.artifacts import log_results, results_name, use_results
from i2am_train.tracking.media import sample_table, score_table
from i2am_train.tracking.names import (
    EVALUATION,
    EVALUATION_JOB,
    SAMPLES,
    STUDY,
    STUDY_ARMS,
    STUDY_DIFFERENCES,
    STUDY_JOB,
    TABLE,
)
from i2am_train.tracking.session import finish_run, open_run


def track_evaluation(
    tracking: TrackingConfig,
    folder: Path,
    result: EvaluationResult,
    *,
    arm: str,
    panels: Sequence[SamplePanels],
    use_inputs: Callable[[Any], None],
) -> None:
    """Log a finished evaluation as a run of its own; nothing where W&B is disabled.

    Args:
        tracking: mode, project, group, tags.
        folder: of the evaluation, with its manifest and its written results.
        result: the scores.
        arm: of the model, unless ``tracking.arm`` is set.
        panels: of the first samples, as far as they were kept.
        use_inputs: says of a run what it reads (``artifacts.use_dataset``, ``artifacts.use_model``).
    """
    if tracking.wandb == "disabled":
        return
    manifest = RunFolder(folder, resumed=False).manifest
    run = open_run(
        tracking,
        folder,
        name=results_name(folder),
        job_type=EVALUATION_JOB,
        arm=arm,
        config={**manifest.pop("settings"), "provenance": manifest},
    )
    try:
        use_inputs(run)
        logged: dict[str, Any] = {EVALUATION + name: value for name, value in result.metrics.items()}
        logged[EVALUATION + SAMPLES] = score_table(result.rows)
        if shown := panels[: tracking.table_samples]:
            logged[EVALUATION + TABLE] = sample_table(result.rows, shown)
        run.log(logged)
        log_results(run, EVALUATION_JOB, folder, evaluation_files(folder))
    finally:
        finish_run(run)


def evaluation_files(folder: Path) -> dict[str, Path]:
    """The files of an evaluation's artifact, by name."""
    return {name: folder / name for name in (RESULTS, SAMPLES_FILE, PANELS)}


ARM_COLUMNS = ("arm", "label", "metric", "mean", "standard deviation", "seeds")
_DIFFERENCE = {name: name for name in ("arm", "against", "metric", "difference", "low", "high")} | {
    "pairs": "n",
    "pairs above zero": "positive",
    "over": "over",
    "interval": "interval",
}
"""Columns of differences, and the entry of ``results["paired"]`` that each shows."""
DIFFERENCE_COLUMNS = (*_DIFFERENCE, "shows")


def track_study(tracking: TrackingConfig, folder: Path, results: Mapping[str, Any]) -> None:
    """Log a finished study as a run of its own; nothing where W&B is disabled.

    Args:
        tracking: of the study.
        folder: of the study; holds ``results.json``.
        results: its content.
    """
    if tracking.wandb == "disabled":
        return
    named = ("command", "git", "machine", "versions", "data", "started", "minutes")
    run = open_run(
        tracking,
        folder,
        name=results["name"],
        job_type=STUDY_JOB,
        arm=STUDY_JOB,
        config={**results["settings"], "provenance": {name: results[name] for name in named}},
    )
    try:
        for cell in results["cells"]:
            evaluation = folder / cell["folder"] / EVALUATION_JOB
            use_results(run, EVALUATION_JOB, evaluation, evaluation_files(evaluation))
        run.log(
            {
                STUDY_ARMS: wandb.Table(columns=list(ARM_COLUMNS), data=arm_rows(results)),
                STUDY_DIFFERENCES: wandb.Table(columns=list(DIFFERENCE_COLUMNS), data=difference_rows(results)),
                **{
                    f"{STUDY}{arm}/{metric}": entry["mean"]
                    for arm, metrics in results["summary"].items()
                    for metric, entry in metrics.items()
                },
            }
        )
        log_results(run, STUDY_JOB, folder, {"results.json": folder / "results.json"})
    finally:
        finish_run(run)


def arm_rows(results: Mapping[str, Any]) -> list[list[Any]]:
    """A row for each arm and metric, in the order of ``ARM_COLUMNS``."""
    labels = arm_labels(results)
    return [
        [arm, labels[arm], metric, entry["mean"], entry["std"], entry["n"]]
        for arm, metrics in results["summary"].items()
        for metric, entry in metrics.items()
    ]


def difference_rows(results: Mapping[str, Any]) -> list[list[Any]]:
    """A row for each paired difference, in the order of ``DIFFERENCE_COLUMNS``."""
    better = {name: entry["higher_is_better"] for name, entry in results["metrics"].items()}
    return [
        [
            *(entry[name] for name in _DIFFERENCE.values()),
            str(verdict(better[entry["metric"]], entry["low"], entry["high"])),
        ]
        for entry in results["paired"]
    ]
