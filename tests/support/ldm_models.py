"""Networks in the layouts of latent-diffusion (Paint-by-Example, DCI-VTON), of StableVITON, and of the paper's authors.

Written by us from the description of their public code: module names, shapes, arguments and
order of calls are theirs, the code is not. All three are one U-Net, Stable Diffusion 1.5's, under different names.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = 8
LEVELS_WITH_ATTENTION = 3


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax of the scaled products, head by head."""
    parts = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        parts.append((a @ b.mT / a.shape[-1] ** 0.5).softmax(-1) @ c)
    return torch.cat(parts, dim=-1)


def sinusoids(steps: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of a time."""
    half = width // 2
    angles = steps[:, None] * 10000 ** (-torch.arange(half, device=steps.device) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def encoder_plan(widths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Level, input and output width of each encoder block with a residual; (level, width, 0) halves the picture."""
    last = widths[0]
    for level, width in enumerate(widths):
        for _ in range(2):
            yield level, last, width
            last = width
        if level + 1 < len(widths):
            yield level, width, 0


def decoder_plan(widths: Sequence[int]) -> Iterator[tuple[int, int, int, bool]]:
    """Level, input (with the skip connection) and output width of each decoder block, and whether it doubles."""
    skips = [widths[0], *(after or before for _, before, after in encoder_plan(widths))]
    last = widths[-1]
    for level, width in reversed(list(enumerate(widths))):
        for number in range(3):
            yield level, last + skips.pop(), width, number == 2 and level > 0
            last = width


# -- the authors' own model -------------------------------------------------------------------------------------------


class AuthorsSelfAttention(nn.Module):
    """One matrix for query, key and value."""

    def __init__(self, heads: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 3 * width, bias=bias)
        self.out_proj = nn.Linear(width, width)
        self.n_heads = heads

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attend(*self.in_proj(x).chunk(3, dim=-1), self.n_heads))


class AuthorsCrossAttention(nn.Module):
    def __init__(self, heads: int, width: int, context: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(context, width, bias=False)
        self.v_proj = nn.Linear(context, width, bias=False)
        self.out_proj = nn.Linear(width, width)
        self.n_heads = heads

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        given = (self.q_proj(x), self.k_proj(y), self.v_proj(y))
        return self.out_proj(attend(*given, self.n_heads))


class AuthorsResidualBlock(nn.Module):
    def __init__(self, before: int, after: int, time: int) -> None:
        super().__init__()
        self.groupnorm_feature = nn.GroupNorm(32, before)
        self.conv_feature = nn.Conv2d(before, after, 3, padding=1)
        self.linear_time = nn.Linear(time, after)
        self.groupnorm_merged = nn.GroupNorm(32, after)
        self.conv_merged = nn.Conv2d(after, after, 3, padding=1)
        self.residual_layer = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, context: Tensor, time: Tensor) -> Tensor:
        hidden = self.conv_feature(F.silu(self.groupnorm_feature(x)))
        hidden = hidden + self.linear_time(F.silu(time))[:, :, None, None]
        return self.conv_merged(F.silu(self.groupnorm_merged(hidden))) + self.residual_layer(x)


class AuthorsAttentionBlock(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.groupnorm = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_input = nn.Conv2d(width, width, 1)
        self.layernorm_1 = nn.LayerNorm(width)
        self.attention_1 = AuthorsSelfAttention(HEADS, width)
        self.layernorm_2 = nn.LayerNorm(width)
        self.attention_2 = AuthorsCrossAttention(HEADS, width, context)
        self.layernorm_3 = nn.LayerNorm(width)
        self.linear_geglu_1 = nn.Linear(width, 8 * width)
        self.linear_geglu_2 = nn.Linear(4 * width, width)
        self.conv_output = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor, time: Tensor) -> Tensor:
        hidden = self.conv_input(self.groupnorm(x)).flatten(2).mT
        hidden = hidden + self.attention_1(self.layernorm_1(hidden))
        hidden = hidden + self.attention_2(self.layernorm_2(hidden), context)
        value, gate = self.linear_geglu_1(self.layernorm_3(hidden)).chunk(2, dim=-1)
        hidden = hidden + self.linear_geglu_2(value * F.gelu(gate))
        return self.conv_output(hidden.mT.reshape(x.shape)) + x


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2))


