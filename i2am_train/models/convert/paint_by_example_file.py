"""Paint-by-Example and DCI-VTON from one file in latent-diffusion's layout, as a pipeline of diffusers.

Both are the same three networks: Stable Diffusion's U-Net with nine input channels
(``model.diffusion_model``), its VAE (``first_stage_model``), and CLIP's image encoder followed by five transformer
blocks, a norm and a projection to one token (``cond_stage_model``, ``proj_out``), beside the vector that stands for no
reference (``learnable_vector``). The order of input channels is that of diffusers' pipeline.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import PaintByExamplePipeline, PNDMScheduler
from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig

from i2am_train.errors import CheckpointError
from i2am_train.locks import staged
from i2am_train.models.architecture import BETA_END, BETA_START
from i2am_train.models.convert.key_report import KeyReport, Renamed, key_report, lacking, load_renamed, renamed
from i2am_train.models.convert.single_file import UNET_PREFIX, empty_unet_part, empty_vae_part
from i2am_train.models.others.paint_by_example import CHANNELS
from i2am_train.models.pretrained import INDEX_FILE
from i2am_train.weight_files import check_network, read_weights

HEAD_WIDTH = 64
"""Of CLIP's attention in ViT-L/14, which both models have; files do not state the number of heads."""

CLIP_PREFIX = "cond_stage_model.transformer.vision_model."
MAPPER_PREFIX = "cond_stage_model.mapper.resblocks."
ENCODER_PARTS = ("cond_stage_model.", "proj_out.", "learnable_vector")
PARTS = (UNET_PREFIX, "first_stage_model.", CLIP_PREFIX, MAPPER_PREFIX, *ENCODER_PARTS[1:])
"""How the keys of each part start; a file without one of them is of another model."""

OUTSIDE_MAPPER = {
    CLIP_PREFIX: "model.",
    "cond_stage_model.final_ln.": "final_layer_norm.",
    "proj_out.": "proj_out.",
    "learnable_vector": "uncond_vector",
}
MAPPER_LAYERS = {
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
    unet, unet_weights = empty_unet_part(weights, file)
    _check_channels(unet.config["in_channels"], file)
    vae, vae_weights, vae_starts = empty_vae_part(weights, file)
    encoder_weights = renamed_encoder(weights)
    encoder = empty_encoder(encoder_weights.tensors, file)
    parts = {"unet": (unet, unet_weights), "vae": (vae, vae_weights), "image_encoder": (encoder, encoder_weights)}
    report = key_report(file, weights, parts, ours=(UNET_PREFIX, *vae_starts, *ENCODER_PARTS))
    report.check()
    for network, tensors in parts.values():
        load_renamed(network, tensors, file)
        network.eval()
    _number_positions(encoder)
    pipeline = PaintByExamplePipeline(
        vae=vae,
        image_encoder=encoder,
        unet=unet,
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=_image_processor(encoder.config.image_size),
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
        _name_encoder(content / INDEX_FILE)


def _name_encoder(index: Path) -> None:
    """Names the encoder's package as the folder on the hub does; diffusers writes one without the class."""
    content = json.loads(index.read_text())
    content["image_encoder"] = ["paint_by_example", PaintByExampleImageEncoder.__name__]
    index.write_text(json.dumps(content, indent=2) + "\n")


def renamed_encoder(weights: Mapping[str, Tensor]) -> Renamed:
    """The image encoder's tensors under diffusers' names; what has no such name keeps its own.

    Old files also have ``position_ids``, which are numbers from 0 on and no weights: a report lists them as unexpected.
    """
    return renamed(weights, ENCODER_PARTS, _split, _encoder_name)


def empty_encoder(tensors: Mapping[str, Tensor], file: str) -> PaintByExampleImageEncoder:
    """An image encoder on the meta device with the sizes of these tensors (diffusers' names)."""
    try:
        width, _, patch, _ = tensors["model.embeddings.patch_embedding.weight"].shape
        positions = tensors["model.embeddings.position_embedding.weight"].shape[0]
        intermediate = tensors["model.encoder.layers.0.mlp.fc1.weight"].shape[0]
        token = tensors["proj_out.weight"].shape[0]
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"The image encoder in '{file}' is not Paint-by-Example's: it has {lacking(error)}. Expected CLIP "
            f"ViT-L/14 under '{CLIP_PREFIX}'."
        ) from error
    layers = {name.split(".")[3] for name in tensors if name.startswith("model.encoder.layers.")}
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=intermediate,
        projection_dim=token,
        num_hidden_layers=len(layers),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
    )
    with torch.device("meta"):
        return PaintByExampleImageEncoder(config)


def _check_parts(weights: Mapping[str, Tensor], file: str) -> None:
    absent = [start for start in PARTS if not any(key.startswith(start) for key in weights)]
    if absent:
        raise CheckpointError(
            f"'{file}' is no checkpoint of Paint-by-Example or DCI-VTON: none of its {len(weights)} keys starts with "
            f"{' or '.join(absent)}. Expected model.ckpt or viton512.ckpt as their authors distribute them. "
            "Give Stable Diffusion as unet=FILE, and the custom model of the paper as custom=FILE."
        )


def _check_channels(channels: int, file: str) -> None:
    if channels != CHANNELS:
        raise CheckpointError(
            f"The U-Net in '{file}' has {channels} input channels. Paint-by-Example and DCI-VTON have "
            f"{CHANNELS} (latent, masked picture, mask); StableVITON, which has 13, needs its own code: "
            "build it there, and trace it with the recipe 'stableviton'."
        )


def _split(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """Query, key and value of the mapper's fused projections (one head each), in that order; others as they are."""
    if ".attn.c_qkv." not in key or len(tensor) % 3:
        return {key: tensor}
    names = (key.replace("c_qkv", f"to_{letter}") for letter in "qkv")
    return dict(zip(names, tensor.chunk(3), strict=True))


def _encoder_name(key: str) -> str | None:
    for theirs, ours in OUTSIDE_MAPPER.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    match = re.fullmatch(re.escape(MAPPER_PREFIX) + r"(\d+)\.(.*)\.(weight|bias)", key)
    if match is None or match[2] not in MAPPER_LAYERS:
        return None
    return f"mapper.blocks.{match[1]}.{MAPPER_LAYERS[match[2]]}.{match[3]}"


def _number_positions(encoder: Any) -> None:
    """Fills the one buffer that no file has, and that is still on the meta device."""
    embeddings = encoder.model.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]


def _scheduler() -> PNDMScheduler:
    """Stable Diffusion's schedule with its PLMS sampler."""
    return PNDMScheduler(
        beta_start=BETA_START, beta_end=BETA_END, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )


def _image_processor(size: int) -> CLIPImageProcessor:
    """CLIP's own scale and deviation, as the authors feed the reference."""
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
