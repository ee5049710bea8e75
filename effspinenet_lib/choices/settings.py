"""The choices that the paper leaves open and that its cost columns can tell apart, as data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from effspinenet_lib.models.specs import (
    EXPANSION_RATIO,
    SQUEEZE_RATIO,
    STEM_BLOCKS,
    STEM_DIM,
    level_side,
    round_dim,
)

Rounding = Callable[[float], int]


def _nearest(value: float, multiple: int) -> int:
    return max(multiple, int(value + multiple / 2) // multiple * multiple)


def _down(value: float, multiple: int) -> int:
    return max(multiple, int(value) // multiple * multiple)


def _up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


# Channels after a multiplication. "90 %" is EfficientNet's rule: one multiple more where the
# nearest one lies below 90 % of the value.
ROUNDINGS: dict[str, Rounding] = {
    "4, 90 %": partial(round_dim, multiple=4),
    "8, 90 %": partial(round_dim, multiple=8),
    "nearest 4": partial(_nearest, multiple=4),
    "nearest 8": partial(_nearest, multiple=8),
    "down to 8": partial(_down, multiple=8),
    "up to 8": partial(_up, multiple=8),
    "down to 1": partial(_down, multiple=1),
}
SQUEEZE_ROUNDINGS: dict[str, Rounding] = {
    "down": partial(_down, multiple=1),
    "nearest": partial(_nearest, multiple=1),
    "8, 90 %": partial(round_dim, multiple=8),
}
# Side of the features of a level.
SIDES: dict[str, Callable[[int, int], int]] = {
    "up": level_side,
    "down": lambda image_side, level: image_side // 2**level,
}
# What counts as Multi-Adds beside convolutions and linear layers. A profiler that counts the
# operations of a graph finds all of them, half a Multi-Add each.
COUNTED: dict[str, frozenset[str]] = {
    "convolutions": frozenset(),
    "and norms": frozenset({"norm"}),
    "and activations": frozenset({"norm", "activation"}),
    "every product and sum": frozenset({"norm", "activation", "gate", "sum", "bias"}),
}


@dataclass(frozen=True)
class Choices:
    """One answer to every open question; the defaults are what this library builds.

    `CHOICES` says what each is and which answers are tried.
    """

    stem_dim: int = STEM_DIM
    stem_scaled: bool = True
    stem_blocks: int = STEM_BLOCKS
    expansion: int = EXPANSION_RATIO
    first_expansion: int = EXPANSION_RATIO
    squeeze_ratio: float = SQUEEZE_RATIO
    squeeze_of: str = "input"
    squeeze_rounding: str = "down"
    dims: str = "as printed"
    rounding: str = "4, 90 %"
    lost_repeats: str = "17 and 18: 1"
    idle_block: bool = True

    downsampling: str = "pooling"
    space_to_depth_norm: bool = False
    plain_downsampling: str = "depthwise"
    classification_downsampling: str = "plain"
    upsampling: str = "before 1x1"
    same_shape_conv: bool = False
    sides: str = "up"

    counted: str = "convolutions"
    squeeze_counted: bool = True
    norm_parameters: int = 2
    fusion_weights: bool = True

    classes: int = 90
    anchors: int = 9
    prediction: str = "separable"
    head_norms: str = "per level"
    head_bias: bool = False
    lateral_norm: bool = True
    merge: str = "after 1x1"
    classification_classes: int = 1000
    segmentation_prediction: str = "separable"

    instance_classes: int = 91
    proposals: int = 1000
    proposal_layers: int = 3
    proposal_prediction: str = "separable"
    proposal_anchors: int = 3
    fc_layers: int = 1
    fc_norm: bool = True
    box_per_class: bool = True
    mask_prediction: str = "1x1"


@dataclass(frozen=True)
class Choice:
    """An open question and the answers that are tried.

    Attributes:
        name: field of `Choices`.
        group: what it belongs to.
        title: the question in a few words.
        values: the answers.
    """

    name: str
    group: str
    title: str
    values: tuple[Any, ...]


BLOCKS, RESAMPLING, COUNTING = "blocks", "resampling", "counting"
HEADS, INSTANCES = "heads", "Mask R-CNN"
_YES_NO = (True, False)

CHOICES: tuple[Choice, ...] = (
    Choice("stem_dim", BLOCKS, "stem channels", (8, 16, 24, 32, 40)),
    Choice("stem_scaled", BLOCKS, "stem takes the multiplier", _YES_NO),
    Choice("stem_blocks", BLOCKS, "blocks chained after the stem", (2, 3)),
    Choice("expansion", BLOCKS, "expansion", (4, 5, 6)),
    Choice("first_expansion", BLOCKS, "expansion of block 1", (1, 6)),
    Choice("squeeze_ratio", BLOCKS, "squeeze ratio", (0.0, 0.1, 0.2, 0.25)),
    Choice("squeeze_of", BLOCKS, "squeeze ratio of", ("input", "expanded")),
    Choice("squeeze_rounding", BLOCKS, "squeeze rounding", tuple(SQUEEZE_ROUNDINGS)),
    Choice(
        "dims",
        BLOCKS,
        "dimensions scaled",
        # The constant of Equation 4: Equation 2 as approximated, what fits best, and in full.
        ("as printed", "unrounded, 0.0780", "unrounded, 0.0786", "unrounded, 0.0794"),
    ),
    Choice("rounding", BLOCKS, "channel rounding", tuple(ROUNDINGS)),
    Choice(
        "lost_repeats",
        BLOCKS,
        "repeats lost in Table 2",
        ("17 and 18: 1", "17 and 18: 2", "1 and 2: 1"),
    ),
    Choice("idle_block", BLOCKS, "block 13 added to 16", _YES_NO),
    Choice(
        "downsampling",
        RESAMPLING,
        "after space-to-depth",
        ("pooling", "depthwise", "one depthwise", "space-to-depth"),
    ),
    Choice("space_to_depth_norm", RESAMPLING, "norm after space-to-depth", _YES_NO),
    Choice(
        "plain_downsampling",
        RESAMPLING,
        "without space-to-depth",
        ("depthwise", "one depthwise", "pooling"),
    ),
    Choice(
        "classification_downsampling",
        RESAMPLING,
        "for classification",
        ("plain", "space-to-depth"),
    ),
    Choice("upsampling", RESAMPLING, "upsampling", ("before 1x1", "after 1x1")),
    Choice("same_shape_conv", RESAMPLING, "1x1 at equal shapes", _YES_NO),
    Choice("sides", RESAMPLING, "odd sides rounded", tuple(SIDES)),
    Choice("counted", COUNTING, "Multi-Adds of", tuple(COUNTED)),
    Choice("squeeze_counted", COUNTING, "Multi-Adds of squeezing", _YES_NO),
    Choice("norm_parameters", COUNTING, "parameters of a norm's channel", (0, 2, 4)),
    Choice("fusion_weights", COUNTING, "weights of fusion", _YES_NO),
    Choice("classes", HEADS, "classes", (80, 90, 91)),
    Choice("anchors", HEADS, "anchors", (3, 6, 9)),
    Choice("prediction", HEADS, "prediction layer", ("separable", "3x3", "1x1")),
    Choice("head_norms", HEADS, "norms", ("per level", "shared")),
    Choice("head_bias", HEADS, "biases before norms", _YES_NO),
    Choice("lateral_norm", HEADS, "norm after the lateral 1x1", _YES_NO),
    Choice("merge", HEADS, "levels upsampled to P3", ("after 1x1", "before 1x1")),
    Choice("classification_classes", HEADS, "classes of ImageNet", (1000, 1001)),
    Choice("segmentation_prediction", HEADS, "segmentation's prediction", ("separable", "1x1")),
    Choice("instance_classes", INSTANCES, "classes", (80, 81, 90, 91)),
    Choice("proposals", INSTANCES, "proposals", (300, 512, 1000)),
    Choice("proposal_layers", INSTANCES, "layers of the proposal branch", (1, 3)),
    Choice("proposal_prediction", INSTANCES, "proposal prediction", ("separable", "1x1")),
    Choice("proposal_anchors", INSTANCES, "proposal anchors", (3, 9)),
    Choice("fc_layers", INSTANCES, "fully connected layers", (1, 2)),
    Choice("fc_norm", INSTANCES, "their norms", _YES_NO),
    Choice("box_per_class", INSTANCES, "a box a class", _YES_NO),
    Choice("mask_prediction", INSTANCES, "mask prediction", ("1x1", "separable")),
)
assert [choice.name for choice in CHOICES] == [field.name for field in fields(Choices)]

LIBRARY = Choices()
# The authors' code for this network, tensorflow/tpu, models/official/detection/modeling/
# architecture: spinenetv2.py, nn_ops.py and heads.py (2020).
RELEASED = Choices(
    stem_dim=8,
    stem_blocks=3,
    rounding="8, 90 %",
    downsampling="one depthwise",
    space_to_depth_norm=True,
    same_shape_conv=True,
    fusion_weights=False,
    head_bias=True,
    classification_classes=1001,
    segmentation_prediction="1x1",
    proposal_layers=1,
    proposal_prediction="1x1",
    fc_norm=True,
    mask_prediction="separable",
)

# What the authors' code needs to meet the printed cells, step by step. Each is our guess.
CLOSER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("every product and sum counted", {"counted": "every product and sum"}),
    ("unrounded dimensions", {"dims": "unrounded, 0.0786", "rounding": "nearest 8"}),
    ("pooling", {"downsampling": "pooling", "space_to_depth_norm": False}),
    ("norms shared", {"head_norms": "shared"}),
)


def _sets() -> dict[str, Choices]:
    """Sets of answers that are compared as wholes."""
    sets = {"library": LIBRARY, "released code": RELEASED}
    choices = RELEASED
    for name, change in CLOSER:
        choices = replace(choices, **change)
        sets[f"and {name}"] = choices
    return sets


SETS = _sets()
CLOSEST = SETS[f"and {CLOSER[-1][0]}"]
