"""training/optimization.py: which weights train, and how fast."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from i2am_train.config.schema import OptimizationConfig
from i2am_train.errors import ConfigError
from i2am_train.training.optimization import (
    learning_rate_factor,
    make_optimizer,
    make_schedule,
    set_trainable,
)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_sets_of_trained_weights(make_small_model: Callable[..., Any]) -> None:
    """Each set is what its name says; projector and null tokens always train, VAE and encoder never."""
    model = make_small_model()
    sets = {}
    for name in ("all", "decoder", "cross_attention"):
        set_trainable(model, name)
        sets[name] = trained(model)
        assert {n for n in sets[name] if n.startswith("projector.")} == {
            f"projector.{n}" for n, _ in model.projector.named_parameters()
        }
        assert not [n for n in sets[name] if n.startswith(("vae.", "reference_encoder."))]
    unet = {f"unet.{name}" for name, _ in model.unet.named_parameters()}
    assert unet <= sets["all"]
    assert sets["cross_attention"] < sets["decoder"] < sets["all"]
    rest = {n for n in unet & sets["cross_attention"] if ".attn2." not in n}
    assert rest == {"unet.conv_in.weight", "unet.conv_in.bias"}
    assert {n for n in unet if ".attn2." in n} <= sets["cross_attention"]
    frozen = unet - sets["decoder"]
    assert frozen
    assert all(n.split(".")[1] in ("down_blocks", "mid_block", "time_embedding") for n in frozen)
    assert any(n.startswith("unet.mid_block") and ".attn2." in n for n in sets["decoder"])


def test_unknown_set(make_small_model: Callable[..., Any]) -> None:
    """The error names the option, what was found and what is possible."""
    with pytest.raises(ConfigError, match="'encoder'; expected one of all, decoder, cross_att"):
        set_trainable(make_small_model(), "encoder")


def test_schedule() -> None:
    """Linear warm-up to the peak, half a cosine to the last step's fraction, constant beyond."""
    options = OptimizationConfig(
        steps=20, warmup_steps=4, learning_rate=2e-3, final_lr_fraction=0.1, weight_decay=0.0
    )
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


@pytest.mark.parametrize(("precision", "fused"), [("bf16-mixed", True), ("16-mixed", False)])
def test_options_reach_the_optimizer(precision: Any, fused: bool) -> None:
    """Rate, betas and decay arrive; float16 is not fused, since Lightning cannot clip its gradients then."""
    options = OptimizationConfig(
        precision=precision, learning_rate=0.5, betas=(0.8, 0.7), weight_decay=0.25
    )
    (group,) = make_optimizer([nn.Parameter(torch.ones(2, 3))], options).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.8, 0.7), 0.25)
    assert group["fused"] is fused
