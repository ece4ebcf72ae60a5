"""IP-Adapter on Stable Diffusion 1.5: from words alone, or filling in a mask."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, StableDiffusionInpaintPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPVisionModelWithProjection

from i2am_train.attention.lookup import detect_recipe
from i2am_train.data.pictures import Image, fit_mask, fit_picture
from i2am_train.errors import CaptureError, CheckpointError
from i2am_train.models.pretrained import check_pipeline, fitting, load_network, load_part, load_pipeline
from i2am_train.models.traceable import Request, Source, TraceableModel, latent_multiple, pillow
from i2am_train.models.watch import Watch
from i2am_train.weight_files import read_adapter

_ENCODER = "image_encoder"


def load_ip_adapter(source: Source) -> TraceableModel:
    """A Stable Diffusion pipeline with one adapter in it.

    The image encoder is the pipeline's, or lies in the folder of the adapter's file, beside it or one higher up, as its
    authors distribute it.

    Raises:
        CheckpointError: folder, encoder or adapter cannot be read, or the adapter is of another kind or for another
            encoder.
    """
    assert source.adapter is not None, "checked with the configuration"
    expected = (StableDiffusionPipeline.__name__, StableDiffusionInpaintPipeline.__name__)
    check_pipeline(source.folder, expected, source.model)
    pipeline = load_pipeline(
        StableDiffusionPipeline,
        source.folder,
        unet=load_network(UNet2DConditionModel, source.folder, "unet"),
        vae=load_network(AutoencoderKL, source.folder, "vae"),
        text_encoder=load_part(CLIPTextModel, source.folder, "text_encoder"),
        safety_checker=None,
        requires_safety_checker=False,
    )
    if pipeline.image_encoder is None:
        folder = _encoder_folder(source.adapter)
        encoder = load_part(CLIPVisionModelWithProjection, str(folder), _ENCODER)
        pipeline.register_modules(image_encoder=encoder)
    weights = read_adapter(source.adapter)
    insert = partial(pipeline.load_ip_adapter, subfolder="", weight_name="", image_encoder_folder=None)
    fitting("adapter", source.adapter, partial(insert, weights))
    _check_kind(pipeline, source)
    _check_encoder(pipeline, source)
    pipeline = pipeline.to(source.device)
    pipeline.set_progress_bar_config(disable=True)
    return TraceableModel(
        target=pipeline,
        recipe=source.recipe_of(pipeline),
        make=partial(_make, pipeline),
        multiple=latent_multiple(pipeline.unet, pipeline.vae_scale_factor),
    )


def _make(pipeline: Any, request: Request) -> Image:
    """With a mask by inpainting, else from noise."""
    watch = Watch()

    def see(_: Any, index: int, timestep: Any, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        watch.see_step(request.steps, index, timestep, kept["latents"])
        return kept

    arguments: dict[str, Any] = {
        "prompt": request.prompt,
        "ip_adapter_image": pillow(request.reference),
        "height": request.size.height,
        "width": request.size.width,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "generator": torch.Generator().manual_seed(request.seed),
        "output_type": "np",
        "callback_on_step_end": see,
    }
    if request.image is not None and request.mask is not None:
        pipeline = StableDiffusionInpaintPipeline(**pipeline.components, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        arguments |= {
            "image": pillow(fit_picture(request.image, request.size, "stretch", 0)),
            "mask_image": pillow(fit_mask(request.mask, request.size, "stretch")),
            "strength": 1.0,
        }
    return cast(Image, watch.images(pipeline(**arguments).images, pipeline.dtype)[0])


def _encoder_folder(adapter: Path) -> Path:
    """The folder with the image encoder's: that of the adapter's file, or the one above it."""
    for folder in (adapter.parent, adapter.parent.parent):
        if (folder / _ENCODER / "config.json").is_file():
            return folder
    raise CheckpointError(
        f"Neither the pipeline nor the folder of adapter={adapter} has an {_ENCODER}/. Put the "
        f"adapter's {_ENCODER}/ beside its file, as its authors distribute it."
    )


def _check_kind(pipeline: Any, source: Source) -> None:
    """Refuses an adapter whose tokens are not those of the model that was asked for."""
    try:
        found = detect_recipe(pipeline).name
    except CaptureError:
        found = "another kind of adapter"
    if found != source.model:
        raise CheckpointError(
            f"adapter={source.adapter} is {found}, and model={source.model} was asked for. Set "
            "model= to what it is, or give another file."
        )


def _check_encoder(pipeline: Any, source: Source) -> None:
    """Refuses an adapter that was made for an image encoder of another width.

    The 4 tokens are made of the encoder's projected class token, all others of its patches.
    """
    projection = pipeline.unet.encoder_hid_proj.image_projection_layers[0]
    reads = next(part for part in projection.modules() if isinstance(part, nn.Linear)).in_features
    vision = pipeline.image_encoder.config
    gives = vision.projection_dim if isinstance(projection, ImageProjection) else vision.hidden_size
    if reads != gives:
        raise CheckpointError(
            f"adapter={source.adapter} reads image features of {reads} channels, and the "
            f"{_ENCODER} gives {gives}. Put the {_ENCODER}/ that the adapter was made for beside its "
            "file, and leave other ones out of the pipeline's folder."
        )
