"""``i2am evaluate``: judge a checkpoint on held-out samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from i2am_train.commands.entry import entry
from i2am_train.config.schema import EvaluateConfig

if TYPE_CHECKING:
    from i2am_train.datasets.datamodule import TryOnDataModule
    from i2am_train.evaluation.evaluator import EvaluationSettings
    from i2am_train.models.tryon import TryOnModel


def run(config: EvaluateConfig) -> None:
    """Evaluate, and print the scores and where everything lies."""
    folder = default_output(config)
    results = evaluate(config, folder)
    print_scores(results)
    print(f"Images, scores of each sample and panels: {folder}")


def print_scores(results: dict[str, Any]) -> None:
    """The scores as a table, with the number of samples and any warning."""
    from rich.console import Console
    from rich.table import Table

    from i2am_train.metrics.registry import METRICS

    table = Table(title=f"{results['samples']} samples")
    for heading in ("score", "value", "meaning"):
        table.add_column(heading, justify="right" if heading == "value" else "left")
    for name, info in METRICS.items():
        if name in results["metrics"]:
            arrow = {True: " (higher is better)", False: " (lower is better)", None: ""}
            value = f"{results['metrics'][name]:.{info.digits}f}"
            table.add_row(info.label, value, info.description + arrow[info.higher_is_better])
    console = Console()
    console.print(table)
    for warning in results["warnings"]:
        console.print(f"Warning: {warning}", style="bold yellow")


def default_output(config: EvaluateConfig) -> Path:
    """``output``, or a folder in the run's, or one in ``runs/`` that is named after the checkpoint."""
    if config.output is not None:
        return config.output
    from i2am_train.config.locations import checkpoint_folder

    folder = checkpoint_folder(config.checkpoint)
    name = f"evaluation-{config.evaluation.pairing}"
    if (folder / "settings.json").is_file():
        return folder / name
    return Path.cwd() / "runs" / f"{folder.name}-{name}"


def evaluate(config: EvaluateConfig, folder: Path) -> dict[str, Any]:
    """The results of a checkpoint; computed unless the folder holds them already.

    Raises:
        I2AMError: checkpoint, data or folder do not fit the configuration.
    """
    from i2am_train.assembly import make_test_trainer, make_untrained_module, model_folder
    from i2am_train.callbacks.evaluation import EvaluationCallback
    from i2am_train.config.build import plain
    from i2am_train.evaluation.results import read_results
    from i2am_train.runs import RunFolder, fingerprint

    model, scored, datamodule = prepare(config)
    settings = plain(config) | {"checkpoint": str(model_folder(config.checkpoint))}
    opened = RunFolder.open(
        folder, settings, may_differ=("output", "device", "progress_bar", "data.workers")
    )
    finished = read_results(folder)
    if opened.finished and finished is not None:
        return finished
    opened.start(seed=config.sampling.seed, data=fingerprint(datamodule.root))
    callback = EvaluationCallback(
        scored,
        folder,
        panel_samples=config.evaluation.panel_samples,
        save_images=True,
        description=settings,
    )
    trainer = make_test_trainer(config, callback)
    trainer.test(make_untrained_module(model), datamodule, verbose=False)
    opened.finish()
    results = read_results(folder)
    assert results is not None
    return results


def prepare(config: EvaluateConfig) -> tuple[TryOnModel, EvaluationSettings, TryOnDataModule]:
    """Model, scores and data of an evaluation, made before its folder: bad input leaves nothing behind.

    Raises:
        I2AMError: device, checkpoint, data, layers, metrics or number of samples do not fit the configuration.
    """
    from i2am_train.assembly import (
        check_device,
        load_model,
        make_datamodule,
        make_settings,
        prepare_data,
    )
    from i2am_train.evaluation.evaluator import check_settings

    check_device(config.device)
    root = prepare_data(config.data)
    model = load_model(config.checkpoint, config.data)
    settings = make_settings(config.sampling, config.attribution, config.evaluation.metrics)
    check_settings(model, settings)
    datamodule = make_datamodule(
        config.data,
        root,
        seed=config.sampling.seed,
        eval_batch_size=config.evaluation.batch_size,
        test_samples=config.evaluation.samples,
        pairing=config.evaluation.pairing,
    )
    datamodule.test_dataset()
    return model, settings, datamodule


if __name__ == "__main__":
    entry("evaluate", run)
