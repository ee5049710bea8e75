"""Every recipe by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from effspinenet_lib.errors import UnknownName
from effspinenet_lib.training.recipes.ablations import (
    RESNET_SCHEDULE,
    SCHEDULES_OF_TABLE_5,
    STRATEGIES_OF_TABLE_4,
)
from effspinenet_lib.training.recipes.detection import (
    PAPER_DETECTION,
    PAPER_SEARCH_TRIAL,
    PROXY_DETECTION,
    SMOKE_DETECTION,
)
from effspinenet_lib.training.recipes.other_tasks import (
    PAPER_CLASSIFICATION,
    PAPER_INSTANCES,
    PAPER_SEGMENTATION,
)
from effspinenet_lib.training.recipes.recipe import Recipe
from effspinenet_lib.training.recipes.search import PROXY_SEARCH, SMOKE_SEARCH
from effspinenet_lib.training.recipes.small_data import (
    SMALL_DATA_CLASSIFICATION,
    SMALL_DATA_DETECTION,
    SMALL_DATA_SEGMENTATION,
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        PAPER_DETECTION,
        *SCHEDULES_OF_TABLE_5,
        RESNET_SCHEDULE,
        *STRATEGIES_OF_TABLE_4,
        PAPER_SEARCH_TRIAL,
        PAPER_INSTANCES,
        PAPER_CLASSIFICATION,
        PAPER_SEGMENTATION,
        PROXY_DETECTION,
        SMALL_DATA_DETECTION,
        SMALL_DATA_CLASSIFICATION,
        SMALL_DATA_SEGMENTATION,
        SMOKE_DETECTION,
        PROXY_SEARCH,
        SMOKE_SEARCH,
    )
}


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        UnknownName: there is none; the message lists the near names.
    """
    if name not in RECIPES:
        raise UnknownName("recipe", name, RECIPES)
    return RECIPES[name]


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """The recipe that `Recipe.to_dict` gave `values` of; its named recipe says the sources.

    Raises:
        UnknownName: the named recipe or a field does not exist.
    """
    named = get_recipe(values["name"])
    defaults = {f.name: f.default for f in fields(Recipe) if f.default is not MISSING}
    lists = {
        "lr_drops": tuple((int(step), float(factor)) for step, factor in values["lr_drops"]),
        "scale_jitter": tuple(values["scale_jitter"]),
    }
    plain = {**defaults, **values, **lists}
    return named.with_(**{k: v for k, v in plain.items() if v != getattr(named, k)})
