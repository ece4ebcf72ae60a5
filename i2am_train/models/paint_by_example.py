"""Paint-by-Example: fills a masked region of a picture after a reference; from a folder, the hub or its authors' file.

Its reference is one token, and a softmax over one key is 1 whatever query and key are: the captured logits never moved
a pixel. They stem from the text model that it was trained from, so that a map is a probe of that geometry.
``Painted.functional`` says so of the maps at hand.

The authors' file, and DCI-VTON's, is in latent diffusion's layout and holds the same three networks: Stable Diffusion's
U-Net with nine input channels (``model.diffusion_model``), its VAE (``first_stage_model``), and CLIP's image encoder
followed by five transformer blocks, a norm and a projection to one token (``cond_stage_model``, ``proj_out``), beside
the vector that stands for no reference (``learnable_vector``). The order of input channels is that of diffusers'.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PaintByExamplePipeline, PNDMScheduler, UNet2DConditionModel
from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
from numpy.typing import NDArray
from PIL import Image as PillowImage
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig

from i2am_train.attention import AttributionMaps, Recipe, Site, Tokens, trace
from i2am_train.attention.known import paint_by_example
from i2am_train.data.pictures import Image, Mask, fit_mask, fit_picture
from i2am_train.errors import CheckpointError, ConfigError
from i2am_train.locks import staged
from i2am_train.models.architecture import BETA_END, BETA_START
from i2am_train.models.pretrained import INDEX_FILE, check_pipeline, load_network, load_part
from i2am_train.models.single_file import (
    UNET_PREFIX,
    KeyReport,
    Renamed,
    fill,
    renamed,
    sizes_read,
    unet_part,
    vae_part,
)
from i2am_train.models.traceable import Request, Source, TraceableModel, latent_multiple, pillow
from i2am_train.models.watch import Watch
from i2am_train.types import GridSize, WeightType
from i2am_train.weight_files import check_network, read_weights

_CHANNELS = 9
"""Of the U-Net's input: noise, masked picture and mask."""

_ALL_LAYERS = r"(?P<layer>(down|up)_blocks\.\d+\.attentions\.\d+)\.transformer_blocks\.0\.attn2"
"""The 15 cross-attentions that the authors' hook reads: all but the middle's."""
_DECODER = "up_blocks."
"""Start of the names of the paper's nine layers."""

_AUTHORS_STEPS = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
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
        return self.maps.select([name for name in self.maps.layers if name.startswith(_DECODER)])

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
    def from_pretrained(cls, source: str, device: torch.device | str = "cpu", dtype: WeightType = "float32") -> Self:
        """From a folder or the hub (Fantasy-Studio/Paint-by-Example), without its safety checker.

        The parts are read one by one: diffusers retired the pipeline, and its own loading no longer finds the encoder's
        class.

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
            scheduler=load_part(DDIMScheduler, source, "scheduler", **_AUTHORS_STEPS),
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

        ``guidance`` is the scale of classifier-free guidance; 1 is none.

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


def load_paint_by_example(source: Source) -> TraceableModel:
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

    return TraceableModel(
        target=model.pipeline, recipe=source.recipe_of(model.pipeline), make=make, multiple=model.size_step
    )


def _check_unet(unet: Any, source: str) -> None:
    if unet.config.in_channels != _CHANNELS:
        raise CheckpointError(
            f"The U-Net of '{source}' takes {unet.config.in_channels} channels; Paint-by-Example's takes {_CHANNELS}. "
            "Give pipeline=Fantasy-Studio/Paint-by-Example, or a folder of that pipeline."
        )


def _recipe(*, guided: bool) -> Recipe:
    """That of the model, with all layers but the middle's."""
    site = Site(_ALL_LAYERS, reference=Tokens(grid=None))
    return replace(paint_by_example(guided), sites=(site,))


def resized(picture: Image | Mask, size: GridSize) -> PillowImage.Image:
    """As the authors resize: bicubic, a mask by nearest neighbours.

    >>> np.asarray(resized(np.array([[True, False]]), GridSize(1, 4))).tolist()
    [[255, 255, 0, 0]]
    """
    resampling = PillowImage.Resampling.BICUBIC
    if picture.dtype == np.bool_:
        picture, resampling = picture.astype(np.uint8) * 255, PillowImage.Resampling.NEAREST
    return PillowImage.fromarray(picture).resize((size.width, size.height), resampling)


# -- the authors' file ----------------------------------------------------------------------------------------------

_HEAD_WIDTH = 64
"""Of CLIP's attention in ViT-L/14, which both models have; files do not state the number of heads."""

_CLIP_PREFIX = "cond_stage_model.transformer.vision_model."
_MAPPER_PREFIX = "cond_stage_model.mapper.resblocks."
ENCODER_PARTS = ("cond_stage_model.", "proj_out.", "learnable_vector")
_PARTS = (UNET_PREFIX, "first_stage_model.", _CLIP_PREFIX, _MAPPER_PREFIX, *ENCODER_PARTS[1:])
"""How the keys of each part start; a file without one of them is of another model."""

_OUTSIDE_MAPPER = {
    _CLIP_PREFIX: "model.",
    "cond_stage_model.final_ln.": "final_layer_norm.",
    "proj_out.": "proj_out.",
    "learnable_vector": "uncond_vector",
}
_MAPPER_LAYERS = {
    "ln_1": "norm1",
    "attn.to_q": "attn1.to_q",
    "attn.to_k": "attn1.to_k",
    "attn.to_v": "attn1.to_v",
    "attn.c_proj": "attn1.to_out.0",
    "ln_2": "norm3",
    "mlp.c_fc": "ff.net.0.proj",
    "mlp.c_proj": "ff.net.2",
}


