"""Mask R-CNN with separable branches on any backbone with outputs P3 to P7 (section 4.1).

The branches are those of the authors' code. The algorithm is torchvision's; added here is what it
lacks: crowd regions that are ignored, batches in which nothing is sampled, exact strides, and
float32 where the layers run in a lower precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

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
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from effspinenet_lib.models.anchors import (
    BOX_CODE,
    IGNORED,
    AnchorSettings,
    make_anchors,
    match_anchors,
)
from effspinenet_lib.models.base import Extents, Target, TaskModel, check_finite, crowds
from effspinenet_lib.models.layers import (
    NORM_EPSILON,
    NORM_MOMENTUM,
    PyramidBackbone,
    SeparableConv,
    conv_norm,
    initialise,
    initialise_head,
    make_activation,
    make_norm,
    separable_block,
)
from effspinenet_lib.models.specs import OUTPUT_LEVELS

# Labels inside this module, as torchvision has them: objects from 1.
BACKGROUND = 0
NOT_SAMPLED = -1  # of an anchor or a region; of an object: it is a crowd region
UPSAMPLING = 2  # Mask R-CNN: masks have twice the side of what is pooled for them
# The authors' code: standard deviations that the box branch's last layers start from.
CLASS_STD, BOX_STD = 0.01, 0.001
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
    """A separable convolution shared over the levels, a norm for each, separable 1x1 predictions.

    One convolution whatever the scale (the authors' code; its setting of two has no effect).
    """

    def __init__(self, dim: int, levels: int, anchors: int, activation: str) -> None:
        super().__init__()
        self.conv = SeparableConv(dim, dim, bias=True)
        self.norms = nn.ModuleList(make_norm(dim) for _ in range(levels))
        self.activation = make_activation(activation)
        self.objectness = SeparableConv(dim, anchors, bias=True, kernel=1)
        self.codes = SeparableConv(dim, BOX_CODE * anchors, bias=True, kernel=1)
        initialise_head(self)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Map [N, dim, H, W] of each level to [N, anchors, H, W] and [N, 4 anchors, H, W]."""
        shared = [
            self.activation(norm(self.conv(f)))
            for norm, f in zip(self.norms, features, strict=True)
        ]
        return [self.objectness(f).float() for f in shared], [self.codes(f).float() for f in shared]


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
        phases = ("training", "testing")
        super().__init__(
            _Anchors(settings.anchors),
            head,
            settings.anchors.match_iou,
            settings.background_iou,
            settings.anchor_samples,
            settings.anchor_positives,
            dict(zip(phases, settings.candidates, strict=True)),
            dict(zip(phases, settings.proposals, strict=True)),
            settings.proposal_nms_iou,
        )
        self.settings = settings.anchors

    def filter_proposals(
        self, proposals: Tensor, objectness: Tensor, *rest: list
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Choose the best proposals of each image; in evaluation they must be finite."""
        if not self.training:
            check_finite(proposals, objectness)
        return super().filter_proposals(proposals, objectness, *rest)

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
            crowd = target["boxes"][target["labels"] == NOT_SAMPLED]
            label[(label == BACKGROUND) & _in_crowd(anchor, crowd, self.settings)] = NOT_SAMPLED
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
            *chain.from_iterable(separable_block(dim, activation) for _ in range(layers)),
            nn.Flatten(),
            nn.Linear(dim * settings.box_side**2, fc_dim),
            nn.Unflatten(1, (fc_dim, 1, 1)),
            _RegionNorm(fc_dim, eps=NORM_EPSILON, momentum=NORM_MOMENTUM),
            make_activation(activation),
        )
        transposed = nn.ConvTranspose2d(dim, dim, UPSAMPLING, UPSAMPLING)
        mask_head = nn.Sequential(
            *chain.from_iterable(separable_block(dim, activation) for _ in range(layers)),
            transposed,
            make_norm(dim),
            make_activation(activation),
        )
        super().__init__(
            _PyramidAlign(settings.box_side, settings),
            box_head,
            FastRCNNPredictor(fc_dim, classes + 1),
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
            SeparableConv(dim, classes + 1, bias=True, kernel=1),
        )
        self.settings = settings.anchors
        initialise(transposed)  # its bias
        nn.init.kaiming_normal_(transposed.weight, mode="fan_out", nonlinearity="relu")
        initialise_head(self)
        nn.init.normal_(self.box_predictor.cls_score.weight, std=CLASS_STD)
        nn.init.normal_(self.box_predictor.bbox_pred.weight, std=BOX_STD)

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
        self, features: dict[str, Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Decode each image's proposals [.., 4]; the masks come from the boxes detected."""
        logits, codes = self.boxes(features, proposals)
        check_finite(logits, codes)
        found = self.postprocess_detections(logits, codes, proposals, sizes)
        boxes, _, labels = found
        masks = maskrcnn_inference(self.masks(features, boxes), labels)
        return [
            {"boxes": box, "scores": score, "labels": label - 1, "masks": mask.squeeze(1)}
            for box, score, label, mask in zip(*found, masks, strict=True)
        ]


def _in_crowd(boxes: Tensor, crowd: Tensor, settings: AnchorSettings) -> Tensor:
    """Which boxes [B, 4] lie in crowd regions [M, 4], by the rule of the detection task."""
    everything = torch.ones(len(crowd), dtype=torch.bool, device=crowd.device)
    return match_anchors(boxes, crowd, everything, settings) == IGNORED


class MaskRCNN(TaskModel):
    """A two-stage detector with masks.

    The shapes of a training step depend on the data (torchvision's proposals and samples), so a
    compiler that builds a program for every shape builds one at every step: not for a TPU.

    Args:
        backbone: computes the outputs P3 to P7.
        num_classes: classes, without background.
        head_dim: channels of the branches (Table 2).
        head_layers: separable convolutions a branch (Table 2).
        fc_dim: width of the fully connected layer of the box branch (section 4.1).
        activation: `swish` or `relu`.
    """

    def __init__(
        self,
        backbone: PyramidBackbone,
        num_classes: int,
        head_dim: int,
        head_layers: int,
        fc_dim: int,
        activation: str = "swish",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.settings = InstanceSettings()
        self.lateral = nn.ModuleDict(
            {
                str(level): conv_norm(dim, head_dim, activation=activation)
                for level, dim in backbone.feature_dims.items()
            }
        )
        initialise(self.lateral)
        anchors = self.settings.anchors.per_location
        head = ProposalHead(head_dim, len(self.lateral), anchors, activation)
        self.proposals = ProposalNetwork(head, self.settings)
        self.regions = RegionBranches(
            num_classes, head_dim, head_layers, fc_dim, activation, self.settings
        )

    def training_losses(self, images: Tensor, targets: list[Target]) -> dict[str, Tensor]:
        """Losses of the proposal network and of the regions.

        Returns:
            `objectness` and `proposal`; `classification`, `box` and `mask`.
        """
        shifted = [_shift_labels(target) for target in targets]
        features = self.features(images)
        proposals, losses = self.proposals(_listed(images), features, shifted)
        return {
            "objectness": losses["loss_objectness"],
            "proposal": losses["loss_rpn_box_reg"],
            **self.regions.losses(features, proposals, shifted),
        }

    def predict(self, images: Tensor, extents: Extents | None = None) -> list[dict[str, Tensor]]:
        """Detections with masks."""
        features, listed = self.features(images), _listed(images)
        if extents is not None:
            listed = ImageList(images, list(extents))
        proposals, _ = self.proposals(listed, features, None)
        return self.regions.detections(features, proposals, listed.image_sizes)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """The backbone's outputs at the dimension of the branches, by level."""
        outputs = self.backbone(images)
        return {level: lateral(outputs[int(level)]) for level, lateral in self.lateral.items()}

    def network(self, images: Tensor) -> tuple[Tensor, ...]:
        """Run every layer on a fixed number of regions, each the whole image on P3.

        Those are 1000 proposals and 100 detections an image, P and K below (the authors' code).

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


def _listed(images: Tensor) -> ImageList:
    return ImageList(images, [(images.shape[-2], images.shape[-1])] * len(images))


def _shift_labels(target: Target) -> Target:
    """A target as torchvision has it: labels from 1, and -1 for crowd regions."""
    labels = torch.where(crowds(target), NOT_SAMPLED, target["labels"] + 1)
    return {"boxes": target["boxes"], "labels": labels, "masks": target["masks"]}
