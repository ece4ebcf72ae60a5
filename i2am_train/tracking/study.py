"""The run that sums up an ablation: tables of arms and of paired differences, with the evaluations as inputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from i2am_train.config.tracking import TrackingConfig
from i2am_train.results.finished_runs import arm_labels
from i2am_train.results.statistics import verdict
from i2am_train.tracking.artifacts import log_results, use_results
from i2am_train.tracking.evaluation import evaluation_files
from i2am_train.tracking.names import (
    EVALUATION_JOB,
    STUDY,
    STUDY_ARMS,
    STUDY_DIFFERENCES,
    STUDY_JOB,
)
from i2am_train.tracking.session import finish_run, open_run

ARM_COLUMNS = ("arm", "label", "metric", "mean", "standard deviation", "seeds")
DIFFERENCE_COLUMNS = (
    *("arm", "against", "metric", "difference", "low", "high", "pairs", "pairs above zero"),
    *("over", "interval", "shows"),
)


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
        config={
            **results["settings"],
            "provenance": {name: results[name] for name in named},
        },
    )
    try:
        for cell in results["cells"]:
            evaluation = folder / cell["folder"] / EVALUATION_JOB
            use_results(run, EVALUATION_JOB, evaluation, evaluation_files(evaluation))
        run.log(
            {
                STUDY_ARMS: wandb.Table(columns=list(ARM_COLUMNS), data=arm_rows(results)),
                STUDY_DIFFERENCES: wandb.Table(
                    columns=list(DIFFERENCE_COLUMNS), data=difference_rows(results)
                ),
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
    fields = (
        *("arm", "against", "metric", "difference", "low", "high", "n", "positive"),
        *("over", "interval"),
    )
    return [
        [
            *(entry[name] for name in fields),
            str(
                verdict(
                    results["metrics"][entry["metric"]]["higher_is_better"],
                    entry["low"],
                    entry["high"],
                )
            ),
        ]
        for entry in results["paired"]
    ]
