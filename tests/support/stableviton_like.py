"""A model of StableVITON's shape in the module tree of its own repository, and the factory that the README shows."""

from typing import Any

import numpy as np
import torch
from PIL import Image as PillowImage
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS = 16, 2
DOWN = (4, 4, 4, 2, 2, 2, 1, 1, 1)
"""By how much each of the nine warping blocks' grids is smaller than the latent."""


class CrossAttention(nn.Module):
    """As latent-diffusion names its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        parts = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn2 = CrossAttention()


class Warping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Block()])

    def forward(self, x: Tensor, hint: Tensor) -> Tensor:
        tokens, keys = (part.flatten(2).transpose(1, 2) for part in (x, hint))
        made = self.transformer_blocks[0].attn2(tokens, keys)
        return x + made.transpose(1, 2).unflatten(-1, x.shape[-2:])


class DiffusionModel(nn.Module):
    """Nine warping blocks whose keys have the queries' grid."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.hint, self.out = (nn.Conv2d(a, b, 1) for a, b in ((4, WIDTH), (4, WIDTH), (WIDTH, 4)))
        self.warp_flow_blks = nn.ModuleList(Warping() for _ in DOWN)

    def forward(self, x: Tensor, timesteps: Tensor, cloth: Tensor) -> Tensor:
        hidden, hint = self.into(x), self.hint(cloth)
        for block, down in zip(self.warp_flow_blks, DOWN, strict=True):
            small = block(F.avg_pool2d(hidden, down), F.avg_pool2d(hint, down))
            hidden = hidden + F.interpolate(small, scale_factor=down)
        return self.out(hidden)


class Network(nn.Module):
    """LatentDiffusion.model in the repository."""

    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = DiffusionModel()


class StableVITON:
    """What a user writes around the model: it keeps the attribute `model`, and makes one picture when called."""

    def __init__(self, model: Network, device: torch.device) -> None:
        self.model = model.to(device).eval()
        self.device = device

    @torch.no_grad()
    def __call__(
        self, *, image: Any, mask: Any, reference: Any, height: int, width: int, steps: int, seed: int, **others: Any
    ) -> PillowImage.Image:
        cloth = self.latent(reference, height, width)
        latent = torch.randn(cloth.shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        for timestep in torch.linspace(981, 1, steps):
            latent = latent - self.p_sample(latent, timestep[None], cloth) / steps
        bright = (latent[0, :3].permute(1, 2, 0).sigmoid() * 255).to(torch.uint8).cpu().numpy()
        return PillowImage.fromarray(bright).resize((width, height))

    def p_sample(
        self,
        x: Tensor,
        t: Tensor,
        c: Tensor,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Tensor | None = None,
    ) -> Tensor:
        """As the repository's samplers are called: its own inference runs without guidance."""
        within: Tensor = self.model.diffusion_model(x, t, c)
        if unconditional_conditioning is None or unconditional_guidance_scale == 1:
            return within
        without = self.model.diffusion_model(x, t, unconditional_conditioning)
        return without + unconditional_guidance_scale * (within - without)

    def latent(self, picture: PillowImage.Image, height: int, width: int) -> Tensor:
        small = np.asarray(picture.convert("RGBA").resize((width // 4, height // 4)), np.float32)
        return torch.from_numpy(small / 127.5 - 1).permute(2, 0, 1)[None].to(self.device)


def build(checkpoint: str | None, device: torch.device) -> StableVITON:
    """The factory: the user's own way of loading, here random weights."""
    torch.manual_seed(6)
    return StableVITON(Network(), device)


def build_nothing(checkpoint: str | None, device: torch.device) -> object:
    return object()


def build_deaf(checkpoint: str | None, device: torch.device) -> Any:
    """Its call lacks what it would be called with."""
    return lambda image, mask: image


def build_unknown(checkpoint: str | None, device: torch.device) -> Any:
    """Can be called, and has none of the modules that a recipe knows."""
    return lambda **arguments: arguments["image"]
