"""The shipped model's training on a card: the step that is captured once and replayed, and what a capture refuses."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.card import card, on_card
from tests.support.cuda_graphs import graphs_there
from tests.support.tiny_training import encoded_data, options, script

RECIPE, STEPS = script(), script("training_steps")


@contextmanager
def card_with_graphs(machine: Any) -> Iterator[list[Any]]:
    with machine(), graphs_there() if machine is card else nullcontext([]) as graphs:
        yield graphs


def trained(machine: Any, model: Any, given: Any) -> tuple[list[Any], dict[str, Any], list[Any]]:
    """Graphs, saved state and logged rows of a training on the card."""
    with card_with_graphs(machine) as graphs, STEPS.own_stream(torch.device("cuda")):
        model.to("cuda")
        RECIPE.train_denoiser(model, {name: value.to("cuda") for name, value in encoded_data().items()}, given)
        assert on_card(model.unet.conv_out.weight)
        model.to("cpu")
    state = torch.load(given.work / "denoiser.pt", weights_only=True, map_location="cpu")
    return graphs, state, [json.loads(line) for line in (given.work / "log.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_replayed_steps_are_the_same(
    machine: Any, make_small_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the hint while it fades, then without: a graph each, and weights, averages, momenta and log as uncaptured.

    Batches, noise, learning rates and the hint's weight differ from step to step, so that a value kept by the capture
    would show.
    """
    words = ("--steps", "6", "--seeded-steps", "3")
    monkeypatch.setattr(STEPS.CapturedStep, "UNCAPTURED", 100)
    none, expected, rows = trained(machine, make_small_model(), options(tmp_path / "plain", *words))
    assert not none
    monkeypatch.setattr(STEPS.CapturedStep, "UNCAPTURED", 1)
    graphs, found, again = trained(machine, make_small_model(), options(tmp_path / "captured", *words))
    exact = {"rtol": 0, "atol": 0} if machine is card else {"rtol": 0.1, "atol": 1e-3}  # sums of no fixed order
    if machine is card:
        assert [graph.replays for graph in graphs] == [2, 2]
    for name in ("trained", "average"):
        torch.testing.assert_close(found[name], expected[name], **exact)
    assert found["optimizers"][1]["state"][0]["step"] == 6
    for row, other in zip(again, rows, strict=True):
        assert row == (other if machine is card else pytest.approx(other, rel=0.01))


@pytest.mark.long
def test_a_run_of_the_card_goes_on_on_the_cpu(
    machine: Any, make_small_model: Callable[..., Any], tmp_path: Path
) -> None:
    given = options(tmp_path, "--steps", "2", "--save-every", "1")
    trained(machine, make_small_model(), given)
    given.steps = 3
    RECIPE.train_denoiser(make_small_model(), encoded_data(), given)
    assert torch.load(given.work / "denoiser.pt", weights_only=True)["step"] == 3


def test_the_vae_on_the_card(machine: Any, make_small_model: Callable[..., Any], tmp_path: Path) -> None:
    """Trained, then encoding; latents are kept on the CPU."""
    model, given = make_small_model(), options(tmp_path, "--vae-steps", "5")
    data = {name: torch.randint(0, 256, (3, 64, 48, 3), dtype=torch.uint8) for name in RECIPE.PICTURES}
    with card_with_graphs(machine) as graphs, STEPS.own_stream(torch.device("cuda")):
        model.to("cuda")
        RECIPE.train_vae(model, {name: value.to("cuda") for name, value in data.items()}, given)
        RECIPE.set_scaling_factor(model, data["person"])
        latents = RECIPE.encode_all(model, data, given.work)
        assert not any(map(on_card, latents.values()))
        model.to("cpu")
    assert machine is not card or [graph.replays for graph in graphs] == [2]
    assert latents["person"].float().std().item() == pytest.approx(1, abs=0.05)


def read(value: Tensor) -> dict[str, Tensor]:
    return {"result": value * value.sum().item()}


def pick(value: Tensor) -> dict[str, Tensor]:
    return {"result": value[value > 0]}


def draw(value: Tensor) -> dict[str, Tensor]:
    return {"result": torch.rand_like(value)}


ELSEWHERE = torch.ones(3)


def from_the_cpu(value: Tensor) -> dict[str, Tensor]:
    return {"result": value + ELSEWHERE.to("cuda")}


@pytest.mark.parametrize("step", [read, pick, draw, from_the_cpu])
def test_the_capture_refuses(step: Callable[[Tensor], dict[str, Tensor]]) -> None:
    """What a card refuses, and random numbers of its own: the graphs that are not there would show it."""
    with card(), graphs_there(), STEPS.own_stream(torch.device("cuda")):
        captured = STEPS.CapturedStep(step, torch.device("cuda"))
        for _ in range(captured.UNCAPTURED):
            captured(value=torch.ones(3))
        with pytest.raises(RuntimeError, match="captur"):
            captured(value=torch.ones(3))


def test_a_replay_reads_what_was_copied_and_computes_once() -> None:
    """In place, through a view, into results: the capture itself changes nothing."""
    with card(), graphs_there() as graphs, STEPS.own_stream(torch.device("cuda")):
        total = torch.zeros(2, 2, device="cuda")

        def step(value: Tensor) -> dict[str, Tensor]:
            total.view(4)[:3].add_(value)
            return {"sum": total.sum() * 2}

        captured = STEPS.CapturedStep(step, torch.device("cuda"))
        for number in range(1, 6):
            results = captured(value=torch.full((3,), float(number)))
            assert results["sum"].item() == 6 * sum(range(1, number + 1))
        assert [graph.replays for graph in graphs] == [2]
