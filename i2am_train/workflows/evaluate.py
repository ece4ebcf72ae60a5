"""``i2am evaluate``: judge a checkpoint on held-out samples, or a folder of finished images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from i2am_train.callbacks.evaluation import GenerationCallback
from i2am_train.callbacks.weights import snapshot_folders
from i2am_train.config.evaluation import EvaluateConfig
from i2am_train.config.locations import checkpoint_folder
from i2am_train.config.options import plain
from i2am_train.data.dataset import data_root, prepare_data
from i2am_train.data.module import TryOnDataModule
from i2am_train.data.needed_files import noted_in, refuse_broken_pictures
from i2am_train.environment import first_process, wait_for
from i2am_train.errors import CheckpointError, I2AMError
from i2am_train.evaluation.evaluator import (
    EvaluationResult,
    EvaluationSettings,
    GeneratedSamples,
    check_settings,
    person_names,
    read_results,
    real_images,
    score_generated,
    write_evaluation,
)
from i2am_train.evaluation.faithfulness import layers_asked, runs_of
from i2am_train.evaluation.scoring import ScoringOptions, check_counts, check_scoring, open_folders, score_images
from i2am_train.files import read_object
from i2am_train.fingerprints import correspondence_mark, data_state, folder_state
from i2am_train.locks import locked
from i2am_train.models.by_name import load_model, model_folder, with_layers, with_precision
from i2am_train.models.tryon import TryOnModel
from i2am_train.ops.numerics import check_device
from i2am_train.reporting.faithfulness import measured, write_shown
from i2am_train.reporting.model_tables import CAUTION, TABLE_2, evaluation_scores, published_values
from i2am_train.reporting.table import terminal
from i2am_train.results.run_files import write_panels
from i2am_train.runs import (
    MANIFEST_FILE,
    SETTINGS_FILE,
    RunFolder,
    checkpoint_label,
    folder_beside,
    require_apart,
    run_of,
)
from i2am_train.tracking.scores import track_evaluation
from i2am_train.tracking.session import arm_name, sync_advice, use_dataset, use_images, use_model
from i2am_train.trainers import check_test_trainer, make_test_trainer, make_untrained_module
from i2am_train.types import GridSize, Pairing

WITHOUT_EFFECT_ON_SCORES = (
    "output",
    "device",
    "devices",
    "strategy",
    "progress_bar",
    "expected",
    "data.workers",
    "tracking",
)
"""Options that may differ when a stopped evaluation goes on, or a finished one is asked for again."""


def run(config: EvaluateConfig) -> None:
    """Evaluate, and print the scores and where everything lies."""
    for one in _with_snapshots(config):
        folder = default_output(one)
        results = evaluate(one, folder)
        if first_process():
            print_scores(results, expected_values(one))
            print(f"Everything of this evaluation: {folder}")
            if advice := sync_advice(one.tracking, folder):
                print(advice)


def _with_snapshots(config: EvaluateConfig) -> list[EvaluateConfig]:
    """The evaluation itself, after those of the run's snapshots if they were asked for.

    Raises:
        CheckpointError: snapshots were asked for, and the checkpoint is not a run that kept any.
    """
    if not config.snapshots:
        return [config]
    run = checkpoint_folder(config.checkpoint or "")
    folders = snapshot_folders(run)
    if not folders:
        raise CheckpointError(
            f"{run} holds no snapshots. Give the folder of a run that was trained with "
            "trainer.snapshot_every_n_steps=N, or leave out snapshots=true."
        )
    output = default_output(config)
    one = replace(config, snapshots=False)
    return [*(of_snapshot(one, folder, output) for folder in folders), one]


def of_snapshot(config: EvaluateConfig, snapshot: Path, output: Path) -> EvaluateConfig:
    """The evaluation of a run's snapshot as that of the run, in a folder beside its ``output``.

    >>> one = of_snapshot(EvaluateConfig(checkpoint="a"), Path("a/snapshots/step-000100"), Path("a/evaluation-paired"))
    >>> one.output.name
    'evaluation-paired-step-000100'
    """
    folder = output.with_name(f"{output.name}-{snapshot.name}")
    return replace(config, checkpoint=str(snapshot), output=folder)


def expected_values(config: EvaluateConfig) -> dict[str, float]:
    """What the paper reports for the model that is judged, or that its run was to repeat; empty if nothing.

    Raises:
        RunFolderError: the run's settings cannot be read.
    """
    model = config.expected
    if model is None and config.checkpoint is not None:
        folder = checkpoint_folder(config.checkpoint)
        place = run_of(folder)
        settings = (folder if place is None else place[0]) / SETTINGS_FILE
        model = read_object(settings).get("expected") if settings.is_file() else None
    if model is None or model not in TABLE_2:
        return {}
    return published_values(model, paired=config.evaluation.pairing is Pairing.PAIRED)


def print_scores(results: dict[str, Any], expected: dict[str, float] | None = None) -> None:
    """The scores as a table, with the paper's beside them if given, the number of samples and any warning."""
    console = Console(markup=False, emoji=False)
    console.print(terminal(evaluation_scores(results, expected or {})))
    if expected:
        console.print(CAUTION)
    for warning in results["warnings"]:
        console.print(f"Warning: {warning}", style="bold yellow")


