"""RetinaNet with separable heads shared over the levels (section 4.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, clip_boxes_to_image, nms

from effspinenet_lib.models.anchors import (
    NEGATIVE,
    AnchorSettings,
    assign_anchors,
    decode_boxes,
    encode_boxes,
    make_anchors,
    match_anchors,
)
from effspinenet_lib.models.base import Target, crowds
from effspinenet_lib.models.focal import focal_loss_sum
from effspinenet_lib.models.layers import (
    PyramidBackbone,
    SeparableConv,
    conv_norm,
    dense_conv,
    initialise,
    make_activation,
    make_norm,
)
from effspinenet_lib.models.one_stage import OneStageDetector
from effspinenet_lib.models.specs import level_side
from effspinenet_lib.native import norm_activation

BOX_CODE = 4
# RetinaNet: a location starts with this probability of holding an object, and the last layer's
# weights from a normal of this deviation. The other head layers start by variance scaling, as in
# EfficientDet's separable heads: RetinaNet's 0.01 leaves the gradients of separable ones tiny.
PRIOR_PROBABILITY = 0.01
PREDICTOR_STD = 0.01


@dataclass(frozen=True)
class DetectionSettings:
    """Losses and post-processing.

    Attributes:
        focal_alpha: weight of the positives (released config; RetinaNet's).
        focal_gamma: 1.5 in the released SpineNet configs; RetinaNet's paper has 2.
        huber_delta: in box-code units (released config).
        box_loss_weight: factor on the box loss (released config).
        score_threshold: detections below are dropped (released config).
        nms_iou: class-wise non-maximum suppression (released config).
        candidates: boxes an image that enter the suppression (released config).
        detections: boxes an image that leave it (COCO's limit; released config).
        candidates_by_class: `candidates` counts each class for itself (released code), else all
            classes of an image together.
    """

    focal_alpha: float = 0.25
    focal_gamma: float = 1.5
    huber_delta: float = 0.1
    box_loss_weight: float = 50.0
    score_threshold: float = 0.05
    nms_iou: float = 0.5
    candidates: int = 5000
    detections: int = 100
    candidates_by_class: bool = False


class RetinaHead(nn.Module):
    """One branch: convolutions shared over the levels, a norm for each level.

    With separable convolutions the prediction layer is separable too (recovered from the cost
    columns). With `biased` the convolutions before the norms have biases (released code).
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        outputs: int,
        levels: int,
        activation: str,
        separable: bool = True,
        biased: bool = False,
    ) -> None:
        super().__init__()
        conv = SeparableConv if separable else dense_conv
        self.convs = nn.ModuleList(conv(dim, dim, bias=biased) for _ in range(layers))
        self.layers = layers
        self.norms = nn.ModuleList(make_norm(dim) for _ in range(levels * layers))
        self.activation = make_activation(activation)
        self.predict = conv(dim, outputs, bias=True)
        initialise(self)
        nn.init.normal_(self.last_conv.weight, std=PREDICTOR_STD)

    @property
    def last_conv(self) -> nn.Conv2d:
        """The convolution that gives the outputs."""
        predict = self.predict
        return predict.pointwise if isinstance(predict, SeparableConv) else predict

    def forward(self, features: Tensor, level: int) -> Tensor:
        """Map [N, dim, H, W] of the level-th output to [N, outputs, H, W]."""
        for layer, conv in enumerate(self.convs):
            norm = self.norms[level * self.layers + layer]
            features = norm_activation(norm, self.activation, conv(features))
        return self.predict(features)


class RetinaNet(OneStageDetector):
    """A one-stage detector on any backbone with outputs P3 to P7.

    Args:
        backbone: computes the outputs P3 to P7.
        num_classes: classes, without background. The cost columns of the paper fit 90, COCO's
            highest category id.
        head_dim: channels of the heads (Table 2).
        head_layers: separable convolutions a branch (Table 2).
        activation: `swish` or `relu`.
        anchors: sizes, ratios and matching.
        settings: losses and post-processing.
        separable: separable convolutions in the heads, or dense ones (RetinaNet's, SpineNet's).
        project: bring every level to `head_dim` by a 1x1 convolution, norm and activation; else
            the backbone's features have this dimension already, as those of a feature pyramid.
        released: as the released code: biases before the heads' norms, and logits of a class 0,
            the background, that learns to be absent and is left out of the detections. The logits
            are [N, A, 1 + num_classes] then; labels count from 0 without it, as ever.
    """

    def __init__(
        self,
        backbone: PyramidBackbone,
        num_classes: int,
        head_dim: int,
        head_layers: int,
        activation: str = "swish",
        anchors: AnchorSettings | None = None,
        settings: DetectionSettings | None = None,
        separable: bool = True,
        project: bool = True,
        released: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.first_class = int(released)
        self.anchor_settings = anchors or AnchorSettings()
        self.settings = settings or DetectionSettings()
        dims = backbone.feature_dims
        if not project and set(dims.values()) != {head_dim}:
            raise ValueError(f"unprojected features of {dims} do not fit heads of {head_dim}")
        self.lateral = nn.ModuleList(
            conv_norm(dim, head_dim, activation=activation) if project else nn.Identity()
            for dim in dims.values()
        )
        initialise(self.lateral)
        count = self.anchor_settings.per_location
        settled = (len(dims), activation, separable, released)
        self.logits = self.first_class + num_classes
        self.class_head = RetinaHead(head_dim, head_layers, count * self.logits, *settled)
        self.box_head = RetinaHead(head_dim, head_layers, count * BOX_CODE, *settled)
        class_bias = self.class_head.last_conv.bias
        assert class_bias is not None
        nn.init.constant_(class_bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        self._anchors: dict[tuple[tuple[int, int], ...], Tensor] = {}

    def network(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the network: class logits [N, A, C], box codes [N, A, 4], anchors [A, 4].

        C is the number of classes, and one more, the first, where there is a background class.
        """
        features = list(self.backbone(images).values())
        logits, codes = [], []
        for level, (lateral, feature) in enumerate(zip(self.lateral, features, strict=True)):
            projected = lateral(feature)
            logits.append(_by_anchor(self.class_head(projected, level), self.logits))
            codes.append(_by_anchor(self.box_head(projected, level), BOX_CODE))
        sides = tuple((f.shape[-2], f.shape[-1]) for f in features)
        return torch.cat(logits, 1), torch.cat(codes, 1), self.anchors(sides, images.device)

    def scores(self, logits: Tensor) -> Tensor:
        """Probabilities [N, A, C], each class for itself."""
        return logits.sigmoid()

    def anchors(self, sides: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
        """Anchors [A, 4] for features of these sides; made once for each size."""
        if sides not in self._anchors or self._anchors[sides].device != device:
            self._anchors[sides] = make_anchors(sides, self.anchor_settings, device)
        return self._anchors[sides]

    def loss_count(self, images: Tensor, targets: list[Target]) -> Tensor:
        """Positive anchors of the batch."""
        size = (images.shape[-2], images.shape[-1])
        sides = tuple(
            (level_side(size[0], level), level_side(size[1], level))
            for level in self.backbone.feature_dims
        )
        anchors = self.anchors(sides, images.device)
        matches = [
            match_anchors(anchors, t["boxes"], crowds(t), self.anchor_settings) for t in targets
        ]
        return (torch.stack(matches) >= 0).sum()

    def loss_divisor(self, count: Tensor) -> Tensor:
        """The positives plus one, as in the released code."""
        return count + 1

    def losses(
        self, logits: Tensor, codes: Tensor, anchors: Tensor, targets: list[Target]
    ) -> dict[str, Tensor]:
        """Focal and Huber loss over the batch, divided by its positives plus one.

        The normalisation is the released code's. No shape depends on values.
        """
        settings = self.settings
        assigned = assign_anchors(anchors, targets, self.anchor_settings)
        positive = assigned.positive
        focal = focal_loss_sum(
            logits,
            (assigned.labels + self.first_class).where(positive, NEGATIVE),
            ~assigned.ignored,
            settings.focal_alpha,
            settings.focal_gamma,
        )
        wanted = encode_boxes(assigned.boxes, anchors)
        huber = F.huber_loss(
            codes.float().where(positive[..., None], wanted),
            wanted,
            reduction="sum",
            delta=settings.huber_delta,
        )
        normaliser = positive.sum() + 1
        return {
            "classification": focal / normaliser,
            "box": settings.box_loss_weight * huber / BOX_CODE / normaliser,
        }

    def detections(
        self, scores: Tensor, codes: Tensor, anchors: Tensor, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Decode one image: scores [A, C] and codes [A, 4] to at most 100 boxes."""
        settings = self.settings
        scores = scores[:, self.first_class :]
        if settings.candidates_by_class:
            return self._detections_by_class(scores, codes, anchors, size)
        confident = torch.nonzero(scores.flatten() > settings.score_threshold).squeeze(1)
        values = scores.flatten()[confident]
        values, order = values.topk(min(settings.candidates, len(values)))
        confident = confident[order]
        anchor = confident.div(scores.shape[1], rounding_mode="floor")
        labels = confident % scores.shape[1]
        boxes = clip_boxes_to_image(decode_boxes(codes[anchor], anchors[anchor]), size)
        kept = batched_nms(boxes, values, labels, settings.nms_iou)[: settings.detections]
        return {"boxes": boxes[kept], "scores": values[kept], "labels": labels[kept]}

    def _detections_by_class(
        self, scores: Tensor, codes: Tensor, anchors: Tensor, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Decode one image as the released code does, ties and boxes of no extent included.

        Equal scores stand in order of class, then anchor. A box that clipping leaves in the
        corner at 0, 0 alone is dropped. The boxes of the classes are moved apart in float64,
        where that changes no overlap.
        """
        settings = self.settings
        by_class = scores.T.contiguous()
        values, anchor = by_class.sort(dim=1, descending=True, stable=True)
        values, anchor = values[:, : settings.candidates], anchor[:, : settings.candidates]
        labels, rank = torch.nonzero(values > settings.score_threshold, as_tuple=True)
        values, anchor = values[labels, rank], anchor[labels, rank]
        boxes = clip_boxes_to_image(decode_boxes(codes[anchor], anchors[anchor]), size)
        extended = (boxes > 0).any(1)
        values, labels, boxes = values[extended], labels[extended], boxes[extended]
        apart = boxes.double() + (labels * 2 * max(size))[:, None]
        kept = nms(apart, values.double(), settings.nms_iou)[: settings.detections]
        return {"boxes": boxes[kept], "scores": values[kept], "labels": labels[kept]}


def _by_anchor(prediction: Tensor, width: int) -> Tensor:
    """Reorder [N, K * width, H, W] to [N, H * W * K, width], as the anchors are ordered."""
    batch = prediction.shape[0]
    return prediction.permute(0, 2, 3, 1).reshape(batch, -1, width)
