"""Makes a new try-on model from sizes alone, with random weights in Stable Diffusion 1.5's topology.

:class:`Architecture` has the shipped sizes; tests use smaller images and the same widths divided.
"""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from i2am_train.models.projector import ReferenceProjector
from i2am_train.models.tryon import INPUT_CHANNELS, TryOnConfig, TryOnModel
from i2am_train.types import GridSize, PredictionType

BETA_START, BETA_END = 0.00085, 0.012  # Stable Diffusion's scaled-linear schedule


@dataclass(kw_only=True, slots=True)
class Architecture:
    """Widths of a model; the defaults are the shipped tiny model's, chosen for speed on two CPU cores.

    ``heads`` is the number of heads per U-Net level: 8 where the width gives them 16 channels each, since fewer than
    16 channels a head cost more time than they are worth (measured: attention at 32x24 was 2 to 4 times slower).
    ``norm_groups`` are few, as the narrowest levels need: a group of two channels loses a picture's mean colour.
    """

    unet_widths: tuple[int, ...] = (32, 64, 128, 128)
    heads: tuple[int, ...] = (2, 4, 8, 8)
    context_width: int = 128
    vae_widths: tuple[int, ...] = (16, 32, 64)
    norm_groups: int = 4
    encoder_width: int = 128
    encoder_layers: int = 4
    encoder_heads: int = 4
    patch: int = 8
    projector_blocks: int = 1
    class_token: bool = False
    prediction_type: PredictionType = PredictionType.V_PREDICTION


def build_model(size: GridSize, architecture: Architecture | None = None) -> TryOnModel:
    """A model with random weights for images of the given size.

    >>> build_model(GridSize(64, 48)).reference_grid
    GridSize(height=8, width=6)
    """
    sizes = architecture or Architecture()
    config = TryOnConfig(
        height=size.height,
        width=size.width,
        reference_height=size.height,
        reference_width=size.width,
        class_token=sizes.class_token,
    )
    grid = GridSize(size.height // sizes.patch, size.width // sizes.patch)
    projector = ReferenceProjector(
        encoder_width=sizes.encoder_width,
        context_width=sizes.context_width,
        tokens=grid.tokens + int(sizes.class_token),
        depth=sizes.projector_blocks,
    )
    return TryOnModel(
        config,
        widen_input(_unet(size, sizes)),
        _vae(size, sizes),
        _reference_encoder(size, sizes),
        projector,
        make_scheduler(sizes.prediction_type),
    )


def _unet(size: GridSize, sizes: Architecture) -> UNet2DConditionModel:
    """Decoder cross-attention at three resolutions, as in SD1.5; the encoder has none, to save half the time."""
    factor = 2 ** (len(sizes.vae_widths) - 1)
    levels = len(sizes.unet_widths)
    return UNet2DConditionModel(
        sample_size=(size.height // factor, size.width // factor),
        in_channels=4,
        out_channels=4,
        block_out_channels=sizes.unet_widths,
        down_block_types=("DownBlock2D",) * levels,
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        layers_per_block=2,
        attention_head_dim=sizes.heads,  # diffusers' historical name for the number of heads
        cross_attention_dim=sizes.context_width,
        norm_num_groups=sizes.norm_groups,
    )


def _vae(size: GridSize, sizes: Architecture) -> AutoencoderKL:
    levels = len(sizes.vae_widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.vae_widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=sizes.norm_groups,
        sample_size=max(size),
        mid_block_add_attention=False,
    )


def _reference_encoder(size: GridSize, sizes: Architecture) -> Dinov2Model:
    config = Dinov2Config(
        hidden_size=sizes.encoder_width,
        num_hidden_layers=sizes.encoder_layers,
        num_attention_heads=sizes.encoder_heads,
        mlp_ratio=2,
        image_size=max(size),
        patch_size=sizes.patch,
        use_mask_token=False,
    )
    return Dinov2Model(config)


def make_scheduler(prediction_type: PredictionType) -> DDIMScheduler:
    """SD's schedule; with v-prediction it ends in pure noise, so that colours must come from the garment.

    >>> float(make_scheduler(PredictionType.V_PREDICTION).alphas_cumprod[-1])  # the share of the picture at the end
    0.0
    """
    return DDIMScheduler(
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=str(prediction_type),
        rescale_betas_zero_snr=prediction_type is PredictionType.V_PREDICTION,
    )


def widen_input(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Gives the first convolution more input channels, the new ones zero (paper A.5), and returns the U-Net.

    At the start the network then equals the one that it was on the noisy latent alone.

    >>> unet = UNet2DConditionModel(block_out_channels=(32,) * 4, cross_attention_dim=8, norm_num_groups=8)
    >>> first = unet.conv_in.weight
    >>> bool((widen_input(unet).conv_in.weight[:, :4] == first).all()), unet.conv_in.weight.shape[1]
    (True, 12)
    """
    old = unet.conv_in
    new = nn.Conv2d(INPUT_CHANNELS, old.out_channels, old.kernel_size, old.stride, old.padding)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        if new.bias is not None and old.bias is not None:
            new.bias.copy_(old.bias)
    unet.conv_in = new.to(old.weight.device, old.weight.dtype)
    unet.register_to_config(in_channels=INPUT_CHANNELS)
    return unet