def default_output(config: EvaluateConfig) -> Path:
    """``output``, or a folder in the run's, or one in ``runs/`` that is named after what is judged.

    >>> default_output(EvaluateConfig(checkpoint="tiny")) == Path.cwd() / "runs" / "tiny-evaluation-paired"
    True
    """
    if config.output is not None:
        return config.output

    name = f"evaluation-{config.evaluation.pairing}"
    if config.images is not None:
        return Path.cwd() / "runs" / f"{config.images.name}-{name}"
    return folder_beside(checkpoint_folder(config.checkpoint or ""), name)


def evaluate(config: EvaluateConfig, folder: Path) -> dict[str, Any]:
    """The results of a checkpoint or of finished images; computed unless the folder holds them already.

    Raises:
        I2AMError: checkpoint, data, images or folder do not fit the configuration, or another process writes it.
    """
    with locked(folder), noted_in(folder):
        if config.checkpoint is None:
            return _evaluate_folders(config, folder)
        return _evaluate_checkpoint(config, config.checkpoint, folder)


def _evaluate_folders(config: EvaluateConfig, folder: Path) -> dict[str, Any]:
    """Image metrics of the images in one folder against those in another."""
    assert config.images is not None  # the schema's check
    assert config.reference is not None
    check_device(config.device)
    for root in (config.images, config.reference):
        require_apart(root, folder, config.tracking.folder, counts=lambda name: True)
    paired = config.evaluation.pairing is Pairing.PAIRED
    images, reference = open_folders(
        config.images,
        config.reference,
        paired=paired,
        samples=config.evaluation.samples,
        resize=None if config.resize is None else GridSize(*config.resize),
    )
    options = ScoringOptions.of(config)
    check_scoring(images, reference, options)
    unused = ("checkpoint", "data", "sampling", "attribution")
    settings = {name: value for name, value in plain(config).items() if name not in unused}
    settings["fingerprints"] = {
        "images": folder_state(config.images).fingerprint,
        "reference": folder_state(config.reference).fingerprint,
    }
    opened = RunFolder.open(folder, settings, may_differ=WITHOUT_EFFECT_ON_SCORES)
    if opened.finished and (finished := read_results(folder)) is not None:
        return finished
    opened.start(data=settings["fingerprints"]["reference"])
    try:
        scores = score_images(images, reference, options, paired=paired)
    except I2AMError:
        opened.discard()  # once the image at fault is replaced, the folders are others
        raise
    rows = [{"index": index, "name": name} for index, name in enumerate(images.names)]
    result = EvaluationResult.of_images(rows, scores)
    write_evaluation(folder, result, settings)
    track_evaluation(
        config.tracking,
        folder,
        result,
        arm=config.images.name,
        panels=(),
        use_inputs=partial(_use_folders, config, settings["fingerprints"]),
    )
    opened.finish()
    return read_results(folder) or {}


def _use_folders(config: EvaluateConfig, fingerprints: Mapping[str, str], run: Any) -> None:
    for role, root in (("images", config.images), ("reference", config.reference)):
        assert root is not None  # the schema's check
        use_images(run, role, root, fingerprints[role])


