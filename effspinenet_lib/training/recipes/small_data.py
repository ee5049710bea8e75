"""Recipes for a user's own pictures: what `effspinenet train` takes unless told otherwise."""

from __future__ import annotations

from effspinenet_lib.training.recipes.recipe import declare
from effspinenet_lib.training.recipes.shared import PAPER_SGD, SHORT_SCHEDULE

SMALL_DATA_DETECTION = declare(
    "small_data_detection",
    batch_size=(8, "our choice: many steps from few images"),
    steps=(2_000, "our choice: a few hundred images from scratch in well under an hour"),
    learning_rate=(0.1, "our choice: below proxy_detection's, as the images vary less"),
    warmup_steps=(200, "our choice: 10 % of the steps"),
    warmup_start=(0.0, "our choice: from zero, as the warmup is short"),
    schedule=("step", "paper 5.1.1"),
    lr_drops=(
        ((400, 0.1), (120, 0.01)),
        "our choice: the paper's factors; the last 20 % and 6 % so that both phases train",
    ),
    scale_jitter=((0.5, 2.0), "released config of Mobile SpineNet-49"),
    norm_freeze_steps=(0, "our choice: as the paper; level 7 of real pictures has more values"),
    **PAPER_SGD,
    **SHORT_SCHEDULE,
)

SMALL_DATA_CLASSIFICATION = declare(
    "small_data_classification",
    batch_size=(16, "our choice: many steps from few images"),
    steps=(2_000, "our choice: as small_data_detection"),
    learning_rate=(0.1, "our choice: as small_data_detection"),
    warmup_steps=(200, "our choice: 10 % of the steps"),
    warmup_start=(0.0, "our choice: from zero, as the warmup is short"),
    schedule=("cosine", "our choice: no drops to place"),
    lr_drops=((), "our choice: none beside the cosine"),
    scale_jitter=((0.8, 1.25), "our choice: the object stays in the picture"),
    norm_freeze_steps=(400, "our choice: level 7 of a small picture is one value"),
    **{**PAPER_SGD, "clip_gradient_norm": (5.0, "our choice: frozen norms bound nothing")},
    **SHORT_SCHEDULE,
)

SMALL_DATA_SEGMENTATION = declare(
    "small_data_segmentation",
    batch_size=(8, "our choice: many steps from few images"),
    steps=(2_000, "our choice: as small_data_detection"),
    learning_rate=(0.05, "paper 5.3"),
    warmup_steps=(200, "our choice: 10 % of the steps; paper 5.3: 500 of 10,000"),
    warmup_start=(0.0, "our choice: from zero, as the warmup is short"),
    schedule=("cosine", "paper 5.3"),
    lr_drops=((), "our choice: none beside the cosine"),
    scale_jitter=((0.5, 2.0), "our choice: as small_data_detection"),
    norm_freeze_steps=(400, "our choice: level 7 of a small picture is one value"),
    **{**PAPER_SGD, "clip_gradient_norm": (5.0, "our choice: frozen norms bound nothing")},
    **SHORT_SCHEDULE,
)

# What `effspinenet train` takes for a task unless told otherwise.
SMALL_DATA_RECIPES: dict[str, str] = {
    "detection": SMALL_DATA_DETECTION.name,
    "instances": SMALL_DATA_DETECTION.name,
    "classification": SMALL_DATA_CLASSIFICATION.name,
    "segmentation": SMALL_DATA_SEGMENTATION.name,
}
