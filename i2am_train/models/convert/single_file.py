"""Stable Diffusion 1.5's U-Net and VAE from one file in the original layout, without network and without its YAML.

The layout is that of ``v1-5-pruned.ckpt`` and of fine-tuned VAEs: ``model.diffusion_model.input_blocks...`` and
``first_stage_model.encoder...``, or ``encoder...`` alone. Names are translated by diffusers' own converters; widths are
read off the tensors; everything else is Stable Diffusion 1.5's topology, and a file of another one is refused.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor, nn

from i2am_train.errors import CheckpointError
from i2am_train.models.convert.key_report import KeyReport, Renamed, key_report, lacking, load_renamed

UNET_PREFIX = "model.diffusion_model."
EMA_PREFIX = "model_ema."
VAE_PREFIXES = ("first_stage_model.", "")
VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
HEADS = 8
LEVELS = 4


@dataclass(frozen=True, slots=True)
class _Name:
    """A key in place of its tensor: the converters only move values, and look at shapes of attention weights."""

    key: str
    shape: tuple[int, ...] = ()


def unet_from_weights(
    weights: Mapping[str, Tensor], file: str, *, ema: bool = False
) -> tuple[UNet2DConditionModel, KeyReport]:
    """The U-Net in a checkpoint's tensors, as float32: the trained weights, or with ``ema`` their average.

    Raises:
        CheckpointError: there is no U-Net of Stable Diffusion 1.5's topology, or no average.
    """
    unet, renamed = empty_unet_part(weights, file, ema=ema)
    report = key_report(file, weights, {"unet": (unet, renamed)}, ours=(EMA_PREFIX if ema else UNET_PREFIX,))
    report.check()
    load_renamed(unet, renamed, file)
    return unet.eval(), report


def vae_from_weights(weights: Mapping[str, Tensor], file: str) -> tuple[AutoencoderKL, KeyReport]:
    """The VAE in a checkpoint's tensors, as float32: of a whole model, or fine-tuned alone.

    Files have no scaling factor; Stable Diffusion's is assumed.

    Raises:
        CheckpointError: there is no VAE of Stable Diffusion's topology.
    """
    vae, renamed, starts = empty_vae_part(weights, file)
    report = key_report(file, weights, {"vae": (vae, renamed)}, ours=starts)
    report.check()
    load_renamed(vae, renamed, file)
    return vae.eval(), report


def empty_unet_part(
    weights: Mapping[str, Tensor], file: str, *, ema: bool = False
) -> tuple[UNet2DConditionModel, Renamed]:
    """The U-Net of a file on the meta device, and the tensors for it.

    Raises:
        CheckpointError: there is no U-Net of Stable Diffusion 1.5's topology, or no average.
    """
    sources = {key[len(UNET_PREFIX) :]: key for key in weights if key.startswith(UNET_PREFIX)}
    if not sources:
        raise CheckpointError(
            f"'{file}' has no U-Net in Stable Diffusion's layout: none of its {len(weights)} keys starts with "
            f"'{UNET_PREFIX}' (there: {_examples(weights)}). Give v1-5-pruned.safetensors or another file like it, or "
            "a folder in diffusers' layout."
        )
    if ema:
        sources = {name: _ema_key(key) for name, key in sources.items()}
        if not any(key in weights for key in sources.values()):
            raise CheckpointError(
                f"'{file}' has no averaged weights (keys '{EMA_PREFIX}...'), and ema=true asks for them. Set "
                "ema=false, or give the file that has both, such as v1-5-pruned.ckpt."
            )
    ldm = {name: weights[key] for name, key in sources.items() if key in weights}
    unet = empty_unet(ldm, file)
    return unet, renamed_unet(ldm, sources, unet)


def empty_vae_part(weights: Mapping[str, Tensor], file: str) -> tuple[AutoencoderKL, Renamed, tuple[str, ...]]:
    """The VAE of a file on the meta device, the tensors for it, and how its keys start.

    Raises:
        CheckpointError: there is no VAE of Stable Diffusion's topology.
    """
    prefix = next((p for p in VAE_PREFIXES if f"{p}decoder.conv_in.weight" in weights), VAE_PREFIXES[0])
    starts = tuple(f"{prefix}{part}" for part in VAE_PARTS)
    sources = {key[len(prefix) :]: key for key in weights if key.startswith(starts)}
    if not sources:
        raise CheckpointError(
            f"'{file}' has no VAE in Stable Diffusion's layout: none of its {len(weights)} keys starts with "
            f"'first_stage_model.' or 'decoder.' (there: {_examples(weights)}). Give vae=FOLDER or vae=FILE with one."
        )
    ldm = {name: weights[key] for name, key in sources.items()}
    vae = empty_vae(ldm, file)
    return vae, renamed_vae(ldm, sources, vae), starts


def empty_unet(ldm: Mapping[str, Tensor], file: str) -> UNet2DConditionModel:
    """A U-Net of Stable Diffusion 1.5's topology on the meta device, with the widths of these tensors."""
    try:
        widths = [ldm[f"input_blocks.{3 * n + 1}.0.out_layers.3.weight"].shape[0] for n in range(LEVELS)]
        context = ldm["input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
        channels = ldm["input_blocks.0.0.weight"].shape[1], ldm["out.2.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"The U-Net in '{file}' is not of Stable Diffusion 1.5's topology: it has {lacking(error)}. Expected four "
            "levels of two blocks with cross-attention in the upper three, as in v1-5-pruned.ckpt."
        ) from error
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=64,
            in_channels=channels[0],
            out_channels=channels[1],
            block_out_channels=widths,
            layers_per_block=2,
            attention_head_dim=HEADS,  # diffusers' historical name for the number of heads
            cross_attention_dim=context,
        )


