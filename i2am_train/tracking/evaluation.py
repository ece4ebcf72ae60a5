"""What a finished evaluation tells W&B: scores, tables and results, with what it judged as inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from i2am_train.config.tracking import TrackingConfig
from i2am_train.evaluation.evaluator import EvaluationResult
from i2am_train.results.finished_runs import PANELS, RESULTS, Panels
from i2am_train.results.finished_runs import SAMPLES as SAMPLES_FILE
from i2am_train.runs import RunFolder
from i2am_train.tracking.artifacts import log_results, results_name
from i2am_train.tracking.media import sample_table, score_table
from i2am_train.tracking.names import EVALUATION, EVALUATION_JOB, SAMPLES, TABLE
from i2am_train.tracking.session import finish_run, open_run


def track_evaluation(
    tracking: TrackingConfig,
    folder: Path,
    result: EvaluationResult,
    *,
    arm: str,
    panels: Panels | None,
    use_inputs: Callable[[Any], None],
) -> None:
    """Log a finished evaluation as a run of its own; nothing where W&B is disabled.

    Args:
        tracking: mode, project, group, tags.
        folder: of the evaluation, with its manifest and its written results.
        result: the scores.
        arm: of the model, unless ``tracking.arm`` is set.
        panels: pictures and maps of the first samples, if there are any.
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
        logged: dict[str, Any] = {
            EVALUATION + name: value for name, value in result.metrics.items()
        }
        logged[EVALUATION + SAMPLES] = score_table(result.rows)
        if panels is not None and tracking.table_samples:
            logged[EVALUATION + TABLE] = sample_table(result.rows, panels, tracking.table_samples)
        run.log(logged)
        log_results(run, EVALUATION_JOB, folder, evaluation_files(folder))
    finally:
        finish_run(run)


def evaluation_files(folder: Path) -> dict[str, Path]:
    """The files of an evaluation's artifact, by name."""
    return {name: folder / name for name in (RESULTS, SAMPLES_FILE, PANELS)}
