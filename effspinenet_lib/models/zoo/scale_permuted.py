"""Scale-permuted models for every task (section 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from effspinenet_lib.errors import UserError
from effspinenet_lib.models.base import TaskModel
from effspinenet_lib.models.classification import DROPOUT, Classifier, pyramid_classification_head
from effspinenet_lib.models.instances import MaskRCNN
from effspinenet_lib.models.learned import distributed, parse_betas
from effspinenet_lib.models.retinanet import RetinaNet
from effspinenet_lib.models.scale_permuted import BackboneOptions, ScalePermutedBackbone
from effspinenet_lib.models.segmentation import PyramidSegmentationHead, Segmenter
from effspinenet_lib.models.specs import SCALES, BackboneSpec, ModelSpec, scale_backbone


@dataclass(frozen=True)
class ScalePermutedOptions(BackboneOptions):
    """What the ablation tables switch, and the resource distribution.

    Attributes:
        betas: of the 18 blocks (Equation 4), such as `10-10-5-...`, in place of the model's own
            distribution; empty: its own.
        dropout: rate before the linear layer of the classifier.
    """

    betas: str = ""
    dropout: float = DROPOUT

    def __post_init__(self) -> None:
        """Refuse values that would build another network than was meant.

        Raises:
            UserError: an option's value is none.
            UnknownName: the activation is not known.
        """
        super().__post_init__()
        if not isinstance(self.betas, str):
            raise UserError(f"model option betas is {self.betas!r}; write it as 10-10-5-...")
        if self.betas:
            parse_betas(self.betas)
        if not 0 <= self.dropout < 1:
            raise UserError(f"model option dropout is {self.dropout}; it must be from 0 to below 1")


def _backbone_spec(spec: ModelSpec, betas: str) -> BackboneSpec:
    if not betas:
        return spec.backbone
    return scale_backbone(distributed(parse_betas(betas)), SCALES[spec.scale])


def build_scale_permuted(
    spec: ModelSpec, task: str, num_classes: int, options: ScalePermutedOptions
) -> TaskModel:
    """A scale-permuted backbone under the head of a task.

    Raises:
        KeyError: no such task.
    """
    if task == "classification" and options.space_to_depth is None:
        # Recovered: Table 10's cost columns fit depthwise resampling alone.
        options = replace(options, space_to_depth=False)
    scale = SCALES[spec.scale]
    backbone = ScalePermutedBackbone(_backbone_spec(spec, options.betas), options)
    head = (scale.head_dim, scale.head_layers)
    activation = options.activation
    dims = backbone.feature_dims
    builders: dict[str, Callable[[], TaskModel]] = {
        "detection": lambda: RetinaNet(backbone, num_classes, *head, activation),
        "instances": lambda: MaskRCNN(backbone, num_classes, *head, scale.box_fc_dim, activation),
        "classification": lambda: Classifier(
            backbone, pyramid_classification_head(dims, num_classes, activation, options.dropout)
        ),
        "segmentation": lambda: Segmenter(
            backbone, PyramidSegmentationHead(dims, num_classes, *head, activation)
        ),
    }
    return builders[task]()
