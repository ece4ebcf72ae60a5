"""training/optimization.py: which weights train, and how fast."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from i2am_train.config.training import OptimizationConfig
from i2am_train.errors import ConfigError
from i2am_train.models.architecture import make_scheduler
from i2am_train.models.projector import ReferenceProjector
from i2am_train.models.tryon import TryOnConfig, TryOnModel
from i2am_train.training.optimization import (
    eight_bit_adamw,
    learning_rate_factor,
    make_optimizer,
    make_schedule,
    set_trainable,
    trained_weights,
)
from i2am_train.types import PredictionType


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def attention(width: int, context: int = 768) -> int:
    """Weights of a cross-attention: query and output, key and value, the output's bias."""
    return 2 * width * width + 2 * context * width + width


def transformer(width: int) -> int:
    """Weights of an attention block: two 1x1 convolutions, both attentions, GEGLU feed-forward, four norms."""
    convolutions = 2 * (width * width + width)
    own = 4 * width * width + width
    feed_forward = (8 * width * width + 8 * width) + (4 * width * width + width)
    return convolutions + own + attention(width) + feed_forward + 4 * 2 * width


def residual(before: int, after: int) -> int:
    """Weights of a residual block: two norms, two convolutions, the time's layer, a 1x1 convolution if needed."""
    convolutions = 9 * (before * after + after * after) + 2 * after
    shortcut = 0 if before == after else before * after + after
    return 2 * (before + after) + convolutions + 1280 * after + after + shortcut


CONV_IN = 9 * 12 * 320 + 320
TIME = 320 * 1280 + 1280 + 1280 * 1280 + 1280
ENCODER_ATTENTION = 2 * (attention(320) + attention(640) + attention(1280))
DECODER_ATTENTION = 3 * (attention(320) + attention(640) + attention(1280))
DECODER = (
    3 * residual(2560, 1280)
    + (2 * residual(2560, 1280) + residual(1920, 1280) + 3 * transformer(1280))
    + (residual(1920, 640) + residual(1280, 640) + residual(960, 640) + 3 * transformer(640))
    + (residual(960, 320) + 2 * residual(640, 320) + 3 * transformer(320))
    + sum(9 * width * width + width for width in (1280, 1280, 640))  # after upsampling
)
OUTPUT = 2 * 320 + 9 * 320 * 4 + 4
ALL = 859_520_964 + 9 * 8 * 320  # Stable Diffusion 1.5 and eight more input channels


@pytest.fixture(scope="module")
def true_size(make_parts: Callable[..., Any]) -> TryOnModel:
    """Stable Diffusion 1.5's U-Net and the authors' projector, without memory; the frozen networks are small."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(in_channels=12, cross_attention_dim=768)
        projector = ReferenceProjector(1536, 768, 1036)
    config = TryOnConfig(height=512, width=384, reference_height=518, reference_width=392)
    scheduler = make_scheduler(PredictionType.EPSILON)
    return TryOnModel(config, unet, make_parts("vae"), make_parts("dinov2"), projector, scheduler)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("all", ALL),
        ("v2", ALL - TIME),
        ("v1", CONV_IN + ENCODER_ATTENTION + DECODER + OUTPUT),
        ("cross_attention", CONV_IN + ENCODER_ATTENTION + attention(1280) + DECODER_ATTENTION),
    ],
)
def test_sets_of_trained_weights(true_size: TryOnModel, name: str, expected: int) -> None:
    """Each set counts the authors' modules; projector and null tokens always train, VAE and encoder never."""
    set_trainable(true_size, name)
    counted = sum(p.numel() for p in true_size.unet.parameters() if p.requires_grad)
    assert counted == expected
    names = trained(true_size)
    assert {n for n in names if n.startswith("projector.")} == {
        f"projector.{n}" for n, _ in true_size.projector.named_parameters()
    }
    assert not [n for n in names if n.startswith(("vae.", "reference_encoder."))]
    projector = sum(p.numel() for p in true_size.projector.parameters())
    line = trained_weights(true_size)
    assert line.startswith(f"Training {(expected + projector) / 1e6:,.1f} M of ")
    assert line.endswith(f": U-Net {expected / 1e6:,.1f} M, projector {projector / 1e6:,.1f} M")


def test_v1_leaves_the_bottleneck(true_size: TryOnModel) -> None:
    """Its cross-attention keeps the weights of text, as in the authors' first code."""
    set_trainable(true_size, "v1")
    names = trained(true_size)
    assert not [n for n in names if n.startswith(("unet.mid_block.", "unet.time_embedding."))]
    encoder = {n for n in names if n.startswith("unet.down_blocks.")}
    assert len(encoder) == 6 * 5
    assert all(".attn2." in n for n in encoder)


def test_schedule() -> None:
    """Linear warm-up to the peak, half a cosine to the last step's fraction, constant beyond."""
    options = OptimizationConfig(steps=20, warmup_steps=4, learning_rate=2e-3, final_lr_fraction=0.1, weight_decay=0.0)
    optimizer = make_optimizer([nn.Parameter(torch.ones(2, 3))], options)
    schedule = make_schedule(optimizer, options)
    rates = []
    for _ in range(24):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.5e-3, 1e-3, 1.5e-3, 2e-3])
    assert rates[4] == pytest.approx(2e-3)
    assert rates[12] == pytest.approx((2e-3 + 2e-4) / 2)
    assert rates[20:] == pytest.approx([2e-4] * 4)
    assert rates[4:21] == sorted(rates[4:21], reverse=True)


def test_constant_learning_rate() -> None:
    """The authors' training: no warm-up, no decay."""
    options = OptimizationConfig(steps=7, warmup_steps=0, final_lr_fraction=1.0)
    assert {learning_rate_factor(step, options) for step in range(9)} == {1.0}


def test_eight_bits_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU the error says what to install."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"adamw8bit needs bitsandbytes: pip install"):
        eight_bit_adamw()


@pytest.mark.parametrize(
    ("precision", "clip", "fused"),
    [("32-true", 1.0, True), ("bf16-mixed", None, True), ("bf16-mixed", 1.0, True), ("16-mixed", 1.0, False)],
)
def test_options_reach_the_optimizer(precision: Any, clip: float | None, fused: bool) -> None:
    """Rate, betas and decay arrive; fused but where a loss scale is undone after the clipping."""
    options = OptimizationConfig(
        precision=precision, gradient_clip=clip, learning_rate=0.5, betas=(0.8, 0.7), weight_decay=0.25
    )
    (group,) = make_optimizer([nn.Parameter(torch.ones(2, 3))], options).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.8, 0.7), 0.25)
    assert group["fused"] is fused
