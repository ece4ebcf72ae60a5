"""Small super-resolution pipelines of PASD's and SeeSR's structure, with random weights.

Only what matters to attribution is kept: the names and places of the attention to the reference, its
tokens, the numbers of heads, the start latents (paper eqs. 23, 24), the schedulers, and guidance.
"""

import warnings
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UniPCMultistepScheduler
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from i2am_train.models.diffusion import PASD_RESIDUAL, SEESR_RESIDUAL, low_resolution_start

CONTEXT, SCALE, SWIN_WIDTH, SWIN_SIDE = 8, 4, 6, 12
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class AttendingUpBlock(nn.Module):
    """A decoder block of diffusers with one more transformer after each resnet.

    ``reference`` (``[row, token, channel]``) is what these attend to; the pipeline sets it.
    """

    reference: Tensor

    def __init__(self, block: Any, kind: str, heads: int, width: int | None, groups: int) -> None:
        super().__init__()
        self.resnets, self.upsamplers, self.kind = block.resnets, block.upsamplers, kind
        self.attentions = getattr(block, "attentions", [None] * len(block.resnets))
        self.channels = block.resnets[0].out_channels
        self.has_cross_attention = hasattr(block, "attentions")
        transformers = [
            Transformer2DModel(
                heads, self.channels // heads, self.channels, norm_num_groups=groups,
                cross_attention_dim=width or self.channels,
            )
            for _ in block.resnets
        ]  # fmt: skip
        setattr(self, kind, nn.ModuleList(transformers))

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        upsample_size: Any = None,
        encoder_hidden_states: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        skips = list(res_hidden_states_tuple)
        for resnet, text, own in zip(self.resnets, self.attentions, getattr(self, self.kind), strict=True):
            hidden_states = resnet(torch.cat([hidden_states, skips.pop()], dim=1), temb)
            if text is not None:
                hidden_states = text(hidden_states, encoder_hidden_states, return_dict=False)[0]
            hidden_states = own(hidden_states, self.reference, return_dict=False)[0]
        for upsampler in self.upsamplers or ():
            hidden_states = upsampler(hidden_states, upsample_size)
        return hidden_states


def attending(unet: Any, kind: str, heads: tuple[int, ...], width: int | None = None, groups: int = 4) -> None:
    """Replaces the last blocks of a decoder by such ones; ``heads`` are given per block."""
    first = len(unet.up_blocks) - len(heads)
    for at, count in enumerate(heads, start=first):
        unet.up_blocks[at] = AttendingUpBlock(unet.up_blocks[at], kind, count, width, groups)


class TinySuperResolution:
    """Called like the pipelines of ``model=factory``; latents are a quarter of the picture's size."""

    residual: float

    def __init__(self, kind: str, heads: tuple[int, ...], width: int | None, scheduler: Any) -> None:
        widths = (20, 20, 40, 40)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.unet = UNet2DConditionModel(
                block_out_channels=widths, attention_head_dim=(5, 5, 10, 10), norm_num_groups=4,
                cross_attention_dim=CONTEXT, layers_per_block=2,
            )  # fmt: skip
            attending(self.unet, kind, heads, width)
            self.text = torch.randn(2, 5, CONTEXT)
        self.unet.eval()
        self.scheduler = scheduler

    def set_references(self, latents: Tensor, rows: int) -> None:
        """Give the decoder's blocks what they attend to."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(
        self, *, reference: Image.Image, height: int, width: int, steps: int, guidance: float,
        seed: int, **_: Any,
    ) -> Image.Image:  # fmt: skip
        low = _encoded(reference, height // SCALE, width // SCALE)
        do_classifier_free_guidance = guidance > 1  # as the authors' pipelines name it
        rows = 1 + do_classifier_free_guidance
        self.set_references(low, rows)
        noise = torch.randn(low.shape, generator=torch.Generator().manual_seed(seed))
        alpha = float(self.scheduler.alphas_cumprod[-1])
        latents = low_resolution_start(low, noise, alpha, self.residual)
        with warnings.catch_warnings():
            # diffusers' UniPC turns tensors into arrays in a way that numpy 2 warns of.
            warnings.filterwarnings("ignore", category=DeprecationWarning, message="__array__")
            self.scheduler.set_timesteps(steps)
        for timestep in self.scheduler.timesteps:
            both = self.unet(latents.repeat(rows, 1, 1, 1), timestep, self.text[-rows:]).sample
            without, with_text = both[:1], both[-1:]
            predicted = without + guidance * (with_text - without)
            latents = self.scheduler.step(predicted, timestep, latents).prev_sample
        return _decoded(latents, height, width)


class TinyPASD(TinySuperResolution):
    """Pixel attention in all four blocks, to features of the low-resolution picture on the same grid."""

    residual = PASD_RESIDUAL

    def __init__(self) -> None:
        scheduler = UniPCMultistepScheduler(**SCHEDULE)
        super().__init__("pixel_attentions", (4, 4, 2, 2), None, scheduler)

    def set_references(self, latents: Tensor, rows: int) -> None:
        for block, factor in zip(self.unet.up_blocks, (8, 4, 2, 1), strict=True):
            height, width = (side // factor for side in latents.shape[-2:])
            features = _features(adaptive_avg_pool2d(latents, (height, width)), block.channels)
            block.reference = features.repeat(rows, 1, 1)


class TinySeeSR(TinySuperResolution):
    """Image attention in three blocks, with 20, 10 and 5 heads, to the mean and 12x12 tokens."""

    residual = SEESR_RESIDUAL

    def __init__(self) -> None:
        scheduler = DDIMScheduler(**SCHEDULE)
        super().__init__("image_attentions", (20, 10, 5), SWIN_WIDTH, scheduler)

    def set_references(self, latents: Tensor, rows: int) -> None:
        tokens = _features(adaptive_avg_pool2d(latents, (SWIN_SIDE, SWIN_SIDE)), SWIN_WIDTH)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        for block in self.unet.up_blocks[1:]:
            block.reference = tokens.repeat(rows, 1, 1)


def make_pasd(checkpoint: str | None, device: torch.device) -> TinyPASD:
    """A factory."""
    return TinyPASD()


def make_seesr(checkpoint: str | None, device: torch.device) -> TinySeeSR:
    """A factory."""
    return TinySeeSR()


def _encoded(picture: Image.Image, height: int, width: int) -> Tensor:
    """``[1, 4, height, width]``: colours and their mean, in [-1, 1]."""
    colours = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    small = adaptive_avg_pool2d(colours, (height, width))
    return torch.cat([small, small.mean(dim=1, keepdim=True)], dim=1)


def _decoded(latents: Tensor, height: int, width: int) -> Image.Image:
    colours = interpolate(latents[:, :3].clamp(-1, 1), (height, width))[0]
    return Image.fromarray(((colours + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def _features(maps: Tensor, channels: int) -> Tensor:
    """A random but fixed view of each place: ``[1, token, channels]``."""
    weight = torch.randn(maps.shape[1], channels, generator=torch.Generator().manual_seed(6))
    return maps.flatten(2).transpose(1, 2) @ weight
