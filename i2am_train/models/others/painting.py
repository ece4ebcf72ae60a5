"""Paint-by-Example of diffusers, for `i2am explain`."""

from __future__ import annotations

from functools import partial
from typing import cast

import numpy as np
import torch
from PIL import Image as PillowImage

from i2am_train.data.arrays import Image
from i2am_train.data.pictures import fit_mask, fit_picture
from i2am_train.models.others.base import OtherModel, Request, Source
from i2am_train.models.others.folders import check_pipeline
from i2am_train.models.paint_by_example import PaintByExample, bytes_of, see_step
from i2am_train.models.watch import Watch
from i2am_train.types import GridSize


def load_paint_by_example(source: Source) -> OtherModel:
    """The pipeline of a folder, or of the hub (Fantasy-Studio/Paint-by-Example).

    Raises:
        CheckpointError: it cannot be read, or is another pipeline.
    """
    check_pipeline(source.folder, ("PaintByExamplePipeline",), source.model)
    model = PaintByExample.from_pretrained(source.folder, source.device)
    pipeline = model.pipeline
    side = pipeline.image_encoder.config.image_size

    def make(request: Request) -> Image:
        assert request.image is not None
        assert request.mask is not None
        watch = Watch()
        made = pipeline(
            image=pillow(fit_picture(request.image, request.size, "stretch", 0)),
            mask_image=pillow(fit_mask(request.mask, request.size, "stretch")),
            # The authors stretch the reference; the feature extractor would crop it.
            example_image=pillow(
                fit_picture(request.reference, GridSize(side, side), "stretch", 0)
            ),
            height=request.size.height,
            width=request.size.width,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="np",
            callback=partial(see_step, watch, request.steps),
        )
        return cast(Image, bytes_of(made.images, watch, pipeline.dtype)[0])

    return OtherModel(
        target=pipeline,
        recipe=source.recipe_of(pipeline),
        make=make,
        multiple=model.size_step,
    )


def pillow(picture: np.ndarray) -> PillowImage.Image:
    """A picture, or a mask as black and white."""
    white = np.uint8(255)
    return PillowImage.fromarray(picture * white if picture.dtype == np.bool_ else picture)
