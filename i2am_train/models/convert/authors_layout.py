"""The authors' custom model (VITON-v1) in the names of Stable Diffusion's code: one converter then serves both.

A Lightning checkpoint of theirs holds ``diffusion`` (time embedding, U-Net, output layer, null tokens), ``mlp`` (our
projector), ``encoder`` and ``decoder`` (the VAE, as numbered layers) and ``dinov2`` (frozen). Their U-Net's blocks are
Stable Diffusion's one by one: ``encoders.N`` is ``input_blocks.N``, ``bottleneck`` is ``middle_block``, ``decoders.N``
is ``output_blocks.N``; self-attention has query, key and value in one matrix.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from i2am_train.models.convert.key_report import Renamed, renamed

UNET_PARTS = ("diffusion.time_embedding.", "diffusion.unet.", "diffusion.final.")
NULL_TOKENS = "diffusion.uncond_vector"
PROJECTOR_PREFIX = "mlp.proj."
VAE_PARTS = ("encoder.", "decoder.")
REFERENCE_ENCODER = "dinov2."
FUSED = re.compile(r"(.*)\battention(_1)?\.in_proj\.(weight|bias)")

BLOCKS = {"encoders.": "input_blocks.", "bottleneck.": "middle_block.", "decoders.": "output_blocks."}
OUTSIDE = {
    "diffusion.time_embedding.linear_1.": "time_embed.0.",
    "diffusion.time_embedding.linear_2.": "time_embed.2.",
    "diffusion.final.groupnorm.": "out.0.",
    "diffusion.final.conv.": "out.2.",
}
LAYERS = {
    "groupnorm_feature": "in_layers.0",
    "conv_feature": "in_layers.2",
    "linear_time": "emb_layers.1",
    "groupnorm_merged": "out_layers.0",
    "conv_merged": "out_layers.3",
    "residual_layer": "skip_connection",
    "groupnorm": "norm",
    "conv_input": "proj_in",
    "conv_output": "proj_out",
    "conv": "conv",  # of an upsampling layer
    "layernorm_1": "transformer_blocks.0.norm1",
    "layernorm_2": "transformer_blocks.0.norm2",
    "layernorm_3": "transformer_blocks.0.norm3",
    "attention_1.to_q": "transformer_blocks.0.attn1.to_q",
    "attention_1.to_k": "transformer_blocks.0.attn1.to_k",
    "attention_1.to_v": "transformer_blocks.0.attn1.to_v",
    "attention_1.out_proj": "transformer_blocks.0.attn1.to_out.0",
    "attention_2.q_proj": "transformer_blocks.0.attn2.to_q",
    "attention_2.k_proj": "transformer_blocks.0.attn2.to_k",
    "attention_2.v_proj": "transformer_blocks.0.attn2.to_v",
    "attention_2.out_proj": "transformer_blocks.0.attn2.to_out.0",
    "linear_geglu_1": "transformer_blocks.0.ff.net.0.proj",
    "linear_geglu_2": "transformer_blocks.0.ff.net.2",
}
PROJECTOR_LAYERS = {
    "layernorm_1": "norm1",
    "layernorm_2": "norm3",
    "attention_1.to_q": "attn1.to_q",
    "attention_1.to_k": "attn1.to_k",
    "attention_1.to_v": "attn1.to_v",
    "attention_1.out_proj": "attn1.to_out.0",
    "linear_geglu_1": "ff.net.0.proj",
    "linear_geglu_2": "ff.net.2",
}
VAE_LAYERS = {
    "groupnorm_1": "norm1",
    "conv_1": "conv1",
    "groupnorm_2": "norm2",
    "conv_2": "conv2",
    "residual_layer": "nin_shortcut",
    "groupnorm": "norm",
    "attention.to_q": "q",
    "attention.to_k": "k",
    "attention.to_v": "v",
    "attention.out_proj": "proj_out",
}
VAE_NUMBERS = {
    "encoder": [
        *("conv_in", "down.0.block.0", "down.0.block.1", "down.0.downsample.conv"),
        *("down.1.block.0", "down.1.block.1", "down.1.downsample.conv"),
        *("down.2.block.0", "down.2.block.1", "down.2.downsample.conv"),
        *("down.3.block.0", "down.3.block.1"),
        *("mid.block_1", "mid.attn_1", "mid.block_2", "norm_out", "", "conv_out", "quant_conv"),
    ],
    "decoder": [
        *("post_quant_conv", "conv_in", "mid.block_1", "mid.attn_1", "mid.block_2"),
        *("up.3.block.0", "up.3.block.1", "up.3.block.2", "", "up.3.upsample.conv"),
        *("up.2.block.0", "up.2.block.1", "up.2.block.2", "", "up.2.upsample.conv"),
        *("up.1.block.0", "up.1.block.1", "up.1.block.2", "", "up.1.upsample.conv"),
        *("up.0.block.0", "up.0.block.1", "up.0.block.2", "norm_out", "", "conv_out"),
    ],
}
"""What each numbered layer is; layers without weights have no name."""


def is_custom_model(keys: Mapping[str, Tensor]) -> bool:
    """True for a checkpoint of the authors' custom model."""
    return any(key.startswith(UNET_PARTS) for key in keys)


