"""Runs in Weights & Biases: opened so that a training never waits for them long and never dies of them, and what they
read and make.

W&B writes every run to disk first (``wandb/offline-run-...`` or ``wandb/run-...``) and sends it from there, so a
network that dies loses nothing. What is added here: a run that cannot be started online starts offline, the wait at
the end is limited, and a folder keeps the id of its run, so that a resumed training continues it (``wandb sync`` joins
the parts of an offline run, too).

Lineage: the dataset is an input of the training run, the model its output; both are inputs of an evaluation. An
artifact is known by its content: logging the same dataset or the same model again, from another run or machine, means
the version that is there already. Files are not copied: W&B reads a model's files from where they lie, at once when
online and at ``wandb sync`` when offline.
"""

from __future__ import annotations

import hashlib
import os
import re
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
from i2am_train.data.dataset import AS_IT_LIES, list_lengths
from i2am_train.environment import shown, without_secrets
from i2am_train.files import read_json, read_object, write_json
from i2am_train.metrics.registry import METRICS
from i2am_train.runs import MODEL_FOLDER, SETTINGS_FILE, checkpoint_label
from i2am_train.tracking.names import ARM, EVALUATION_JOB, STEP, TRAIN_JOB, VALIDATION, summary_of

_RUN_FILE = "wandb.json"
"""File of a run folder: id of its run in W&B, and how its model is called there."""

START_TIMEOUT = 15.0
"""Seconds in which the server must answer when a run begins; W&B adds ten."""

_STAGING_VARIABLE, _STAGING = "WANDB_DATA_DIR", "i2am-staged"
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
        "id": _run_id(folder),
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
    if Path(os.environ.get(_STAGING_VARIABLE, _STAGING)).name == _STAGING:  # else the user has chosen
        os.environ[_STAGING_VARIABLE] = str(folder / "wandb" / _STAGING)


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
                f"{_sync_command(Path(arguments['dir']))}"
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
    if Path(os.environ.get(_STAGING_VARIABLE, "")).name == _STAGING:
        del os.environ[_STAGING_VARIABLE]
    if not run.offline and time.monotonic() - started >= patience:
        wandb.termwarn(
            f"Weights & Biases did not take all of this run in {patience:.0f} s. Nothing is lost: send the rest "
            f"later with: wandb sync --include-online {folder}"
        )


def _sync_command(folder: Path) -> str:
    """What sends the offline runs in a folder to W&B."""
    return f"wandb sync {folder / 'wandb'}"


def sync_advice(tracking: TrackingConfig, folder: Path) -> str | None:
    """A sentence on how to send the offline runs of a run folder to W&B, if there are any.

    >>> sync_advice(TrackingConfig(), Path("no/run")) is None
    True
    """
    place = tracking.folder or folder
    files = (place / "wandb").glob("offline-run-*/*.wandb")
    if all(file.with_suffix(".wandb.synced").exists() for file in files):
        return None
    return f"Send it to Weights & Biases with: {_sync_command(place)}"


def _run_id(folder: Path) -> str:
    """The id of the run that belongs to a folder, made at the first call and kept there."""
    known = _read_record(folder)
    if "id" not in known:
        known["id"] = secrets.token_hex(5)
        write_json(folder / _RUN_FILE, known)
    return str(known["id"])


def _read_record(folder: Path) -> dict[str, Any]:
    """What a folder's ``wandb.json`` says; empty without one."""
    file = folder / _RUN_FILE
    return read_object(file) if file.is_file() else {}


# ---- lineage -------------------------------------------------------------------------------------

_DATASET, _IMAGES, _MODEL = "dataset", "images", "model"
"""Types of artifacts, and what their names begin with; results are of the type of their run's job."""


def _artifact_name(kind: str, name: str) -> str:
    """A name that W&B accepts.

    >>> _artifact_name("model", "my run/7")
    'model-my-run-7'
    """
    return f"{kind}-{re.sub(r'[^a-zA-Z0-9_.-]+', '-', name)}"


def use_dataset(run: Any, root: Path, fingerprint: str) -> None:
    """Say that a run reads a dataset; only its fingerprint and the lengths of its lists are sent, no picture."""
    _use_fingerprint(run, _DATASET, fingerprint, root, list_lengths(root, AS_IT_LIES))


def use_bench(run: Any, root: Path, fingerprint: str, samples: int) -> None:
    """Say that a run looks for the objects of a COCO dataset, of which only fingerprint and number are sent."""
    _use_fingerprint(run, _DATASET, fingerprint, root, {"objects": samples})


