"""Optimizer, learning-rate schedule, and which weights train."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from i2am_train.attention.compiled import guard_hooks
from i2am_train.config.training import OptimizationConfig
from i2am_train.errors import ConfigError
from i2am_train.models.tryon import TryOnModel
from i2am_train.types import Trainable

_V1 = ("conv_in.", "up_blocks.", "conv_norm_out.", "conv_out.")
_SETS: Mapping[Trainable, Callable[[str], bool]] = {
    "all": lambda name: True,
    "v1": lambda name: name.startswith(_V1) or (name.startswith("down_blocks.") and ".attn2." in name),
    "v2": lambda name: not name.startswith("time_embedding."),
    "cross_attention": lambda name: name.startswith("conv_in.") or ".attn2." in name,
    "lora": lambda name: ".lora_" in name,
}
"""Whether a U-Net weight of this name trains, by the name of the set."""


def set_trainable(model: TryOnModel, trainable: Trainable) -> None:
    """Freezes everything but the projector, the null tokens and the chosen part of the U-Net.

    ``v1``: the set of the authors' first code: first convolution, decoder, output layers and the encoder's
    cross-attention; the bottleneck stays, its cross-attention included. ``v2``: that of their later code, all but the
    time embedding. ``cross_attention``: the first convolution and every cross-attention (their ``sd_locked``).
    ``all``: the whole U-Net. The VAE and the reference encoder are always frozen.
    ``lora``: adapters alone (``models.lora``); the projector is frozen, too.

    >>> from i2am_train.models.architecture import build_model
    >>> from i2am_train.types import GridSize
    >>> with torch.device("meta"):
    ...     model = build_model(GridSize(64, 48))
    >>> set_trainable(model, "cross_attention")
    >>> sorted({name.split(".")[0] for name, value in model.unet.named_parameters() if value.requires_grad})
    ['conv_in', 'mid_block', 'up_blocks']
    """
    model.requires_grad_(False)
    model.projector.requires_grad_(trainable != "lora")
    for name, parameter in model.unet.named_parameters():
        if _SETS[trainable](name):
            parameter.requires_grad_(True)


def trained_weights(model: TryOnModel) -> str:
    """How many weights train, by network, in one line.

    ``Training 123.4 M of 1,073.5 M weights: U-Net 105.1 M, projector 18.3 M``
    """
    networks = {"U-Net": model.unet, "projector": model.projector}
    counts = {
        name: sum(value.numel() for value in network.parameters() if value.requires_grad)
        for name, network in networks.items()
    }
    total = sum(value.numel() for value in model.parameters())
    parts = ", ".join(f"{name} {_millions(count)}" for name, count in counts.items())
    return f"Training {_millions(sum(counts.values()))} of {_millions(total)} weights: {parts}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def make_optimizer(parameters: list[nn.Parameter], options: OptimizationConfig) -> Optimizer:
    """AdamW over the given parameters; one fused kernel where that goes together with gradient clipping.

    ``adamw8bit`` is bitsandbytes', whose two moments take a byte each.

    >>> optimizer = make_optimizer([nn.Parameter(torch.zeros(2))], OptimizationConfig(weight_decay=0.5))
    >>> type(optimizer).__name__, optimizer.defaults["weight_decay"]
    ('AdamW', 0.5)
    """
    if options.optimizer == "adamw8bit":
        made: Optimizer = eight_bit_adamw()(
            parameters, lr=options.learning_rate, betas=options.betas, weight_decay=options.weight_decay
        )
        return made
    return AdamW(
        parameters,
        lr=options.learning_rate,
        betas=options.betas,
        weight_decay=options.weight_decay,
        # A fused kernel undoes float16's loss scale itself, and gradients are clipped before.
        fused=options.precision != "16-mixed" or options.gradient_clip is None,
    )


def eight_bit_adamw() -> Any:
    """The optimizer's class.

    Raises:
        ConfigError: bitsandbytes is not installed, or there is no GPU for it.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "optimization.optimizer=adamw8bit needs a CUDA device, and torch finds none. Set it to adamw."
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "optimization.optimizer=adamw8bit needs bitsandbytes: pip install bitsandbytes, or set it to adamw."
        ) from error
    return AdamW8bit


def prepare_networks(model: TryOnModel, options: OptimizationConfig) -> None:
    """Gradient checkpointing, memory layout and compilation of the U-Net."""
    if options.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    if options.compile:
        guard_hooks()
        # The blocks that repeat, and not the whole: each of their shapes is compiled once, in a fifth of the time.
        model.unet.compile_repeated_blocks(dynamic=False)


def learning_rate_factor(step: int, options: OptimizationConfig) -> float:
    """Linear warm-up, then half a cosine down to ``final_lr_fraction`` at the last step.

    >>> options = OptimizationConfig(steps=101, warmup_steps=1, final_lr_fraction=0.5)
    >>> [round(learning_rate_factor(step, options), 2) for step in (0, 51, 101)]
    [1.0, 0.75, 0.5]
    """
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return options.final_lr_fraction + (1 - options.final_lr_fraction) * cosine


def make_schedule(optimizer: Optimizer, options: OptimizationConfig) -> LambdaLR:
    """The schedule of :func:`learning_rate_factor`, advanced once a step.

    >>> options = OptimizationConfig(learning_rate=0.5, steps=10, warmup_steps=2)
    >>> make_schedule(make_optimizer([nn.Parameter(torch.zeros(2))], options), options).get_last_lr()
    [0.25]
    """
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, options))
