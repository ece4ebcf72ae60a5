"""``i2am ablate``: train and judge arms x seeds from one checkpoint, and compare them seed by seed."""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console

from i2am_train.callbacks.weights import snapshot_folders
from i2am_train.config.evaluation import EvaluateConfig
from i2am_train.config.options import plain
from i2am_train.config.store import BASE_ARM, arm_config, arm_name
from i2am_train.config.training import AblateConfig, TrainConfig
from i2am_train.data.dataset import data_root, prepare_data
from i2am_train.data.needed_files import noted_in
from i2am_train.errors import ConfigError
from i2am_train.files import read_json, write_json
from i2am_train.fingerprints import data_state
from i2am_train.locks import locked
from i2am_train.metrics.registry import METRICS
from i2am_train.models.by_name import with_layers, with_precision
from i2am_train.reporting.ablation_page import build_report
from i2am_train.reporting.ablation_tables import as_terminal, verdict_sentences
from i2am_train.results.run_files import read_history, read_samples
from i2am_train.results.study import SCHEMA, compare
from i2am_train.runs import RunFolder
from i2am_train.tracking.names import STEP_SECONDS
from i2am_train.tracking.scores import track_study
from i2am_train.tracking.session import sync_advice
from i2am_train.workflows import evaluate, train
from i2am_train.workflows.side_by_side import side_by_side

WITHOUT_EFFECT_ON_CELLS = (
    *("output", "arms", "seeds", "jobs", "data.workers", "device", "trainer.progress_bar", "tracking"),
)
"""Options that may differ when a study is asked for again: arms and seeds are added, other cells stay as they are."""
DONE = "minutes.json"
"""The last file of a cell that is written."""
TIMES = "times.json"
"""When a cell, or the study, was worked on: beginning and end of each time, in seconds since 1970. A process that is
killed leaves out its last time."""
LOG_WIDTH = 140
"""Columns of the tables in a log file."""


class Cell(NamedTuple):
    """One arm with one seed; the untrained checkpoint has none."""

    arm: str
    seed: int | None

    @property
    def folder(self) -> str:
        """Where the cell lies inside the study's folder.

        >>> Cell("refined", 0).folder, Cell("base", None).folder
        ('cells/refined-seed0', 'cells/base')
        """
        return f"cells/{self.name}"

    @property
    def name(self) -> str:
        """How it is called in the study's output."""
        name = arm_name(self.arm)
        return name if self.seed is None else f"{name}-seed{self.seed}"


def run(config: AblateConfig) -> None:
    """Fill all cells, write results and report, and show the table."""

    results = ablate(config)
    with locked(config.folder):
        report = build_report(config.folder)
    # Where the output goes to a file there is no width to fit; 80 columns would cut the tables' words.
    # Labels and paths with brackets are no markup.
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH, markup=False, emoji=False)
    console.print()
    console.print(as_terminal(results))
    for sentence in verdict_sentences(results):
        console.print(sentence)
    console.print(f"\nReport:  {report}\nTables:  {config.folder / 'results.md'}", soft_wrap=True)
    console.print(f"Numbers: {config.folder / 'results.json'}", soft_wrap=True)
    if advice := sync_advice(tracked(config).tracking, config.folder):
        console.print(advice, soft_wrap=True)


def ablate(config: AblateConfig) -> dict[str, Any]:
    """The study's results; cells that are finished already are not run again.

    Raises:
        I2AMError: an arm, the checkpoint, the data or the folder do not fit the configuration, or another process
            writes it.
    """
    with locked(config.folder), noted_in(config.folder):
        return _ablate(with_precision(with_layers(config)))


def _ablate(config: AblateConfig) -> dict[str, Any]:
    data_root(config.data, config.folder, config.tracking.folder)
    RunFolder.check(config.folder, plain(config), may_differ=WITHOUT_EFFECT_ON_CELLS)
    _check(config)
    root = prepare_data(config.data, config.folder, config.tracking.folder)
    arms = {arm: _arm_settings(config, arm) for arm in config.arms}
    folder = RunFolder.open(config.folder, plain(config), may_differ=WITHOUT_EFFECT_ON_CELLS)
    folder.start(data=data_state(root))
    finished = all((folder / cell.folder / DONE).is_file() for cell in _cells(config))
    with nullcontext() if finished else _timed(folder.path):
        entries = list(_entries(config, folder.path))
    results = _results(config, folder.path, arms, entries, folder.manifest)
    tracked_before = folder.finished and _holds(folder / "results.json", entries)
    write_json(folder / "results.json", results)
    if not tracked_before:
        track_study(tracked(config).tracking, folder.path, results)
    folder.finish()
    return results


