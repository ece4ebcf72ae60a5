"""``i2am train``: train a model from a checkpoint; the same command again continues a stopped run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from i2am_train.commands.entry import entry
from i2am_train.config.schema import WITHOUT_EFFECT_ON_WEIGHTS, TrainConfig

if TYPE_CHECKING:
    from pathlib import Path


def run(config: TrainConfig) -> None:
    """Train and say where the model lies."""
    folder = train(config)
    print(f"\nModel: {folder / 'model'}\nJudge it with: i2am evaluate checkpoint={folder}")


def train(config: TrainConfig) -> Path:
    """Train one run, or continue it, or leave it if it is finished; the run folder.

    Raises:
        I2AMError: data, checkpoint, layer or run folder do not fit the configuration.
    """
    import torch

    from i2am_train.assembly import (
        MODEL_FOLDER,
        make_datamodule,
        make_module,
        make_trainer,
        prepare_data,
    )
    from i2am_train.config.build import plain
    from i2am_train.runs import RunFolder, fingerprint

    root = prepare_data(config.data)
    torch.manual_seed(config.seed)
    module = make_module(config)  # before the folder is made: bad input leaves nothing behind
    folder = RunFolder.open(
        config.folder,
        plain(config),
        resume=config.resume,
        may_differ=WITHOUT_EFFECT_ON_WEIGHTS,
    )
    if folder.finished:
        print(f"{folder.path} is finished already; nothing to train.")
        return folder.path
    first_process = os.environ.get("LOCAL_RANK", "0") == "0"
    if first_process:
        folder.start(seed=config.seed, data=fingerprint(root))
    datamodule = make_datamodule(
        config.data,
        root,
        seed=config.seed,
        eval_batch_size=config.evaluation.batch_size,
        validation_samples=config.validation.samples,
    )
    trainer = make_trainer(config, folder.path)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    trainer.fit(module, datamodule, ckpt_path=str(checkpoint) if checkpoint.is_file() else None)
    if trainer.is_global_zero:
        module.model.save_pretrained(folder / MODEL_FOLDER)
        folder.finish()
    return folder.path


if __name__ == "__main__":
    entry("train", run)
