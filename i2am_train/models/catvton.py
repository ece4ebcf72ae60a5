"""CatVTON-style try-on: person and garment on one canvas, filled in by an inpainting U-Net.

Written here from its description: Stable Diffusion's inpainting network without its cross-attention, whose
self-attention sees both pictures. Rows of a guided batch: unconditional (without the garment), conditional.
"""

from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from i2am_train.attention.frames import announce
from i2am_train.data.pictures import Image, fit_mask, fit_picture
from i2am_train.errors import CheckpointError
from i2am_train.models.diffusion import guided
from i2am_train.models.pretrained import fitting, load_network, load_part
from i2am_train.models.traceable import NO_GUIDANCE, Request, Source, TraceableModel, latent_multiple
from i2am_train.models.watch import Watch
from i2am_train.ops.numerics import to_uint8
from i2am_train.weight_files import check_used, read_weights

_CHANNELS = 9
"""Of the U-Net's input: noise, mask, masked picture."""
_ETA = 1.0
"""Noise that each DDIM step adds anew, as its authors sample."""
_WHITE = 255


class SkipAttnProcessor(nn.Module):
    """In place of cross-attention: hands on what comes in. The recipe is recognised by its name."""

    def forward(self, attn: nn.Module, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """The tokens as they are.

        >>> SkipAttnProcessor()(nn.Identity(), torch.ones(1, 2)).tolist()
        [[1.0, 1.0]]
        """
        return hidden_states


class _CatVTON:
    """The networks. ``side_by_side`` puts the garment to the right instead of below."""

    def __init__(self, unet: Any, vae: Any, scheduler: Any, *, side_by_side: bool = False) -> None:
        self.unet, self.vae, self.scheduler = unet, vae, scheduler
        self.axis = -1 if side_by_side else -2  # along which person and garment are joined
        unet.set_attn_processor(
            {
                path: SkipAttnProcessor() if path.endswith("attn2.processor") else processor
                for path, processor in unet.attn_processors.items()
            }
        )

    @torch.no_grad()
    def __call__(self, request: Request) -> Image:
        """The person in the garment."""
        assert request.image is not None
        assert request.mask is not None
        size = request.size
        person = self._tensor(fit_picture(request.image, size, "crop", _WHITE))
        garment = self._tensor(fit_picture(request.reference, size, "pad", _WHITE))
        mask = torch.from_numpy(fit_mask(request.mask, size, "crop")).to(person)[None, None]
        masked = self._encoded(person * (1 - mask))
        small = F.interpolate(mask, masked.shape[-2:], mode="nearest")
        conditions = [
            self._canvas(small, torch.zeros_like(small), masked, reference)
            for reference in (torch.zeros_like(masked), self._encoded(garment))
        ]
        watch = Watch()
        latents = self._sampled(torch.cat(conditions), request, watch)
        watch.check()
        made = latents.chunk(2, dim=self.axis)[0] / self.vae.config.scaling_factor
        decoded = self.vae.decode(made).sample
        watch.see(decoded, "The images that the VAE decodes")
        watch.check()
        return cast(Image, to_uint8(decoded)[0].permute(1, 2, 0).cpu().numpy())

    def _canvas(self, mask: Tensor, empty: Tensor, masked: Tensor, reference: Tensor) -> Tensor:
        """Mask and pictures of the whole canvas, ``[1, 5, height, width]``."""
        return torch.cat([torch.cat([mask, empty], self.axis), torch.cat([masked, reference], self.axis)], dim=1)

    def _sampled(self, conditions: Float[Tensor, "2 5 h w"], request: Request, watch: Watch) -> Tensor:
        """Latents of the canvas, after all steps, which are watched."""
        is_guided = request.guidance > NO_GUIDANCE
        rows = conditions if is_guided else conditions[1:]
        noise = torch.Generator().manual_seed(request.seed)
        shape = (1, self.vae.config.latent_channels, *conditions.shape[-2:])
        latents: Tensor = torch.randn(shape, generator=noise).to(conditions)
        self.scheduler.set_timesteps(request.steps)
        latents = latents * self.scheduler.init_noise_sigma
        for step, timestep in enumerate(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(latents, timestep).expand(len(rows), -1, -1, -1)
            with announce(step_index=step, conditional_rows=slice(len(rows) - 1, len(rows))):
                predicted = self.unet(torch.cat([scaled, rows], dim=1), timestep, encoder_hidden_states=None).sample
            without, within = predicted[:1], predicted[-1:]
            direction = guided(without, within, request.guidance) if is_guided else within
            fresh = torch.randn(shape, generator=noise).to(latents)
            latents = self.scheduler.step(direction, timestep, latents, eta=_ETA, variance_noise=fresh).prev_sample
            watch.see_step(request.steps, step, timestep, latents)
        return latents

    def _tensor(self, picture: Image) -> Float[Tensor, "1 3 height width"]:
        values = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
        return (values / 127.5 - 1).to(self.unet.device)

    def _encoded(self, pictures: Tensor) -> Tensor:
        """Latents at the mode of the encoder's distribution: a picture has one explanation."""
        mode = self.vae.encode(pictures).latent_dist.mode()
        return cast(Tensor, mode * self.vae.config.scaling_factor)


def load_catvton(source: Source) -> TraceableModel:
    """Stable Diffusion's inpainting folder, with the attention weights of ``adapter`` in it.

    Raises:
        CheckpointError: it cannot be read, is no inpainting network, or the weights do not fit.
    """
    unet = load_network(UNet2DConditionModel, source.folder, "unet", _check_unet)
    if source.adapter is not None:
        weights = read_weights(source.adapter)
        check_used(weights, source.adapter)
        fitting("adapter", source.adapter, lambda: load_attention(unet, weights))
    model = _CatVTON(
        unet=unet.to(source.device),
        vae=load_network(AutoencoderKL, source.folder, "vae").to(source.device),
        scheduler=load_part(DDIMScheduler, source.folder, "scheduler"),
        side_by_side=bool(source.options.get("side_by_side", False)),
    )
    pixels = 2 ** (len(model.vae.config.block_out_channels) - 1)
    return TraceableModel(
        target=model, recipe=source.recipe_of(model), make=model, fit="crop", multiple=latent_multiple(unet, pixels)
    )


def load_attention(unet: nn.Module, weights: dict[str, Tensor]) -> None:
    """Weights of all self-attentions from the authors' list.

    Their file numbers every module whose path contains ``attn1``, so that one layer's weights stand under its own
    number and under those of its parts. How many parts there are depends on the library; the numbers under which a
    query projection stands are the layers, in order.

    Raises:
        CheckpointError: the layers are not as many as the U-Net's.
        RuntimeError: a layer's tensor is missing or misshapen.
    """
    layers = [module for path, module in unet.named_modules() if path.endswith(".attn1")]
    keys = (name.partition(".") for name in weights)
    numbers = sorted(int(number) for number, _, rest in keys if rest == "to_q.weight")
    if len(numbers) != len(layers):
        raise CheckpointError(
            f"The attention weights are of {len(numbers)} self-attentions, and the U-Net has {len(layers)}. Give the "
            "file attention/model.safetensors of CatVTON's release, and the inpainting network of Stable Diffusion 1.5."
        )
    for number, layer in zip(numbers, layers, strict=True):
        prefix = f"{number}."
        own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        layer.load_state_dict(own, strict=True)


def _check_unet(unet: Any, source: str) -> None:
    if unet.config.in_channels != _CHANNELS:
        raise CheckpointError(
            f"The U-Net of '{source}' takes {unet.config.in_channels} channels; CatVTON's is an inpainting network of "
            f"{_CHANNELS}. Give checkpoint=FOLDER of Stable Diffusion 1.5 inpainting."
        )