class AuthorsBlock(nn.Sequential):
    def forward(self, x: Tensor, context: Tensor, time: Tensor) -> Tensor:
        for layer in self:
            bare = isinstance(layer, (nn.Conv2d, Upsample))
            x = layer(x) if bare else layer(x, context, time)
        return x


class AuthorsUNet(nn.Module):
    """``forward(x, context, time)``; the time arrives as an embedding."""

    def __init__(self, widths: tuple[int, ...], context: int, channels: int = 12) -> None:
        super().__init__()
        time, last = 4 * widths[0], widths[-1]

        def block(level: int, before: int, after: int, *more: nn.Module) -> AuthorsBlock:
            attention = [AuthorsAttentionBlock(after, context)] * (level < LEVELS_WITH_ATTENTION)
            return AuthorsBlock(AuthorsResidualBlock(before, after, time), *attention, *more)

        self.encoders = nn.ModuleList([AuthorsBlock(nn.Conv2d(channels, widths[0], 3, padding=1))])
        for level, before, after in encoder_plan(widths):
            halve = nn.Conv2d(before, before, 3, stride=2, padding=1)
            self.encoders.append(block(level, before, after) if after else AuthorsBlock(halve))
        self.bottleneck = block(0, last, last, AuthorsResidualBlock(last, last, time))
        self.decoders = nn.ModuleList(
            block(level, before, after, *([Upsample(after)] * doubles))
            for level, before, after, doubles in decoder_plan(widths)
        )

    def forward(self, x: Tensor, context: Tensor, time: Tensor) -> Tensor:
        skips = []
        for block in self.encoders:
            x = block(x, context, time)
            skips.append(x)
        x = self.bottleneck(x, context, time)
        for block in self.decoders:
            x = block(torch.cat([x, skips.pop()], dim=1), context, time)
        return x


class AuthorsDiffusion(nn.Module):
    """Latent, agnostic and pose latents, context, and a time as cosines and sines."""

    def __init__(self, widths: tuple[int, ...], context: int, tokens: int, channels: int = 12) -> None:
        super().__init__()
        self.width = widths[0]
        self.time_embedding = nn.Module()
        self.time_embedding.linear_1 = nn.Linear(self.width, 4 * self.width)
        self.time_embedding.linear_2 = nn.Linear(4 * self.width, 4 * self.width)
        self.unet = AuthorsUNet(widths, context, channels)
        self.final = nn.Module()
        self.final.groupnorm = nn.GroupNorm(32, self.width)
        self.final.conv = nn.Conv2d(self.width, 4, 3, padding=1)
        self.uncond_vector = nn.Parameter(torch.randn(1, tokens, context))

    def forward(self, inputs: Tensor, context: Tensor, step: Tensor) -> Tensor:
        time = sinusoids(step, self.width).to(inputs.dtype)
        time = self.time_embedding.linear_2(F.silu(self.time_embedding.linear_1(time)))
        hidden = self.unet(inputs, context, time)
        return self.final.conv(F.silu(self.final.groupnorm(hidden)))


