"""Every training setting as data, each number beside its source. Needs no torch.

A recipe is declared as `field=(value, source)`, so that a value cannot be given without
saying where it comes from. Sources:

- "paper 5.1.1" and the like: a section of the paper;
- "released config": `coco_spinenet49_mobile_tpu.yaml` and the RetinaNet configs of the
  authors' code (TensorFlow Model Garden, package `tf-models-official`);
- "as EfficientNet": what section 5.2 refers to, that paper or its released code;
- "our choice": neither says it; the reason follows.

The learning rate that a recipe gives at each step is `training.optim.learning_rate_at`.
"""

from effspinenet_lib.training.recipes.recipe import CHANGED, PRECISIONS, SCHEDULES, Recipe
from effspinenet_lib.training.recipes.registry import RECIPES, get_recipe, recipe_from_dict
from effspinenet_lib.training.recipes.shared import EVALUATION_BATCH, SEARCH_HELD_OUT_IMAGES
from effspinenet_lib.training.recipes.small_data import SMALL_DATA_RECIPES

__all__ = [
    "CHANGED",
    "EVALUATION_BATCH",
    "PRECISIONS",
    "RECIPES",
    "SCHEDULES",
    "SEARCH_HELD_OUT_IMAGES",
    "SMALL_DATA_RECIPES",
    "Recipe",
    "get_recipe",
    "recipe_from_dict",
]