def tracked(config: AblateConfig, arm: str | None = None, *tags: str) -> AblateConfig:
    """The study with its runs in one W&B group and folder, named after their cells and tagged."""
    tracking = replace(
        config.tracking,
        name=None,
        arm=arm,
        group=config.tracking.group or config.name,
        tags=[*([] if arm is None else [arm]), *tags, *config.tracking.tags],
        folder=config.tracking.folder or config.folder,
    )
    return replace(config, tracking=tracking)


def _holds(results: Path, entries: list[dict[str, Any]]) -> bool:
    return results.is_file() and read_json(results).get("cells") == entries


def _check(config: AblateConfig) -> None:
    """Bad input of any arm fails here, before anything is written."""
    if config.trainer.multi_process:
        raise ConfigError(
            "A study trains its cells one after another in this process; found trainer.devices="
            f"{config.trainer.devices}, trainer.num_nodes={config.trainer.num_nodes}. Set both to 1, or train the "
            "cells with 'i2am train', which can use several processes."
        )
    trained = [arm for arm in config.arms if arm != BASE_ARM]
    cells = {arm: _training(config, arm, 0, config.folder) for arm in trained}
    _check_different("names", {arm: arm_name(arm) for arm in config.arms})
    _check_different("labels", {arm: _arm_settings(config, arm)["label"] for arm in config.arms})
    judged = _evaluation(config, config.init)
    for cell in cells.values():
        train.make_checked_module(cell)
    model, _ = evaluate.prepare(judged, config.init, config.folder)
    for cell in cells.values():
        train.open_data(cell, model, processes=1)


def _check_different(what: str, called: dict[str, str]) -> None:
    """Tables and folders of a study go by what its arms are called."""
    for name in called.values():
        alike = [arm for arm, other in called.items() if other == name]
        if len(alike) > 1:
            raise ConfigError(
                f"The arms {' and '.join(alike)} are both called {name}. Arms have different {what}: rename a file, or "
                "set another label: in it."
            )


def _cells(config: AblateConfig) -> Iterator[Cell]:
    """Seed by seed, so that a stopped study holds whole comparisons."""
    if BASE_ARM in config.arms:
        yield Cell(BASE_ARM, None)
    for seed in config.seeds:
        for arm in config.arms:
            if arm != BASE_ARM:
                yield Cell(arm, seed)


def _entries(config: AblateConfig, root: Path) -> Iterator[dict[str, Any]]:
    """What comes of each cell, in their order."""
    cells = list(_cells(config))
    if config.jobs == 1:
        for cell, remaining in _with_time_left(cells):
            print(f"\n=== {cell.name}{remaining} ===", flush=True)
            yield _run_cell(config, cell, root)
        return
    unfinished = [cell for cell in cells if not (root / cell.folder / DONE).is_file()]
    quiet = replace(config, trainer=replace(config.trainer, progress_bar=False))
    tasks = {cell.name: partial(_run_cell, quiet, cell, root) for cell in unfinished}
    side_by_side(tasks, config.jobs, root / "cells", "ablate")
    for cell in cells:
        with redirect_stdout(io.StringIO()):  # that it is finished already
            yield _run_cell(config, cell, root)


def _with_time_left(cells: Sequence[Cell]) -> Iterator[tuple[Cell, str]]:
    started = time.monotonic()
    for position, cell in enumerate(cells):
        text = f" ({position + 1} of {len(cells)}"
        if position > 1:  # the first cell is often the untrained one, which says little
            minutes = (time.monotonic() - started) / position * (len(cells) - position) / 60
            text += f", about {minutes:.0f} min left"
        yield cell, text + ")"


def _run_cell(config: AblateConfig, cell: Cell, root: Path) -> dict[str, Any]:
    """What comes of a cell, which is made as far as it is not there yet."""
    folder = root / cell.folder
    with nullcontext() if (folder / DONE).is_file() else _timed(folder):
        results = _made_or_read(config, cell, root)
    if not (folder / DONE).is_file():
        seconds = sum(end - beginning for beginning, end in read_json(folder / TIMES))
        write_json(folder / DONE, {"minutes": round(seconds / 60, 2)})
    return {
        "arm": cell.arm,
        "seed": cell.seed,
        "folder": cell.folder,
        "metrics": {**results["metrics"], **_step_seconds(root, cell)},
        "samples": results["samples"],
        "minutes": read_json(folder / DONE)["minutes"],
        "warnings": results["warnings"],
    }


@contextmanager
def _timed(folder: Path) -> Iterator[None]:
    """Adds a time to those that a folder was worked on, also where it is stopped on the way."""
    beginning = time.time()
    try:
        yield
    finally:
        if folder.is_dir():  # else nothing was begun
            file = folder / TIMES
            before = read_json(file) if file.is_file() else []
            write_json(file, [*before, [round(beginning, 1), round(time.time(), 1)]])


