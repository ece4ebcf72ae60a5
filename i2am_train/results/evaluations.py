"""Finished evaluations, found in the folders of commands and read: what tables over several models are made of.

An evaluation belongs to a model (a row of the tables), perhaps to one training seed of it, and to the end of
training or to a snapshot on the way. Which numbers may stand side by side is decided here, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from i2am_train.errors import ConfigError, RunFolderError
from i2am_train.files import entries_of, read_object
from i2am_train.metrics.registry import describe
from i2am_train.results.run_files import RESULTS, SAMPLES, read_samples
from i2am_train.results.study import uses_truth
from i2am_train.runs import MANIFEST_FILE, MODEL_FOLDER, SETTINGS_FILE, best_step, checkpoint_label, run_of
from i2am_train.types import Pairing

_MANIFEST_SCHEMA = 1

_COMPARED = ("sampling", "attribution")
"""Groups of an evaluation's settings in which compared evaluations must agree."""
_SWEPT = ("deltas", "penalties", "time_groups", "cuda_graphs", "byte_budget")
"""Options that add scores, save time or memory, and change none; the last is of older files."""
_FAITHFUL = "evaluation.faithfulness"
"""How samples were made again, in the protocol of evaluations that did so."""
_MODEL_GROUPS = ("init", "objective", "optimization")
"""What makes two training runs of different seeds runs of one model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One finished evaluation and what it was of."""

    folder: Path
    label: str
    """How tables call the model."""
    model: str
    """The same for evaluations of one model: its label, settings of its training, or its folder."""
    run: str
    """The training run that the checkpoint comes from, or the checkpoint itself."""
    seed: int | None
    """Training seed, None where the checkpoint is not from a run."""
    step: int | None
    """Optimizer steps, None where they are not known."""
    snapshot: bool
    """Whether this is a checkpoint on the way (a snapshot, or the best by validation) and not the finished model."""
    truth: bool
    """Whether the model was trained with ground-truth correspondence."""
    pairing: Pairing
    metrics: Mapping[str, float]
    intervals: Mapping[str, Mapping[str, float]]
    samples: tuple[Mapping[str, Any], ...] = field(repr=False)
    protocol: Mapping[str, Any] = field(repr=False)
    """What must be equal for two evaluations to be compared, as plain values."""
    settings: Mapping[str, Any] = field(repr=False)
    manifest: Mapping[str, Any] = field(repr=False)

    @property
    def judged(self) -> str:
        """The checkpoint or the folder of images, as the settings name it."""
        return _judged(self.settings)


def read_evaluations(
    folders: Sequence[Path], names: Sequence[str] = (), *, mixed: bool = False
) -> tuple[Evaluation, ...]:
    """All finished evaluations in ``folders``: evaluations themselves, training runs or studies.

    Args:
        folders: what ``i2am evaluate``, ``i2am train`` (with evaluations in it) or ``i2am ablate`` wrote.
        names: how tables call the model of each folder; by the label of its training, or by its folder, where empty.
        mixed: take evaluations of different data, samples, sampling or protocol, too.

    Raises:
        RunFolderError: a folder holds no finished evaluation, or one that cannot be read.
        ConfigError: the evaluations cannot be compared, or ``names`` do not fit.
    """
    if names and len(names) != len(folders):
        raise ConfigError(
            f"names has {len(names)} entries for {len(folders)} folders in runs. Give one name per folder, in the "
            "same order, or none."
        )
    found: list[Evaluation] = []
    given: Sequence[str | None] = names or (None,) * len(folders)
    for folder, name in zip(folders, given, strict=True):
        inside = [_read(path) for path in _evaluation_folders(folder)]
        found += _renamed(folder, inside, name) if name else inside
    unique = {evaluation.folder.resolve(): evaluation for evaluation in found}
    evaluations = _told_apart(list(unique.values()))
    if not mixed:
        _refuse_incomparable(evaluations)
    return tuple(evaluations)


