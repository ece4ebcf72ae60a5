"""Paint-by-Example: fills a masked region of a picture after a reference, with its attention captured.

Its reference is one token, and a softmax over one key is 1 whatever query and key are: the captured
logits never moved a pixel. They stem from the text model that it was trained from, so that a map is
a probe of that geometry. ``Painted.functional`` says so of the maps at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PaintByExamplePipeline, UNet2DConditionModel
from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
from numpy.typing import NDArray
from PIL import Image as PillowImage
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig

from i2am_train.attention import AttributionMaps, Recipe, Site, Tokens, trace
from i2am_train.attention.known_recipes import paint_by_example
from i2am_train.data.arrays import Image, Mask
from i2am_train.errors import CheckpointError, ConfigError, NotFiniteError
from i2am_train.models.pretrained import load_network, load_part
from i2am_train.models.watch import Watch, advice
from i2am_train.types import GridSize, WeightType

CHANNELS = 9
"""Of the U-Net's input: noise, masked picture and mask."""

ALL_LAYERS = r"(?P<layer>(down|up)_blocks\.\d+\.attentions\.\d+)\.transformer_blocks\.0\.attn2"
"""The 15 cross-attentions that the authors' hook reads: all but the middle's."""
DECODER = "up_blocks."
"""Start of the names of the paper's nine layers."""

AUTHORS_STEPS = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
"""DDIM on latent diffusion's own grid, 981, 961, ... 1, which the authors sample on."""


@dataclass(frozen=True, kw_only=True)
class Painting:
    """What is asked for: one picture."""

    image: Image
    """RGB ``[height, width, 3]`` of any size."""
    mask: Mask
    """Of the same size, True where it is painted anew."""
    reference: Image
    """RGB of any size."""
    seed: int
    """Of this picture's noise, whatever the batch."""


@dataclass(frozen=True, kw_only=True)
class Painted:
    """What came of a batch."""

    images: NDArray[np.uint8]
    """``[batch, height, width, 3]``."""
    maps: AttributionMaps
    """Of all 15 layers."""

    @property
    def decoder_maps(self) -> AttributionMaps:
        """Of the paper's nine layers."""
        return self.maps.select([name for name in self.maps.layers if name.startswith(DECODER)])

    @property
    def functional(self) -> bool:
        """False where the model's output does not depend on the attention that the maps show."""
        return self.maps.store.functional


class PaintByExample:
    """A pipeline of diffusers, sampled by DDIM."""

    def __init__(self, pipeline: PaintByExamplePipeline) -> None:
        self.pipeline = pipeline
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def from_pretrained(
        cls, source: str, device: torch.device | str = "cpu", dtype: WeightType = "float32"
    ) -> PaintByExample:
        """From a folder or the hub (Fantasy-Studio/Paint-by-Example), without its safety checker.

        The parts are read one by one: diffusers retired the pipeline, and its own loading no longer
        finds the encoder's class.

        Raises:
            CheckpointError: the folder or name cannot be read, or is of another pipeline.
        """
        unet = load_network(UNet2DConditionModel, source, "unet", _check_unet)
        vae = load_network(AutoencoderKL, source, "vae")
        config = load_part(CLIPVisionConfig, source, "image_encoder")
        pipeline = PaintByExamplePipeline(
            vae=vae,
            image_encoder=load_part(
                PaintByExampleImageEncoder, source, "image_encoder", config=config
            ),
            unet=unet,
            scheduler=load_part(DDIMScheduler, source, "scheduler", **AUTHORS_STEPS),
            safety_checker=None,
            feature_extractor=load_part(CLIPImageProcessor, source, "feature_extractor"),
        )
        return cls(pipeline.to(device, dtype=getattr(torch, dtype)))

    @property
    def size_step(self) -> int:
        """Pixels that height and width of a picture must be a multiple of: whole latents at each level."""
        levels = len(self.pipeline.unet.config.block_out_channels)
        return int(self.pipeline.vae_scale_factor * 2 ** (levels - 1))

    def check_size(self, size: GridSize) -> None:
        """Refuses a size that the networks cannot halve as often as they do.

        Raises:
            ConfigError: height or width is no multiple of ``size_step``.
        """
        if size.height % self.size_step or size.width % self.size_step:
            raise ConfigError(
                f"Pictures of {size} (height x width) do not fit this pipeline: both must be multiples of "
                f"{self.size_step}. Set height and width to such numbers; the paper's are 512."
            )

    def paint(
        self, paintings: Sequence[Painting], size: GridSize, *, steps: int, guidance: float
    ) -> Painted:
        """Paint a batch; pictures are resized to ``size``, references to the encoder's square, aspects aside.

        Args:
            paintings: what is asked for.
            size: of the results.
            steps: DDIM steps.
            guidance: scale of classifier-free guidance; 1 is none.

        Raises:
            NotFiniteError: the images are no numbers, as half precision can make them.
        """
        watch = Watch()
        side = self.pipeline.image_encoder.config.image_size
        with trace(self.pipeline, _recipe(guided=guidance > 1)) as attention:
            images = self.pipeline(
                image=[resized(one.image, size) for one in paintings],
                mask_image=[resized(one.mask, size) for one in paintings],
                example_image=[resized(one.reference, GridSize(side, side)) for one in paintings],
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(one.seed) for one in paintings],
                output_type="np",
                callback=partial(see_step, watch, steps),
            ).images
        return Painted(images=bytes_of(images, watch, self.pipeline.dtype), maps=attention.maps())


def see_step(watch: Watch, steps: int, index: int, timestep: Any, latents: Tensor) -> None:
    """Notes what a step of a pipeline's sampling gave."""
    watch.see(
        latents, f"Step {index + 1} of {steps} of sampling (timestep {int(timestep)}): the latents"
    )


def bytes_of(images: NDArray[np.float32], watch: Watch, dtype: torch.dtype) -> NDArray[np.uint8]:
    """Images ``[batch, height, width, 3]`` in [0, 1] as bytes, rounded as diffusers does.

    Raises:
        NotFiniteError: they, or what a step gave, are no numbers.
    """
    watch.check()
    if not np.isfinite(images).all():
        raise NotFiniteError(f"The images that the VAE decodes are no numbers. {advice(dtype)}")
    return (images * 255).round().astype(np.uint8)


def _check_unet(unet: Any, source: str) -> None:
    if unet.config.in_channels != CHANNELS:
        raise CheckpointError(
            f"The U-Net of '{source}' takes {unet.config.in_channels} channels; Paint-by-Example's takes {CHANNELS}. "
            "Give pipeline=Fantasy-Studio/Paint-by-Example, or a folder of that pipeline."
        )


def _recipe(*, guided: bool) -> Recipe:
    """That of the model, with all layers but the middle's."""
    site = Site(ALL_LAYERS, reference=Tokens(grid=None))
    return replace(paint_by_example(guided), sites=(site,))


def resized(picture: Image | Mask, size: GridSize) -> PillowImage.Image:
    """As the authors resize: bicubic, a mask by nearest neighbours."""
    resampling = PillowImage.Resampling.BICUBIC
    if picture.dtype == np.bool_:
        picture, resampling = picture.astype(np.uint8) * 255, PillowImage.Resampling.NEAREST
    return PillowImage.fromarray(picture).resize((size.width, size.height), resampling)
