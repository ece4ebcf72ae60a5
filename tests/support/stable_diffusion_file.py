"""Stable Diffusion's own names of the weights of diffusers, written against its code and not diffusers'."""

from typing import Any

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def original_unet_name(name: str) -> str:
    """Stable Diffusion's own name of a U-Net weight of diffusers, written against its code and not diffusers'."""
    for ours, theirs in (
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
    ):
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    half, *words = name.split(".")
    level = 0 if half == "mid_block" else int(words.pop(0))
    kind, number, rest = words[0], int(words[1]), ".".join(words[2:])
    if kind == "resnets":
        layer, _, what = rest.rpartition(".")
        rest = f"0.{UNET_RESNET[layer]}.{what}"
    elif kind == "attentions":
        rest = f"1.{rest}"
    if half == "mid_block":
        return f"middle_block.{rest}" if number == 0 else f"middle_block.2.{rest[2:]}"
    if half == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{3 * level + 3}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{3 * level + number + 1}.{rest}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}.{rest}"
    return f"output_blocks.{3 * level + number}.{rest}"


def original_vae_name(name: str, levels: int) -> str:
    """Stable Diffusion's own name of a VAE weight of diffusers."""
    half, *words = name.split(".")
    if "quant_conv" in half:
        return name
    if words[0] == "conv_norm_out":
        return f"{half}.norm_out.{words[1]}"
    if words[0] == "mid_block":
        kind, number, rest = words[1], int(words[2]), ".".join(words[3:])
        if kind == "attentions":
            layer, _, what = rest.rpartition(".")
            return f"{half}.mid.attn_1.{VAE_ATTENTION[layer]}.{what}"
        return f"{half}.mid.block_{number + 1}.{rest}"
    if words[0] not in ("down_blocks", "up_blocks"):
        return name
    level = int(words[1]) if words[0] == "down_blocks" else levels - 1 - int(words[1])
    start = f"{half}.{words[0].removesuffix('_blocks')}.{level}"
    rest = ".".join(words[3:]).replace("conv_shortcut", "nin_shortcut").removeprefix("0.")
    kind = words[2]
    if kind == "resnets":
        return f"{start}.block.{rest if words[3] != '0' else '0.' + rest}"
    return f"{start}.{kind.removesuffix('rs')}.{rest}"


def in_original_layout(unet: Any = None, vae: Any = None, *, vae_prefix: str = "first_stage_model.") -> dict[str, Any]:
    """The weights of a U-Net and a VAE of diffusers as those of one file in Stable Diffusion's own layout."""
    weights = {}
    if unet is not None:
        for name, value in unet.state_dict().items():
            weights[f"model.diffusion_model.{original_unet_name(name)}"] = value
    if vae is not None:
        levels = len(vae.config["block_out_channels"])
        for name, value in vae.state_dict().items():
            squared = ".attentions." in name and name.endswith("weight") and value.ndim == 2
            key = vae_prefix + original_vae_name(name, levels)
            weights[key] = value[:, :, None, None] if squared else value
    return weights