def _renamed(folder: Path, inside: list[Evaluation], name: str) -> list[Evaluation]:
    if len({evaluation.model for evaluation in inside}) > 1:
        raise ConfigError(
            f"{folder} holds several models ({', '.join(dict.fromkeys(e.label for e in inside))}), so the name "
            f"'{name}' does not fit. Leave names out, or give the folders of its runs one by one."
        )
    return [replace(evaluation, label=name, model=f"{name} {evaluation.model}") for evaluation in inside]


def _evaluation_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise RunFolderError(
            f"There is no folder {folder}. Give folders that 'i2am evaluate', 'i2am train' or 'i2am ablate' wrote."
        )
    patterns = ("evaluation*", "cells/*/evaluation*")
    candidates = [folder, *(path for pattern in patterns for path in sorted(folder.glob(pattern)))]
    found = [path for path in candidates if all((path / f).is_file() for f in (RESULTS, SAMPLES))]
    if not found:
        raise RunFolderError(
            f"{folder} holds no finished evaluation ({RESULTS} with {SAMPLES}). Judge the checkpoint first: "
            f"i2am evaluate checkpoint={folder}, with the data.* options of its training."
        )
    return found


def _read(folder: Path) -> Evaluation:
    results, manifest = read_object(folder / RESULTS), read_object(folder / MANIFEST_FILE)
    if "metrics" not in results:
        raise RunFolderError(
            f"{folder} holds results of '{manifest.get('command')}', which are no evaluation. Give folders that "
            "'i2am evaluate', 'i2am train' or 'i2am ablate' wrote in runs, and those of 'i2am detect' in detected."
        )
    if manifest.get("schema") != _MANIFEST_SCHEMA:
        raise RunFolderError(
            f"The evaluation in {folder} is of another version of i2am_train (schema "
            f"{manifest.get('schema')!r}, this one reads {_MANIFEST_SCHEMA}). Evaluate again into another folder."
        )
    with entries_of(folder / RESULTS):
        settings = results["settings"]
        describe(results.get("own_metrics", {}))
        return Evaluation(
            folder=folder,
            pairing=Pairing(settings.get("evaluation", {}).get("pairing", "paired")),
            metrics=_scores(results["metrics"]),
            intervals={n: _scores(ends) for n, ends in results.get("intervals", {}).items()},
            samples=read_samples(folder / SAMPLES),
            protocol=_protocol(results, manifest),
            settings=settings,
            manifest=manifest,
            **_origin(settings, folder),
        )


def _scores(found: Mapping[str, Any]) -> dict[str, Any]:
    """Scores by name, those that are null left as they are.

    Raises:
        TypeError: one is no number.
    """
    for name, value in found.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise TypeError(f"{name}={value!r} is no number")
    return dict(found)


