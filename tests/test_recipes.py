"""Recipes: the paper's numbers, their sources, and what cannot be trained with."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import MISSING, fields

import pytest

from effspinenet_lib.errors import UnknownName, UserError
from effspinenet_lib.training.recipes import (
    CHANGED,
    RECIPES,
    Recipe,
    get_recipe,
    recipe_from_dict,
    recipes_frame,
)

SETTINGS = {f.name for f in fields(Recipe)} - {"name", "sources"}
LATER = {f.name: f.default for f in fields(Recipe) if f.default is not MISSING}


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
    assert recipe_from_dict(json.loads(json.dumps(values))) == recipe
    left_out = {name for name, default in LATER.items() if getattr(recipe, name) == default}
    assert set(values) == SETTINGS - left_out | {"name"}


def test_a_recipe_from_json_may_lack_what_its_named_one_has() -> None:
    plain = get_recipe("paper_classification").replace(ema_decay=None, dropout=None)
    assert recipe_from_dict(plain.to_dict()) == plain


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


SGD = {name: recipe for name, recipe in RECIPES.items() if recipe.optimizer == "sgd"}


@pytest.mark.parametrize("recipe", SGD.values(), ids=SGD)
def test_recipes_of_sgd_keep_what_the_paper_says_of_it(recipe: Recipe) -> None:
    paper = get_recipe("paper_detection")
    for name in ("momentum", "weight_decay", "flip_probability"):
        assert getattr(recipe, name) == getattr(paper, name)
    # 5.1.1: steps for detection; 5.3: a cosine for segmentation; the small searches choose one
    if recipe.name.endswith(("classification", "segmentation", "_search")):
        assert (recipe.schedule, recipe.lr_drops) == ("cosine", ())
    else:
        assert recipe.schedule == "step"
        assert [factor for _, factor in recipe.lr_drops] == [0.1, 0.01]


@pytest.mark.parametrize("epochs", [72, 200, 350, 500])
def test_the_schedules_of_table_5_differ_in_their_length_alone(epochs: int) -> None:
    recipe, paper = get_recipe(f"paper_detection_{epochs}_epochs"), get_recipe("paper_detection")
    assert recipe.steps == epochs * (118_287 // 256)
    assert recipe.replace(steps=paper.steps).to_dict() == {**paper.to_dict(), "name": recipe.name}


def test_the_strategies_of_table_4_are_added_one_at_a_time() -> None:
    baseline = get_recipe("paper_strategies_baseline")
    trained = get_recipe("paper_strategies_ms_train")
    full = get_recipe("paper_detection")
    assert (baseline.steps, baseline.scale_jitter) == (72 * 462, (0.8, 1.2))
    assert (trained.steps, trained.scale_jitter) == (650 * 462, (0.1, 2.0))
    assert baseline.stochastic_depth == trained.stochastic_depth == 0.0
    assert {**trained.to_dict(), "stochastic_depth": 0.2} == {
        **full.to_dict(),
        "name": trained.name,
    }
    for name in ("paper_strategies_ms_train_250_epochs", "paper_detection_250_epochs"):
        assert get_recipe(name).steps == 250 * 462


def test_the_segmentation_recipe_is_section_5_3() -> None:
    recipe = get_recipe("paper_segmentation")
    assert (recipe.steps, recipe.batch_size, recipe.learning_rate) == (10_000, 256, 0.05)
    assert (recipe.schedule, recipe.warmup_steps) == ("cosine", 500)


def test_the_classification_recipe_is_efficientnets() -> None:
    """The figures of EfficientNet's paper, section 5.2, against those of its code."""
    recipe, images = get_recipe("paper_classification"), 1_281_167
    epoch = images / recipe.batch_size
    assert recipe.steps / epoch == pytest.approx(350, abs=0.01)
    assert recipe.decay_steps / epoch == pytest.approx(2.4, abs=0.001)
    # the paper's initial rate of 0.256 is this one at the batch of 4096
    assert recipe.scale_to_batch(4_096).learning_rate == pytest.approx(0.256)
    rmsprop = (recipe.optimizer, recipe.optimizer_decay, recipe.momentum, recipe.weight_decay)
    assert rmsprop == ("rmsprop", 0.9, 0.9, 1e-5)