def read_pipeline(file: Path) -> tuple[PaintByExamplePipeline, KeyReport]:
    """The pipeline in a checkpoint, in float32 on the CPU, and what became of every key.

    Its scheduler is PNDM, which evaluates one step more than asked for, as the authors' PLMS does. There is no safety
    checker in it.

    Raises:
        CheckpointError: the file cannot be read safely, or is of another model.
        KeyMismatchError: weights are missing or have other shapes.
    """
    return pipeline_from_weights(read_weights(file), file.name)


def pipeline_from_weights(weights: Mapping[str, Tensor], file: str) -> tuple[PaintByExamplePipeline, KeyReport]:
    """As `read_pipeline`, from tensors by name; ``file`` is for messages."""
    _check_parts(weights, file)
    unet, unet_weights = unet_part(weights, file)
    _check_channels(unet.config["in_channels"], file)
    vae, vae_weights, vae_starts = vae_part(weights, file)
    encoder, encoder_weights = encoder_part(weights, file)
    parts = {"unet": (unet, unet_weights), "vae": (vae, vae_weights), "image_encoder": (encoder, encoder_weights)}
    report = fill(file, weights, parts, ours=(UNET_PREFIX, *vae_starts, *ENCODER_PARTS))
    # The one buffer that no file has, and that is still on the meta device.
    embeddings = encoder.model.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]
    side = encoder.config.image_size
    pipeline = PaintByExamplePipeline(
        vae=vae,
        image_encoder=encoder,
        unet=unet,
        scheduler=PNDMScheduler(  # Stable Diffusion's schedule with its PLMS sampler
            beta_start=BETA_START, beta_end=BETA_END, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        # CLIP's own scale and deviation, as the authors feed the reference
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
    )
    return pipeline, report


def write_pipeline(pipeline: PaintByExamplePipeline, folder: Path, *, half: bool = False) -> None:
    """Writes a pipeline's folder, all or nothing; with ``half`` in float16, to which the networks are changed.

    Read it part by part: diffusers retired the pipeline, and ``from_pretrained`` of newer versions than 0.33 does not
    find the encoder's class in any such folder, that of the hub included.
    """
    if half:
        for part in ("unet", "vae", "image_encoder"):
            check_network(getattr(pipeline, part).half(), "the pipeline in float16", part)
    with staged(folder) as content:
        pipeline.save_pretrained(content)
        # As in the folder on the hub; diffusers writes the encoder's package without the class.
        index = json.loads((content / INDEX_FILE).read_text())
        index["image_encoder"] = ["paint_by_example", PaintByExampleImageEncoder.__name__]
        (content / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def encoder_part(weights: Mapping[str, Tensor], file: str) -> tuple[PaintByExampleImageEncoder, Renamed]:
    """The image encoder of a file on the meta device, and the tensors for it; what has no place keeps its own name.

    Old files also have ``position_ids``, which are numbers from 0 on and no weights: a report lists them as unexpected.

    Raises:
        CheckpointError: it is another encoder.
    """
    theirs = renamed(weights, ENCODER_PARTS, "c_qkv", _encoder_name)
    tensors = theirs.tensors
    with sizes_read(
        f"The image encoder in '{file}' is not Paint-by-Example's", f"CLIP ViT-L/14 under '{_CLIP_PREFIX}'."
    ):
        width, _, patch, _ = tensors["model.embeddings.patch_embedding.weight"].shape
        positions = tensors["model.embeddings.position_embedding.weight"].shape[0]
        intermediate = tensors["model.encoder.layers.0.mlp.fc1.weight"].shape[0]
        token = tensors["proj_out.weight"].shape[0]
    layers = {name.split(".")[3] for name in tensors if name.startswith("model.encoder.layers.")}
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=intermediate,
        projection_dim=token,
        num_hidden_layers=len(layers),
        num_attention_heads=width // _HEAD_WIDTH,
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
    )
    with torch.device("meta"):
        return PaintByExampleImageEncoder(config), theirs


def _check_parts(weights: Mapping[str, Tensor], file: str) -> None:
    absent = [start for start in _PARTS if not any(key.startswith(start) for key in weights)]
    if absent:
        raise CheckpointError(
            f"'{file}' is no checkpoint of Paint-by-Example or DCI-VTON: none of its {len(weights)} keys starts with "
            f"{' or '.join(absent)}. Expected model.ckpt or viton512.ckpt as their authors distribute them. "
            "Give Stable Diffusion as unet=FILE, and the custom model of the paper as custom=FILE."
        )


def _check_channels(channels: int, file: str) -> None:
    if channels != _CHANNELS:
        raise CheckpointError(
            f"The U-Net in '{file}' has {channels} input channels. Paint-by-Example and DCI-VTON have "
            f"{_CHANNELS} (latent, masked picture, mask); StableVITON, which has 13, needs its own code: "
            "build it there, and trace it with the recipe 'stableviton'."
        )


def _encoder_name(key: str) -> str | None:
    for theirs, ours in _OUTSIDE_MAPPER.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    match = re.fullmatch(re.escape(_MAPPER_PREFIX) + r"(\d+)\.(.*)\.(weight|bias)", key)
    if match is None or match[2] not in _MAPPER_LAYERS:
        return None
    return f"mapper.blocks.{match[1]}.{_MAPPER_LAYERS[match[2]]}.{match[3]}"