def _origin(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Model, run, seed and step of what was judged."""
    judged = Path(_judged(settings))
    place = run_of(judged)
    training = None
    if place is not None:  # a run that was moved still holds its evaluation
        training = _training_settings(place[0]) or _training_settings(folder.parent)
    if place is None or training is None:
        return {
            "label": checkpoint_label(judged), "model": str(judged), "run": str(judged),
            "seed": None, "step": None, "snapshot": False, "truth": False,
        }  # fmt: skip
    (run, step), steps = place, training["optimization"]["steps"]
    finished = judged.name == MODEL_FOLDER
    if step is None and not finished:
        step = best_step(run) or best_step(folder.parent)
    identity = {name: training.get(name) for name in _MODEL_GROUPS}
    return {
        "label": training.get("label") or training["name"],
        "model": json.dumps([training.get("label"), identity], sort_keys=True),
        "run": str(run),
        "seed": training.get("seed"),
        "step": steps if step is None else step,
        "snapshot": not finished,
        "truth": uses_truth({"losses": training["objective"]}),
    }


def _judged(settings: Mapping[str, Any]) -> str:
    return str(settings.get("checkpoint") or settings.get("images"))


def _training_settings(run: Path) -> dict[str, Any] | None:
    file = run / SETTINGS_FILE
    settings = read_object(file) if file.is_file() else {}
    return settings if "objective" in settings and "optimization" in settings else None


def _protocol(results: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    settings = results["settings"]
    compared: dict[str, Any] = {"data": manifest.get("data"), "samples": int(results["samples"])}
    for group in _COMPARED:
        options = settings.get(group) or {}
        compared |= {f"{group}.{n}": v for n, v in options.items() if n not in _SWEPT}
    judged = settings.get("evaluation", {})
    if judged.get("faithful_samples"):
        compared[_FAITHFUL] = {name: judged[name] for name in ("faithful_samples", "faithfulness")}
    return compared | {f"protocol.{n}": v for n, v in results.get("protocol", {}).items()}


def _told_apart(evaluations: list[Evaluation]) -> list[Evaluation]:
    """Models that share a label get the folder behind it; an evaluation of the same checkpoint does, too."""
    result, taken = [], {}
    for evaluation in evaluations:
        place = (evaluation.model, evaluation.run, evaluation.step, evaluation.pairing)
        if place in taken:
            name = evaluation.folder.name
            evaluation = replace(evaluation, model=f"{evaluation.model} {name}", label=f"{evaluation.label} ({name})")
        taken[place] = evaluation
        result.append(evaluation)
    places: dict[str, dict[str, str]] = {}
    for evaluation in result:
        places.setdefault(evaluation.label, {}).setdefault(evaluation.model, evaluation.run)
    names = {
        model: f"{label} ({name})" if len(models) > 1 else label
        for label, models in places.items()
        for model, name in zip(models, _distinguishing_parts(list(models.values())), strict=True)
    }
    return [replace(evaluation, label=names[evaluation.model]) for evaluation in result]


def _distinguishing_parts(paths: Sequence[str]) -> list[str]:
    """The last part of each path in which all differ, or numbers where there is none.

    >>> _distinguishing_parts(["runs/study/cells/refined-seed0", "runs/long/cells/refined-seed0"])
    ['study', 'long']
    """
    for parts in zip(*(reversed(Path(path).parts) for path in paths), strict=False):
        if len(set(parts)) == len(paths):
            return list(parts)
    return [str(number) for number in range(1, len(paths) + 1)]


def _refuse_incomparable(evaluations: Sequence[Evaluation]) -> None:
    for pairing in Pairing:
        same = [evaluation for evaluation in evaluations if evaluation.pairing is pairing]
        differences = list(incomparable(same))
        if differences:
            raise ConfigError(
                f"These {pairing} evaluations cannot be compared; they differ in {'; '.join(differences)}. Evaluate "
                "them alike, report them in parts, or give mixed=true: then the page says what differs."
            )


def incomparable(evaluations: Iterable[Evaluation]) -> Iterator[str]:
    """What the protocols differ in, each with its values and the models that have them.

    >>> from types import SimpleNamespace
    >>> list(incomparable(SimpleNamespace(label=name, protocol={"data": f"d-{name}"}) for name in "ab"))
    ['data: "d-a" (a) against "d-b" (b)']
    """
    by_name: dict[str, dict[str, list[str]]] = {}
    evaluations = list(evaluations)
    for evaluation in evaluations:
        for name in {name: None for e in evaluations for name in e.protocol}:
            if name == _FAITHFUL and name not in evaluation.protocol:
                continue  # has no score that it could falsify
            value = json.dumps(evaluation.protocol.get(name), sort_keys=True)
            by_name.setdefault(name, {}).setdefault(value, []).append(evaluation.label)
    for name, values in by_name.items():
        if len(values) > 1:
            said = (f"{value} ({', '.join(dict.fromkeys(of))})" for value, of in values.items())
            yield f"{name}: {' against '.join(said)}"
