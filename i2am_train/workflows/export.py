"""``i2am export``: a model as a pipeline folder of diffusers, with a model card, and on the hub if asked for."""

from __future__ import annotations

import torch

from i2am_train.config.hub import HUB, check_repository, push
from i2am_train.config.locations import checkpoint_folder
from i2am_train.config.models import ExportConfig
from i2am_train.models.convert.exported import check_free, export_pipeline
from i2am_train.models.loading import model_folder
from i2am_train.models.tryon import TryOnModel
from i2am_train.reporting.model_card import ModelFacts, model_card


def run(config: ExportConfig) -> None:
    """Write the folder, push it if asked for, and say how to use it.

    Raises:
        I2AMError: the checkpoint cannot be read, the folder is in use, or the hub refuses.
    """
    if config.push is not None:
        check_repository(config.push)
    check_free(config.output)
    folder = model_folder(config.checkpoint)
    model = TryOnModel.from_pretrained(folder)
    card = model_card(
        ModelFacts(
            name=config.push or config.output.name,
            origin=config.checkpoint,
            run=checkpoint_folder(config.checkpoint),
            image_size=model.image_size,
            reference_grid=model.reference_grid,
            encoder=type(model.reference_encoder).__name__,
            parameters={
                name: sum(value.numel() for value in network.parameters())
                for name, network in {
                    "U-Net": model.unet,
                    "VAE": model.vae,
                    "reference encoder": model.reference_encoder,
                    "projector": model.projector,
                }.items()
            },
            prediction_type=str(model.schedule.prediction_type),
            dtype=config.dtype,
            license=config.license,
            base_model=config.base_model,
        )
    )
    export_pipeline(model, config.output, dtype=getattr(torch, config.dtype), card=card)
    print(f"Pipeline: {config.output} (README.md is its card)")
    if config.push is not None:
        address = push(config.output, config.push, private=config.private)
        print(f"Pushed: {address}\nUse it as checkpoint={HUB}{config.push}")
