"""``i2am init``: a model folder for ``i2am train`` from foreign parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from i2am_train.commands.entry import entry
from i2am_train.config.schema import InitConfig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from i2am_train.models.key_report import KeyReport
    from i2am_train.models.tryon import TryOnModel


def run(config: InitConfig) -> None:
    """Make the model folder, and say what is in it.

    Raises:
        I2AMError: a part is missing, damaged or does not fit, the folder exists, or the disk is full.
    """
    from i2am_train.errors import RunFolderError
    from i2am_train.models.key_report import KeyMismatchError
    from i2am_train.models.parts import assemble

    if config.output.exists():
        raise RunFolderError(
            f"'{config.output}' exists. Nothing was written. Give another output=FOLDER."
        )
    try:
        model, reports = assemble(config)
    except KeyMismatchError as error:
        raise KeyMismatchError(
            f"{error} All keys: {write_report(config.output, [error.report])}", error.report
        ) from error
    model.save_pretrained(config.output, half=config.half)
    print(description(model))
    for report in reports:
        print(report.summary())
    if reports:
        print(f"All keys: {write_report(config.output, reports)}")
    print(
        f"\nModel: {config.output}\nTrain it with: i2am train init={config.output} data=viton_hd data.root=PATH"
    )


def write_report(output: Path, reports: Sequence[KeyReport]) -> Path:
    """Writes what became of every key beside the model's folder."""
    from i2am_train.runs import write_json

    file = output.with_name(f"{output.name}.keys.json")
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
    weights = ", ".join(
        f"{name} {sum(value.numel() for value in network.parameters()) / 1e6:,.1f} M"
        for name, network in networks.items()
    )
    token = " after the class token" if config.class_token else ""
    return "\n".join(
        [
            f"Images: {model.image_size}, latents {model.latent_size}",
            f"Reference: {config.reference_height}x{config.reference_width} pixels, {model.reference_grid} "
            f"patches{token}, mean {config.reference_mean} and deviation {config.reference_std}",
            f"Weights: {weights}",
            f"Prediction: {model.schedule.prediction_type.value}",
        ]
    )


if __name__ == "__main__":
    entry("init", run)
