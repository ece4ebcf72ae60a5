"""``i2am faithful``: whether a checkpoint's attention is a cause of its images.

``i2am diagnose``: which layer's attention should be repaired. Both make images again, batch by batch.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

from rich.console import Console
from torch.utils.data import default_collate
from tqdm import tqdm

from i2am_train.config.evaluation import DiagnoseConfig
from i2am_train.config.explanation import TRYON, FaithfulConfig
from i2am_train.config.locations import checkpoint_folder, revisions
from i2am_train.config.options import plain
from i2am_train.config.store import arm_values
from i2am_train.data.dataset import batch_on, data_root, prepare_data
from i2am_train.data.module import TryOnDataModule
from i2am_train.data.needed_files import refuse_broken_pictures
from i2am_train.environment import provenance
from i2am_train.evaluation.diagnosis import diagnosis, images_of, layer_heads
from i2am_train.evaluation.faithfulness import check_faithfulness, faithfulness, layers_asked, runs_of
from i2am_train.evaluation.remaking import Remake, counted, refuse_chance, remake_of, remake_of_picture
from i2am_train.evaluation.scoring import batches
from i2am_train.files import read_json, write_json, write_text
from i2am_train.fingerprints import data_state
from i2am_train.locks import locked
from i2am_train.models.by_name import load_model, model_folder, with_layers, with_precision
from i2am_train.models.loaders import loader_of
from i2am_train.models.tryon import TryOnModel
from i2am_train.ops.numerics import chosen_device
from i2am_train.reporting.diagnosis import (
    HEADS,
    PAGE,
    REPAIR,
    diagnosed,
    diagnosis_tables,
    repair,
    repair_file,
    verdict_sentences,
)
from i2am_train.reporting.diagnosis_page import diagnosis_figure, diagnosis_page
from i2am_train.reporting.faithfulness import RESULTS, faithfulness_tables, measured, write_shown, write_tables
from i2am_train.reporting.figures.canvas import save_figure
from i2am_train.reporting.table import Table, terminal
from i2am_train.runs import RunFolder, checkpoint_label, folder_beside
from i2am_train.workflows.explain import check_options, picture_request, source_of

WIDTH = 110
"""Characters of the tables where the terminal has fewer."""
PARTIAL = "partial"
"""Folder of the rows of finished batches."""
WITHOUT_EFFECT = ("output", "device", "progress_bar", "data.workers")
"""Options that may differ when a stopped run goes on."""
_PROPOSED_FROM = "refined"
"""The experiment whose terms and weights a proposal takes."""

_Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _Measurement:
    """What is measured of a model by making its images again, and what becomes of it."""

    images: int
    """How often each image is made."""
    rows: Callable[[Remake, Callable[[], None]], _Rows]
    """Of a batch; calls the function each time that the images were made."""
    results: Callable[[_Rows], dict[str, Any]]
    """Of the rows of all samples."""
    write: Callable[[dict[str, Any], Path], None]
    """Everything but the results themselves, into the folder."""


def run(config: FaithfulConfig) -> None:
    """Measure, and print the tables and where everything lies."""
    config = with_layers(config)
    if config.model == TRYON:
        folder = config.output or folder_beside(checkpoint_folder(config.checkpoint or ""), "faithful")
        results = _measured(config, folder, RESULTS, partial(_faithful, config))
    else:
        folder = config.output or Path.cwd() / "runs" / f"faithful-{config.of_picture}"
        with locked(folder):
            results = _of_picture(config, folder)
    _print(faithfulness_tables(results))
    print(f"Everything of this measurement: {folder}")


def _faithful(config: FaithfulConfig, model: TryOnModel) -> _Measurement:
    check_faithfulness(model, None, config, config.attribution, config.sampling.steps)

    def rows(remake: Remake, on_run: Callable[[], None]) -> _Rows:
        return faithfulness(remake, config, config.attribution, on_run)

    return _Measurement(
        images=runs_of(config, len(layers_asked(model, None, config.layers))),
        rows=rows,
        results=lambda rows: measured("", rows, config.shares),
        write=write_shown,
    )


def _of_picture(config: FaithfulConfig, folder: Path) -> dict[str, Any]:
    """The results of one picture by another person's model; read where they are finished."""
    settings = plain(config) | revisions(*config.checkpoints)
    RunFolder.check(folder, settings, may_differ=WITHOUT_EFFECT)
    loader = loader_of(config.model)
    check_options(config, loader)
    request, reference_mask = picture_request(config, loader)
    model = loader.load(source_of(config))
    check_faithfulness(model.target, model.recipe, config, config.attribution, config.sampling.steps)
    remake = remake_of_picture(model, request, name=config.picture, reference_mask=reference_mask)
    used = layers_asked(model.target, model.recipe, config.layers)
    opened = RunFolder.open(folder, settings, may_differ=WITHOUT_EFFECT)
    if opened.finished:
        return dict(read_json(folder / RESULTS))
    most = 2 + runs_of(config, len(used))
    print(f"The picture is made up to {most} times, in {config.sampling.steps} steps, on {config.device}.")
    if reference_mask is None:
        print("Without reference_mask= all of the reference counts.")
    if left_out := sorted({"gradient", "gradient_attention", "truth"} & set(config.controls)):
        print(f"Left out of the controls, without gradients and truth: {', '.join(left_out)}.")
    with tqdm(total=most, unit="image", desc="making images", disable=not config.progress_bar) as bar:
        refuse_chance(counted(remake, bar.update))
        opened.start(seed=config.sampling.seed)
        rows = faithfulness(remake, config, config.attribution, bar.update)
    results = {
        **measured("", rows, config.shares),
        "label": config.of_picture,
        "settings": settings,
        "provenance": provenance(),
    }
    write_shown(results, folder)
    write_json(folder / RESULTS, results)
    opened.finish()
    return results


