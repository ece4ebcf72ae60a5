"""Recipes of models whose parts are in diffusers, on small models of the same structure."""

import pytest

from tests.support.recipe_contract import RecipeContract, check_compiled_whole, to_compile
from tests.support.recipe_models import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
class TestRecipes(RecipeContract):
    """Everything in `RecipeContract`, for each model."""


@pytest.mark.parametrize("case", to_compile(CASES), ids=str)
def test_a_network_compiled_whole_hides_no_attention(case):
    check_compiled_whole(case, "eager")


@pytest.mark.slow
def test_a_network_compiled_for_gradients_hides_no_attention():
    case = next(case for case in CASES if case.recipe == "paint_by_example")
    check_compiled_whole(case, "aot_eager")
