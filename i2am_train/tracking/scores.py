"""Scores in W&B: tables of samples with their pictures, masks that can be switched on and off, and the runs of finished
evaluations and ablations, with what they judged as inputs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import wandb
from numpy.typing import NDArray

from i2am_train.config.reporting import TrackingConfig
from i2am_train.evaluation.evaluator import SAMPLE_NAMES, EvaluationResult
from i2am_train.reporting.figures.canvas import overlay
from i2am_train.results.run_files import PANELS, RESULTS, SamplePanels
from i2am_train.results.run_files import SAMPLES as SAMPLES_FILE
from i2am_train.results.statistics import verdict
from i2am_train.results.study import arm_labels
from i2am_train.runs import RunFolder
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
from i2am_train.tracking.session import finish_run, log_results, open_run, results_name, use_results

INPAINTED, GARMENT, ATTRIBUTED = "inpainted region", "garment", "attribution above delta"
"""Masks of the overlays, as W&B shows them."""
_CLASSES = {INPAINTED: 1, GARMENT: 2, ATTRIBUTED: 3}

TABLE_COLUMNS = (
    *("sample", "garment name", "garment", "person", "generated"),
    *("attribution on generated", "attribution on garment"),
)
"""Columns before the scores, which are called as in ``samples.jsonl``."""

_WORST_FIRST = "imacs_g"
"""The score that tables are sorted by, ascending."""

Rows = Sequence[Mapping[str, Any]]
T = TypeVar("T")


# ---- single samples ------------------------------------------------------------------------------


def sample_table(rows: Rows, panels: Sequence[SamplePanels], **moment: int) -> Any:
    """A ``wandb.Table`` of the first samples, those with panels: pictures, maps and every score, worst first.

    Args:
        rows: names and scores of samples (``EvaluationResult.rows``).
        panels: of the first of them, in their order.
        moment: first columns, equal in all rows: epoch and optimiser step.
    """
    scores = _score_names(rows)
    table = wandb.Table(columns=[*moment, *TABLE_COLUMNS, *scores])
    pairs = list(zip(rows, panels, strict=False))
    for row, one in _worst_first(pairs, rows[: len(pairs)]):
        maps = (overlay(one.generated, one.map_generated), overlay(one.garment, one.map_reference))
        table.add_data(
            *moment.values(),
            one.name,
            one.garment_name,
            *map(wandb.Image, (one.garment, one.person, one.generated, *maps)),
            *(row[name] for name in scores),
        )
    return table


def _score_table(rows: Rows) -> Any:
    """A ``wandb.Table`` of the scores of all samples, worst first, without pictures."""
    names = [name for name in (*SAMPLE_NAMES, *_score_names(rows)) if name in rows[0]]
    return wandb.Table(columns=names, data=[[row[name] for name in names] for row in _worst_first(rows, rows)])


def _score_names(rows: Rows) -> list[str]:
    return [name for name in rows[0] if name not in SAMPLE_NAMES]


def _worst_first(items: Iterable[T], rows: Rows) -> list[T]:
    """Items by ascending IMACS_g of their rows; those without one come last, in their order.

    >>> _worst_first("abc", [{"imacs_g": 0.2}, {}, {"imacs_g": -0.1}])
    ['c', 'a', 'b']
    """

    def order(pair: tuple[T, Mapping[str, Any]]) -> tuple[bool, float]:
        value = pair[1].get(_WORST_FIRST)
        return (value is None, value or 0.0)

    return [item for item, _ in sorted(zip(items, rows, strict=True), key=order)]


def generated_overlays(panels: Iterable[SamplePanels], delta: float) -> list[Any]:
    """Generated images, each with the inpainted region and where the attribution is ``delta`` or more."""
    return [
        _overlaid(one.generated, {INPAINTED: one.inpaint_mask, ATTRIBUTED: one.map_generated >= delta}, one.name)
        for one in panels
    ]


def reference_overlays(panels: Iterable[SamplePanels], delta: float) -> list[Any]:
    """Garments, each with its mask and where the attribution is ``delta`` or more."""
    return [
        _overlaid(
            one.garment,
            {GARMENT: one.garment_mask, ATTRIBUTED: one.map_reference >= delta},
            f"{one.garment_name} on {one.name}",
        )
        for one in panels
    ]


def _overlaid(picture: NDArray[np.uint8], masks: Mapping[str, NDArray[np.bool_] | None], caption: str) -> Any:
    return wandb.Image(
        picture,
        caption=caption,
        masks={
            name: {"mask_data": mask.astype(np.uint8) * _CLASSES[name], "class_labels": {_CLASSES[name]: name}}
            for name, mask in masks.items()
            if mask is not None
        },
    )


# ---- finished evaluations and ablations ----------------------------------------------------------


def track_evaluation(
    tracking: TrackingConfig,
    folder: Path,
    result: EvaluationResult,
    *,
    arm: str,
    panels: Sequence[SamplePanels],
    use_inputs: Callable[[Any], None],
) -> None:
    """Log a finished evaluation, with its manifest and results in ``folder``, as a run of its own; nothing where W&B is
    disabled.

    ``arm`` is that of the model, unless ``tracking.arm`` is set; ``panels`` are of the first samples, as far as they
    were kept; ``use_inputs`` says of a run what it reads (``session.use_dataset``, ``session.use_model``).
    """

    def log(run: Any) -> None:
        logged: dict[str, Any] = {EVALUATION + name: value for name, value in result.metrics.items()}
        logged[EVALUATION + SAMPLES] = _score_table(result.rows)
        if shown := panels[: tracking.table_samples]:
            logged[EVALUATION + TABLE] = sample_table(result.rows, shown)
        run.log(logged)

    name = results_name(folder)
    track_finished(tracking, folder, log, name=name, job_type=EVALUATION_JOB, arm=arm, use_inputs=use_inputs)


def track_finished(
    tracking: TrackingConfig,
    folder: Path,
    log: Callable[[Any], None],
    *,
    name: str,
    job_type: str,
    arm: str,
    use_inputs: Callable[[Any], None],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Log what is finished in a folder as a run of its own, with inputs and files; nothing where W&B is disabled.

    Args:
        tracking: mode, project, group, tags.
        folder: with the manifest, scores, samples and panels.
        log: logs the scores to a run.
        name: as for ``session.open_run``, like ``job_type`` and ``arm``.
        use_inputs: says of a run what it reads.
        settings: of this command; None: those of the folder's manifest.
    """
    if tracking.wandb == "disabled":
        return
    manifest = RunFolder(folder, resumed=False).manifest
    kept = manifest.pop("settings")
    config = {**(kept if settings is None else settings), "provenance": manifest}
    run = open_run(tracking, folder, name=name, job_type=job_type, arm=arm, config=config)
    try:
        use_inputs(run)
        log(run)
        log_results(run, job_type, folder, _evaluation_files(folder))
    finally:
        finish_run(run)