def diagnose(config: DiagnoseConfig) -> None:
    """Measure, print tables and proposal, and say where everything lies."""
    folder = config.output or folder_beside(checkpoint_folder(config.checkpoint), "diagnose")
    results = _measured(config, folder, "diagnosis.json", partial(_diagnosed, config))
    _print(table for table in diagnosis_tables(results) if table.name != HEADS)
    for sentence in verdict_sentences(results):
        print(sentence)
    if (file := folder / REPAIR).is_file():
        print(f"i2am train experiment={file} init={config.checkpoint}")
    print(f"Everything of this diagnosis: {folder} (page: {folder / PAGE})")


def _diagnosed(config: DiagnoseConfig, model: TryOnModel) -> _Measurement:
    heads = layer_heads(model, None, config)
    objective = arm_values(_PROPOSED_FROM)["objective"]

    def rows(remake: Remake, on_run: Callable[[], None]) -> _Rows:
        return diagnosis(remake, config, on_run)

    def write(results: dict[str, Any], folder: Path) -> None:
        write_tables(folder / "diagnosis.md", diagnosis_tables(results))
        save_figure(diagnosis_figure(results), folder / "diagnosis.png")
        proposed = repair(results, objective)
        file = None if proposed is None else repair_file(results, proposed)
        if file is not None:
            write_text(folder / REPAIR, file)
        write_text(folder / PAGE, diagnosis_page(results, file))

    return _Measurement(
        images=images_of(heads, config),
        rows=rows,
        results=lambda rows: diagnosed(rows, list(heads), least_use=config.least_use),
        write=write,
    )


def _measured(
    config: FaithfulConfig | DiagnoseConfig, folder: Path, file: str, measure: Callable[[TryOnModel], _Measurement]
) -> dict[str, Any]:
    """The results of a measurement, which is made batch by batch, goes on where it was stopped, and is read where it
    is finished. All that can be checked is checked before anything is written."""
    with locked(folder):
        return _made_or_read(config, folder, file, measure)


def _made_or_read(
    config: FaithfulConfig | DiagnoseConfig, folder: Path, file: str, measure: Callable[[TryOnModel], _Measurement]
) -> dict[str, Any]:
    config, device = with_precision(config), chosen_device(config.device)
    settings = plain(config) | {"checkpoint": str(model_folder(config.checkpoint or ""))}
    data_root(config.data, folder)
    RunFolder.check(folder, settings, may_differ=WITHOUT_EFFECT)
    model = load_model(config.checkpoint or "", config.data).to(device).eval()
    measurement = measure(model)
    # May draw the embedded dataset, which takes a while.
    datamodule = TryOnDataModule(
        config.data,
        prepare_data(config.data, folder),
        seed=config.sampling.seed,
        eval_batch_size=config.batch_size,
        test_samples=config.samples,
    )
    dataset = datamodule.test_dataset()
    refuse_broken_pictures([dataset])
    opened = RunFolder.open(folder, settings, may_differ=WITHOUT_EFFECT)
    if opened.finished:
        return dict(read_json(folder / file))
    opened.start(seed=config.sampling.seed, data=data_state(datamodule.root))
    print(
        f"Each of the {len(dataset)} images is made {measurement.images} times, in {config.sampling.steps} steps: "
        f"{len(dataset) * measurement.images} images on {device.type}."
    )
    parts = batches(len(dataset), config.batch_size)
    files = [folder / PARTIAL / f"batch-{number:05d}.json" for number in range(len(parts))]
    done = sum(len(part) for part, kept in zip(parts, files, strict=True) if kept.is_file())
    with tqdm(
        total=len(dataset) * measurement.images,
        initial=done * measurement.images,
        unit="image",
        desc="making images",
        disable=not config.progress_bar,
    ) as bar:
        for part, kept in zip(parts, files, strict=True):
            if not kept.is_file():
                batch = batch_on(default_collate([dataset[position] for position in part]), device)
                remake = remake_of(model, batch, config.sampling)
                write_json(kept, measurement.rows(remake, partial(bar.update, len(part))))
    results = {
        **measurement.results([row for kept in files for row in read_json(kept)]),
        "label": checkpoint_label(model_folder(config.checkpoint or "")),
        "settings": settings,
        "provenance": provenance(),
    }
    measurement.write(results, folder)
    write_json(folder / file, results)
    opened.finish()
    shutil.rmtree(folder / PARTIAL)
    return results


def _print(tables: Iterable[Table]) -> None:
    console = Console(markup=False, emoji=False, width=max(get_terminal_size().columns, WIDTH))
    for table in tables:
        console.print(terminal(table))