def _evaluate_checkpoint(config: EvaluateConfig, checkpoint: str, folder: Path) -> dict[str, Any]:
    """Attention scores and image metrics of a model on held-out samples.

    Images are generated on all devices and scored by the first process; the others return nothing.
    """
    config = with_precision(with_layers(config))
    settings = plain(config) | {"checkpoint": str(model_folder(checkpoint))}
    data_root(config.data, folder, config.tracking.folder)
    RunFolder.check(folder, settings, may_differ=WITHOUT_EFFECT_ON_SCORES)
    model, datamodule = prepare(config, checkpoint, folder)
    if not first_process():
        wait_for(folder / MANIFEST_FILE)
    opened = RunFolder.open(folder, settings, may_differ=WITHOUT_EFFECT_ON_SCORES)
    finished = read_results(folder)
    if opened.finished and finished is not None:
        return finished
    if first_process():
        opened.start(seed=config.sampling.seed, data=data_state(datamodule.root))
    dataset = datamodule.test_dataset()
    samples = GeneratedSamples(folder=folder, names=person_names(dataset), batch_size=config.evaluation.batch_size)
    _generate(config, model, datamodule, samples)
    if not first_process():
        return {}
    result = score_generated(
        samples, real_images(dataset), ScoringOptions.of(config), paired=config.evaluation.pairing is Pairing.PAIRED
    )
    result.protocol |= correspondence_mark(datamodule.root)
    panels = samples.panels()
    if panels:
        write_panels(folder, panels)
    if config.evaluation.faithful_samples:
        label = checkpoint_label(model_folder(checkpoint))
        write_shown(measured(label, result.rows, config.evaluation.faithfulness.shares), folder)
    write_evaluation(folder, result, settings)
    track_evaluation(
        config.tracking,
        folder,
        result,
        arm=arm_name(model_folder(checkpoint)),
        panels=panels,
        use_inputs=partial(_use_data_and_model, config, datamodule.root, opened.manifest["data"]),
    )
    opened.finish()
    samples.clear()
    return read_results(folder) or {}


def _use_data_and_model(config: EvaluateConfig, root: Path, data: str, run: Any) -> None:
    use_dataset(run, root, data)
    use_model(run, model_folder(config.checkpoint or ""), upload=config.tracking.upload_model)


def _generate(
    config: EvaluateConfig, model: TryOnModel, datamodule: TryOnDataModule, samples: GeneratedSamples
) -> None:
    """Make the batches that are not there yet."""
    pending = samples.pending()
    if not pending:
        return
    datamodule.test_batches = pending
    if (judged := min(config.evaluation.faithful_samples, len(samples.names))) and first_process():
        layers = layers_asked(model, None, config.evaluation.faithfulness.layers)
        again = runs_of(config.evaluation.faithfulness, len(layers))
        print(
            f"Each of the first {judged} samples is made {again} times more, to tell whether attention is a cause: "
            f"{judged * again} images beside the {len(samples.names)}."
        )
    callback = GenerationCallback(samples, config.sampling, config.attribution, config.evaluation)
    trainer = make_test_trainer(config, callback)
    trainer.test(make_untrained_module(model), datamodule, verbose=False)


def prepare(config: EvaluateConfig, checkpoint: str, folder: Path) -> tuple[TryOnModel, TryOnDataModule]:
    """Model and data of an evaluation in ``folder``; bad input leaves nothing behind.

    Raises:
        I2AMError: device, checkpoint, data, layers, metrics or number of samples do not fit the configuration.
    """
    check_test_trainer(config)
    model = load_model(checkpoint, config.data)
    check_settings(model, EvaluationSettings.of(config))
    scoring = ScoringOptions.of(config)
    embedded = config.data.synthetic.test if config.data.root is None else None
    if (samples := config.evaluation.samples or embedded) is not None:
        check_counts(samples, samples, scoring)
    # May draw the embedded dataset, which takes a while.
    root = prepare_data(config.data, folder, config.tracking.folder)
    datamodule = TryOnDataModule(
        config.data,
        root,
        seed=config.sampling.seed,
        eval_batch_size=config.evaluation.batch_size,
        test_samples=config.evaluation.samples,
        test_pairing=config.evaluation.pairing,
    )
    dataset = datamodule.test_dataset()
    if first_process():
        refuse_broken_pictures([dataset])
    real = real_images(dataset)
    check_scoring(real, real, scoring)
    return model, datamodule
