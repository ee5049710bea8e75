"""Mask R-CNN with separable branches on any backbone with outputs P3 to P7 (section 4.1).

The paper states the convolutions of the branches and the width of the fully connected layer; the
rest is recovered from the cost columns of Table 6 (4.7 B and 4.6 M, 9.2 B and 6.4 M, 16.0 B and
9.2 M for D0, D1 and D2), with the backbones that every other table has. Misses in % of the
printed value, and the largest of the six:

| variant | FLOPs | parameters | largest |
|---|---|---|---|
| taken | +2.2 +1.2 +1.6 | -0.4 -0.9 +0.5 | 2.2 |
| 1x1 prediction of proposals (released code) | +2.1 +1.1 +1.5 | -0.5 -0.9 +0.5 | 2.1 |
| norms of the proposal branch for all levels | +2.2 +1.2 +1.6 | -0.5 -0.9 +0.5 | 2.2 |
| 9 anchors a location | +2.4 +1.4 +1.8 | -0.4 -0.8 +0.5 | 2.4 |
| 90 outputs for classes, boxes and masks, not 91 | +2.0 +1.1 +1.5 | -0.5 -0.9 +0.5 | 2.0 |
| one box for all classes | +0.2 +0.2 +0.4 | -2.5 -2.3 -1.5 | 2.5 |
| one mask for all classes | -7.4 -5.6 -3.4 | -0.6 -1.0 +0.4 | 7.4 |
| separable prediction layer of masks | +3.1 +1.8 +2.1 | -0.4 -0.9 +0.5 | 3.1 |
| masks from 7x7 features | -14.6 -13.0 -10.5 | -0.4 -0.9 +0.5 | 14.6 |
| boxes from 14x14 features | +97 +78 +92 | +52 +51 +92 | 97 |
| transposed convolution of 256 channels | +52 +27 +16 | +1.0 +0.3 +1.4 | 52 |
| 512 proposals | -14.5 -12.0 -13.8 | -0.4 -0.9 +0.5 | 14.5 |
| backbones in multiples of 8 | +2.2 +1.2 +1.9 | -0.4 -0.9 +1.2 | 2.2 |

The 1x1 convolutions to the branches' dimension cannot be left out: regions are pooled from
levels of one dimension. Cost does not tell the variants within 3 % apart. Taken is what the
library has already (RetinaNet's branch for the proposals) and else the released code's choice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers

from effspinenet_lib.models.base import Target, TaskModel, check_batch, crowds
from effspinenet_lib.models.instance_heads import (
    NOT_SAMPLED,
    InstanceSettings,
    ProposalHead,
    ProposalNetwork,
    RegionBranches,
)
from effspinenet_lib.models.layers import PyramidBackbone, conv_norm, initialise
from effspinenet_lib.models.specs import OUTPUT_LEVELS


class MaskRCNN(TaskModel):
    """A two-stage detector with masks.

    The shapes of a training step depend on the data (torchvision's proposals and samples), so a
    compiler that builds a program for every shape builds one at every step: not for a TPU.

    Args:
        backbone: computes the outputs P3 to P7.
        num_classes: classes, without background. The cost columns of the paper fit 90, COCO's
            highest category id.
        head_dim: channels of the branches (Table 2).
        head_layers: separable convolutions a branch (Table 2).
        fc_dim: width of the fully connected layer of the box branch (section 4.1).
        activation: `swish` or `relu`.
        settings: anchors, sampling, pooling and post-processing.
    """

    def __init__(
        self,
        backbone: PyramidBackbone,
        num_classes: int,
        head_dim: int,
        head_layers: int,
        fc_dim: int,
        activation: str = "swish",
        settings: InstanceSettings | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.settings = settings or InstanceSettings()
        self.lateral = nn.ModuleDict(
            {
                str(level): conv_norm(dim, head_dim, activation=activation)
                for level, dim in backbone.feature_dims.items()
            }
        )
        initialise(self.lateral)
        anchors = self.settings.anchors.per_location
        head = ProposalHead(head_dim, head_layers, len(self.lateral), anchors, activation)
        self.proposals = ProposalNetwork(head, self.settings)
        self.regions = RegionBranches(
            num_classes, head_dim, head_layers, fc_dim, activation, self.settings
        )

    def forward(
        self, images: Tensor, targets: list[Target] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Compute losses in training, detections with masks in evaluation.

        Args:
            images: [N, 3, H, W], normalised.
            targets: for training, one dict an image: `boxes` [M, 4] in input pixels, `labels`
                int64 [M] from 0, `masks` bool [M, H, W] and, if any is, `iscrowd` bool [M].

        Returns:
            In training `objectness` and `proposal`, the losses of the proposal network, and
            `classification`, `box` and `mask`. In evaluation one dict an image: `boxes` [K, 4]
            in input pixels, `scores` [K] falling, `labels` int64 [K], `masks` [K, 28, 28], the
            probability of the object over its box.

        Raises:
            ValueError: training without targets.
            UserError: training on a single image so small that P7 has one position.
            TrainingError: the outputs are not finite.
        """
        size = (images.shape[-2], images.shape[-1])
        shifted = None
        if self.training:
            if targets is None:
                raise ValueError("targets are needed in training")
            check_batch(images, max(self.backbone.feature_dims))
            shifted = [_shift_labels(target) for target in targets]
        features = self.features(images)
        listed = ImageList(images, [size] * len(images))
        proposals, losses = self.proposals(listed, features, shifted)
        if shifted is None:
            return self.regions.detections(features, proposals, size)
        return {
            "objectness": losses["loss_objectness"],
            "proposal": losses["loss_rpn_box_reg"],
            **self.regions.losses(features, proposals, shifted),
        }

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """The backbone's outputs at the dimension of the branches, by level."""
        outputs = self.backbone(images)
        return {level: lateral(outputs[int(level)]) for level, lateral in self.lateral.items()}

    def network(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run every layer on a fixed number of regions, each the whole image on P3.

        Those are 1000 proposals and 100 detections an image, P and K below: so the cost columns
        of Table 6 fit.

        Args:
            images: [N, 3, H, W], normalised.

        Returns:
            Objectness [N A, 1] and box codes [N A, 4] of the anchors, class logits [N P, C + 1],
            box codes [N P, 4 (C + 1)], mask logits [N K, C + 1, 28, 28].
        """
        features = self.features(images)
        level = str(min(OUTPUT_LEVELS))
        finest = {level: features[level]}  # one level: no choice that depends on data
        objectness, codes = self.proposals.head(list(features.values()))
        whole = images.new_tensor([[0, 0, images.shape[-1], images.shape[-2]]])
        boxes, masks = (
            [whole.expand(count, -1)] * len(images)
            for count in (self.settings.proposals[1], self.settings.detections)
        )
        return (
            *concat_box_prediction_layers(objectness, codes),
            *self.regions.boxes(finest, boxes),
            self.regions.masks(finest, masks),
        )


def _shift_labels(target: Target) -> Target:
    """A target as torchvision has it: labels from 1, and -1 for crowd regions."""
    labels = torch.where(crowds(target), NOT_SAMPLED, target["labels"] + 1)
    return {"boxes": target["boxes"], "labels": labels, "masks": target["masks"]}