def covered_seconds(times: Iterable[Sequence[float]]) -> float:
    """How long at least one of several times lasted, each given by beginning and end.

    >>> covered_seconds([(20, 30), (0, 5), (2, 9), (3, 4)])
    19.0
    """
    total, reached = 0.0, -math.inf
    for beginning, end in sorted(map(tuple, times)):
        total += max(0.0, end - max(beginning, reached))
        reached = max(reached, end)
    return total


def _wall_minutes(study: Path, cells: Iterable[Path]) -> float | None:
    """How long the study was worked on by the clock, on any of its cells, processes that begin included.

    Those of the cells stand in where the first process was killed. None where a cell is of a version that did not say.
    """
    files = [cell / TIMES for cell in cells]
    if not all(file.is_file() for file in files):
        return None
    files += [study / TIMES] if (study / TIMES).is_file() else []
    return round(covered_seconds(one for file in files for one in read_json(file)) / 60, 1)


def _made_or_read(config: AblateConfig, cell: Cell, root: Path) -> dict[str, Any]:
    """The evaluation of a cell, after its training and with its snapshots."""
    seed = [] if cell.seed is None else [f"seed{cell.seed}"]
    config = tracked(config, arm_name(cell.arm), *seed)
    checkpoint = config.init
    if cell.seed is not None:
        training = _training(config, cell.arm, cell.seed, root / cell.folder)
        checkpoint = str(train.train(training))
    judged = _evaluation(config, checkpoint)
    evaluation = root / cell.folder / "evaluation"
    results = evaluate.evaluate(judged, evaluation)
    for snapshot in snapshot_folders(root / cell.folder):
        one = evaluate.of_snapshot(judged, snapshot, evaluation)
        evaluate.evaluate(one, evaluate.default_output(one))
    return results


def _step_seconds(root: Path, cell: Cell) -> dict[str, float]:
    """What a training step took, as a metric of the cell; of the base nothing, which is not trained."""
    history = read_history(root / cell.folder / "metrics.csv", cell.arm, cell.seed)
    if history is None or STEP_SECONDS not in history.curves:
        return {}
    return {STEP_SECONDS: median(history.curves[STEP_SECONDS].values.tolist())}


def _training(config: AblateConfig, arm: str, seed: int, output: Path) -> TrainConfig:
    return with_layers(arm_config(config, arm, seed, output))


def _evaluation(config: AblateConfig, checkpoint: str) -> EvaluateConfig:
    return EvaluateConfig(
        checkpoint=checkpoint,
        device=config.device,
        progress_bar=config.trainer.progress_bar,
        data=config.data,
        sampling=config.sampling,
        attribution=config.attribution,
        evaluation=config.evaluation,
        tracking=config.tracking,
    )


def _arm_settings(config: AblateConfig, arm: str) -> dict[str, Any]:
    """Entry of an arm in ``results.json``; reading it here checks the arm's file before anything is run."""
    if arm == BASE_ARM:
        return {"name": arm, "label": "Base", "losses": {}}
    training = _training(config, arm, 0, Path())
    return {
        "name": arm,
        "label": training.label,
        "losses": plain(training.objective) if training.objective.active else {},
        "steps": training.optimization.steps,
    }


def _results(
    config: AblateConfig,
    root: Path,
    arms: dict[str, dict[str, Any]],
    entries: list[dict[str, Any]],
    manifest: dict[str, Any],
) -> dict[str, Any]:
    samples = {
        entry["folder"]: read_samples(root / entry["folder"] / "evaluation" / "samples.jsonl") for entry in entries
    }
    shown = {name for entry in entries for name in entry["metrics"]}
    metrics = {name: info.as_json() for name, info in METRICS.items() if name in shown}
    compared = compare(
        entries,
        metrics,
        list(arms),
        config.reference,
        samples=samples,
        confidence=config.confidence,
        resamples=config.bootstrap_samples,
    )
    return {
        "schema": SCHEMA,
        **{name: manifest[name] for name in ("command", "git", "machine", "versions")},
        "kind": "ablation",
        "name": config.name,
        "data": manifest["data"],
        "started": manifest["started"],
        "minutes": round(sum(entry["minutes"] for entry in entries), 1),
        "wall_minutes": _wall_minutes(root, (root / entry["folder"] for entry in entries)),
        "settings": manifest["settings"],
        "metrics": metrics,
        "arms": list(arms.values()),
        "seeds": config.seeds,
        "cells": entries,
        **compared,
    }
