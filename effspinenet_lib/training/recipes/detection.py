"""Recipes of detection: the paper's own, its search's, and those of the profiles."""

from __future__ import annotations

from effspinenet_lib.training.recipes.recipe import Setting, declare
from effspinenet_lib.training.recipes.shared import (
    PAPER_BATCH,
    PAPER_LEARNING_RATE,
    PAPER_REGULARISATION,
    PAPER_SGD,
    PAPER_STEPS_PER_EPOCH,
    SHORT_SCHEDULE,
)

PAPER_DETECTION_SETTINGS: dict[str, Setting] = {
    "batch_size": (PAPER_BATCH, "paper 5.1.1"),
    "steps": (650 * PAPER_STEPS_PER_EPOCH, "paper 5.1.1: 650 epochs, here of 462 steps"),
    "learning_rate": (PAPER_LEARNING_RATE, "paper 5.1.1"),
    "warmup_steps": (2_000, "released config; the paper does not mention a warmup"),
    "warmup_start": (0.0067, "released config; the paper does not mention a warmup"),
    "schedule": ("step", "paper 5.1.1"),
    "lr_drops": (
        ((30 * PAPER_STEPS_PER_EPOCH, 0.1), (10 * PAPER_STEPS_PER_EPOCH, 0.01)),
        "paper 5.1.1: 0.1x and 0.01x at the last 30 and 10 epochs",
    ),
    "scale_jitter": ((0.1, 2.0), "paper 5.1.1"),
    **PAPER_SGD,
    **PAPER_REGULARISATION,
}
PAPER_DETECTION = declare("paper_detection", **PAPER_DETECTION_SETTINGS)

# Section 5.1.1: what a sampled architecture is trained with before its AP is its reward. It trains
# on `train2017-rest-7392` and is evaluated on `train2017-held-7392` (`SEARCH_HELD_OUT_IMAGES`).
PAPER_SEARCH_TRIAL = declare(
    "paper_search_trial",
    **{
        **PAPER_DETECTION_SETTINGS,
        "steps": (4_500, "paper 5.1.1, search details: 4.5k iterations"),
        "lr_drops": (
            ((208, 0.1), (69, 0.01)),
            "our choice: the paper's last 30 and 10 epochs are longer than the run; the same "
            "shares of the schedule, 30 / 650 and 10 / 650",
        ),
    },
)

PROXY_DETECTION = declare(
    "proxy_detection",
    batch_size=(8, "our choice: more steps from the images that the time allows"),
    steps=(2_500, "our choice: a run of about 10 minutes on one thread"),
    learning_rate=(
        0.25,
        "our choice: the loss falls faster than with 0.1; far above the paper's "
        "scaled with the batch (0.00875), since the schedule is 120 times shorter",
    ),
    warmup_steps=(200, "our choice: 8 % of the steps"),
    warmup_start=(0.0, "our choice: from zero, as the warmup is short"),
    schedule=("step", "paper 5.1.1"),
    lr_drops=(
        ((500, 0.1), (150, 0.01)),
        "our choice: the paper's factors; the last 20 % and 6 % so that both phases train",
    ),
    scale_jitter=((0.8, 1.25), "our choice: the paper's [0.1, 2.0] needs its long schedule"),
    norm_freeze_steps=(
        400,
        "our choice: at 128 pixels and batch 8 a norm at level 7 sees 8 values a step; without "
        "this, what a run reaches depends on how far its running statistics are from those",
    ),
    **PAPER_SGD,
    **SHORT_SCHEDULE,
)

SMOKE_DETECTION = declare(
    "smoke_detection",
    batch_size=(4, "our choice: the smallest that exercises batching"),
    steps=(12, "our choice: every part of the loop runs; says nothing about accuracy"),
    learning_rate=(
        PAPER_LEARNING_RATE * 4 / PAPER_BATCH,
        "our choice: the paper's, scaled linearly with the batch",
    ),
    warmup_steps=(4, "our choice: so that every phase of the schedule runs"),
    warmup_start=(0.0, "our choice: from zero, as the warmup is short"),
    schedule=("step", "paper 5.1.1"),
    lr_drops=(((4, 0.1), (2, 0.01)), "our choice: so that every phase of the schedule runs"),
    scale_jitter=((0.8, 1.25), "our choice: as proxy_detection"),
    **PAPER_SGD,
    **PAPER_REGULARISATION,
)