def test_the_search_trains_its_samples_for_4500_steps() -> None:
    trial, paper = get_recipe("paper_search_trial"), get_recipe("paper_detection")
    assert trial.steps == 4_500
    changed = {name for name in SETTINGS if getattr(trial, name) != getattr(paper, name)}
    assert changed == {"steps", "lr_drops"}
    for (before_end, _), (paper_before_end, _) in zip(trial.lr_drops, paper.lr_drops, strict=True):
        share = paper_before_end / paper.steps
        assert before_end / trial.steps == pytest.approx(share, abs=1e-4)


def test_a_smaller_batch_sees_as_many_images_at_the_same_rate_for_each() -> None:
    recipe = get_recipe("paper_detection")
    small = recipe.scale_to_batch(4)
    assert small.steps == 300_300 * 64
    assert small.learning_rate == 0.28 / 64
    assert small.warmup_start == 0.0067 / 64
    assert small.warmup_steps == 2_000 * 64
    assert small.lr_drops == ((30 * 462 * 64, 0.1), (10 * 462 * 64, 0.01))
    assert small.scaled_from_batch == 256
    assert "256" in small.sources["learning_rate"]
    assert small.scale_to_batch(8).scaled_from_batch == 256
    assert small.scale_to_batch(8).steps == recipe.scale_to_batch(8).steps
    assert recipe.scale_to_batch(256) is recipe


def test_a_smaller_batch_keeps_the_length_of_an_average_in_images() -> None:
    recipe = get_recipe("paper_classification")
    small = recipe.scale_to_batch(512)
    assert small.ema_decay is not None
    assert small.ema_decay**4 == pytest.approx(recipe.ema_decay)
    assert small.decay_steps == 4 * recipe.decay_steps


def test_the_table_of_recipes_has_every_setting_with_its_source() -> None:
    frame = recipes_frame()
    assert len(frame) == len(RECIPES) * len(SETTINGS)
    shown = frame.set_index(["recipe", "setting"]).loc[("paper_detection", "steps")]
    assert shown["value"] == "300,300"
    assert shown["source"].startswith("paper 5.1.1")


def test_a_changed_setting_says_so() -> None:
    recipe = get_recipe("smoke_detection")
    changed = recipe.replace(learning_rate=1.0)
    assert changed.learning_rate == 1.0
    assert changed.sources["learning_rate"] == CHANGED
    assert changed.sources["momentum"] == recipe.sources["momentum"]
    assert recipe.sources["learning_rate"] != CHANGED


def test_scaling_the_steps_keeps_the_shape_of_the_schedule() -> None:
    recipe = get_recipe("paper_detection")
    short = recipe.scale_to_steps(recipe.steps // 100)
    assert short.steps == 3_003
    assert short.warmup_steps == 20
    assert short.lr_drops == ((139, 0.1), (46, 0.01))
    assert short.learning_rate == recipe.learning_rate


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_scales_down_to_very_few_steps(recipe: Recipe, steps: int) -> None:
    assert recipe.scale_to_steps(steps).steps == steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 100}, "scale_to_steps"),
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
        ({"optimizer": "rmsprop"}, "optimizer_decay is missing with optimizer 'rmsprop'"),
        ({"optimizer_epsilon": 0.1}, "optimizer_epsilon has no meaning with optimizer 'sgd'"),
        ({"schedule": "exponential"}, "decay_rate is missing with schedule 'exponential'"),
        ({"decay_steps": 9}, "decay_steps has no meaning with schedule 'step'"),
        ({"ema_decay": 1.5}, "ema_decay"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        get_recipe("small_data_detection").replace(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "near"),
    [
        ({"schedule": "cosin"}, "cosine"),
        ({"optimizer": "rmsprob"}, "rmsprop"),
        ({"auto_augment": "imagnet"}, "imagenet"),
        ({"precision": "bfloat"}, "bfloat16"),
        ({"learning_rat": 0.1}, "learning_rate"),
    ],
)
def test_unknown_words_list_the_near_ones(changes: dict, near: str) -> None:
    with pytest.raises(UnknownName, match=near):
        get_recipe("proxy_detection").replace(**changes)


def test_an_unknown_recipe_lists_the_near_ones() -> None:
    with pytest.raises(UnknownName, match="proxy_detection"):
        get_recipe("proxi_detection")


def test_recipes_need_no_torch() -> None:
    code = "import sys, effspinenet_lib.training.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_recipe_can_be_sent_to_another_process() -> None:
    recipe = get_recipe("paper_detection")
    assert pickle.loads(pickle.dumps(recipe)) == recipe
