"""The one-stage detectors that Table 3 compares with; all weights are fresh.

Choices that no text states were fitted to Table 3's cost columns. Deviations from the printed
cells, at 90 classes:

- EfficientNet-FPN (B0, B1, B2): separable 3x3 convolutions in the pyramid, and heads that take
  its features as they are: FLOPs -3.8, -2.2, -1.1 %, parameters +1.0, +0.3, +0.2 %, which all
  three round to the printed ones. With a 1x1 convolution a level before the heads, as
  Eff-SpineNet has: -2.9, -1.0, +0.4 % and +1.6, +0.9, +1.1 %, and no parameters round to the
  printed ones. With dense convolutions: +3.2, +6.8, +11.1 % and +5.4, +5.2, +6.8 %.
- EfficientDet (D0, D1, D2), as its paper has it: -0.3, +0.1, -1.5 % and -0.6, +0.3, -0.1 %.
- ResNet-50-FPN, P6 from P5 (released code): -0.1 % and +0.2 %. P6 from C5, as in RetinaNet's
  paper, would give +12.3 % parameters.
- SpineNet-49, as the released code has it: -0.3 % and +0.1 %.

EfficientNet's last 1x1 convolution, to 1280 channels, belongs to its classifier and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from effspinenet_lib.errors import UnknownName, UserError
from effspinenet_lib.models.extractors import TimmFeatures
from effspinenet_lib.models.fpn import BiFPN, FeaturePyramid
from effspinenet_lib.models.layers import ACTIVATIONS, PyramidBackbone
from effspinenet_lib.models.released_specs import RELEASED
from effspinenet_lib.models.retinanet import RetinaNet
from effspinenet_lib.models.specs import SCALES, SPINENET_49, Scale
from effspinenet_lib.models.spinenet import SpineNet
from effspinenet_lib.models.zoo.registry import DropOptions, baseline
from effspinenet_lib.models.zoo.released import build_released

TABLES = ("table-03",)
# EfficientNet of each scale; EfficientDet's and EfficientNet-FPN's sizes and head dimensions are
# Eff-SpineNet's of this scale (Table 2; EfficientDet's paper, Table 1).
BACKBONES = {"D0": "efficientnet_b0", "D1": "efficientnet_b1", "D2": "efficientnet_b2"}
BIFPN_REPEATS = {"D0": 3, "D1": 4, "D2": 5}  # EfficientDet's paper, Table 1
# RetinaNet's dense heads; 640 pixels by SpineNet's paper and the released configs.
DENSE_SIZE, DENSE_DIM, DENSE_LAYERS = 640, 256, 4
SWISH = "swish"  # section 5.1.1: all models of Table 3


@dataclass(frozen=True)
class OneStageOptions(DropOptions):
    """Options of a detector of Table 3; the defaults are those of its row.

    Attributes:
        stochastic_depth: drop rate of the last block; it grows linearly with depth. Section
            5.1.1 names the method, the released configs of the same training have 0.2.
    """

    stochastic_depth: float = 0.2


@dataclass(frozen=True)
class ResNetOptions(OneStageOptions):
    """Options of ResNet-50-FPN; Table 3's row is Table 4's last column.

    Attributes:
        activation: `swish`, or `relu` as in the first columns of Table 4.
    """

    activation: str = SWISH

    def __post_init__(self) -> None:
        """Refuse values that mean no network.

        Raises:
            UserError: the drop rate is out of range.
            UnknownName: the activation is not known.
        """
        super().__post_init__()
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS:
            raise UnknownName("activation", str(self.activation), ACTIVATIONS)


@dataclass(frozen=True)
class SpineNetOptions(OneStageOptions):
    """Options of SpineNet-49.

    Attributes:
        released: the released code's arithmetic, into which the released weights fit, else
            Table 3's row, whose layers are those of all other models here.
    """

    released: bool = False

    def __post_init__(self) -> None:
        """Refuse values that mean no network.

        Raises:
            UserError: the drop rate is out of range, or the switch is neither true nor false.
        """
        super().__post_init__()
        if not isinstance(self.released, bool):
            raise UserError(f"model option released is {self.released!r}; it must be true or false")


def _separable_heads(pyramid: PyramidBackbone, num_classes: int, scale: Scale) -> RetinaNet:
    return RetinaNet(pyramid, num_classes, scale.head_dim, scale.head_layers, SWISH, project=False)


def _register_efficientnet_fpn(name: str, scale: Scale) -> None:
    @baseline(f"{name}_fpn", {"detection": scale.input_size}, TABLES, OneStageOptions)
    def build(task: str, num_classes: int, options: OneStageOptions) -> RetinaNet:
        features = TimmFeatures(name, stochastic_depth=options.stochastic_depth)
        pyramid = FeaturePyramid(features, scale.head_dim, SWISH, separable=True)
        return _separable_heads(pyramid, num_classes, scale)


def _register_efficientdet(name: str, scale: Scale, repeats: int) -> None:
    @baseline(
        f"efficientdet_{scale.id.lower()}", {"detection": scale.input_size}, TABLES, OneStageOptions
    )
    def build(task: str, num_classes: int, options: OneStageOptions) -> RetinaNet:
        features = TimmFeatures(name, stochastic_depth=options.stochastic_depth)
        pyramid = BiFPN(features, scale.head_dim, repeats, SWISH)
        return _separable_heads(pyramid, num_classes, scale)


for _scale, _name in BACKBONES.items():
    _register_efficientnet_fpn(_name, SCALES[_scale])
    _register_efficientdet(_name, SCALES[_scale], BIFPN_REPEATS[_scale])


@baseline("resnet50_fpn", {"detection": DENSE_SIZE}, (*TABLES, "table-04"), ResNetOptions)
def _resnet50_fpn(task: str, num_classes: int, options: ResNetOptions) -> RetinaNet:
    activation = options.activation
    features = TimmFeatures(
        "resnet50", activation=activation, stochastic_depth=options.stochastic_depth
    )
    pyramid = FeaturePyramid(features, DENSE_DIM, activation, separable=False)
    return RetinaNet(
        pyramid, num_classes, DENSE_DIM, DENSE_LAYERS, activation, separable=False, project=False
    )


@baseline("spinenet_49", {"detection": DENSE_SIZE}, TABLES, SpineNetOptions)
def _spinenet_49(task: str, num_classes: int, options: SpineNetOptions) -> RetinaNet:
    """SpineNet's 1x1 convolutions at its ends are the projections of the heads."""
    if options.released:
        return build_released(RELEASED["spinenet_49"], num_classes, options)
    backbone = SpineNet(SPINENET_49, SWISH, options.stochastic_depth)
    return RetinaNet(backbone, num_classes, DENSE_DIM, DENSE_LAYERS, SWISH, separable=False)