def _evaluation_files(folder: Path) -> dict[str, Path]:
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
    """Log a finished study as a run of its own, with the content of its ``results.json``; nothing where W&B is
    disabled."""
    if tracking.wandb == "disabled":
        return
    named = ("command", "git", "machine", "versions", "data", "started", "minutes", "wall_minutes")
    config = {**results["settings"], "provenance": {name: results[name] for name in named}}
    run = open_run(tracking, folder, name=results["name"], job_type=STUDY_JOB, arm=STUDY_JOB, config=config)
    try:
        for cell in results["cells"]:
            evaluation = folder / cell["folder"] / EVALUATION_JOB
            use_results(run, EVALUATION_JOB, evaluation, _evaluation_files(evaluation))
        run.log(
            {
                STUDY_ARMS: wandb.Table(columns=list(ARM_COLUMNS), data=_arm_rows(results)),
                STUDY_DIFFERENCES: wandb.Table(columns=list(DIFFERENCE_COLUMNS), data=_difference_rows(results)),
                **{
                    f"{STUDY}{arm}/{metric}": entry["mean"]
                    for arm, metrics in results["summary"].items()
                    for metric, entry in metrics.items()
                },
            }
        )
        log_results(run, STUDY_JOB, folder, {RESULTS: folder / RESULTS})
    finally:
        finish_run(run)


def _arm_rows(results: Mapping[str, Any]) -> list[list[Any]]:
    """A row for each arm and metric, in the order of ``ARM_COLUMNS``."""
    labels = arm_labels(results)
    return [
        [arm, labels[arm], metric, entry["mean"], entry["std"], entry["n"]]
        for arm, metrics in results["summary"].items()
        for metric, entry in metrics.items()
    ]


def _difference_rows(results: Mapping[str, Any]) -> list[list[Any]]:
    """A row for each paired difference, in the order of ``DIFFERENCE_COLUMNS``."""
    better = {name: entry["higher_is_better"] for name, entry in results["metrics"].items()}
    return [
        [
            *(entry[name] for name in _DIFFERENCE.values()),
            str(verdict(better[entry["metric"]], entry["low"], entry["high"])),
        ]
        for entry in results["paired"]
    ]
