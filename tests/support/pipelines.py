"""Tiny pipelines of other people's models, with random weights, as folders."""

from pathlib import Path
from typing import Any


def tiny_paint_by_example(folder: Path, **unet: Any) -> Path:
    """A Paint-by-Example pipeline in Stable Diffusion 1.5's topology, two heads, latents of half the image's size.

    The U-Net's 15 cross-attentions beside the middle's lie where SD1.5 has them; keywords replace its options.
    """
    import torch
    from diffusers import PaintByExamplePipeline, PNDMScheduler, UNet2DConditionModel
    from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
    from transformers import CLIPImageProcessor, CLIPVisionConfig

    width, side = 16, 32
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=width, projection_dim=width, num_hidden_layers=4,
        num_attention_heads=2, image_size=side, patch_size=8,
    )  # fmt: skip
    sizes: dict[str, Any] = {
        "in_channels": 9, "block_out_channels": (16, 16, 32, 32), "norm_num_groups": 8, "attention_head_dim": 2,
        "cross_attention_dim": width,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(2)
        PaintByExamplePipeline(
            vae=_vae(),
            image_encoder=PaintByExampleImageEncoder(vision),
            unet=UNet2DConditionModel(**sizes | unet),
            scheduler=PNDMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True
            ),
            safety_checker=None,
            feature_extractor=CLIPImageProcessor(
                size={"shortest_edge": side}, crop_size={"height": side, "width": side}
            ),
        ).save_pretrained(folder)  # fmt: skip
    return folder


def tiny_stable_diffusion(folder: Path, **unet: Any) -> Path:
    """Stable Diffusion 1.5's topology in small, with DDIM and a text encoder; keywords replace options of the U-Net."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    width = 16
    text = CLIPTextConfig(
        hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=3 + 256 * 2, max_position_embeddings=77, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    sizes: dict[str, Any] = {
        "block_out_channels": (16, 16, 32, 32), "norm_num_groups": 8, "attention_head_dim": 2,
        "cross_attention_dim": width, "sample_size": 64,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(text),
            tokenizer=_tokenizer(),
            unet=UNet2DConditionModel(**sizes | unet),
            scheduler=DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                set_alpha_to_one=False, steps_offset=1,
            ),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(folder)  # fmt: skip
    return folder


def _vae() -> Any:
    """Latents of half the image's size."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def _tokenizer() -> Any:
    """CLIP's tokenizer that knows single letters only."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = ["<pad>", "<|startoftext|>", "<|endoftext|>", *letters]
    words += [f"{letter}</w>" for letter in letters]
    return CLIPTokenizer(vocab={word: at for at, word in enumerate(words)}, merges=[], model_max_length=77)


ENCODER_WIDTH = 32
RESAMPLER_WIDTH = 64
"""Of one head, which diffusers takes to be 64 channels wide."""


def tiny_ip_adapter(folder: Path, kind: str = "ip_adapter") -> tuple[Path, Path]:
    """A Stable Diffusion folder, and the file of an IP-Adapter for it beside an image encoder of 16x16 patches.

    ``kind``: ip_adapter (4 tokens), ip_adapter_full_face (class token and patches), ip_adapter_plus (16 tokens; a
    ``.bin`` file, in which the authors release them all).
    """
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    base = tiny_stable_diffusion(folder / "base")
    encoder = CLIPVisionConfig(
        hidden_size=ENCODER_WIDTH, intermediate_size=ENCODER_WIDTH, projection_dim=ENCODER_WIDTH,
        num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=4,
    )  # fmt: skip
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    crossed = [layer for path, layer in unet.named_modules() if path.endswith("attn2")]
    # The authors number all attentions in the order of diffusers' processors: encoder, decoder, middle.
    order = [path for path in unet.attn_processors if path.endswith("attn2.processor")]
    assert len(order) == len(crossed)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        CLIPVisionModelWithProjection(encoder).save_pretrained(folder / "image_encoder")
        parts = {"image_proj": _image_projection(kind), "ip_adapter": {}}
        for number, path in enumerate(order):
            out = unet.get_submodule(path.removesuffix(".processor")).to_k.out_features
            for part in ("to_k_ip", "to_v_ip"):
                parts["ip_adapter"][f"{2 * number + 1}.{part}.weight"] = torch.randn(out, 16) / 4
    if kind == "ip_adapter_plus":
        torch.save(parts, folder / f"{kind}.bin")
        return base, folder / f"{kind}.bin"
    tensors = {f"{part}.{name}": value for part in parts for name, value in parts[part].items()}
    save_file(tensors, folder / f"{kind}.safetensors")
    return base, folder / f"{kind}.safetensors"


def _image_projection(kind: str) -> dict[str, Any]:
    """Weights of the projection of the encoder's tokens, by the authors' names."""
    import torch

    def linear(name: str, inner: int, outer: int, bias: bool = True) -> dict[str, Any]:
        weights = {f"{name}.weight": torch.randn(outer, inner) / inner**0.5}
        return weights | ({f"{name}.bias": torch.zeros(outer)} if bias else {})

    def norm(name: str, width: int) -> dict[str, Any]:
        return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}

    if kind == "ip_adapter":
        return linear("proj", ENCODER_WIDTH, 4 * 16) | norm("norm", 16)
    if kind == "ip_adapter_plus":
        wide = RESAMPLER_WIDTH
        weights = {"latents": torch.randn(1, 16, wide) / wide**0.5}
        weights |= linear("proj_in", ENCODER_WIDTH, wide) | linear("proj_out", wide, 16)
        weights |= norm("norm_out", 16)
        for layer in (f"layers.{number}" for number in range(4)):
            weights |= norm(f"{layer}.0.norm1", wide) | norm(f"{layer}.0.norm2", wide)
            weights |= linear(f"{layer}.0.to_q", wide, wide, bias=False)
            weights |= linear(f"{layer}.0.to_kv", wide, 2 * wide, bias=False)
            weights |= linear(f"{layer}.0.to_out", wide, wide, bias=False)
            weights |= norm(f"{layer}.1.0", wide)
            weights |= linear(f"{layer}.1.1", wide, 4 * wide, bias=False)
            weights |= linear(f"{layer}.1.3", 4 * wide, wide, bias=False)
        return weights
    assert kind == "ip_adapter_full_face"
    hidden = linear("proj.0", ENCODER_WIDTH, ENCODER_WIDTH)
    return hidden | linear("proj.2", ENCODER_WIDTH, 16) | norm("proj.3", 16)


def tiny_catvton(folder: Path, stride: int = 8) -> tuple[Path, Path]:
    """An inpainting folder, and attention weights numbered as CatVTON's release does it.

    ``stride`` is how many modules its authors count for each self-attention.
    """
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    base = tiny_stable_diffusion(folder / "base", in_channels=9)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    tensors = {}
    generator = torch.Generator().manual_seed(5)
    layers = [layer for path, layer in unet.named_modules() if path.endswith(".attn1")]
    for number, layer in enumerate(layers):
        for name, value in layer.state_dict().items():
            fresh = torch.randn(value.shape, generator=generator) / 4
            tensors[f"{stride * number}.{name}"] = fresh
            if name == "to_q.weight":  # the part stands under a number of its own, too
                tensors[f"{stride * number + 1}.weight"] = fresh.clone()
    save_file(tensors, folder / "attention.safetensors")
    return base, folder / "attention.safetensors"
