"""The parts of Mask R-CNN: proposals, and what is computed from each region.

torchvision has the algorithm. Here are the branches of section 4.1, and what torchvision lacks:
crowd regions that are ignored, batches in which nothing is sampled, and numbers in float32 where
the layers run in a lower precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_inference,
    maskrcnn_loss,
)
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from effspinenet_lib.models.anchors import IGNORED, AnchorSettings, make_anchors, match_anchors
from effspinenet_lib.models.base import Target, check_finite
from effspinenet_lib.models.layers import (
    NORM_EPSILON,
    NORM_MOMENTUM,
    SeparableConv,
    initialise,
    make_activation,
    make_norm,
)
from effspinenet_lib.models.retinanet import BOX_CODE, RetinaHead
from effspinenet_lib.models.specs import OUTPUT_LEVELS

# Labels inside this module, as torchvision has them: objects from 1.
BACKGROUND = 0
NOT_SAMPLED = -1  # of an anchor or a region; of an object: it is a crowd region
UPSAMPLING = 2  # Mask R-CNN: masks have twice the side of what is pooled for them
# Released code: deviations of the normal distributions that the box branch's last layers start
# from.
CLASS_STD = 0.01
BOX_STD = 0.001
# torchvision's crops of masks take pixel i to lie at i, not at i + 0.5. Pasted back exactly, such
# crops of discs 10 to 26 pixels wide give back 92 % of them (IoU); with this correction, all.
HALF_PIXEL = 0.5
# Released: one size of 3 strides a level and 3 ratios, positive from an IoU of 0.7. (The 8 strides
# of feature pyramids belong to one that starts at P2.)
PROPOSAL_ANCHORS = AnchorSettings(octave_scales=1, match_iou=0.7)


@dataclass(frozen=True)
class InstanceSettings:
    """Anchors, sampling, pooling and post-processing.

    "Released" is the SpineNet authors' code and its Mask R-CNN configuration for SpineNet-49.
    The losses are torchvision's.

    Attributes:
        anchors: sizes and ratios, and when one is positive (released).
        background_iou: an anchor below is negative (released).
        anchor_samples: anchors an image in the proposal losses (released).
        anchor_positives: their largest share of positives (released).
        candidates: boxes a level that enter the suppression: training, evaluation (released).
        proposals: boxes an image that leave it: training, evaluation (released).
        proposal_nms_iou: suppression among the proposals of a level (released).
        region_iou: a proposal of at least this IoU is positive, else negative (released).
        region_samples: proposals an image in the other losses (released).
        region_positives: their largest share of positives (released).
        box_weights: factors on the box code (released code and torchvision).
        box_side: what is pooled for the box branch (section 4.1 has Mask R-CNN's: 7).
        mask_side: what is pooled for the mask branch (Mask R-CNN: 14).
        points: samples a cell and direction in pooling (released; torchvision has 2, which
            costs four times as much and a third of a training step).
        canonical: a region of this side in pixels is pooled from this level (Equation 1 of the
            feature pyramid's paper; released).
        score_threshold: detections below are dropped (torchvision; Model Garden).
        nms_iou: class-wise suppression (released).
        detections: boxes an image that leave it (COCO's limit; released).
    """

    anchors: AnchorSettings = PROPOSAL_ANCHORS
    background_iou: float = 0.3
    anchor_samples: int = 256
    anchor_positives: float = 0.5
    candidates: tuple[int, int] = (2000, 1000)
    proposals: tuple[int, int] = (1000, 1000)
    proposal_nms_iou: float = 0.7
    region_iou: float = 0.5
    region_samples: int = 512
    region_positives: float = 0.25
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    box_side: int = 7
    mask_side: int = 14
    points: int = 1
    canonical: tuple[int, int] = (224, 4)
    score_threshold: float = 0.05
    nms_iou: float = 0.5
    detections: int = 100


class ProposalHead(nn.Module):
    """RetinaNet's branch with 5 numbers an anchor: objectness and box code."""

    def __init__(self, dim: int, layers: int, levels: int, anchors: int, activation: str) -> None:
        super().__init__()
        self.anchors = anchors
        self.branch = RetinaHead(dim, layers, anchors * (1 + BOX_CODE), levels, activation)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Map [N, dim, H, W] of each level to [N, anchors, H, W] and [N, 4 anchors, H, W]."""
        predictions = [self.branch(f, level).float() for level, f in enumerate(features)]
        widths = [self.anchors, BOX_CODE * self.anchors]
        objectness, codes = zip(*(p.split(widths, 1) for p in predictions), strict=True)
        return list(objectness), list(codes)


class _Anchors(nn.Module):
    """The library's anchors under torchvision's interface.

    torchvision's own lie on the cells' corners and have wrong strides where the side of an image
    is no multiple of 128.
    """

    def __init__(self, settings: AnchorSettings) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, images: ImageList, features: list[Tensor]) -> list[Tensor]:
        sides = [(f.shape[-2], f.shape[-1]) for f in features]
        anchors = make_anchors(sides, self.settings, features[0].device)
        return [anchors] * len(images.image_sizes)


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's region proposal network; anchors in crowd regions are not sampled."""

    def __init__(self, head: ProposalHead, settings: InstanceSettings) -> None:
        super().__init__(
            _Anchors(settings.anchors),
            head,
            settings.anchors.match_iou,
            settings.background_iou,
            settings.anchor_samples,
            settings.anchor_positives,
            dict(zip(("training", "testing"), settings.candidates, strict=True)),
            dict(zip(("training", "testing"), settings.proposals, strict=True)),
            settings.proposal_nms_iou,
        )
        self.settings = settings.anchors

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        sizes: list[tuple[int, int]],
        anchors: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Choose the best proposals of each image, and their scores.

        Raises:
            TrainingError: the outputs are not finite, in evaluation.
        """
        if not self.training:
            check_finite(proposals, objectness)
        return super().filter_proposals(proposals, objectness, sizes, anchors)

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Label the anchors [A] of each image: 1 positive, 0 negative, -1 neither.

        Returns:
            The labels, and the box [A, 4] that each anchor is matched to.
        """
        objects = [{"boxes": t["boxes"][t["labels"] != NOT_SAMPLED]} for t in targets]
        labels, boxes = super().assign_targets_to_anchors(anchors, objects)
        for label, anchor, target in zip(labels, anchors, targets, strict=True):
            crowds = target["boxes"][target["labels"] == NOT_SAMPLED]
            label[(label == BACKGROUND) & _in_crowd(anchor, crowds, self.settings)] = NOT_SAMPLED
        return labels, boxes

    def compute_loss(
        self, objectness: Tensor, codes: Tensor, labels: list[Tensor], targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Losses of objectness and boxes; 0 where crowds leave no anchor to sample."""
        if not any((label != NOT_SAMPLED).any() for label in labels):
            return objectness.sum() * 0, codes.sum() * 0
        return super().compute_loss(objectness, codes, labels, targets)


class _PyramidAlign(MultiScaleRoIAlign):
    """RoIAlign on P3 to P7 with the levels' true strides, whatever the size of the image.

    torchvision's infers strides from its first batch, wrongly for small images.
    """

    def __init__(self, side: int, settings: InstanceSettings) -> None:
        scale, level = settings.canonical
        super().__init__([str(number) for number in OUTPUT_LEVELS], side, settings.points)
        self.scales = [2.0**-number for number in OUTPUT_LEVELS]
        self.map_levels = LevelMapper(min(OUTPUT_LEVELS), max(OUTPUT_LEVELS), scale, level)


class _RegionNorm(nn.BatchNorm2d):
    """The library's norm; a single region has no variance and takes the moving statistics."""

    def forward(self, features: Tensor) -> Tensor:
        if len(features) != 1:
            return super().forward(features)
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(features, mean, variance, self.weight, self.bias, eps=self.eps)


class RegionBranches(RoIHeads):
    """The box and the mask branch, on torchvision's matching, sampling and post-processing.

    Proposals in crowd regions are not sampled.

    Args:
        classes: classes, without background.
        dim: channels of the features and of the branches.
        layers: separable convolutions a branch.
        fc_dim: width of the fully connected layer of the box branch, which has a norm (released).
        activation: `swish` or `relu`.
        settings: sampling, pooling and post-processing.
    """

    def __init__(
        self,
        classes: int,
        dim: int,
        layers: int,
        fc_dim: int,
        activation: str,
        settings: InstanceSettings,
    ) -> None:
        box_head = nn.Sequential(
            *_separable_convs(dim, layers, activation),
            nn.Flatten(),
            nn.Linear(dim * settings.box_side**2, fc_dim, bias=False),
            nn.Unflatten(1, (fc_dim, 1, 1)),
            _RegionNorm(fc_dim, eps=NORM_EPSILON, momentum=NORM_MOMENTUM),
            make_activation(activation),
        )
        mask_head = nn.Sequential(
            *_separable_convs(dim, layers, activation),
            nn.ConvTranspose2d(dim, dim, UPSAMPLING, UPSAMPLING, bias=False),
            make_norm(dim),
            make_activation(activation),
        )
        box_predictor = FastRCNNPredictor(fc_dim, classes + 1)
        for layer, std in (
            (box_predictor.cls_score, CLASS_STD),
            (box_predictor.bbox_pred, BOX_STD),
        ):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        super().__init__(
            _PyramidAlign(settings.box_side, settings),
            box_head,
            box_predictor,
            settings.region_iou,
            settings.region_iou,
            settings.region_samples,
            settings.region_positives,
            settings.box_weights,
            settings.score_threshold,
            settings.nms_iou,
            settings.detections,
            _PyramidAlign(settings.mask_side, settings),
            mask_head,
            nn.Conv2d(dim, classes + 1, 1),
        )
        self.settings = settings.anchors
        initialise(self)

    def boxes(self, features: dict[str, Tensor], regions: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits [R, C + 1] and box codes [R, 4 (C + 1)] of regions [.., 4] by image."""
        pooled = self.box_head(self.box_roi_pool(features, regions, []))
        logits, codes = self.box_predictor(pooled)
        return logits.float(), codes.float()

    def masks(self, features: dict[str, Tensor], regions: list[Tensor]) -> Tensor:
        """Mask logits [R, C + 1, 28, 28] of regions [.., 4] by image."""
        pooled = self.mask_head(self.mask_roi_pool(features, regions, []))
        return self.mask_predictor(pooled).float()

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], boxes: list[Tensor], labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Match the regions of each image to its objects.

        Returns:
            The index of the object, and its label, 0 for background, -1 for regions not to be
            sampled.
        """
        matches, assigned = [], []
        for regions, box, label in zip(proposals, boxes, labels, strict=True):
            crowd = label == NOT_SAMPLED
            (match,), (given,) = super().assign_targets_to_proposals(
                [regions], [box[~crowd]], [label[~crowd]]
            )
            if not crowd.all():
                match = torch.nonzero(~crowd).squeeze(1)[match]
            hidden = _in_crowd(regions, box[crowd], self.settings)
            given[(given == BACKGROUND) & hidden] = NOT_SAMPLED
            matches.append(match)
            assigned.append(given)
        return matches, assigned

    def losses(
        self, features: dict[str, Tensor], proposals: list[Tensor], targets: list[Target]
    ) -> dict[str, Tensor]:
        """Sample regions and compute the losses of classes, boxes and masks.

        They are 0 where there is nothing to sample: no region outside of crowds, no object.
        """
        regions, matches, labels, codes = self.select_training_samples(proposals, targets)
        logits, predicted = self.boxes(features, regions)
        if len(logits):
            classification, box = fastrcnn_loss(logits, predicted, labels, codes)
        else:
            classification, box = logits.sum() * 0, predicted.sum() * 0
        positive = [label > BACKGROUND for label in labels]
        regions = [r[p] for r, p in zip(regions, positive, strict=True)]
        mask = maskrcnn_loss(
            self.masks(features, regions),
            [r - HALF_PIXEL for r in regions],
            [target["masks"] for target in targets],
            [target["labels"] for target in targets],
            [m[p] for m, p in zip(matches, positive, strict=True)],
        )
        return {"classification": classification, "box": box, "mask": mask}

    def detections(
        self, features: dict[str, Tensor], proposals: list[Tensor], size: tuple[int, int]
    ) -> list[dict[str, Tensor]]:
        """Decode each image's proposals [.., 4]; the masks come from the boxes detected."""
        logits, codes = self.boxes(features, proposals)
        check_finite(logits, codes)
        found = self.postprocess_detections(logits, codes, proposals, [size] * len(proposals))
        boxes, _, labels = found
        masks = maskrcnn_inference(self.masks(features, boxes), labels)
        return [
            {"boxes": box, "scores": score, "labels": label - 1, "masks": mask.squeeze(1)}
            for box, score, label, mask in zip(*found, masks, strict=True)
        ]


def _separable_convs(dim: int, layers: int, activation: str) -> list[nn.Module]:
    """The 3x3 convolutions of a branch, each with its norm and activation."""
    return [
        module
        for _ in range(layers)
        for module in (
            SeparableConv(dim, dim, bias=False),
            make_norm(dim),
            make_activation(activation),
        )
    ]


def _in_crowd(boxes: Tensor, crowds: Tensor, settings: AnchorSettings) -> Tensor:
    """Which boxes [B, 4] lie in crowd regions [M, 4], by the rule of the detection task."""
    everything = torch.ones(len(crowds), dtype=torch.bool, device=crowds.device)
    return match_anchors(boxes, crowds, everything, settings) == IGNORED
