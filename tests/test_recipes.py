"""Recipes: the paper's numbers, their sources, and what cannot be trained with."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import fields

import pytest

from effspinenet_lib.errors import UnknownName, UserError
from effspinenet_lib.recipes import CHANGED, RECIPES, Recipe, get_recipe

SETTINGS = {f.name for f in fields(Recipe)} - {"name", "sources"}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_setting_names_its_source(recipe: Recipe) -> None:
    assert set(recipe.sources) == SETTINGS
    for name, source in recipe.sources.items():
        known = ("paper ", "released config", "our choice:", "neither the paper nor")
        assert source.startswith(known), f"{name}: {source}"


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_survives_json(recipe: Recipe) -> None:
    values = recipe.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert set(values) == SETTINGS | {"name"}


def test_the_paper_recipe_is_section_5_1_1() -> None:
    recipe = get_recipe("paper_detection")
    images_of_coco, batch, epochs = 118_287, 256, 650
    epoch = images_of_coco // batch
    assert (recipe.batch_size, recipe.learning_rate) == (batch, 0.28)
    assert recipe.steps == epochs * epoch == 300_300
    assert recipe.lr_drops == ((30 * epoch, 0.1), (10 * epoch, 0.01))
    assert (recipe.momentum, recipe.weight_decay) == (0.9, 4e-5)
    assert recipe.scale_jitter == (0.1, 2.0)


def test_the_paper_recipe_agrees_with_the_released_config() -> None:
    """The released config has the same drops: 30 and 10 epochs before the end of its 600."""
    steps, boundaries = 277_200, (263_340, 272_580)
    recipe = get_recipe("paper_detection")
    assert tuple(before_end for before_end, _ in recipe.lr_drops) == tuple(
        steps - boundary for boundary in boundaries
    )
    assert (recipe.warmup_steps, recipe.warmup_start) == (2_000, 0.0067)
    assert recipe.stochastic_depth == 0.2


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_all_recipes_keep_what_the_paper_says_of_sgd(recipe: Recipe) -> None:
    paper = get_recipe("paper_detection")
    for name in ("momentum", "weight_decay", "flip_probability"):
        assert getattr(recipe, name) == getattr(paper, name)
    # 5.1.1: steps for detection; 5.3: a cosine for segmentation
    if recipe.name.endswith("detection"):
        assert recipe.schedule == "step"
        assert [factor for _, factor in recipe.lr_drops] == [0.1, 0.01]
    else:
        assert (recipe.schedule, recipe.lr_drops) == ("cosine", ())


def test_a_changed_setting_says_so() -> None:
    recipe = get_recipe("smoke_detection")
    changed = recipe.with_(learning_rate=1.0)
    assert changed.learning_rate == 1.0
    assert changed.sources["learning_rate"] == CHANGED
    assert changed.sources["momentum"] == recipe.sources["momentum"]
    assert recipe.sources["learning_rate"] != CHANGED


def test_scaling_the_steps_keeps_the_shape_of_the_schedule() -> None:
    recipe = get_recipe("paper_detection")
    short = recipe.scaled_to(recipe.steps // 100)
    assert short.steps == 3_003
    assert short.warmup_steps == 20
    assert short.lr_drops == ((139, 0.1), (46, 0.01))
    assert short.learning_rate == recipe.learning_rate


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_scales_down_to_very_few_steps(recipe: Recipe, steps: int) -> None:
    assert recipe.scaled_to(steps).steps == steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 100}, "scaled_to"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"weight_decay": -1e-5}, "weight_decay"),
        ({"scale_jitter": (0.0, 2.0)}, "scale_jitter"),
        ({"scale_jitter": (2.0, 1.0)}, "scale_jitter"),
        ({"warmup_steps": 3_000}, "warmup"),
        ({"lr_drops": ((10, 0.01), (30, 0.1))}, "earliest first"),
        ({"flip_probability": 1.5}, "flip_probability"),
        ({"stochastic_depth": 1.0}, "stochastic_depth"),
        ({"clip_gradient_norm": 0.0}, "clip_gradient_norm"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        get_recipe("proxy_detection").with_(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "near"),
    [
        ({"schedule": "cosin"}, "cosine"),
        ({"precision": "bfloat"}, "bfloat16"),
        ({"learning_rat": 0.1}, "learning_rate"),
    ],
)
def test_unknown_words_list_the_near_ones(changes: dict, near: str) -> None:
    with pytest.raises(UnknownName, match=near):
        get_recipe("proxy_detection").with_(**changes)


def test_an_unknown_recipe_lists_the_near_ones() -> None:
    with pytest.raises(UnknownName, match="proxy_detection"):
        get_recipe("proxi_detection")


def test_recipes_need_no_torch() -> None:
    code = "import sys, effspinenet_lib.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_recipe_can_be_sent_to_another_process() -> None:
    recipe = get_recipe("paper_detection")
    assert pickle.loads(pickle.dumps(recipe)) == recipe
