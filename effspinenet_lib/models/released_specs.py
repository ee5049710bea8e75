"""The detectors that the authors released in the TensorFlow Model Garden, as data.

Every figure is from `official/vision` of the Model Garden: backbones/spinenet_mobile.py and
spinenet.py, the files in configs/experiments/retinanet, configs/retinanet.py and
MODEL_GARDEN.md. This module needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from effspinenet_lib.models.specs import (
    KERNEL,
    SPINENET_49,
    TOPOLOGY,
    BackboneSpec,
    BlockSpec,
    SpineNetSpec,
)

# Feature dimension of a level in Mobile SpineNet-49; level 0 is the stem convolution.
MOBILE_DIMS = {0: 8, 1: 16, 2: 24, 3: 40, 4: 80, 5: 112, 6: 112, 7: 112}
HEAD_LAYERS = 4
SOURCE = "TensorFlow Model Garden, official/vision (tf-models-official 2.20.0)"


@dataclass(frozen=True)
class ReleasedSpec:
    """A released RetinaNet.

    Attributes:
        name: as `create_model` knows it.
        backbone: the scale-permuted backbone.
        image_size: image side in pixels.
        activation: `hard_swish` or `swish`.
        head_dim: channels of the heads, and of what the backbone's levels are brought to.
        separable: separable convolutions in the heads, or dense ones.
        experiment: the Model Garden's name of the experiment.
        metrics: published figures by name: AP on COCO val2017 in percent; empty for a model of
            which only the configuration is published.
    """

    name: str
    backbone: BackboneSpec | SpineNetSpec
    image_size: int
    activation: str
    head_dim: int
    separable: bool
    experiment: str
    metrics: dict[str, float]


def _mobile(multiplier: float) -> BackboneSpec:
    """Table 1's topology with block 3 fused, and the released dimensions cut to whole numbers."""
    blocks = tuple(
        BlockSpec(
            index,
            level,
            KERNEL,
            int(MOBILE_DIMS[level] * multiplier),
            (1, 2) if index == 3 else inputs,
            is_output,
        )
        for index, (level, inputs, is_output) in enumerate(TOPOLOGY, start=1)
    )
    return BackboneSpec(blocks, stem_dim=int(MOBILE_DIMS[0] * multiplier))


_MOBILE = "retinanet_mobile_coco"
RELEASED: dict[str, ReleasedSpec] = {
    spec.name: spec
    for spec in (
        ReleasedSpec(
            "mobile_spinenet_49",
            _mobile(1.0),
            image_size=384,
            activation="hard_swish",
            head_dim=48,
            separable=True,
            experiment=_MOBILE,
            metrics={"AP": 28.1},  # MODEL_GARDEN.md; the configuration's header has 27.6
        ),
        ReleasedSpec(
            "mobile_spinenet_49s",
            _mobile(0.65),
            image_size=384,
            activation="hard_swish",
            head_dim=40,
            separable=True,
            experiment=_MOBILE,
            metrics={"AP": 23.5},  # the configuration's header
        ),
        ReleasedSpec(
            "mobile_spinenet_49xs",
            _mobile(0.6),
            image_size=256,
            activation="swish",
            head_dim=24,
            separable=True,
            experiment=_MOBILE,
            metrics={},
        ),
        ReleasedSpec(
            "spinenet_49",
            SPINENET_49,
            image_size=640,
            activation="swish",
            head_dim=256,
            separable=False,
            experiment="retinanet_spinenet_coco",
            metrics={"AP": 44.2},  # MODEL_GARDEN.md
        ),
    )
}