def empty_vae(ldm: Mapping[str, Tensor], file: str) -> AutoencoderKL:
    """A VAE of Stable Diffusion's topology on the meta device, with the widths of these tensors."""
    try:
        levels = len({name.split(".")[2] for name in ldm if name.startswith("encoder.down.")})
        widths = [ldm[f"encoder.down.{n}.block.0.conv2.weight"].shape[0] for n in range(levels)]
        latent = ldm["decoder.conv_in.weight"].shape[1]
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"The VAE in '{file}' is not of Stable Diffusion's topology: it has {lacking(error)}. Expected the VAE of "
            "v1-5-pruned.ckpt, or one fine-tuned from it."
        ) from error
    with torch.device("meta"):
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=widths,
            layers_per_block=2,
            latent_channels=latent,
            sample_size=512,
        )


def renamed_unet(ldm: Mapping[str, Tensor], sources: Mapping[str, str], unet: nn.Module) -> Renamed:
    """A U-Net's tensors under diffusers' names; ``sources`` are their keys in the file."""
    keys = {f"{UNET_PREFIX}{name}": _Name(name) for name in ldm}
    converted = convert_ldm_unet_checkpoint(keys, unet.config)
    return _gathered(ldm, sources, converted)


def renamed_vae(ldm: Mapping[str, Tensor], sources: Mapping[str, str], vae: nn.Module) -> Renamed:
    """A VAE's tensors under diffusers' names; 1x1 convolutions of its attention become linear layers."""
    converted = convert_ldm_vae_checkpoint({name: _Name(name) for name in ldm}, vae.config)
    renamed = _gathered(ldm, sources, converted)
    for name, tensor in renamed.tensors.items():
        if ".attentions." in name and tensor.ndim == 4:
            renamed.tensors[name] = tensor[:, :, 0, 0]
    return renamed


def _gathered(ldm: Mapping[str, Tensor], sources: Mapping[str, str], converted: Mapping[str, _Name]) -> Renamed:
    return Renamed(
        {name: ldm[value.key] for name, value in converted.items()},
        {name: sources[value.key] for name, value in converted.items()},
    )


def _ema_key(key: str) -> str:
    """The average's key of a weight: the original code drops the dots."""
    return EMA_PREFIX + "".join(key.split(".")[1:])


def _examples(keys: Iterable[str]) -> str:
    return ", ".join(sorted({".".join(key.split(".")[:2]) for key in keys})[:4])
