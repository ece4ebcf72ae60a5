"""``i2am init``: a model folder for ``i2am train`` from foreign parts, or a pipeline from a foreign checkpoint.

``i2am export``: a model as a pipeline folder of diffusers, with a model card, and on the hub if asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import nn

from i2am_train.config.locations import HUB, checkpoint_folder, push, require_login, revisions
from i2am_train.config.models import ExportConfig, InitConfig
from i2am_train.errors import RunFolderError
from i2am_train.files import require_own_json, write_json
from i2am_train.models.assembly import assemble
from i2am_train.models.by_name import model_folder
from i2am_train.models.exported import check_free, export_pipeline
from i2am_train.models.paint_by_example import read_pipeline, write_pipeline
from i2am_train.models.single_file import KeyMismatchError, KeyReport
from i2am_train.models.tryon import TryOnModel
from i2am_train.reporting.model_card import ModelFacts, model_card

DCI_VTON_REMARK = """
The pipeline's own call masks away the warped garment, which DCI-VTON keeps in the masked picture and
as the start noise (latents=); for its images, call pipeline.unet with both, and no guidance."""


class _Made(NamedTuple):
    """What was written, in words."""

    description: str
    reports: Sequence[KeyReport]
    next_step: str


def init(config: InitConfig) -> None:
    """Make the folder, and say what is in it.

    Raises:
        I2AMError: a part is missing, damaged or does not fit, the folder exists, or the disk is full.
    """
    if config.output.exists():
        raise RunFolderError(f"'{config.output}' exists. Nothing was written. Give another output=FOLDER.")
    # What becomes of every key stands beside the model's folder.
    file = config.output.with_name(f"{config.output.name}.keys.json")
    require_own_json(file, ("file", "mapped", "unexpected"))
    try:
        made = _make_model(config) if config.pipeline_file is None else _make_pipeline(config)
    except KeyMismatchError as error:
        write_json(file, [asdict(error.report)])
        raise KeyMismatchError(f"{error} All keys: {file}", error.report) from error
    print(made.description)
    fetched = revisions(config.unet, config.vae, config.encoder).get("revisions", {})
    for name, commit in fetched.items():
        print(f"From the hub: {name}, revision {commit}")
    for report in made.reports:
        print(report.summary())
    if made.reports:
        write_json(file, [asdict(report) for report in made.reports])
        print(f"All keys: {file}")
    print(f"\n{made.next_step}")


def _make_model(config: InitConfig) -> _Made:
    model, reports = assemble(config)
    model.save_pretrained(config.output, half=config.half)
    follow = f"i2am train init={config.output} data=viton_hd data.root=PATH"
    return _Made(_description(model), reports, f"Model: {config.output}\nTrain it with: {follow}")


def _make_pipeline(config: InitConfig) -> _Made:
    assert config.pipeline_file is not None
    pipeline, report = read_pipeline(config.pipeline_file)
    write_pipeline(pipeline, config.output, half=config.half)
    recipe = "paint_by_example" if config.dci_vton is None else "dci_vton_diffusers"
    sizes = {"U-Net": pipeline.unet, "VAE": pipeline.vae, "image encoder": pipeline.image_encoder}
    return _Made(
        f"Weights: {_weights(sizes)}",
        [report],
        f"Pipeline of diffusers: {config.output}\nTrace it with the recipe '{recipe}'."
        + ("" if config.dci_vton is None else DCI_VTON_REMARK),
    )


def _description(model: TryOnModel) -> str:
    """Sizes of a model, one line each."""
    config = model.config
    networks = {
        "U-Net": model.unet,
        "projector": model.projector,
        "VAE (frozen)": model.vae,
        f"{type(model.reference_encoder).__name__} (frozen)": model.reference_encoder,
    }
    token = " after the class token" if config.class_token else ""
    return "\n".join(
        [
            f"Images: {model.image_size}, latents {model.latent_size}",
            f"Reference: {config.reference_height}x{config.reference_width} pixels, {model.reference_grid} "
            f"patches{token}, mean {config.reference_mean} and deviation {config.reference_std}",
            f"Weights: {_weights(networks)}",
            f"Prediction: {model.schedule.prediction_type.value}",
        ]
    )


def _weights(networks: Mapping[str, nn.Module]) -> str:
    return ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in _counts(networks).items())


def _counts(networks: Mapping[str, nn.Module]) -> dict[str, int]:
    return {name: sum(value.numel() for value in network.parameters()) for name, network in networks.items()}


def export(config: ExportConfig) -> None:
    """Write the folder, push it if asked for, and say how to use it.

    Raises:
        I2AMError: the checkpoint cannot be read, the folder is in use, nobody is logged in, or the hub refuses.
    """
    check_free(config.output)
    if config.push is not None:
        require_login(config.push)
    model = TryOnModel.from_pretrained(model_folder(config.checkpoint))
    networks = {
        "U-Net": model.unet,
        "VAE": model.vae,
        "reference encoder": model.reference_encoder,
        "projector": model.projector,
    }
    facts = ModelFacts(
        name=config.push or config.output.name,
        origin=config.checkpoint,
        run=checkpoint_folder(config.checkpoint),
        image_size=model.image_size,
        reference_grid=model.reference_grid,
        encoder=type(model.reference_encoder).__name__,
        parameters=_counts(networks),
        prediction_type=str(model.schedule.prediction_type),
        dtype=config.dtype,
        license=config.license,
        base_model=config.base_model,
    )
    export_pipeline(model, config.output, dtype=getattr(torch, config.dtype), card=model_card(facts))
    print(f"Pipeline: {config.output} (README.md is its card)")
    if config.push is not None:
        address = push(config.output, config.push, private=config.private)
        print(f"Pushed: {address}\nUse it as checkpoint={HUB}{config.push}")
