"""A finished study (ablation): its results with what each of its runs kept, and its arms compared pair by pair.

Arms are compared over what they share: the same seed (same starting weights, same order of batches) with and without a
loss term, or, when there is only one seed, the same held-out sample. A part that is not there (no history, no panels)
is listed in ``Study.missing`` and the report goes without it; one that cannot be read is an error that names the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from i2am_train.config.objective import TRUTH, term_needs
from i2am_train.errors import RunFolderError
from i2am_train.results.run_files import (
    RESULTS,
    SAMPLES,
    History,
    SamplePanels,
    SampleScores,
    read_history,
    read_panels,
    read_samples,
)
from i2am_train.results.statistics import Over, PairedDifference, paired_difference

SCHEMA = 2
"""The version of ``results.json`` that this module reads."""

Results: TypeAlias = Mapping[str, Any]
"""Content of ``results.json``: command, machine, metrics, arms, seeds, cells, summary, paired."""

Cells: TypeAlias = Sequence[Mapping[str, Any]]
"""``results["cells"]``: an entry for each arm and seed."""

START_ARM = "base"
"""Name of the arm that is not trained: the checkpoint that all others start from."""


@dataclass(frozen=True, slots=True)
class ArmRun:
    """One arm trained with one seed: where it lies and what was kept of it."""

    arm: str
    seed: int | None
    folder: Path
    evaluated: int | None
    """Number of samples of its evaluation."""
    samples: SampleScores
    panels: tuple[SamplePanels, ...]
    history: History | None


@dataclass(frozen=True, slots=True)
class Study:
    """The folder of a study in memory; ``results`` always has ``summary`` and ``paired``."""

    folder: Path
    results: Results
    runs: tuple[ArmRun, ...]
    missing: tuple[str, ...]

    def of_arm(self, arm: str) -> tuple[ArmRun, ...]:
        """The runs of one arm, lowest seed first.

        >>> runs = [ArmRun("ours", seed, Path("cells"), None, (), (), None) for seed in (1, 0)]
        >>> [run.seed for run in Study(Path("study"), {}, tuple(runs), ()).of_arm("ours")]
        [0, 1]
        """
        runs = [run for run in self.runs if run.arm == arm]
        return tuple(sorted(runs, key=lambda run: -1 if run.seed is None else run.seed))


def read_study(folder: Path) -> Study:
    """Read ``results.json`` and what the runs kept.

    Raises:
        RunFolderError: no ``results.json``, or a file that cannot be read.
    """
    results = read_results(folder / RESULTS)
    runs = tuple(_read_run(folder, cell) for cell in results["cells"])
    pairs = list(zip(results["cells"], runs, strict=True))
    cells = [{**cell, "samples": cell.get("samples", run.evaluated)} for cell, run in pairs]
    samples = {cell["folder"]: run.samples for cell, run in pairs}
    compared = recompared({**results, "cells": cells}, samples)
    return Study(folder, compared, runs, tuple(_missing_parts(runs)))


def read_results(path: Path) -> dict[str, Any]:
    """Read one ``results.json`` and check its version and that the required entries are there."""
    if not path.is_file():
        raise RunFolderError(
            f"{path.parent} has no {path.name}, so there is nothing to report yet. "
            "Give the folder of a finished 'i2am ablate', or run that first."
        )
    results = _read_json(path)
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        found = results.get("schema") if isinstance(results, dict) else type(results).__name__
        raise RunFolderError(
            f"{path} has schema {found!r}; this version reads schema {SCHEMA}. Report it with the version that wrote "
            "it, or run 'i2am ablate' again with another output folder."
        )
    absent = [key for key in ("metrics", "arms", "cells") if key not in results]
    if absent:
        raise RunFolderError(f"{path} lacks {', '.join(absent)}; run 'i2am ablate' again.")
    return results


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{path} is not readable JSON: {error}. Run the command again.") from None


def _read_run(study: Path, cell: Mapping[str, Any]) -> ArmRun:
    folder, arm, seed = study / cell["folder"], str(cell["arm"]), cell["seed"]
    evaluation = folder / "evaluation"
    path = evaluation / RESULTS
    return ArmRun(
        arm=arm,
        seed=seed,
        folder=folder,
        evaluated=_read_json(path).get("samples") if path.is_file() else None,
        samples=read_samples(evaluation / SAMPLES),
        panels=read_panels(evaluation),
        history=read_history(folder / "metrics.csv", arm, seed),
    )


def _missing_parts(runs: Sequence[ArmRun]) -> Iterator[str]:
    if not any(run.history for run in runs if run.arm != START_ARM):
        yield "No training history (cells/*/metrics.csv) was kept, so there are no curves."
    if not any(run.panels for run in runs):
        yield "No panels (cells/*/evaluation/panels.safetensors) were kept, so no samples."
    if not any(run.samples for run in runs):
        yield "No per-sample scores (cells/*/evaluation/samples.jsonl) were kept."


# ---- arms --------------------------------------------------------------------------------------


def reference_arm(results: Results) -> str | None:
    """The arm that the others are compared with: that of the paired entries, else "baseline".

    >>> reference_arm({"arms": [{"name": name} for name in ("base", "baseline", "refined")]})
    'baseline'
    """
    if paired := results.get("paired"):
        return str(paired[0]["against"])
    trained = [arm["name"] for arm in results["arms"] if arm["name"] != START_ARM]
    if "baseline" in trained:
        return "baseline"
    return str(trained[0]) if len(trained) > 1 else None


def uses_truth(arm: Mapping[str, Any]) -> bool:
    """Whether an arm is trained with the true correspondence, so that it is not ranked among arms without.

    >>> uses_truth({"name": "supervised", "losses": {"terms": {"supervised": {"weight": 0.1}}}})
    True
    """
    terms = (arm.get("losses") or {}).get("terms", {})
    return any(TRUTH.intersection(term_needs(name, entry)) for name, entry in terms.items())


def arm_labels(results: Results) -> dict[str, str]:
    """Label of every arm by name, in the order of the file.

    >>> arm_labels({"arms": [{"name": "base"}, {"name": "refined", "label": "Ours"}]})
    {'base': 'base', 'refined': 'Ours'}
    """
    return {arm["name"]: str(arm.get("label") or arm["name"]) for arm in results["arms"]}


# ---- comparison --------------------------------------------------------------------------------


def recompared(results: Results, samples: Mapping[str, SampleScores] | None = None) -> dict[str, Any]:
    """Results with ``summary`` and ``paired`` worked out anew from their cells, whichever version wrote them.

    ``samples`` are the scores of single samples by the cells' folders, for studies of one seed.

    >>> cells = [{"arm": "ours", "seed": 0, "folder": "cells/ours", "metrics": {"ssim": 0.5}}]
    >>> recompared({"arms": [{"name": "ours"}], "metrics": {"ssim": {}}, "cells": cells})["summary"]
    {'ours': {'ssim': {'mean': 0.5, 'std': None, 'n': 1}}}
    """
    settings = results.get("settings") or {}
    names = {"confidence": "confidence", "resamples": "bootstrap_samples"}
    options = {option: settings[name] for option, name in names.items() if name in settings}
    arms, reference = arm_labels(results), reference_arm(results) or ""
    found = compare(results["cells"], results["metrics"], arms, reference, samples, **options)
    return {**results, **found}


def compare(
    cells: Cells,
    metrics: Iterable[str],
    arms: Iterable[str],
    reference_arm: str,
    samples: Mapping[str, SampleScores] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The entries ``summary`` and ``paired`` of ``results.json``.

    Args:
        cells: the entry ``cells``.
        metrics: names of metrics, in the order of the table.
        arms: names of arms.
        reference_arm: the arm that the others are compared with ("baseline").
        samples: per-sample scores by cell folder. With them, an arm that shares only one seed
            with the reference gets an interval over samples, marked ``over: "samples"``.
        options: ``confidence`` and ``resamples`` of the intervals (``statistics.mean_interval``).

    Returns:
        A dictionary to ``update`` the results with; plain numbers, ready for JSON.

    >>> cells = [{"arm": "a", "seed": s, "folder": f"a{s}", "metrics": {"ssim": s / 2}} for s in (0, 1)]
    >>> cells += [{"arm": "b", "seed": s, "folder": f"b{s}", "metrics": {"ssim": s}} for s in (0, 1)]
    >>> found = compare(cells, ["ssim"], ["a", "b"], reference_arm="a")
    >>> found["summary"]["a"]["ssim"]["mean"], found["paired"][0]["difference"]
    (0.25, 0.25)
    """
    metrics = list(metrics)
    return {
        "summary": {
            arm: {metric: of_arm[metric] for metric in metrics if metric in of_arm}
            for arm, of_arm in _summarise(cells).items()
        },
        "paired": [
            {"arm": arm, "against": reference_arm, "metric": metric, **_entry(found)}
            for arm in arms
            if arm != reference_arm
            for metric in metrics
            if (found := _difference(cells, arm, reference_arm, metric, samples or {}, **options))
        ],
    }


