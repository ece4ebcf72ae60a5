"""Recipes of the paper's own model, Paint-by-Example, DCI-VTON and StableVITON in their authors' layouts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from i2am_train.attention import detect_recipe, named_recipe, trace
from i2am_train.attention.frames import Frame
from i2am_train.attention.hooks import AttentionInputs
from i2am_train.attention.listener import Listener
from i2am_train.attention.lookup import SiteModule, resolve_root, resolve_sites
from i2am_train.attention.recipe import paper_number
from i2am_train.errors import CaptureError
from i2am_train.types import Direction, GridSize
from tests.support.ldm_cases import CASES, CONTEXT, LATENT, TryOn, noise
from tests.support.ldm_models import AuthorsDiffusion, ControlLDM, LatentDiffusion, plms
from tests.support.recipe_contract import (
    Case,
    RecipeContract,
    Witness,
    assert_equal,
    check_compiled_whole,
    fresh,
    recipe_of,
    slow_layer,
    to_compile,
    traced_run,
)

TRUE_WIDTHS, TRUE_CONTEXT = (320, 640, 1280, 1280), 768


@pytest.mark.parametrize("case", CASES, ids=str)
class TestRecipes(RecipeContract):
    """Everything in `RecipeContract`, for each model."""


@pytest.mark.parametrize("case", to_compile(CASES), ids=str)
def test_a_network_compiled_whole_hides_no_attention(case: Case) -> None:
    """Graphs that ran before the trace."""
    check_compiled_whole(case, "eager")


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.recipe == name)


@pytest.mark.parametrize("name", ["paint_by_example_ldm", "stableviton"])
def test_plms_evaluates_a_timestep_twice(name: str) -> None:
    """Three steps are four evaluations; both of the second timestep count as one step, their mean.

    Under guidance, which of StableVITON makes two calls of each.
    """
    case = case_of(name)
    target = fresh(case)
    context, garment = noise(2, 1, CONTEXT, seed=7), noise(2, 4, *LATENT, seed=8)
    more = (context,) if name == "paint_by_example_ldm" else (context, garment)
    channels = 9 if name == "paint_by_example_ldm" else 13
    still = noise(2, channels - 4, *LATENT, seed=9)

    def predict(latent: Tensor, t: Tensor) -> Tensor:
        return target.predict(torch.cat([latent, still], dim=1), t, *more, True)

    def sample() -> None:
        with torch.no_grad():
            plms(predict, noise(2, 4, *LATENT, seed=1), (981, 641, 301))

    with Witness(case, target) as witness:
        sample()
    with trace(target, recipe_of(case, target, True)) as attention:
        sample()
    assert {site.calls for site in attention.sites} == {4}
    store = attention.maps().store
    assert store.timesteps == (981, 641, 301)
    for site in case.sites[::4]:
        slow = slow_layer(case, witness, True, site).to_generated
        steps = [slow[:, 0], slow[:, 1:3].mean(dim=1), slow[:, 3]]
        assert_equal(store.layer(site.layer).to_generated, torch.stack(steps, dim=1))


@pytest.mark.parametrize(
    ("name", "marks", "two_sided"),
    [
        ("custom", [], True),
        ("paint_by_example_ldm", ["not functional"], False),
        ("dci_vton", ["not functional", "partial"], False),
        ("dci_vton_diffusers", ["not functional", "partial"], False),
        ("stableviton", ["partial"], True),
    ],
)
def test_what_a_map_means(name: str, marks: list[str], two_sided: bool) -> None:
    """Marks of the results, and no map on the reference where its one token has no place in it."""
    case = case_of(name)
    maps = traced_run(case, fresh(case), 2, True).maps()
    assert [mark.split(":")[0] for mark in maps.store.marks] == marks
    assert [paper_number(record.layer) for record in maps.store.layers] == list(range(1, 10))
    if two_sided:
        assert maps.unified(Direction.GENERATED_TO_REFERENCE).values.shape[0] == 2
    else:
        with pytest.raises(CaptureError, match="no place in the reference picture"):
            maps.unified(Direction.GENERATED_TO_REFERENCE)


@pytest.mark.parametrize(
    ("name", "detected"),
    [
        ("custom", "custom"),
        ("paint_by_example_ldm", "paint_by_example_ldm"),
        ("dci_vton", "paint_by_example_ldm"),
        ("stableviton", "stableviton"),
    ],
)
def test_recognised_by_module_names(name: str, detected: str) -> None:
    """The whole model, or its denoiser alone. DCI-VTON's modules are Paint-by-Example's: ask for it by name."""
    case = case_of(name)
    target = fresh(case)
    found = detect_recipe(target)
    assert (found.name, found.root) == (detected, case.root)
    found = detect_recipe(case.denoiser(target))
    assert (found.name, found.root) == (detected, "")
    assert named_recipe(target, name).root == case.root


def test_halves_of_a_batch_that_has_none() -> None:
    """A recipe for guidance by rows on a model that guides by calls, with an odd batch: what to do is said."""
    case = case_of("stableviton")
    target = fresh(case)
    with (
        trace(target, named_recipe(target, "paint_by_example_ldm", guided=True)),
        torch.no_grad(),
        pytest.raises(CaptureError, match=r"called with 3 rows.*rows='all'"),
    ):
        case.sample(target, 3, guided=True)


# -- true sizes, on the meta device -----------------------------------------------------------------------------------


def true_sites(target: nn.Module, name: str, call: Any) -> list[tuple[Any, ...]]:
    """Layer, heads, width of a head, grids and tokens of both sides as the listener sees them."""
    recipe = named_recipe(target, name)
    root = resolve_root(target, recipe)
    seen: list[tuple[Any, ...]] = []

    def note(site: SiteModule, frame: Frame, inputs: AttentionInputs) -> None:
        queries, keys = inputs.generated, inputs.reference  # row head token channel
        places = site.places(queries.shape[2], keys.shape[2], frame.latent)
        seen.append((
            site.path,
            queries.shape[1],
            queries.shape[3],
            places.generated.grid,
            keys.shape[2],
            places.reference.grid,
        ))  # fmt: skip

    listener = Listener(root, recipe, resolve_sites(root, recipe), note, "trace", lambda frame: None)
    listener.attach()
    try:
        call()
    finally:
        listener.detach()
    return seen


COARSE, MIDDLE, FINE = GridSize(16, 12), GridSize(32, 24), GridSize(64, 48)
LATENT_512_384 = FINE
LATENT_512_512 = GridSize(64, 64)
ATTENTION_2 = "decoders.{}.1.attention_2"
ATTN2 = "output_blocks.{}.1.transformer_blocks.0.attn2"
WARP = "warp_flow_blks.{}.transformer_blocks.0.attn2"


def test_true_table_of_the_custom_model() -> None:
    """512x384: 16x12 with 8x160, 32x24 with 8x80, 64x48 with 8x40; 1037 tokens, 37x28 of them patches."""
    with torch.device("meta"):
        model = TryOn(AuthorsDiffusion(TRUE_WIDTHS, TRUE_CONTEXT, 1037))
        inputs, context = torch.zeros(2, 12, *LATENT_512_384), torch.zeros(2, 1037, TRUE_CONTEXT)
        time = torch.zeros(2)
    seen = true_sites(model, "custom", lambda: model.diffusion(inputs, context, time))
    levels = [(160, COARSE)] * 3 + [(80, MIDDLE)] * 3 + [(40, FINE)] * 3
    assert seen == [
        (ATTENTION_2.format(3 + number), 8, width, grid, 1037, GridSize(37, 28))
        for number, (width, grid) in enumerate(levels)
    ]


@pytest.mark.parametrize("name", ["paint_by_example_ldm", "dci_vton"])
def test_true_table_of_paint_by_example(name: str) -> None:
    """512x512: 16x16, 32x32, 64x64 with 8x160, 8x80, 8x40; one token without a place."""
    with torch.device("meta"):
        model = LatentDiffusion(TRUE_WIDTHS, TRUE_CONTEXT)
        inputs, token = torch.zeros(2, 9, *LATENT_512_512), torch.zeros(2, 1, TRUE_CONTEXT)
        time = torch.zeros(2)
    seen = true_sites(model, name, lambda: model.model(inputs, time, token))
    levels = [(160, 16)] * 3 + [(80, 32)] * 3 + [(40, 64)] * 3
    assert seen == [
        (ATTN2.format(3 + number), 8, width, GridSize(side, side), 1, None)
        for number, (width, side) in enumerate(levels)
    ]


def test_true_table_of_stableviton() -> None:
    """512x384: nine warping blocks, 192, 768 and 3072 keys on the grid of the queries."""
    with torch.device("meta"):
        model = ControlLDM(TRUE_WIDTHS, TRUE_CONTEXT)
        inputs, token = torch.zeros(2, 13, *LATENT_512_384), torch.zeros(2, 1, TRUE_CONTEXT)
        garment, time = torch.zeros(2, 4, *LATENT_512_384), torch.zeros(2)
    seen = true_sites(model, "stableviton", lambda: model.predict(inputs, time, token, garment, False))
    widths = (160, 160, 160, 160, 80, 80, 80, 40, 40)
    grids = [COARSE] * 3 + [MIDDLE] * 3 + [FINE] * 3
    assert [grid.tokens for grid in grids[::3]] == [192, 768, 3072]
    assert seen == [
        (WARP.format(number), 8, width, grid, grid.tokens, grid)
        for number, (width, grid) in enumerate(zip(widths, grids, strict=True))
    ]
