"""Every number of every recipe with its source, as a table."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from effspinenet_lib.training.recipes.recipe import Recipe
from effspinenet_lib.training.recipes.registry import RECIPES


def recipes_frame(recipes: Iterable[Recipe] = tuple(RECIPES.values())) -> pd.DataFrame:
    """One row a setting: columns `recipe`, `setting`, `value` (as text; "–" for none), `source`.

    The settings of a recipe stand in the order of its fields.
    """
    rows = [
        {
            "recipe": recipe.name,
            "setting": name,
            "value": _text(getattr(recipe, name)),
            "source": recipe.sources[name],
        }
        for recipe in recipes
        for name in recipe.__dataclass_fields__
        if name in recipe.sources
    ]
    return pd.DataFrame(rows)


def _text(value: object) -> str:
    if value is None or value == () or value == "":
        return "–"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