def use_images(run: Any, role: str, root: Path, fingerprint: str) -> None:
    """Say that a run reads a folder of finished images (``role``: images or reference)."""
    _use_fingerprint(run, _IMAGES, fingerprint, root, {}, role)


def _use_fingerprint(run: Any, kind: str, fingerprint: str, root: Path, counts: dict[str, int], role: str = "") -> None:
    # The place is metadata: in the file it would make another version of the same data on each machine.
    artifact = wandb.Artifact(
        _artifact_name(kind, fingerprint),
        kind,
        metadata={"fingerprint": fingerprint, "root": str(root), "samples": counts},
    )
    with artifact.new_file(f"{kind}.json") as file:
        file.write(f'{{"fingerprint": "{fingerprint}"}}\n')
    _use(run, artifact, role or kind)


def log_model(run: Any, folder: Path, model: Path, metadata: Mapping[str, Any], *, upload: bool) -> None:
    """Log a finished run's model as its output, and note in the run folder how it is called."""
    name = _artifact_name(_MODEL, folder.name)
    metadata = {**metadata, "run": run.id}
    entry = {"name": name, "metadata": metadata, "uploaded": upload}
    write_json(folder / _RUN_FILE, {**_read_record(folder), _MODEL: entry})
    run.log_artifact(_model_artifact(name, model, metadata, upload=upload))


def use_model(run: Any, model: Path, *, upload: bool) -> None:
    """Say that a run judges a model: the one that its training logged, or a folder of weights."""
    known = _read_record(model.parent).get(_MODEL) if model.name == MODEL_FOLDER else None
    entry = known or {
        "name": _artifact_name(_MODEL, checkpoint_label(model)),
        "metadata": {"folder": str(model)},
        "uploaded": upload,
    }
    artifact = _model_artifact(entry["name"], model, entry["metadata"], upload=entry["uploaded"])
    _use(run, artifact, _MODEL)


def arm_name(model: Path) -> str:
    """The name of the training run that a folder of weights belongs to, else of the folder.

    >>> arm_name(Path("weights/tiny"))
    'tiny'
    """
    for folder in (model.parent, model.parent.parent):  # of a run's model, of a snapshot
        if (folder / SETTINGS_FILE).is_file():
            return str(read_json(folder / SETTINGS_FILE)["name"])
    return checkpoint_label(model)


def log_results(run: Any, kind: str, folder: Path, files: Mapping[str, Path]) -> None:
    """Log the files of a finished evaluation or study as a run's output, under a name that ``use_results`` knows."""
    run.log_artifact(_results_artifact(kind, folder, files))


def use_results(run: Any, kind: str, folder: Path, files: Mapping[str, Path]) -> None:
    """Say that a run reads the results that another one logged with the same arguments."""
    artifact = _results_artifact(kind, folder, files)
    _use(run, artifact, artifact.name)


def _results_artifact(kind: str, folder: Path, files: Mapping[str, Path]) -> Any:
    artifact = wandb.Artifact(_artifact_name(kind, results_name(folder)), kind)
    for name, path in files.items():
        if path.is_file():
            artifact.add_file(str(path), name=name, policy="immutable")
    return artifact


def results_name(folder: Path) -> str:
    """How an evaluation in a folder is called: after its run too, where it lies in a run's folder.

    >>> results_name(Path("runs/study/cells/refined-seed0/evaluation"))
    'refined-seed0-evaluation'
    >>> results_name(Path("runs/tiny-evaluation-paired"))
    'tiny-evaluation-paired'
    """
    in_run = folder.name.startswith(EVALUATION_JOB)
    return f"{folder.parent.name}-{folder.name}" if in_run else folder.name


def _model_artifact(name: str, model: Path, metadata: Mapping[str, Any], *, upload: bool) -> Any:
    artifact = wandb.Artifact(name, _MODEL, metadata=dict(metadata))
    files = sorted(path for path in model.rglob("*") if path.is_file())
    if upload:
        for path in files:
            # "immutable": W&B reads the file where it lies instead of making a copy of all weights.
            artifact.add_file(str(path), name=path.relative_to(model).as_posix(), policy="immutable")
        return artifact
    with artifact.new_file("files.tsv") as listing:
        for path in files:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            name, size = path.relative_to(model).as_posix(), path.stat().st_size
            listing.write(f"{name}\t{size}\t{digest}\n")
    return artifact


def _use(run: Any, artifact: Any, role: str) -> None:
    run.config.update({"inputs": {**run.config.get("inputs", {}), role: artifact.name}}, allow_val_change=True)
    # The public `use_artifact` refuses to work offline and waits for the server online. This is what it calls: the
    # record says that the artifact is an input, and `wandb sync` makes the same request of it.
    run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
