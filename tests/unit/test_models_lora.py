"""models/lora.py: adapters are seen by maps and losses, train alone, and can be merged or saved by themselves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from i2am_train.attention.trace import ScoreTap, trace
from i2am_train.config.objective import ObjectiveConfig
from i2am_train.config.training import OptimizationConfig
from i2am_train.errors import ConfigError
from i2am_train.losses.objective import Objective, make_objective
from i2am_train.models.lora import add_adapters, has_adapters, merged, save_adapters
from i2am_train.models.sampling import sample
from i2am_train.models.tryon import TryOnModel
from i2am_train.training.module import TryOnModule
from i2am_train.training.step import draw, step_losses
from i2am_train.types import Direction, GridSize
from tests.support.terms import weights

LORA = OptimizationConfig(trainable="lora", lora_rank=3, lora_alpha=6)


@pytest.fixture
def adapted(make_small_model: Callable[..., Any]) -> Any:
    """A small model whose adapters are not zero."""
    model = make_small_model()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        add_adapters(model.unet, rank=3, alpha=6)
        for name, weight in model.unet.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(weight, std=0.5)
    return model.eval()


def inputs(size: GridSize, count: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(count, 3, *size, generator=generator) * 2 - 1 for name in ("garment", "agnostic", "densepose")
    }


def test_new_adapters_change_nothing(make_small_model: Callable[..., Any]) -> None:
    """The same images, bit by bit, from a model whose adapters were never trained."""
    model = make_small_model()
    before = sample(model, **inputs(model.image_size), seeds=[0, 1], steps=2)
    add_adapters(model.unet, rank=2, alpha=2)
    assert has_adapters(model.unet)
    assert sample(model, **inputs(model.image_size), seeds=[0, 1], steps=2).equal(before)


def test_maps_are_those_of_the_merged_model(
    adapted: TryOnModel, make_small_model: Callable[..., Any], tmp_path: Path
) -> None:
    """Images, maps and matrices with adapters equal those of the saved model, and not those of the model before."""
    adapted.save_pretrained(tmp_path / "model")
    found = {}
    for name, model in {
        "adapted": adapted,
        "merged": TryOnModel.from_pretrained(tmp_path / "model"),
        "before": make_small_model(),
    }.items():
        with trace(model, matrix_layers=[2]) as attention:
            images = sample(model, **inputs(model.image_size), seeds=[0, 1], steps=2)
        maps = attention.maps()
        found[name] = [
            images,
            *(maps.unified(direction, size=model.image_size).values for direction in Direction),
            maps.specific_reference([(1, 2)], layer=2).values,
        ]
    assert len(attention.sites) == 9
    for ours, theirs, before in zip(*found.values(), strict=True):
        spread = (ours - before).abs().max()
        assert spread > 1e-3
        assert (ours - theirs).abs().max() < 1e-2 * spread


def test_merging_leaves_the_model_alone(adapted: TryOnModel) -> None:
    """No weight moves, no random number is drawn, and the merged U-Net has the names of a plain one."""
    before = {name: value.clone() for name, value in adapted.unet.state_dict().items()}
    state = torch.get_rng_state()
    plain = merged(adapted.unet)
    assert torch.get_rng_state().equal(state)
    assert all(before[name].equal(value) for name, value in adapted.unet.state_dict().items())
    assert before.keys() == adapted.unet.state_dict().keys()
    assert not [name for name in plain.state_dict() if "lora" in name or "base_layer" in name]
    assert not has_adapters(plain)
    assert merged(plain) is plain


def test_attention_losses_reach_the_adapters(
    make_small_model: Callable[..., Any], read_batch: Callable[..., Any]
) -> None:
    """Their gradient arrives at the adapters of the layer's projections, and at nothing but adapters."""
    objective = make_objective(ObjectiveConfig(layers=2, terms=weights(dcml=1.0, tv=1.0, cwg=1.0)))
    module = TryOnModule(make_small_model(), objective, LORA)
    model = module.model
    for name, weight in model.unet.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.1)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".lora_" in n}
    batch = read_batch([1, 4], split="train")
    draws = draw(0, 0, [1, 4], latent=GridSize(16, 12), timesteps=1000, condition_dropout=0.0)
    with ScoreTap(model, layers=[2]) as tap:
        losses = step_losses(model, batch, draws, objective, tap)
        (losses["total"] - losses["denoising"]).backward(retain_graph=True)
        attention = {
            name: weight.grad.abs().sum() for name, weight in model.named_parameters() if weight.grad is not None
        }
    layer = "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2"
    for projection in ("to_q", "to_k"):
        for half in ("A", "B"):
            assert attention[f"{layer}.{projection}.lora_{half}.default.weight"] > 0
    assert attention.keys() <= trained


def test_adapters_alone(adapted: TryOnModel, make_small_model: Callable[..., Any], tmp_path: Path) -> None:
    """The file holds adapters under diffusers' names; put on the model before, they give the images of this one."""
    save_adapters(adapted.unet, tmp_path / "lora")
    (file,) = (tmp_path / "lora").iterdir()
    weights = load_file(file)
    assert file.name == "pytorch_lora_weights.safetensors"
    assert all(name.startswith("unet.") and ".lora_" in name for name in weights)
    assert {w.shape[0] for n, w in weights.items() if ".lora_A." in n} == {3}
    model = make_small_model()
    model.unet.load_lora_adapter(tmp_path / "lora", weight_name=file.name, prefix="unet")
    images = [sample(one, **inputs(one.image_size), seeds=[0, 1], steps=2) for one in (adapted, model)]
    assert torch.allclose(*images, atol=1e-5)


def test_checkpoints_hold_adapters_alone(make_small_model: Callable[..., Any]) -> None:
    """The rest comes with the model that training started from."""
    module = TryOnModule(make_small_model(), Objective(), LORA)
    checkpoint = {"state_dict": dict(module.state_dict())}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == {
        name for name, weight in module.named_parameters() if weight.requires_grad
    }
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=True)


def test_no_adapters_on_random_weights() -> None:
    """The error names both options."""
    with pytest.raises(ConfigError, match=r"from_scratch=True .* trainable=lora"):
        OptimizationConfig(trainable="lora", from_scratch=True)
