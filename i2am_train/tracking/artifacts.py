"""Lineage: the dataset is an input of the training run, the model its output; both are inputs of an evaluation.

An artifact is known by its content: logging the same dataset or the same model again, from another run or machine,
means the version that is there already. Files are not copied: W&B reads a model's files from where they lie, at once
when online and at ``wandb sync`` when offline.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from i2am_train.data.dataset import AS_IT_LIES, list_lengths
from i2am_train.files import read_json, write_json
from i2am_train.runs import MODEL_FOLDER, SETTINGS_FILE, checkpoint_label
from i2am_train.tracking.names import EVALUATION_JOB, STUDY_JOB
from i2am_train.tracking.session import RUN_FILE, read_record

DATASET, IMAGES, MODEL, EVALUATION, STUDY = "dataset", "images", "model", EVALUATION_JOB, STUDY_JOB
"""Types of artifacts, and what their names begin with."""


def artifact_name(kind: str, name: str) -> str:
    """A name that W&B accepts.

    >>> artifact_name("model", "my run/7")
    'model-my-run-7'
    """
    return f"{kind}-{re.sub(r'[^a-zA-Z0-9_.-]+', '-', name)}"


def use_dataset(run: Any, root: Path, fingerprint: str) -> None:
    """Say that a run reads a dataset; only its fingerprint and the lengths of its lists are sent, no picture."""
    _use_fingerprint(run, DATASET, fingerprint, root, list_lengths(root, AS_IT_LIES))


def use_bench(run: Any, root: Path, fingerprint: str, samples: int) -> None:
    """Say that a run looks for the objects of a COCO dataset, of which only fingerprint and number are sent."""
    _use_fingerprint(run, DATASET, fingerprint, root, {"objects": samples})


def use_images(run: Any, role: str, root: Path, fingerprint: str) -> None:
    """Say that a run reads a folder of finished images (``role``: images or reference)."""
    _use_fingerprint(run, IMAGES, fingerprint, root, {}, role)


def _use_fingerprint(run: Any, kind: str, fingerprint: str, root: Path, counts: dict[str, int], role: str = "") -> None:
    # The place is metadata: in the file it would make another version of the same data on each machine.
    artifact = wandb.Artifact(
        artifact_name(kind, fingerprint),
        kind,
        metadata={"fingerprint": fingerprint, "root": str(root), "samples": counts},
    )
    with artifact.new_file(f"{kind}.json") as file:
        file.write(f'{{"fingerprint": "{fingerprint}"}}\n')
    _use(run, artifact, role or kind)


def log_model(run: Any, folder: Path, model: Path, metadata: Mapping[str, Any], *, upload: bool) -> None:
    """Log a finished run's model as its output, and note in the run folder how it is called."""
    name = artifact_name(MODEL, folder.name)
    metadata = {**metadata, "run": run.id}
    entry = {"name": name, "metadata": metadata, "uploaded": upload}
    write_json(folder / RUN_FILE, {**read_record(folder), MODEL: entry})
    run.log_artifact(_model_artifact(name, model, metadata, upload=upload))


def use_model(run: Any, model: Path, *, upload: bool) -> None:
    """Say that a run judges a model: the one that its training logged, or a folder of weights."""
    known = read_record(model.parent).get(MODEL) if model.name == MODEL_FOLDER else None
    entry = known or {
        "name": artifact_name(MODEL, checkpoint_label(model)),
        "metadata": {"folder": str(model)},
        "uploaded": upload,
    }
    artifact = _model_artifact(entry["name"], model, entry["metadata"], upload=entry["uploaded"])
    _use(run, artifact, MODEL)


def arm_name(model: Path) -> str:
    """The name of the training run that a folder of weights belongs to, else of the folder."""
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
    artifact = wandb.Artifact(artifact_name(kind, results_name(folder)), kind)
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
    artifact = wandb.Artifact(name, MODEL, metadata=dict(metadata))
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
