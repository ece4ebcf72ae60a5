"""Optimizer, learning-rate schedule, and which weights train."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from i2am_train.config.schema import OptimizationConfig
from i2am_train.errors import ConfigError
from i2am_train.models.tryon import TryOnModel


def set_trainable(model: TryOnModel, trainable: str) -> None:
    """Freezes everything but the projector, the null tokens and the chosen part of the U-Net.

    ``all``: the whole U-Net. ``decoder``: the authors' V1 set (spec 1.4): first convolution, decoder, output layers and
    every cross-attention. ``cross_attention``: first convolution and cross-attention. The VAE and the reference encoder
    are always frozen, as in the paper. ``lora``: the adapters alone, the projector stays, too.
    """
    model.requires_grad_(False)
    model.projector.requires_grad_(trainable != "lora")
    for parameter in _chosen(model.unet, trainable):
        parameter.requires_grad_(True)


def _chosen(unet: nn.Module, trainable: str) -> Iterator[nn.Parameter]:
    prefixes = {
        "all": ("",),
        "decoder": ("conv_in.", "up_blocks.", "conv_norm_out.", "conv_out."),
        "cross_attention": ("conv_in.",),
        "lora": (),
    }
    if trainable not in prefixes:
        raise ConfigError(
            f"optimization.trainable is '{trainable}'; expected one of {', '.join(prefixes)}."
        )
    for name, parameter in unet.named_parameters():
        chosen = name.startswith(prefixes[trainable]) or ".attn2." in name
        if ".lora_" in name if trainable == "lora" else chosen:
            yield parameter


def make_optimizer(parameters: list[nn.Parameter], options: OptimizationConfig) -> Optimizer:
    """AdamW over the given parameters; one fused kernel where that goes together with gradient clipping.

    ``adamw8bit`` is bitsandbytes', whose two moments take a byte each.
    """
    if options.optimizer == "adamw8bit":
        made: Optimizer = eight_bit_adamw()(
            parameters,
            lr=options.learning_rate,
            betas=options.betas,
            weight_decay=options.weight_decay,
        )
        return made
    return AdamW(
        parameters,
        lr=options.learning_rate,
        betas=options.betas,
        weight_decay=options.weight_decay,
        # Fused kernels undo float16's loss scale themselves, after which Lightning refuses to clip.
        fused=options.precision != "16-mixed",
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
        model.unet.compile()


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
    """The schedule of :func:`learning_rate_factor`, advanced once a step."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, options))
