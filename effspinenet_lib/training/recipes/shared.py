"""Settings that several recipes share, each with its source."""

from __future__ import annotations

from effspinenet_lib.training.recipes.recipe import Setting

EVALUATION_BATCH = 16  # our choice; the same for every model

COCO_TRAIN_IMAGES = 118_287  # images of COCO train2017
# Paper 5.1.1, search details: images of train2017 that no trial trains on, for its reward. The
# paper does not say which; `data.coco.HeldOutSplit` takes them by a rule that anyone can redo.
SEARCH_HELD_OUT_IMAGES = 7_392
PAPER_BATCH = 256  # paper 5.1.1
PAPER_LEARNING_RATE = 0.28  # paper 5.1.1
PAPER_STEPS_PER_EPOCH = COCO_TRAIN_IMAGES // PAPER_BATCH  # 462, as in the released config

# Settings that the paper and the released config give for every detector.
PAPER_SGD: dict[str, Setting] = {
    "momentum": (0.9, "paper 5.1.1"),
    "weight_decay": (
        4e-5,
        "paper 5.1.1; coupled with the gradient as in the released config, whose L2 term is "
        "weight_decay / 2 times the squared weights",
    ),
    "decay_norms_and_biases": (
        False,
        "released config: only kernels have a regulariser, norms and biases have none (it leaves "
        "depthwise and head kernels out as well; here every kernel is decayed)",
    ),
    "flip_probability": (0.5, "paper 5.1.1: horizontal flipping; 0.5 in the released code"),
    "precision": (
        "auto",
        "our choice: bfloat16 on accelerators and on processors with matrix units for it, float32 "
        "elsewhere; released config: bfloat16",
    ),
    "clip_gradient_norm": (None, "neither the paper nor the released config clips for detection"),
    "channels_last": (True, "our choice: a memory layout for speed; the arithmetic is the same"),
}

PAPER_REGULARISATION: dict[str, Setting] = {
    "stochastic_depth": (0.2, "paper 5.1.1 names it; 0.2 from the released config"),
    "norm_momentum": (0.99, "paper 5.1.1"),
    "norm_freeze_steps": (0, "neither the paper nor the released config freezes the norms"),
}
SHORT_SCHEDULE: dict[str, Setting] = {
    "stochastic_depth": (0.0, "our choice: a small model trained this briefly underfits"),
    "norm_momentum": (
        0.95,
        "our choice: with the paper's 0.99 the statistics lag behind the weights of a schedule "
        "this short",
    ),
}
