"""Sampling on a card replays CUDA graphs: images and maps are those without, whoever listens, and whatever changes."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from i2am_train.attention import ScoreTap, trace
from i2am_train.attention.maps import AttributionMaps
from i2am_train.attention.uniform import uniform_attention
from i2am_train.models import graphs
from i2am_train.models.graphs import KEPT, release_graphs, replayed
from i2am_train.models.sampling import sample
from tests.support.card import card
from tests.support.cuda_graphs import Captured, CapturedGraph, graphs_there
from tests.support.host_waits import host_waits

LAYERS = 9


@pytest.fixture
def on_cpu(make_small_model: Callable[..., Any]) -> Any:
    return make_small_model()


@pytest.fixture
def made(on_cpu: Any) -> Iterator[list[Captured]]:
    """On a card; the graphs that are made there."""
    with card(), graphs_there() as captured:
        yield captured


@pytest.fixture
def model(on_cpu: Any, made: list[Captured]) -> Any:
    return on_cpu.to("cuda")


def drawn(model: Any, *, rows: int = 2, steps: int = 3, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    pictures = [(torch.rand(rows, 3, 64, 48, generator=generator) * 2 - 1).to("cuda") for _ in range(3)]
    return sample(model, *pictures, seeds=range(rows), steps=steps, **options).cpu()


def traced(model: Any, options: dict[str, Any], **how: Any) -> tuple[Tensor, AttributionMaps]:
    with trace(model, **options) as attention:
        images = drawn(model, **how)
    return images, attention.maps()


def assert_same_maps(found: AttributionMaps, expected: AttributionMaps) -> None:
    assert found.store.timesteps == expected.store.timesteps
    for one, other in zip(found.store.layers, expected.store.layers, strict=True):
        assert one.layer == other.layer
        for name in ("to_generated", "to_reference", "scores_over_reference", "head_scores_over_generated", "mass"):
            ours, theirs = getattr(one, name), getattr(other, name)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"guidance": 1.0}, {"sampler": "dpmpp"}, {"precision": "bf16-mixed"}],
    ids=["guided", "unguided", "dpmpp", "bf16"],
)
def test_images_are_those_of_calls(model: Any, made: list[Captured], options: dict[str, Any]) -> None:
    expected = drawn(model, cuda_graphs=False, **options)
    assert not made
    torch.testing.assert_close(drawn(model, **options), expected, rtol=0, atol=0)
    (graph,) = made
    assert graph.replays == 1 + 2  # the look whether it is right, then all steps but the first
    torch.testing.assert_close(drawn(model, **options), expected, rtol=0, atol=0)
    assert (len(made), graph.replays) == (1, 6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"via": "sdpa"},
        {"layers": [2, 6], "matrix_layers": [6], "matrix_heads": True},
        {"generated_mask": torch.rand(2, 64, 48) > 0.5},
    ],
    ids=["projections", "sdpa", "matrices", "mask"],
)
def test_maps_are_those_of_calls(model: Any, made: list[Captured], options: dict[str, Any]) -> None:
    """A trace of its own for each run, and one graph in pieces for all of them."""
    images, maps = traced(model, options, cuda_graphs=False)
    for run in (1, 2):
        again, found = traced(model, options)
        torch.testing.assert_close(again, images, rtol=0, atol=0)
        assert_same_maps(found, maps)
        pieces = len(options.get("layers", range(LAYERS))) + 1
        assert [graph.replays for graph in made] == [3 * run] * pieces


def test_another_mask_of_the_same_graph(model: Any, made: list[Captured]) -> None:
    masks = [torch.rand(2, 64, 48) > share for share in (0.2, 0.7)]
    for mask in masks:
        expected, found = (
            traced(model, {"generated_mask": mask}, cuda_graphs=use)[1] for use in (False, True)
        )  # fmt: skip
        assert_same_maps(found, expected)
    assert len(made) == LAYERS + 1


def test_batches_of_another_size_and_plain_runs_have_graphs_of_their_own(model: Any, made: list[Captured]) -> None:
    drawn(model)
    _, maps = traced(model, {"layers": [6]})
    drawn(model, rows=1)
    assert len(made) == 1 + 2 + 1
    assert_same_maps(traced(model, {"layers": [6]})[1], maps)
    assert len(made) == 4
    for rows in range(3, 3 + KEPT):  # the oldest go
        drawn(model, rows=rows, steps=1)
    before = len(made)
    drawn(model)
    assert len(made) == before + 1


def change_weights(model: Any) -> None:
    with torch.no_grad():
        model.unet.conv_out.bias += 1


def move_weights(model: Any) -> None:
    model.unet.conv_out.bias = nn.Parameter(model.unet.conv_out.bias.detach() + 1)


class Halved:
    """An attention processor that halves what another gives."""

    def __init__(self, other: Any) -> None:
        self.other = other

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return 0.5 * self.other(*args, **kwargs)


def replace_processor(model: Any) -> None:
    attention = model.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2
    attention.processor = Halved(attention.processor)


def set_number(model: Any) -> None:
    model.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2.rescale_output_factor = 3.0


@pytest.mark.parametrize("change", [change_weights, move_weights, replace_processor, set_number])
def test_a_changed_model_gives_other_images(model: Any, made: list[Captured], change: Callable[[Any], None]) -> None:
    """Without a new graph where its memory holds the new weights, with one otherwise."""
    before = drawn(model)
    change(model)
    expected = drawn(model, cuda_graphs=False)
    assert not torch.equal(before, expected)
    torch.testing.assert_close(drawn(model), expected, rtol=0, atol=0)
    assert len(made) == (1 if change is change_weights else 2)


def test_whoever_hooks_the_network_is_called(model: Any, made: list[Captured]) -> None:
    drawn(model)
    seen: list[Any] = []
    with model.unet.mid_block.register_forward_hook(lambda *_: seen.append(1)):
        drawn(model)
    assert len(seen) == 3
    assert made[0].replays == 3


def test_changed_keys_are_changed(model: Any, made: list[Captured]) -> None:
    plain = drawn(model)
    with uniform_attention(model):
        expected, found = (drawn(model, cuda_graphs=use) for use in (False, True))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(found, plain)
    assert len(made) == 1


def test_a_tap_keeps_its_last_forward(model: Any, made: list[Captured]) -> None:
    """As in training: validation samples while the tap listens to steps with gradient."""
    with ScoreTap(model, layers=[6]) as tap:
        model.unet(
            torch.zeros(1, 12, 16, 12, device="cuda"), torch.zeros(1, device="cuda"),
            torch.ones(1, 48, 32, device="cuda"),
        )  # fmt: skip
        before = tap.scores(6).detach().cpu()
        images, maps = traced(model, {})
        expected, expected_maps = traced(model, {}, cuda_graphs=False)
        torch.testing.assert_close(images, expected, rtol=0, atol=0)
        assert_same_maps(maps, expected_maps)
        torch.testing.assert_close(tap.scores(6).detach().cpu(), before, rtol=0, atol=0)
    assert len(made) == LAYERS + 2


@pytest.mark.parametrize("listening", [nullcontext, trace], ids=["plain", "traced"])
def test_a_step_waits_for_nothing(model: Any, made: list[Captured], listening: Callable[[Any], Any]) -> None:
    """Runs of more steps wait as often, once the graph is made."""
    with listening(model):
        drawn(model, steps=1, cuda_graphs=False)  # tries the kernels, once in a process
    waited = []
    for steps in (1, 2, 5):
        with listening(model), host_waits() as waits:
            drawn(model, steps=steps)
        waited.append(len(waits))
    assert waited[0] == waited[1] + 3  # for a capture, and to see whether values are finite, and those of the graph
    assert waited[1] == waited[2]
    assert made[0].replays == 1 + 2 + 5


def failing(*_: Any, **__: Any) -> Any:
    raise RuntimeError("CUDA error: operation not permitted")


def test_where_a_graph_cannot_be_made_images_are_made_without(model: Any) -> None:
    expected = drawn(model, cuda_graphs=False)
    with patch.object(CapturedGraph, "capture_begin", failing):
        with pytest.warns(UserWarning, match=r"without CUDA graphs.*not permitted.*sampling.cuda_graphs=false"):
            torch.testing.assert_close(drawn(model), expected, rtol=0, atol=0)
        torch.testing.assert_close(drawn(model), expected, rtol=0, atol=0)  # said once
    _, maps = traced(model, {})
    assert_same_maps(maps, traced(model, {}, cuda_graphs=False)[1])


def test_a_capture_that_fails_half_way_leaves_the_others(model: Any, made: list[Captured]) -> None:
    """Of a traced run, in the third piece; the pool and stream of the failure are not used again."""
    expected = drawn(model)
    _, maps = traced(model, {}, cuda_graphs=False)
    begin = CapturedGraph.capture_begin

    def fails(graph: CapturedGraph, *args: Any, **kwargs: Any) -> None:
        if len(made) == 4:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        begin(graph, *args, **kwargs)

    with patch.object(CapturedGraph, "capture_begin", fails), pytest.warns(UserWarning, match="without CUDA graphs"):
        assert_same_maps(traced(model, {})[1], maps)
    assert_same_maps(traced(model, {})[1], maps)
    before = len(made)
    torch.testing.assert_close(drawn(model), expected, rtol=0, atol=0)
    assert len(made) == before + 1
    assert made[-1].replays > 0


def test_recipes_that_read_a_module_in_another_way(model: Any, made: list[Captured]) -> None:
    """Scale and heads are part of what was captured."""
    recipe = model.attention_recipe()
    plain = traced(model, {"recipe": recipe})[1]
    for changes in ({"scale": 3.0}, {"heads": 1}):
        other = replace(recipe, sites=tuple(replace(site, **changes) for site in recipe.sites))
        expected = traced(model, {"recipe": other}, cuda_graphs=False)[1]
        assert_same_maps(traced(model, {"recipe": other})[1], expected)
    assert_same_maps(traced(model, {"recipe": recipe})[1], plain)
    assert len(made) == 3 * (LAYERS + 1)


def test_other_arithmetic_is_captured_anew(model: Any, made: list[Captured]) -> None:
    drawn(model)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if before == "highest" else "highest")
    try:
        drawn(model)
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(made) == 2


def test_arithmetic_set_by_the_newer_names(model: Any, made: list[Captured]) -> None:
    """Torch then refuses to say it by the older ones."""
    drawn(model)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        drawn(model)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(made) == 2


def test_hooks_of_all_modules_are_called(model: Any, made: list[Captured]) -> None:
    drawn(model)
    seen: list[Any] = []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        drawn(model)
    assert seen.count(model.unet) == 3
    assert made[0].replays == 3


def test_a_model_that_is_not_used_is_freed(make_small_model: Callable[..., Any]) -> None:
    """Also one with an attribute that leads back to it."""
    model = make_small_model()
    with card(), graphs_there() as made:
        model.to("cuda").unet.conv_out.itself = model.unet.forward
        drawn(model)
        assert made
        network = weakref.ref(model.unet)
        del model
        gc.collect()
        assert network() is None


def test_a_graph_that_gives_other_values_is_not_used(model: Any) -> None:
    expected = drawn(model, cuda_graphs=False)
    replay = CapturedGraph.replay

    def wrong(graph: CapturedGraph) -> None:
        replay(graph)
        with torch.inference_mode(False), torch.no_grad():
            graph.operations[-1][3][0].mul_(1.1)

    with patch.object(CapturedGraph, "replay", wrong), pytest.warns(UserWarning, match="a replay gives other values"):
        torch.testing.assert_close(drawn(model), expected, rtol=0, atol=0)


def test_gradients_and_cpus_are_called(made: list[Captured], on_cpu: Any) -> None:
    model = on_cpu
    inputs = (torch.zeros(1, 12, 16, 12), torch.zeros(1), torch.ones(1, 48, 32))
    with torch.no_grad():
        assert not replayed(model.unet)(*inputs).requires_grad
    model.to("cuda")
    assert replayed(model.unet)(*(one.to("cuda") for one in inputs)).requires_grad
    assert not made


def test_memory_is_given_back(model: Any, made: list[Captured]) -> None:
    drawn(model)
    assert model.unet in graphs._KEPT
    release_graphs(model.unet)
    assert model.unet not in graphs._KEPT
    drawn(model)
    assert len(made) == 2


def test_values_that_are_no_numbers_are_left_to_who_asked(model: Any, made: list[Captured]) -> None:
    with torch.no_grad():
        model.unet.conv_out.bias.fill_(math.nan)
        call = replayed(model.unet)
        found = call(
            torch.zeros(1, 12, 16, 12, device="cuda"), torch.zeros(1, device="cuda"),
            torch.ones(1, 48, 32, device="cuda"),
        )  # fmt: skip
    assert not found.isfinite().any()
    assert not made