def unet_weights(weights: Mapping[str, Tensor]) -> Renamed:
    """The U-Net's tensors under Stable Diffusion's names; what has no such name keeps its own."""
    return renamed(weights, UNET_PARTS, _split, _unet_name)


def projector_weights(weights: Mapping[str, Tensor]) -> Renamed:
    """The tensors of ``mlp`` and the null tokens under the names of :class:`ReferenceProjector`."""
    return renamed(weights, (PROJECTOR_PREFIX, NULL_TOKENS), _split, _projector_name)


def vae_weights(weights: Mapping[str, Tensor]) -> Renamed:
    """The VAE's tensors under Stable Diffusion's names (``encoder.down.0...``)."""
    return renamed(weights, VAE_PARTS, _split, _vae_name)


def _split(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """Query, key and value of a fused projection, in that order; other tensors as they are."""
    match = FUSED.fullmatch(key)
    if match is None or len(tensor) % 3:
        return {key: tensor}
    start, number, kind = match[1], match[2] or "", match[3]
    names = (f"{start}attention{number}.to_{letter}.{kind}" for letter in "qkv")
    return dict(zip(names, tensor.chunk(3), strict=True))


def _unet_name(key: str) -> str | None:
    for theirs, ours in OUTSIDE.items():
        if key.startswith(theirs):
            return ours + key[len(theirs) :]
    match = re.fullmatch(r"diffusion\.unet\.(encoders\.\d+\.|bottleneck\.|decoders\.\d+\.)(\d+)\.(.*)", key)
    if match is None:
        return None
    word, rest = match[1].split(".", 1)
    block = f"{BLOCKS[word + '.']}{rest}{match[2]}."
    if match[3] in ("weight", "bias"):  # a bare convolution: the first, or one that halves the size
        return f"{block}{match[3]}" if block == "input_blocks.0.0." else f"{block}op.{match[3]}"
    layer = _layer(match[3], LAYERS)
    return layer and block + layer


def _projector_name(key: str) -> str | None:
    if key == NULL_TOKENS:
        return "null_tokens"
    rest = key[len(PROJECTOR_PREFIX) :]
    if match := re.fullmatch(r"1\.blocks\.(\d+)\.(.*)", rest):
        layer = _layer(match[2], PROJECTOR_LAYERS)
        return layer and f"blocks.{match[1]}.{layer}"
    for number, ours in (("0.", "norm."), ("2.", "output.")):
        if rest.startswith(number):
            return ours + rest[len(number) :]
    return None


def _vae_name(key: str) -> str | None:
    half, number, rest = (key.split(".", 2) + ["", ""])[:3]
    names = VAE_NUMBERS[half]
    if not number.isdigit() or int(number) >= len(names) or not names[int(number)]:
        return None
    part = names[int(number)]
    start = "" if part.endswith("quant_conv") else f"{half}."
    layer = rest if rest in ("weight", "bias") else _layer(rest, VAE_LAYERS)
    return layer and f"{start}{part}.{layer}"


def _layer(name: str, table: Mapping[str, str]) -> str | None:
    """A layer's name by a table, its ``weight`` or ``bias`` kept."""
    layer, _, kind = name.rpartition(".")
    return f"{table[layer]}.{kind}" if layer in table else None
