"""Scale-permuted models for every task (section 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from effspinenet_lib.backbones import BackboneOptions, ScalePermutedBackbone
from effspinenet_lib.specs import SCALES, ModelSpec
from effspinenet_lib.tasks.base import TaskModel
from effspinenet_lib.tasks.classification import Classifier, pyramid_classification_head
from effspinenet_lib.tasks.detection import RetinaNet
from effspinenet_lib.tasks.instances import MaskRCNN
from effspinenet_lib.tasks.segmentation import PyramidSegmentationHead, Segmenter


def build_scale_permuted(
    spec: ModelSpec, task: str, num_classes: int, options: BackboneOptions
) -> TaskModel:
    """A scale-permuted backbone under the head of a task.

    Raises:
        KeyError: no such task.
    """
    if task == "classification" and options.space_to_depth is None:
        # Recovered: Table 10's cost columns fit depthwise resampling alone.
        options = replace(options, space_to_depth=False)
    scale = SCALES[spec.scale]
    backbone = ScalePermutedBackbone(spec.backbone, options)
    head = (scale.head_dim, scale.head_layers)
    activation = options.activation
    dims = backbone.feature_dims
    builders: dict[str, Callable[[], TaskModel]] = {
        "detection": lambda: RetinaNet(backbone, num_classes, *head, activation),
        "instances": lambda: MaskRCNN(backbone, num_classes, *head, scale.box_fc_dim, activation),
        "classification": lambda: Classifier(
            backbone, pyramid_classification_head(dims, num_classes, activation)
        ),
        "segmentation": lambda: Segmenter(
            backbone, PyramidSegmentationHead(dims, num_classes, *head, activation)
        ),
    }
    return builders[task]()
