"""What the costs of the models rest on, and what is known where they miss the print."""

from __future__ import annotations

from effspinenet_lib.models.specs import MODELS
from effspinenet_lib.models.zoo import image_models, mobile

_BACKBONE = "stem of 16 channels, expansion 6, squeeze to 0.2 of the input, multiples of 4"
_S2D = "space-to-depth, pooling, then 1x1"
# Task -> the recovered choices (book/recovered.md) that a scale-permuted model's cost needs.
_SCALE_PERMUTED: dict[str, str] = {
    "detection": f"{_BACKBONE}; {_S2D}; 90 classes, 9 anchors; separable predictors",
    "instances": f"{_BACKBONE}; {_S2D}; 1000 box and 100 mask proposals; separable predictors",
    "classification": f"{_BACKBONE}; depthwise resampling; 1x1 a level to 256 channels",
    "segmentation": f"{_BACKBONE}; {_S2D}; 1x1 a level to the head's channels; 21 classes",
}
_PLAIN_PYRAMID = "separable pyramid without projections before the heads; 90 classes, 9 anchors"
_BASELINES: dict[str, str] = {
    **dict.fromkeys(
        ("efficientnet_b0_fpn", "efficientnet_b1_fpn", "efficientnet_b2_fpn"), _PLAIN_PYRAMID
    ),
    "resnet50_fpn": "P6 from P5; heads of 4 dense convolutions; 90 classes, 9 anchors",
    "spinenet_49": "256 filters at levels 5 to 7; heads of 4 dense convolutions; 90 classes",
    **dict.fromkeys(mobile.NOTES, "320x320; 90 classes"),
    **dict.fromkeys(image_models.NOTES, ""),
}
_NOTES: dict[str, str] = {
    "eff_spinenet_m0": (
        "-5.4 % and -3.6 %. Tried: 41 choices one at a time, eight of them in pairs "
        "(cost/choices.csv). The best set of answers gives +2.3 % and -2.9 %, with all 36 cells "
        "within 3 %, but five of its answers are fitted and it meets fewer cells to the digits."
    ),
    "eff_spinenet_m1": (
        "FLOPs -10.2 %. Tried: as for M0; the best set of answers gives -2.2 % (parameters -0.1 %)."
    ),
    "efficientnet_b0_fpn": (
        "FLOPs -3.8 %; with a 1x1 convolution before the heads -2.9 %, but then no parameters of "
        "the three sizes round to the printed ones."
    ),
    **mobile.NOTES,
    **image_models.NOTES,
}


def rests_on(model: str, task: str) -> str:
    """The choices that the paper leaves open and a model's cost needs."""
    return _SCALE_PERMUTED[task] if model in MODELS else _BASELINES.get(model, "")


def cost_note(model: str) -> str:
    """Why a model's cost misses the print, or what was tried; "" where it fits."""
    return _NOTES.get(model, "")
