"""Recipes of models whose parts are in diffusers, on small models of the same structure."""

import pytest

from tests.recipes.models import CASES
from tests.recipes.slow import RecipeContract


@pytest.mark.parametrize("case", CASES, ids=str)
class TestRecipes(RecipeContract):
    """Everything in `RecipeContract`, for each model."""
