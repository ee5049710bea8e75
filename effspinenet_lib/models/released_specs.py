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


# The released detectors number their classes by COCO's category ids, of which 10 are not used.
COCO_UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
_COCO_NAMES = """
person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant
stop_sign parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe
backpack umbrella handbag tie suitcase frisbee skis snowboard sports_ball kite
baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup fork
knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake
chair couch potted_plant bed dining_table toilet tv laptop mouse remote keyboard
cell_phone microwave oven toaster sink refrigerator book clock vase scissors teddy_bear
hair_drier toothbrush
"""
COCO_NAMES: dict[int, str] = dict(
    zip(
        (number for number in range(1, 91) if number not in COCO_UNUSED),
        (name.replace("_", " ") for name in _COCO_NAMES.split()),
        strict=True,
    )
)


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
        model_id: the Model Garden's name of the backbone.
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
    model_id: str
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
            model_id="49",
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
            model_id="49S",
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
            model_id="49XS",
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
            model_id="49",
            metrics={"AP": 44.2},  # MODEL_GARDEN.md
        ),
    )
}