# -- latent-diffusion -------------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """The softmax is made of einsums in the original: no kernel of torch's sees it."""

    def __init__(self, width: int, context: int | None, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context or width, width, bias=False)
        self.to_v = nn.Linear(context or width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        return self.to_out(attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class GEGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width), nn.Dropout(0.0), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(width, None, heads)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    def __init__(self, width: int, context: int, heads: int = HEADS) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(width, context, heads)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        hidden = self.proj_in(self.norm(x)).flatten(2).mT
        hidden = self.transformer_blocks[0](hidden, context)
        return self.proj_out(hidden.mT.reshape(x.shape)) + x


class ResBlock(nn.Module):
    def __init__(self, before: int, after: int, time: int) -> None:
        super().__init__()
        conv, last = (nn.Conv2d(width, after, 3, padding=1) for width in (before, after))
        self.in_layers = nn.Sequential(nn.GroupNorm(32, before), nn.SiLU(), conv)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, after))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, after), nn.SiLU(), nn.Dropout(0.0), last)
        self.skip_connection = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        hidden = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(hidden)


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class TimestepEmbedSequential(nn.Sequential):
    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            else:
                x = layer(x, context) if isinstance(layer, SpatialTransformer) else layer(x)
        return x


class Encoder(nn.Module):
    """The half of the U-Net that StableVITON has twice."""

    def __init__(self, widths: tuple[int, ...], context: int, channels: int) -> None:
        super().__init__()
        self.model_channels, time, last = widths[0], 4 * widths[0], widths[-1]
        self.time_embed = nn.Sequential(nn.Linear(widths[0], time), nn.SiLU(), nn.Linear(time, time))
        self.input_blocks = nn.ModuleList([first_convolution(channels, widths[0])])
        for level, before, after in encoder_plan(widths):
            halve = TimestepEmbedSequential(Downsample(before))
            block = unet_block(level, before, after, time, context) if after else halve
            self.input_blocks.append(block)
        self.middle_block = unet_block(0, last, last, time, context, ResBlock(last, last, time))

    def encode(
        self, x: Tensor, timesteps: Tensor, context: Tensor, added: Tensor | float = 0.0
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Embedded time, the middle block's output, and those of the blocks before it."""
        emb = self.time_embed(sinusoids(timesteps, self.model_channels).to(x.dtype))
        outputs = []
        for module in self.input_blocks:
            x = module(x, emb, context) + (added if not outputs else 0.0)
            outputs.append(x)
        return emb, self.middle_block(x, emb, context), outputs


def first_convolution(channels: int, width: int) -> TimestepEmbedSequential:
    return TimestepEmbedSequential(nn.Conv2d(channels, width, 3, padding=1))


def unet_block(
    level: int, before: int, after: int, time: int, context: int, *more: nn.Module
) -> TimestepEmbedSequential:
    attention = [SpatialTransformer(after, context)] * (level < LEVELS_WITH_ATTENTION)
    return TimestepEmbedSequential(ResBlock(before, after, time), *attention, *more)


class UNetModel(Encoder):
    """``forward(x, timesteps, context)``, as in Paint-by-Example and DCI-VTON."""

    def __init__(self, widths: tuple[int, ...], context: int, channels: int = 9) -> None:
        super().__init__(widths, context, channels)
        time, last = 4 * widths[0], nn.Conv2d(widths[0], 4, 3, padding=1)
        self.output_blocks = nn.ModuleList(
            unet_block(level, before, after, time, context, *([Upsample(after)] * doubles))
            for level, before, after, doubles in decoder_plan(widths)
        )
        self.out = nn.Sequential(nn.GroupNorm(32, widths[0]), nn.SiLU(), last)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        emb, h, skips = self.encode(x, timesteps, context)
        for module in self.output_blocks:
            h = module(torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)


class DiffusionWrapper(nn.Module):
    """``model``: hands on what the sampler gives, the context by name."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = unet

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return self.diffusion_model(x, t, context=c)


class LatentDiffusion(nn.Module):
    """Paint-by-Example's or DCI-VTON's denoiser, with the vector that stands for no reference."""

    def __init__(self, widths: tuple[int, ...], context: int) -> None:
        super().__init__()
        self.model = DiffusionWrapper(UNetModel(widths, context))
        self.learnable_vector = nn.Parameter(torch.randn(1, 1, context))

    def predict(self, x: Tensor, t: Tensor, c: Tensor, guided: bool) -> Tensor:
        """One evaluation: under guidance of doubled rows, unconditional ones first."""
        if not guided:
            return self.model(x, t, c)
        context = torch.cat([self.learnable_vector.repeat(len(x), 1, 1), c])
        without, given = self.model(torch.cat([x] * 2), torch.cat([t] * 2), context).chunk(2)
        return without + 5 * (given - without)


# -- StableVITON ------------------------------------------------------------------------------------------------------


class WarpingUNet(UNetModel):
    """The decoder's input attends to features of the garment's own encoder, level by level."""

    def __init__(self, widths: tuple[int, ...], context: int, channels: int = 13) -> None:
        super().__init__(widths, context, channels)
        a, b, c, d = widths
        # the decoder's input and the feature that it attends to, coarse to fine
        pairs = [(d, c), (c, c), (c, b), (c, b), (b, b), (b, a), (b, a), (a, a), (a, a)]
        self.warp_flow_blks = nn.ModuleList(SpatialTransformer(*pair) for pair in pairs)
        self.warp_zero_convs = nn.ModuleList(nn.Conv2d(width, width, 1) for width, _ in pairs)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, control: list[Tensor]) -> Tensor:
        with torch.no_grad():  # the trunk is frozen
            emb, h, skips = self.encode(x, timesteps, context)
        control = control[:9]  # the middle block's and those of the coarsest level are not used
        for number, module in enumerate(self.output_blocks):
            if number >= 3:
                hint = control.pop().flatten(2).mT
                warped = self.warp_flow_blks[number - 3](h, hint)
                h = h + self.warp_zero_convs[number - 3](warped)
            h = module(torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)


class GarmentEncoder(Encoder):
    """``control_model``: sees the same latents, and the garment's after the first convolution."""

    def __init__(self, widths: tuple[int, ...], context: int, channels: int = 13) -> None:
        super().__init__(widths, context, channels)
        self.cond_first_block = first_convolution(4, widths[0])

    def forward(self, x: Tensor, hint: Tensor, timesteps: Tensor, context: Tensor) -> list[Tensor]:
        guided_hint = self.cond_first_block(hint, timesteps, context)
        _, middle, outputs = self.encode(x, timesteps, context, guided_hint)
        return [*outputs, middle]


class ControlLDM(nn.Module):
    """StableVITON's two networks. Under guidance each is called twice, for the reference first."""

    def __init__(self, widths: tuple[int, ...], context: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = WarpingUNet(widths, context)
        self.control_model = GarmentEncoder(widths, context)
        self.learnable_vector = nn.Parameter(torch.randn(1, 1, context))

    def apply_model(self, x: Tensor, t: Tensor, c: Tensor, hint: Tensor) -> Tensor:
        control = self.control_model(x=x, hint=hint, timesteps=t, context=c)
        return self.model.diffusion_model(x=x, timesteps=t, context=c, control=control)

    def predict(self, x: Tensor, t: Tensor, c: Tensor, hint: Tensor, guided: bool) -> Tensor:
        """One evaluation, of two calls under guidance."""
        given = self.apply_model(x, t, c, hint)
        if not guided:
            return given
        nothing = self.learnable_vector.repeat(len(x), 1, 1)
        without = self.apply_model(x, t, nothing, torch.zeros_like(hint))
        return without + 5 * (given - without)


def plms(predict: Callable[[Tensor, Tensor], Tensor], latent: Tensor, timesteps: Sequence[int]) -> Tensor:
    """The order of calls of the PLMS sampler: one more than steps, the second timestep twice.

    ``predict(latent, t)`` is one evaluation, of as many calls as the model makes. What is done
    with the predictions does not matter here.
    """
    before: Tensor | None = None
    for step, timestep in enumerate(timesteps):
        t = torch.full((len(latent),), timestep)
        noise = predict(latent, t)
        if before is None:
            following = timesteps[min(step + 1, len(timesteps) - 1)]
            noise = (noise + predict(latent - 0.1 * noise, torch.full_like(t, following))) / 2
        before, latent = noise, latent - 0.1 * noise
    return latent
