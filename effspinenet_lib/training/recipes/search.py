"""Recipes of the search's trials (section 5.1.1): short trainings that rank distributions."""

from __future__ import annotations

from effspinenet_lib.training.recipes.recipe import declare
from effspinenet_lib.training.recipes.shared import PAPER_SGD, SHORT_SCHEDULE

_CLIPPED = {**PAPER_SGD, "clip_gradient_norm": (5.0, "our choice: frozen norms bound nothing")}

PROXY_SEARCH = declare(
    "proxy_search",
    batch_size=(8, "our choice: as proxy_detection"),
    steps=(240, "our choice: 150 trials took 3.3 hours of one core"),
    learning_rate=(
        0.2,
        "our choice: Eff-SpineNet-M0 had 2.1 AP after 220 steps at 96 pixels, with 0.1 1.6, with "
        "0.4 1.4",
    ),
    warmup_steps=(24, "our choice: 10 % of the steps"),
    warmup_start=(0.0, "our choice: from zero, as the warmup is short"),
    schedule=("cosine", "our choice: no drops to place in so few steps"),
    lr_drops=((), "our choice: none beside the cosine"),
    scale_jitter=((0.8, 1.25), "our choice: as proxy_detection"),
    norm_freeze_steps=(40, "our choice: a sixth of the steps, as proxy_detection"),
    **_CLIPPED,
    **SHORT_SCHEDULE,
)

SMOKE_SEARCH = declare(
    "smoke_search",
    batch_size=(4, "our choice: the smallest that exercises batching"),
    steps=(2, "our choice: every part of a trial runs; says nothing about accuracy"),
    learning_rate=(0.01, "our choice: too little to diverge in two steps"),
    warmup_steps=(1, "our choice: so that every phase of the schedule runs"),
    warmup_start=(0.0, "our choice: from zero, as the warmup is short"),
    schedule=("cosine", "our choice: as proxy_search"),
    lr_drops=((), "our choice: none beside the cosine"),
    scale_jitter=((0.8, 1.25), "our choice: as proxy_search"),
    norm_freeze_steps=(0, "our choice: statistics of two steps say nothing"),
    **_CLIPPED,
    **SHORT_SCHEDULE,
)
