"""Writes a model as a pipeline folder of diffusers, with the code that it needs, for people without i2am_train."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import diffusers
import torch

from i2am_train.errors import CheckpointError
from i2am_train.locks import staged
from i2am_train.models import pipeline, projector
from i2am_train.models.pretrained import INDEX_FILE
from i2am_train.models.tryon import NOISE_SCHEDULE, TryOnModel


def export_pipeline(model: TryOnModel, folder: Path, *, dtype: torch.dtype, card: str) -> None:
    """Writes ``model_index.json``, weights, the code of pipeline and projector, and the card; all or nothing.

    ``DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)`` reads it, and so does
    :meth:`TryOnModel.from_pretrained`.

    Raises:
        CheckpointError: the folder exists and is not empty.
    """
    check_free(folder)
    with staged(folder) as content:
        model.write(content, dtype)
        (content / INDEX_FILE).write_text(json.dumps(_index(model), indent=2) + "\n")
        shutil.copyfile(pipeline.__file__, content / "pipeline.py")
        shutil.copyfile(projector.__file__, content / "projector" / "projector.py")
        (content / "README.md").write_text(card, encoding="utf-8")


def check_free(folder: Path) -> None:
    """Fails where the folder of an export is in use.

    Raises:
        CheckpointError: the folder exists and is not empty.

    >>> check_free(Path(__file__).parent)
    Traceback (most recent call last):
        ...
    i2am_train.errors.CheckpointError: '...' exists and is not an empty folder. Nothing was written. ...
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(
            f"'{folder}' exists and is not an empty folder. Nothing was written. Give output=FOLDER a new name."
        )


def _index(model: TryOnModel) -> dict[str, object]:
    config = model.schedule.scheduler.config
    # What the model was trained with, by which a scheduler in the place of its own is judged.
    noise = {name: value for name, value in config.items() if not name.startswith("_")}
    return {
        "_class_name": ["pipeline", "TryOnPipeline"],
        "_diffusers_version": diffusers.__version__,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "reference_encoder": ["transformers", type(model.reference_encoder).__name__],
        "projector": ["projector", "ReferenceProjector"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        NOISE_SCHEDULE: noise,
    } | asdict(model.config)