def _summarise(cells: Cells) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean, sample standard deviation (None for one value) and number of values per arm and metric.

    Values are over the seeds; one that is not finite is left out.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        of_arm = values.setdefault(str(cell["arm"]), {})
        for metric, value in cell["metrics"].items():
            if _is_finite(value):
                of_arm.setdefault(metric, []).append(float(value))
    return {
        arm: {
            metric: {
                "mean": float(np.mean(of_seeds)),
                "std": float(np.std(of_seeds, ddof=1)) if len(of_seeds) > 1 else None,
                "n": len(of_seeds),
            }
            for metric, of_seeds in metrics.items()
        }
        for arm, metrics in values.items()
    }


def _entry(difference: PairedDifference) -> dict[str, Any]:
    over = {"over": str(difference.over), "interval": difference.over.interval}
    entry = asdict(difference)
    return {"difference": entry.pop("mean"), **entry, **over}


def _difference(
    cells: Cells, arm: str, against: str, metric: str, samples: Mapping[str, SampleScores], **options: Any
) -> PairedDifference | None:
    """Difference ``arm - against`` over what both have: seeds, or the samples of the only seed; None without a pair.

    A cell whose seed is ``None`` (the shared starting checkpoint) has no pair. Samples are matched by name; a metric of
    a set, such as a Fréchet distance, has no values of single ones.
    """
    first, second = (
        {cell["seed"]: cell for cell in cells if cell["arm"] == name and cell["seed"] is not None}
        for name in (arm, against)
    )
    shared = first.keys() & second.keys()
    if len(shared) == 1:
        (seed,) = shared
        kept = (samples.get(of[seed]["folder"], ()) for of in (first, second))
        ours, theirs = ({str(sample["name"]): sample.get(metric) for sample in of} for of in kept)
        if (found := _paired(ours, theirs, Over.SAMPLES, **options)) is not None:
            return found
    ours, theirs = ({seed: cell["metrics"].get(metric) for seed, cell in of.items()} for of in (first, second))
    return _paired(ours, theirs, Over.SEEDS, **options)


def _paired(first: Mapping[Any, Any], second: Mapping[Any, Any], over: Over, **options: Any) -> PairedDifference | None:
    shared = first.keys() & second.keys()
    known = sorted(key for key in shared if _is_finite(first[key]) and _is_finite(second[key]))
    if not known:
        return None
    a, b = ([float(of[key]) for key in known] for of in (first, second))
    return paired_difference(a, b, over, **options)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
