"""The training settings of a recipe with their sources."""

from __future__ import annotations

from effspinenet_lib.report.tables import Table, Text
from effspinenet_lib.training.recipes import get_recipe
from effspinenet_lib.training.recipes.frame import recipes_frame


def recipe_table(name: str, beside: str | None = None) -> Table:
    """Every setting of a recipe, its value and its source.

    Args:
        name: of the recipe.
        beside: name of another recipe; only settings whose values differ from its are shown, with
            both values.

    Raises:
        UnknownName: no such recipe.
    """
    frame = recipes_frame([get_recipe(name)]).set_index("setting").drop(columns="recipe")
    title = f"Recipe {name}"
    if beside is not None:
        other = recipes_frame([get_recipe(beside)]).set_index("setting")["value"]
        frame.insert(1, beside, other.reindex(frame.index).fillna("–"))
        frame = frame[frame["value"] != frame[beside]].rename(columns={"value": name})
        title += f" where it differs from {beside}"
    frame["source"] = [Text(source) for source in frame["source"]]
    return Table(frame, title)
