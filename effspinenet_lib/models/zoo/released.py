"""The authors' released detectors, with the arithmetic of the released code.

`effspinenet convert` fills them with the released weights. The three mobile ones are models of
their own; SpineNet-49 is the option `released` of `spinenet_49`, whose other half is Table 3's
row with this library's layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from effspinenet_lib.models.layers import PyramidBackbone
from effspinenet_lib.models.mobile_spinenet import MobileSpineNet
from effspinenet_lib.models.released_specs import HEAD_LAYERS, RELEASED, ReleasedSpec
from effspinenet_lib.models.retinanet import DetectionSettings, RetinaNet
from effspinenet_lib.models.specs import BackboneSpec, SpineNetSpec
from effspinenet_lib.models.spinenet import SpineNet
from effspinenet_lib.models.zoo.registry import DropOptions, baseline


@dataclass(frozen=True)
class ReleasedOptions(DropOptions):
    """Options of a released detector.

    Attributes:
        stochastic_depth: drop rate of the last block; it grows linearly with depth (released
            config: 0.2).
    """

    stochastic_depth: float = 0.2


def build_released(spec: ReleasedSpec, num_classes: int, options: DropOptions) -> RetinaNet:
    """A released detector with fresh weights."""
    backbone: PyramidBackbone
    if isinstance(spec.backbone, SpineNetSpec):
        backbone = SpineNet(spec.backbone, spec.activation, options.stochastic_depth, released=True)
    else:
        backbone = MobileSpineNet(spec.backbone, spec.activation, options.stochastic_depth)
    return RetinaNet(
        backbone,
        num_classes,
        spec.head_dim,
        HEAD_LAYERS,
        spec.activation,
        settings=DetectionSettings(candidates_by_class=True),
        separable=spec.separable,
        released=True,
    )


def _register(spec: ReleasedSpec) -> None:
    @baseline(spec.name, {"detection": spec.image_size}, (), ReleasedOptions)
    def build(task: str, num_classes: int, options: ReleasedOptions) -> RetinaNet:
        return build_released(spec, num_classes, options)


for _spec in RELEASED.values():
    if isinstance(_spec.backbone, BackboneSpec):
        _register(_spec)
