"""``i2am faithful``: whether a checkpoint's attention is a cause of its images."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.utils.data import default_collate
from tqdm import tqdm

from i2am_train.config.evaluation import FaithfulConfig
from i2am_train.config.locations import checkpoint_folder
from i2am_train.config.options import plain
from i2am_train.data.dataset import batch_on, data_root, prepare_data
from i2am_train.data.module import TryOnDataModule
from i2am_train.data.needed_files import refuse_broken_pictures
from i2am_train.environment import provenance
from i2am_train.evaluation.faithfulness import check_faithfulness, faithfulness, layers_asked, remake_of, runs_of
from i2am_train.evaluation.scoring import batches
from i2am_train.files import read_json, write_json, write_text
from i2am_train.fingerprints import data_state
from i2am_train.locks import locked
from i2am_train.models.tryon import load_model, model_folder
from i2am_train.ops.numerics import chosen_device
from i2am_train.reporting.faithfulness import faithfulness_figure, faithfulness_tables, summary
from i2am_train.reporting.figures.canvas import save_figure
from i2am_train.reporting.table import markdown, terminal
from i2am_train.runs import RunFolder, checkpoint_label, folder_beside

RESULTS, PARTIAL = "faithfulness.json", "partial"
WITHOUT_EFFECT = ("output", "device", "progress_bar", "data.workers")
"""Options that may differ when a stopped run goes on."""


def run(config: FaithfulConfig) -> None:
    """Measure, and print the tables and where everything lies."""
    folder = config.output or folder_beside(checkpoint_folder(config.checkpoint), "faithful")
    with locked(folder):
        results = _measured(config, folder)
    console = Console(markup=False, emoji=False)
    for table in faithfulness_tables(results):
        console.print(terminal(table))
    print(f"Everything of this measurement: {folder}")


def _measured(config: FaithfulConfig, folder: Path) -> dict[str, Any]:
    device = chosen_device(config.device)
    settings = plain(config) | {"checkpoint": str(model_folder(config.checkpoint))}
    data_root(config.data, folder)
    RunFolder.check(folder, settings, may_differ=WITHOUT_EFFECT)
    model = load_model(config.checkpoint, config.data).to(device).eval()
    check_faithfulness(model, None, config, config.attribution)
    used = layers_asked(model, None, config.layers)
    layers = layers_asked(model, None, config.attribution.layers, used)
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
        return dict(read_json(folder / RESULTS))
    opened.start(seed=config.sampling.seed, data=data_state(datamodule.root))
    images = runs_of(config, len(used))
    print(
        f"Each of the {len(dataset)} images is made {images} times, in {config.sampling.steps} steps: "
        f"{len(dataset) * images} images on {device.type}."
    )
    parts = batches(len(dataset), config.batch_size)
    files = [folder / PARTIAL / f"batch-{number:05d}.json" for number in range(len(parts))]
    done = sum(len(part) for part, file in zip(parts, files, strict=True) if file.is_file())
    with tqdm(
        total=len(dataset) * images,
        initial=done * images,
        unit="image",
        desc="making images",
        disable=not config.progress_bar,
    ) as bar:
        for part, file in zip(parts, files, strict=True):
            if not file.is_file():
                batch = batch_on(default_collate([dataset[position] for position in part]), device)
                remake = remake_of(model, batch, config.sampling)
                write_json(file, faithfulness(remake, config, config.attribution, partial(bar.update, len(part))))
    rows = [row for file in files for row in read_json(file)]
    results = {
        "label": checkpoint_label(model_folder(config.checkpoint)),
        "layers": layers,
        "shares": config.shares,
        "scores": summary(rows),
        "samples": rows,
        "settings": settings,
        "provenance": provenance(),
    }
    write_text(
        folder / "faithfulness.md", "\n\n".join(markdown(table) for table in faithfulness_tables(results)) + "\n"
    )
    save_figure(faithfulness_figure(results), folder / "faithfulness.png")
    write_json(folder / RESULTS, results)
    opened.finish()
    shutil.rmtree(folder / PARTIAL)
    return results
