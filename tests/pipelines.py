"""Tiny pipelines of other people's models, with random weights, as folders."""

from pathlib import Path
from typing import Any


def tiny_paint_by_example(folder: Path, **unet: Any) -> Path:
    """A Paint-by-Example pipeline in Stable Diffusion 1.5's topology, two heads, latents of half the image's size.

    The U-Net's 15 cross-attentions beside the middle's lie where SD1.5 has them; keywords replace its options.
    """
    import torch
    from diffusers import AutoencoderKL, PaintByExamplePipeline, PNDMScheduler, UNet2DConditionModel
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
            vae=AutoencoderKL(
                block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            ),
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
