"""``i2am train``: train a model from a checkpoint; the same command again continues a stopped run."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

import torch
from rich.console import Console
from rich.table import Table

from i2am_train.callbacks.checkpoints import resume_point
from i2am_train.callbacks.loggers import finish_tracking, record_model
from i2am_train.config.data import data_words
from i2am_train.config.locations import revisions
from i2am_train.config.objective import TRUTH
from i2am_train.config.options import plain
from i2am_train.config.store import to_yaml
from i2am_train.config.training import WITHOUT_EFFECT_ON_WEIGHTS, TrainConfig
from i2am_train.data.dataset import TryOnDataset, data_root, prepare_data, reading_of, require_correspondence
from i2am_train.data.module import TryOnDataModule
from i2am_train.data.needed_files import noted_in, refuse_broken_pictures
from i2am_train.environment import first_process, wait_for, without_secrets
from i2am_train.evaluation.evaluator import EvaluationSettings, check_settings
from i2am_train.fingerprints import data_state
from i2am_train.locks import locked
from i2am_train.models.by_name import with_layers
from i2am_train.models.lora import ADAPTER_FOLDER, has_adapters, save_adapters
from i2am_train.models.tryon import TryOnModel
from i2am_train.reporting.model_tables import published_row
from i2am_train.runs import MANIFEST_FILE, MODEL_FOLDER, RunFolder
from i2am_train.tracking.session import sync_advice
from i2am_train.trainers import (
    check_callbacks,
    check_trainer,
    imported_callbacks,
    make_module,
    make_trainer,
    measure_steps,
    release_signals,
)
from i2am_train.training.encode_dataset import open_cache
from i2am_train.training.module import TryOnModule
from i2am_train.training.optimization import trained_weights
from i2am_train.training.preflight import (
    check_batches,
    check_best,
    check_disk,
    check_trained,
    describe_run,
    memory_advice,
)


def run(config: TrainConfig) -> None:
    """Train and say where the model lies; or only try whether it would work."""
    if config.dry_run:
        rehearse(config)
        return
    folder = train(config)
    if first_process():
        judged = f"i2am evaluate {quote(f'checkpoint={folder}')}{data_words(config.data)}"
        print(f"\nModel: {folder / 'model'}\nJudge it with: {judged}")
        if config.expected is not None:
            print(
                f"{published_row(config.expected)}\nFor numbers beside it, add data=viton_hd data.root="
                f"{config.data.root} sampling=ddim50 sampling.guidance=5 evaluation=paper, and then again "
                "evaluation.pairing=unpaired."
            )
        if advice := sync_advice(config.tracking, folder):
            print(advice)


def train(config: TrainConfig) -> Path:
    """Train one run, or continue it, or leave it if it is finished; the run folder.

    Raises:
        I2AMError: data, checkpoint, layer or run folder do not fit the configuration, or another process writes it.
    """
    with locked(config.folder), noted_in(config.folder):
        return _train(with_layers(config))


def _train(config: TrainConfig) -> Path:
    own = imported_callbacks(config.callbacks)
    resume = config.resume or not first_process()  # the others find the folder that the first made
    data_root(config.data, config.folder, config.tracking.folder)
    RunFolder.check(config.folder, plain(config), resume=resume, may_differ=(*WITHOUT_EFFECT_ON_WEIGHTS, "revisions"))
    module, datamodule = prepare(config)
    if not first_process():
        wait_for(config.folder / MANIFEST_FILE)
    folder = RunFolder.open(
        config.folder, plain(config) | revisions(config.init), resume=resume, may_differ=WITHOUT_EFFECT_ON_WEIGHTS
    )
    if folder.finished:
        print(f"{folder.path} is finished already; nothing to train.")
        return folder.path
    if first_process():
        folder.start(seed=config.seed, data=data_state(datamodule.root))
        print(trained_weights(module.model))
    checkpoint, damage = resume_point(folder.path)
    if first_process():
        print(*damage, sep="\n", end="\n" if damage else "")
    trainer = make_trainer(config, folder.path, own)
    try:
        with memory_advice(trainer):
            trainer.fit(module, datamodule, ckpt_path=None if checkpoint is None else str(checkpoint))
        check_trained(trainer, config)
        if (model := module.whole_model()) is not None:
            model.save_pretrained(folder / MODEL_FOLDER)
            if has_adapters(model.unet):
                save_adapters(model.unet, folder / ADAPTER_FOLDER)
            record_model(trainer, config, folder.path)
    except BaseException:
        finish_tracking(trainer, failed=True)
        raise
    finally:
        module.teardown("fit")
        release_signals(trainer)
    finish_tracking(trainer)
    if trainer.is_global_zero:
        folder.finish()
    return folder.path


def rehearse(config: TrainConfig) -> None:
    """Print the configuration, then what a few steps of it cost, and what the whole will."""
    config = with_layers(config)
    module, datamodule = prepare(config)
    measured = measure_steps(config, module, datamodule)
    if not first_process():
        return
    print(without_secrets(to_yaml(config)))
    table = Table(title=f"{config.label}: what it takes", title_justify="left", show_header=False)
    for term, text in describe_run(config, module.model, measured):
        table.add_row(term, text)
    Console(markup=False, emoji=False).print(table)
    print(f"Nothing was written. Without dry_run=true this would train {config.folder}.")


def prepare(config: TrainConfig) -> tuple[TryOnModule, TryOnDataModule]:
    """Module and data of a run, made before its folder: bad input fails here and leaves nothing behind.

    Raises:
        I2AMError: machine, data, checkpoint, layers, metrics or numbers of samples do not fit the configuration.
    """
    module, processes = make_checked_module(config)
    return module, open_data(config, module.model, processes)


def make_checked_module(config: TrainConfig) -> tuple[TryOnModule, int]:
    """Module of a run and number of its processes; all is checked that needs no dataset, which may have to be drawn.

    Raises:
        I2AMError: machine, checkpoint, layers, metrics, callbacks or free space do not fit the configuration.
    """
    processes = check_trainer(config)
    check_best(config)
    check_callbacks(config.callbacks)
    torch.manual_seed(config.seed)
    module = make_module(config)
    if config.validation.samples:
        check_settings(module.model, EvaluationSettings.of(config))
    check_disk(config, module.model)
    return module, processes


def open_data(config: TrainConfig, model: TryOnModel, processes: int) -> TryOnDataModule:
    """Data of a run, checked; the embedded dataset is drawn where it is missing, which takes a while.

    Raises:
        I2AMError: data, cache or numbers of samples do not fit the configuration.
    """
    root = prepare_data(config.data, config.folder, config.tracking.folder)
    if TRUTH & config.objective.needs:
        require_correspondence(root, reading_of(config.data))
    datamodule = TryOnDataModule(
        config.data,
        root,
        seed=config.seed,
        eval_batch_size=config.evaluation.batch_size,
        validation_samples=config.validation.samples,
        cache=open_cache(config.data, root, model),
    )
    training = datamodule.train_dataset()
    read: list[object] = [training]
    if config.validation.samples:
        read.append(datamodule.validation_dataset())
    check_batches(config, len(training), processes)
    if first_process():
        refuse_broken_pictures([one for one in read if isinstance(one, TryOnDataset)])
    return datamodule
