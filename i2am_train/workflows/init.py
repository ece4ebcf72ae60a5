"""``i2am init``: a model folder for ``i2am train`` from foreign parts, or a pipeline from a foreign checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from i2am_train.config.hub import revisions
from i2am_train.config.models import InitConfig
from i2am_train.errors import RunFolderError
from i2am_train.json_files import require_own_json, write_json
from i2am_train.models.convert.components import assemble
from i2am_train.models.convert.key_report import KeyMismatchError, KeyReport
from i2am_train.models.convert.paint_by_example_file import read_pipeline, write_pipeline
from i2am_train.models.tryon import TryOnModel


def run(config: InitConfig) -> None:
    """Make the folder, and say what is in it.

    Raises:
        I2AMError: a part is missing, damaged or does not fit, the folder exists, or the disk is full.
    """
    if config.output.exists():
        raise RunFolderError(f"'{config.output}' exists. Nothing was written. Give another output=FOLDER.")
    require_own_json(report_file(config.output), ("file", "mapped", "unexpected"))
    try:
        made = _make_model(config) if config.pipeline_file is None else _make_pipeline(config)
    except KeyMismatchError as error:
        raise KeyMismatchError(
            f"{error} All keys: {write_report(config.output, [error.report])}", error.report
        ) from error
    print(made.description)
    fetched = revisions(config.unet, config.vae, config.encoder).get("revisions", {})
    for name, commit in fetched.items():
        print(f"From the hub: {name}, revision {commit}")
    for report in made.reports:
        print(report.summary())
    if made.reports:
        print(f"All keys: {write_report(config.output, made.reports)}")
    print(f"\n{made.next_step}")


class _Made(NamedTuple):
    """What was written, in words."""

    description: str
    reports: Sequence[KeyReport]
    next_step: str


def _make_model(config: InitConfig) -> _Made:
    model, reports = assemble(config)
    model.save_pretrained(config.output, half=config.half)
    follow = f"i2am train init={config.output} data=viton_hd data.root=PATH"
    return _Made(description(model), reports, f"Model: {config.output}\nTrain it with: {follow}")


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


DCI_VTON_REMARK = """
The pipeline's own call masks away the warped garment, which DCI-VTON keeps in the masked picture and
as the start noise (latents=); for its images, call pipeline.unet with both, and no guidance."""


def report_file(output: Path) -> Path:
    """Where what became of every key is written: beside the model's folder."""
    return output.with_name(f"{output.name}.keys.json")


def write_report(output: Path, reports: Sequence[KeyReport]) -> Path:
    """Writes what became of every key beside the model's folder."""
    file = report_file(output)
    write_json(file, [report.as_json() for report in reports])
    return file


def description(model: TryOnModel) -> str:
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
    return ", ".join(
        f"{name} {sum(value.numel() for value in network.parameters()) / 1e6:,.1f} M"
        for name, network in networks.items()
    )
