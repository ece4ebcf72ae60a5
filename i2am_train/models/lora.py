"""Low-rank adapters (LoRA, Hu et al. 2022) beside the U-Net's attention projections, through peft.

peft puts a module around each projection whose output is that of projection and adapter together, under the
projection's own path: hooks on projections, and so attribution maps and attention losses, see what is attended with.
"""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from torch import Tensor

_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""Parts of an attention module that get an adapter, in self-attention and cross-attention alike."""
ADAPTER_FOLDER = "lora"
"""Folder of a run with the adapters alone, if it trained any."""
_ADAPTER = "default"
"""peft's name for the one adapter that a model has here."""


def add_adapters(unet: UNet2DConditionModel, rank: int, alpha: int) -> None:
    """Puts an adapter of the given rank beside every attention projection, and freezes all other weights of the U-Net.

    An adapter's output is scaled by ``alpha / rank`` and is zero at first, so that nothing changes until it is trained.
    Uses torch's global random stream.
    """
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(_PROJECTIONS))
    unet.add_adapter(config, _ADAPTER)


def has_adapters(unet: UNet2DConditionModel) -> bool:
    """True after :func:`add_adapters`.

    >>> down, up = ("CrossAttnDownBlock2D",), ("CrossAttnUpBlock2D",)
    >>> unet = UNet2DConditionModel(None, 4, 4, down_block_types=down, up_block_types=up, block_out_channels=(32,))
    >>> before = has_adapters(unet)
    >>> add_adapters(unet, rank=2, alpha=2)
    >>> before, has_adapters(unet), has_adapters(merged(unet))
    (False, True, False)
    """
    return _ADAPTER in getattr(unet, "peft_config", {})


def copy_adapters(source: UNet2DConditionModel, target: UNet2DConditionModel) -> None:
    """Gives the target adapters like those of the source, if it has any, with values of their own."""
    if has_adapters(source):
        target.add_adapter(source.peft_config[_ADAPTER], _ADAPTER)


def merged(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The U-Net without adapters that computes the same, up to rounding; the given one where it has none.

    The given one is left as it is, bit by bit: weights that an adapter changes are new, others are shared.
    """
    if not has_adapters(unet):
        return unet
    with torch.device("meta"):  # draws no random numbers and needs no memory
        plain = UNet2DConditionModel.from_config(unet.config)
    plain.load_state_dict(_merged_weights(unet), assign=True)
    return plain.eval()


@torch.no_grad()
def _merged_weights(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    from peft.tuners.lora import Linear

    weights = {
        name.replace(".base_layer.", "."): value for name, value in unet.state_dict().items() if ".lora_" not in name
    }
    for path, layer in unet.named_modules():
        if isinstance(layer, Linear):
            weights[f"{path}.weight"] = weights[f"{path}.weight"] + layer.get_delta_weight(_ADAPTER)
    return weights


def save_adapters(unet: UNet2DConditionModel, folder: Path) -> None:
    """Writes the adapters alone, in diffusers' format, as ``pytorch_lora_weights.safetensors``.

    ``load_lora_weights(folder)`` of a pipeline of the model that training started from puts them on again.
    """
    from peft import get_peft_model_state_dict

    StableDiffusionLoraLoaderMixin.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet, adapter_name=_ADAPTER),
        unet_lora_adapter_metadata=unet.peft_config[_ADAPTER].to_dict(),
    )
