"""The demo: a small Llama that writes Python, and the recipe that halves it."""

from collections.abc import Iterable
from pathlib import Path

import yaml

from minitron.recipe import Recipe, build_recipe

HERE = Path(__file__).parent


def demo_recipe(overrides: Iterable[str] = ()) -> Recipe:
    """demo/recipe.yaml with the shipped teacher as the model.

    Raises: RecipeError for a bad override.
    """
    raw = yaml.safe_load((HERE / "recipe.yaml").read_text())
    return build_recipe({"model": str(HERE / "demo-teacher"), **raw}, overrides, where="demo recipe")
