"""Scale-permuted models for every task (section 4)."""

from __future__ import annotations

from torch import nn

from effspinenet_lib.backbones import BackboneOptions, ScalePermutedBackbone
from effspinenet_lib.specs import SCALES, ModelSpec
from effspinenet_lib.tasks.detection import RetinaNet


def build_scale_permuted(
    spec: ModelSpec, task: str, num_classes: int, options: BackboneOptions
) -> nn.Module:
    """A scale-permuted backbone under the head of a task.

    Raises:
        KeyError: no such task.
    """
    scale = SCALES[spec.scale]
    backbone = ScalePermutedBackbone(spec.backbone, options)
    head = (scale.head_dim, scale.head_layers)
    activation = options.activation
    builders = {
        "detection": lambda: RetinaNet(backbone, num_classes, *head, activation),
    }
    return builders[task]()
