"""Paint-by-Example: fills a masked region of a picture after a reference, with its attention captured.

Its reference is one token, and a softmax over one key is 1 whatever query and key are: the captured
logits never moved a pixel. They stem from the text model that it was trained from, so that a map is
a probe of that geometry. ``Painted.functional`` says so of the maps at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PaintByExamplePipeline, UNet2DConditionModel
from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
from numpy.typing import NDArray
from PIL import Image as PillowImage
from transformers import CLIPImageProcessor, CLIPVisionConfig

from i2am_train.attention import AttributionMaps, Recipe, Site, Tokens, trace
from i2am_train.attention.known import paint_by_example
from i2am_train.data.pictures import Image, Mask, fit_mask, fit_picture
from i2am_train.errors import CheckpointError, ConfigError
from i2am_train.models.others.other_model import OtherModel, Request, Source, latent_multiple, pillow
from i2am_train.models.pretrained import check_pipeline, load_network, load_part
from i2am_train.models.watch import Watch
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
            image_encoder=load_part(PaintByExampleImageEncoder, source, "image_encoder", config=config),
            unet=unet,
            scheduler=load_part(DDIMScheduler, source, "scheduler", **AUTHORS_STEPS),
            safety_checker=None,
            feature_extractor=load_part(CLIPImageProcessor, source, "feature_extractor"),
        )
        return cls(pipeline.to(device, dtype=getattr(torch, dtype)))

    @property
    def size_step(self) -> int:
        """Pixels that height and width of a picture must be a multiple of: whole latents at each level."""
        return latent_multiple(self.pipeline.unet, self.pipeline.vae_scale_factor)

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

    def paint(self, paintings: Sequence[Painting], size: GridSize, *, steps: int, guidance: float) -> Painted:
        """Paint a batch; pictures are resized to ``size``, references to the encoder's square, aspects aside.

        Args:
            paintings: what is asked for.
            size: of the results.
            steps: DDIM steps.
            guidance: scale of classifier-free guidance; 1 is none.

        Raises:
            NotFiniteError: the images are no numbers, as half precision can make them.
        """
        with trace(self.pipeline, _recipe(guided=guidance > 1)) as attention:
            images = self.fill(
                [resized(one.image, size) for one in paintings],
                [resized(one.mask, size) for one in paintings],
                [resized(one.reference, self.reference_size) for one in paintings],
                seeds=[one.seed for one in paintings],
                steps=steps,
                guidance=guidance,
            )
        return Painted(images=images, maps=attention.maps())

    @property
    def reference_size(self) -> GridSize:
        """The encoder's square: the authors stretch the reference, the feature extractor would crop it."""
        side = self.pipeline.image_encoder.config.image_size
        return GridSize(side, side)

    def fill(
        self, images: list[PillowImage.Image], masks: list[PillowImage.Image], references: list[PillowImage.Image], *,
        seeds: Sequence[int], steps: int, guidance: float,
    ) -> NDArray[np.uint8]:  # fmt: skip
        """Pictures ``[batch, height, width, 3]`` whose white regions are painted anew, of the size that they have.

        Raises:
            NotFiniteError: they are no numbers.
        """
        watch = Watch()
        made = self.pipeline(
            image=images, mask_image=masks, example_image=references, num_inference_steps=steps,
            guidance_scale=guidance, generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np", callback=partial(watch.see_step, steps),
        )  # fmt: skip
        return watch.images(made.images, self.pipeline.dtype)


def load_paint_by_example(source: Source) -> OtherModel:
    """The pipeline of a folder, or of the hub (Fantasy-Studio/Paint-by-Example), for ``i2am explain``.

    Raises:
        CheckpointError: it cannot be read, or is another pipeline.
    """
    check_pipeline(source.folder, (PaintByExamplePipeline.__name__,), source.model)
    model = PaintByExample.from_pretrained(source.folder, source.device)

    def make(request: Request) -> Image:
        assert request.image is not None
        assert request.mask is not None
        made = model.fill(
            [pillow(fit_picture(request.image, request.size, "stretch", 0))],
            [pillow(fit_mask(request.mask, request.size, "stretch"))],
            [pillow(fit_picture(request.reference, model.reference_size, "stretch", 0))],
            seeds=[request.seed],
            steps=request.steps,
            guidance=request.guidance,
        )
        return cast(Image, made[0])

    return OtherModel(
        target=model.pipeline, recipe=source.recipe_of(model.pipeline), make=make, multiple=model.size_step
    )


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
