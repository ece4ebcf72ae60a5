"""Runs in Weights & Biases: opened so that a training never waits for them long, and never dies of them.

W&B writes every run to disk first (``wandb/offline-run-...`` or ``wandb/run-...``) and sends it from there, so a
network that dies loses nothing. What is added here: a run that cannot be started online starts offline, the wait at
the end is limited, and a folder keeps the id of its run, so that a resumed training continues it (``wandb sync`` joins
the parts of an offline run, too).
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from wandb.errors import CommError, UsageError

from i2am_train.config.reporting import TrackingConfig
from i2am_train.environment import shown, without_secrets
from i2am_train.files import read_object, write_json
from i2am_train.metrics.registry import METRICS
from i2am_train.tracking.names import ARM, STEP, TRAIN_JOB, VALIDATION, summary_of

RUN_FILE = "wandb.json"
"""File of a run folder: id of its run in W&B, and how its model is called there."""

START_TIMEOUT = 15.0
"""Seconds in which the server must answer when a run begins; W&B adds ten."""

STAGING_VARIABLE, STAGING = "WANDB_DATA_DIR", "i2am-staged"
"""Where W&B keeps the files of artifacts that are not sent yet: its variable, and our folder in ``wandb/``."""

_gone_offline = False
"""True after the server could not be reached: later runs of this process do not wait for it again."""


def open_run(
    tracking: TrackingConfig,
    folder: Path,
    *,
    name: str,
    job_type: str,
    arm: str,
    config: Mapping[str, Any],
    tags: Sequence[str] = (),
) -> Any:
    """The W&B run that belongs to a folder, new or continued; offline where online does not work.

    Args:
        tracking: mode, project, group, tags.
        folder: the run folder; keeps the run's id.
        name: shown in W&B unless ``tracking.name`` is set.
        job_type: one of ``names.TRAIN_JOB``, ``EVALUATION_JOB``, ``STUDY_JOB``, ``DETECTION_JOB``.
        arm: of the study, or the like, unless ``tracking.arm`` is set.
        config: nested plain values.
        tags: of the run, beside ``tracking.tags``.

    Returns:
        A ``wandb.Run``; end it with ``finish_run``.
    """
    place = tracking.folder or folder
    _stage_in(place)
    arguments = {
        "project": tracking.project,
        "entity": tracking.entity,
        "name": tracking.name or name,
        "group": tracking.group,
        "job_type": job_type,
        "tags": list(dict.fromkeys([*tags, *tracking.tags])),
        "config": shown({**config, ARM: tracking.arm or arm}),
        "dir": str(place),
        "id": run_id(folder),
        "resume": "allow",
        "reinit": "create_new",
        "settings": wandb.Settings(init_timeout=START_TIMEOUT, finish_timeout=tracking.finish_timeout),
    }
    with _arguments_without_secrets():
        run = _start(arguments, online=tracking.wandb == "online")
    if job_type == TRAIN_JOB:
        _define_curves(run)
    return run


@contextmanager
def _arguments_without_secrets() -> Iterator[None]:
    """W&B keeps the command line as it finds it when a run begins."""
    words = sys.argv
    sys.argv = [without_secrets(word) for word in words]
    try:
        yield
    finally:
        sys.argv = words


def _stage_in(folder: Path) -> None:
    """Files of tables and artifacts wait for being sent beside the run; W&B would put them into the user's home."""
    if Path(os.environ.get(STAGING_VARIABLE, STAGING)).name == STAGING:  # else the user has chosen
        os.environ[STAGING_VARIABLE] = str(folder / "wandb" / STAGING)


def _define_curves(run: Any) -> None:
    """Curves are drawn over optimiser steps, and the runs' table shows the best of each score beside the last."""
    run.define_metric(STEP, hidden=True)
    run.define_metric("*", step_metric=STEP, step_sync=True)
    for metric in METRICS:
        run.define_metric(VALIDATION + metric, step_metric=STEP, step_sync=True, summary=summary_of(metric))


def _start(arguments: dict[str, Any], *, online: bool) -> Any:
    global _gone_offline
    if online and not _gone_offline:
        try:
            return _with_recorded_artifacts(wandb.init(**arguments, mode="online"))
        except (CommError, UsageError) as error:
            _gone_offline = True
            wandb.teardown()  # W&B's service still holds the failed run, and would refuse another of its id
            reason = " ".join(str(error).split())
            wandb.termwarn(
                f"Weights & Biases cannot be used now ({reason}). This run goes on offline, as do later ones of "
                f"this process, and nothing is lost. Send them later ('wandb login' first, if need be) with: "
                f"{sync_command(Path(arguments['dir']))}"
            )
    return wandb.init(**arguments, mode="offline")


def _with_recorded_artifacts(run: Any) -> Any:
    """The run, whose artifacts go through its log on disk as those of an offline run do.

    W&B's own way online is a request that is written nowhere: with the server gone, tables and models would be missing
    from what ``wandb sync`` sends later. There is no setting for it, so the one method that differs is replaced.
    """
    interface = run._interface

    def deliver_artifact(run: Any, artifact: Any, aliases: Any, tags: Any, history_step: int, **options: Any) -> None:
        interface.publish_artifact(run, artifact, aliases, tags, **options)

    interface.deliver_artifact = deliver_artifact
    return run


def finish_run(run: Any, *, failed: bool = False) -> None:
    """End a run; what is not sent within its ``finish_timeout`` stays on disk, and is said to."""
    started, patience, folder = time.monotonic(), run.settings.finish_timeout, run.settings.sync_dir
    run.finish(exit_code=1 if failed else 0)
    if Path(os.environ.get(STAGING_VARIABLE, "")).name == STAGING:
        del os.environ[STAGING_VARIABLE]
    if not run.offline and time.monotonic() - started >= patience:
        wandb.termwarn(
            f"Weights & Biases did not take all of this run in {patience:.0f} s. Nothing is lost: send the rest "
            f"later with: wandb sync --include-online {folder}"
        )


def sync_command(folder: Path) -> str:
    """What sends the offline runs in a folder to W&B."""
    return f"wandb sync {folder / 'wandb'}"


def sync_advice(tracking: TrackingConfig, folder: Path) -> str | None:
    """A sentence on how to send the offline runs of a run folder to W&B, if there are any."""
    place = tracking.folder or folder
    files = (place / "wandb").glob("offline-run-*/*.wandb")
    if all(file.with_suffix(".wandb.synced").exists() for file in files):
        return None
    return f"Send it to Weights & Biases with: {sync_command(place)}"


def run_id(folder: Path) -> str:
    """The id of the run that belongs to a folder, made at the first call and kept there."""
    known = read_record(folder)
    if "id" not in known:
        known["id"] = secrets.token_hex(5)
        write_json(folder / RUN_FILE, known)
    return str(known["id"])


def read_record(folder: Path) -> dict[str, Any]:
    """What a folder's ``wandb.json`` says; empty without one."""
    file = folder / RUN_FILE
    return read_object(file) if file.is_file() else {}
