"""Options of models: how they are sampled, made and exported."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from i2am_train.config.options import (
    Guidance,
    ImageSide,
    ModelFolder,
    Natural,
    OptionError,
    Options,
    Pixels,
    SamplingSteps,
    within,
)
from i2am_train.errors import ConfigError
from i2am_train.types import Normalisation, PredictionType, SamplerName, SamplingPrecision, WeightType

SOURCES = ("unet", "custom", "paint_by_example", "dci_vton")
"""Options of ``InitConfig`` that say what to start from."""


@dataclass(kw_only=True, slots=True)
class SamplingConfig(Options):
    """How images are sampled from a model."""

    sampler: SamplerName = "ddim"
    """ddim: the paper's; dpmpp (DPM-Solver++ 2M) and unipc come as near in half as many steps."""
    steps: SamplingSteps = 10
    """Denoising steps per image."""
    guidance: Guidance = 2.0
    """Scale of classifier-free guidance; 1 is none."""
    seed: Natural = 0
    """Seed of the initial noise; every sample has its own stream, whatever the batch."""
    precision: SamplingPrecision = "auto"
    """Arithmetic of the denoiser: 32-true, bf16-mixed or 16-mixed; auto: bf16-mixed on a GPU that has
    bfloat16, else 32-true. VAE and reference encoder compute in float32."""
    cuda_graphs: bool = True
    """On a GPU, replay the denoiser as CUDA graphs: small batches take less time, and the graphs some memory."""


@dataclass(kw_only=True, slots=True)
class InitConfig(Options):
    """Make a model folder for `i2am train` from Stable Diffusion 1.5, a VAE and an image encoder,
    or a pipeline of diffusers from a checkpoint of Paint-by-Example or DCI-VTON."""

    output: Path
    """Folder of the new model; must not exist yet."""
    unet: str | None = None
    """Stable Diffusion 1.5's U-Net: diffusers folder of it or of a pipeline, such a name on the hub,
    or a file in the original layout (v1-5-pruned.ckpt or .safetensors)."""
    custom: Path | None = None
    """Instead of unet: a checkpoint of the authors' custom model (VITON-v1), with its projector."""
    paint_by_example: Path | None = None
    """A checkpoint of Paint-by-Example (model.ckpt), to be written as a pipeline of diffusers; of
    the other options only half has a meaning then."""
    dci_vton: Path | None = None
    """Likewise a checkpoint of DCI-VTON (viton512.ckpt)."""
    vae: str | None = None
    """VAE: folder, name or file as for unet, also fine-tuned alone (VITONHD_VAE_finetuning.ckpt);
    null: the one that comes with unet or custom."""
    encoder: str = "facebook/dinov2-giant"
    """Reference encoder: folder of transformers or name on the hub, DINOv2 or CLIP of any size."""
    ema: bool = False
    """Take the averaged weights of a file that has both; the authors started from the others."""
    height: ImageSide = 512
    """Image height in pixels."""
    width: ImageSide = 384
    """Image width in pixels."""
    reference_height: Pixels | None = None
    """Height that the garment is resized to for the encoder, a multiple of its patch; null: the
    smallest that covers height (518 for 512 and patches of 14)."""
    reference_width: Pixels | None = None
    """Width likewise (392 for 384)."""
    normalisation: Normalisation | None = None
    """Scale of the encoder's input: imagenet, clip, or authors (values from -1 to 1); null: the
    encoder's own, with custom the authors'."""
    class_token: bool | None = None
    """Keep the encoder's class token before the patches; null: no, with custom as it was trained."""
    projector_blocks: Annotated[int, within(0, 1000)] = 3
    """Transformer blocks of the new projector (with custom: as in the file)."""
    projector_heads: Annotated[int, within(1, 1000)] = 1
    """Attention heads of these blocks."""
    prediction_type: PredictionType = PredictionType.EPSILON
    """What the U-Net predicts; v_prediction also ends the noise schedule in pure noise."""
    half: bool = False
    """Store the weights as float16: half the size, and too coarse to continue a training from."""
    seed: Natural = 0
    """Seed of the new projector and null tokens."""

    def check(self) -> None:
        """A model has one origin, and options that mean something for it.

        >>> InitConfig(output="b", dci_vton="a.ckpt", height=256)
        Traceback (most recent call last):
            ...
        i2am_train.errors.ConfigError: height has no meaning with dci_vton: all of the pipeline comes from ...
        """
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"What to start from is not clear: found {' and '.join(given) or 'neither unet nor custom'}. "
                "Give unet=SOURCE for Stable Diffusion, or custom=FILE for the authors' model; or "
                "paint_by_example=FILE or dci_vton=FILE for a pipeline of diffusers."
            )
        if self.pipeline_file is not None:
            self._check_nothing_else(given[0])
        if self.custom is not None and self.ema:
            raise OptionError("ema", "true", "false with custom: the authors kept no average")

    @property
    def pipeline_file(self) -> Path | None:
        """The checkpoint that becomes a pipeline of diffusers, if that is asked for.

        >>> InitConfig(output="b", unet="a").pipeline_file, InitConfig(output="b", dci_vton="a.ckpt").pipeline_file.name
        (None, 'a.ckpt')
        """
        return self.dci_vton if self.paint_by_example is None else self.paint_by_example

    def _check_nothing_else(self, source: str) -> None:
        """Options of the try-on model change nothing in a pipeline, which is as its authors made it."""
        others = [option for option in fields(self) if option.name not in ("output", "half", source)]
        changed = [option.name for option in others if getattr(self, option.name) != option.default]
        if changed:
            raise ConfigError(
                f"{', '.join(changed)} has no meaning with {source}: all of the pipeline comes from the "
                "checkpoint. Leave it out."
            )


@dataclass(kw_only=True, slots=True)
class ExportConfig(Options):
    """Write a model as a pipeline folder of diffusers with a model card, and push it to the hub."""

    checkpoint: ModelFolder
    """Checkpoint folder, run folder, tiny for the shipped one, or hub:USER/NAME."""
    output: Path
    """Folder to make; must be empty or not there."""
    dtype: WeightType = "float32"
    """Numbers that the weights are stored as: float32, float16 or bfloat16."""
    push: str | None = None
    """Model on the hub, USER/NAME, that the folder is uploaded as; null: nothing is uploaded."""
    private: bool = True
    """A model that pushing makes is seen by its owner alone."""
    license: str | None = None
    """Licence of the weights, as the hub names it (apache-2.0); null: the card leaves it open."""
    base_model: str | None = None
    """Model on the hub that the weights come from; null: none is named."""
