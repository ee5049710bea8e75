"""RetinaNet: one-stage detection with heads shared over the levels (section 4.1)."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms

from effspinenet_lib.models.anchors import (
    ANCHOR_SIZE,
    BOX_CODE,
    NEGATIVE,
    AnchorSettings,
    Assignment,
    BoxScale,
    assign_anchors,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    inside,
    make_anchors,
    match_anchors,
)
from effspinenet_lib.models.base import Extents, Target, TaskModel, check_finite, crowds
from effspinenet_lib.models.layers import (
    PyramidBackbone,
    SeparableConv,
    conv_norm,
    dense_conv,
    initialise,
    initialise_head,
    make_activation,
    make_norm,
)
from effspinenet_lib.models.specs import level_side

PRIOR_PROBABILITY = 0.01  # RetinaNet: a location starts with this probability of an object
# Standard deviations that dense heads start from (the authors' code).
DENSE_STD, DENSE_PREDICTOR_STD = 0.01, 1e-5

Sides = tuple[tuple[int, int], ...]  # (height, width) of each level's features


@dataclass(frozen=True)
class OneStageSettings:
    """How scores and box codes become detections.

    Attributes:
        score_threshold: detections below are dropped.
        nms_iou: class-wise non-maximum suppression.
        candidates: boxes that enter the suppression, the best of an image or of each class.
        candidates_by_class: which of the two. Equal scores are in order of class, then anchor.
        detections: boxes an image that leave it (COCO's limit).
        box_scale: factors on the box codes.
    """

    score_threshold: float
    nms_iou: float
    candidates: int
    candidates_by_class: bool
    detections: int = 100
    box_scale: BoxScale = (1.0, 1.0)


@dataclass(frozen=True)
class DetectionSettings(OneStageSettings):
    """RetinaNet's losses and post-processing, as in the released SpineNet configs.

    Attributes:
        candidates_by_class: as in the Model Garden, for the released models.
        focal_alpha: weight of the positives (RetinaNet's too).
        focal_gamma: RetinaNet's paper has 2.
        huber_delta: in box-code units.
        box_loss_weight: factor on the box loss.
    """

    score_threshold: float = 0.05
    nms_iou: float = 0.5
    candidates: int = 5000
    candidates_by_class: bool = False
    focal_alpha: float = 0.25
    focal_gamma: float = 1.5
    huber_delta: float = 0.1
    box_loss_weight: float = 50.0


class OneStageDetector(TaskModel):
    """A network that gives each anchor class logits and a box code.

    Attributes:
        backbone: computes the features by level.
        matching: when an anchor belongs to an object.
        settings: post-processing.
    """

    backbone: PyramidBackbone
    matching: AnchorSettings
    settings: OneStageSettings

    @abstractmethod
    def network(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the network: class logits [N, A, C], box codes [N, A, 4], anchors [A, 4]."""

    @abstractmethod
    def anchors(self, images: Tensor, sides: Sides) -> Tensor:
        """Anchors [A, 4] for images whose features have these sides, on the images' device."""

    @abstractmethod
    def class_loss(self, logits: Tensor, assigned: Assignment) -> Tensor:
        """The loss of the logits [N, A, C], a sum over the batch."""

    @abstractmethod
    def box_loss(self, codes: Tensor, wanted: Tensor) -> Tensor:
        """The loss of the box codes [N, A, 4], a sum over the batch."""

    @abstractmethod
    def scores(self, logits: Tensor) -> Tensor:
        """Map logits [N, A, C] to probabilities, without those of a background."""

    def training_losses(self, images: Tensor, targets: list[Target]) -> dict[str, Tensor]:
        """The losses `classification` and `box`."""
        return self.losses(*self.network(images), targets)

    def losses(
        self, logits: Tensor, codes: Tensor, anchors: Tensor, targets: list[Target]
    ) -> dict[str, Tensor]:
        """The losses of the network's outputs, divided by `loss_divisor` of the positives.

        No shape depends on values.
        """
        assigned = assign_anchors(anchors, targets, self.matching)
        wanted = encode_boxes(assigned.boxes, anchors, self.settings.box_scale)
        found = codes.float().where(assigned.positive[..., None], wanted)
        divisor = self.loss_divisor(assigned.positive.sum())
        return {
            "classification": self.class_loss(logits.float(), assigned) / divisor,
            "box": self.box_loss(found, wanted) / divisor,
        }

    def predict(self, images: Tensor, extents: Extents | None = None) -> list[dict[str, Tensor]]:
        """The detections of finite logits."""
        logits, codes, anchors = self.network(images)
        check_finite(logits)
        scores = self.scores(logits.float())
        if extents is None:
            extents = [(images.shape[-2], images.shape[-1])] * len(images)
        else:
            scores = scores * inside(anchors, extents)[..., None]
        return [
            self.detections(score, code, anchors, size)
            for score, code, size in zip(scores, codes.float(), extents, strict=True)
        ]

    def detections(
        self, scores: Tensor, codes: Tensor, anchors: Tensor, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Decode one image of `size` (height, width): scores [A, C] and codes [A, 4].

        A box that clipping leaves without area is dropped before the limit of detections.
        torchvision moves the boxes of the classes apart to suppress all at once; float64 keeps
        their overlaps.
        """
        settings = self.settings
        best = best_by_class if settings.candidates_by_class else best_of_all
        values, labels, anchor = best(scores, settings.candidates, settings.score_threshold)
        boxes = decode_boxes(codes[anchor], anchors[anchor], settings.box_scale)
        boxes, extended = clip_boxes(boxes, size)
        values, labels, boxes = values[extended], labels[extended], boxes[extended]
        kept = batched_nms(boxes.double(), values.double(), labels, settings.nms_iou)
        kept = kept.sort().values[: settings.detections]  # equal scores in their order
        return {"boxes": boxes[kept], "scores": values[kept], "labels": labels[kept]}

    def loss_count(self, images: Tensor, targets: list[Target]) -> Tensor:
        """Positive anchors of the batch."""
        height, width = images.shape[-2:]
        levels = self.backbone.feature_dims
        sides = tuple((level_side(height, level), level_side(width, level)) for level in levels)
        anchors = self.anchors(images, sides)
        matches = [match_anchors(anchors, t["boxes"], crowds(t), self.matching) for t in targets]
        return (torch.stack(matches) >= 0).sum()


class RetinaHead(nn.Module):
    """One branch: convolutions shared over the levels, a norm for each level.

    As in the authors' code: where the convolutions are separable, the prediction is too.

    Args:
        dim: channels of the features and of the convolutions.
        layers: convolutions before the prediction.
        outputs: channels of the prediction.
        levels: how many levels share the convolutions.
        activation: behind each norm.
        separable: separable convolutions, or dense ones.
        biased: biases before the norms.
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        outputs: int,
        levels: int,
        activation: str,
        separable: bool = True,
        biased: bool = True,
    ) -> None:
        super().__init__()
        conv = SeparableConv if separable else dense_conv
        self.convs = nn.ModuleList(conv(dim, dim, bias=biased) for _ in range(layers))
        self.layers = layers
        self.norms = nn.ModuleList(make_norm(dim) for _ in range(levels * layers))
        self.activation = make_activation(activation)
        self.predict = conv(dim, outputs, bias=True)
        initialise_head(self)
        if not separable:
            for layer in (*self.convs, self.predict):
                std = DENSE_PREDICTOR_STD if layer is self.predict else DENSE_STD
                nn.init.normal_(layer.weight, std=std)

    @property
    def last_conv(self) -> nn.Conv2d:
        """The convolution that gives the outputs."""
        predict = self.predict
        return predict.pointwise if isinstance(predict, SeparableConv) else predict

    def forward(self, features: Tensor, level: int) -> Tensor:
        """Map [N, dim, H, W] of the level-th output to [N, outputs, H, W]."""
        for layer, conv in enumerate(self.convs):
            norm = self.norms[level * self.layers + layer]
            features = self.activation(norm(conv(features)))
        return self.predict(features)


class RetinaNet(OneStageDetector):
    """A one-stage detector on any backbone with outputs from P3 up to P7.

    Args:
        backbone: computes the outputs.
        num_classes: classes, without background.
        head_dim: channels of the heads (Table 2).
        head_layers: convolutions a branch (Table 2).
        activation: `swish` or `relu`.
        anchor_size: side over stride of the smallest square anchor.
        settings: losses and post-processing.
        separable: separable convolutions in the heads, or dense ones (RetinaNet's, SpineNet's).
        project: bring every level to `head_dim` by a 1x1 convolution, norm and activation; else
            the backbone's features must have this dimension, as those of a feature pyramid.
        biased: biases before the heads' norms (the authors' code).
        background: logits of a class 0, the background, that learns to be absent and is left out
            of the detections (the authors' code). The logits are [N, A, 1 + num_classes] then;
            labels still count from 0 without it.
    """

    settings: DetectionSettings

    def __init__(
        self,
        backbone: PyramidBackbone,
        num_classes: int,
        head_dim: int,
        head_layers: int,
        activation: str = "swish",
        anchor_size: float = ANCHOR_SIZE,
        settings: DetectionSettings | None = None,
        separable: bool = True,
        project: bool = True,
        biased: bool = True,
        background: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.head_dim = head_dim
        self.first_class = int(background)
        self.matching = AnchorSettings(anchor_size)
        self.settings = settings or DetectionSettings()
        dims = backbone.feature_dims.values()
        self.lateral = nn.ModuleList(
            conv_norm(dim, head_dim, activation=activation) if project else nn.Identity()
            for dim in dims
        )
        initialise(self.lateral)
        count = self.matching.per_location
        shared = (len(dims), activation, separable, biased)
        self.logits = self.first_class + num_classes
        self.class_head = RetinaHead(head_dim, head_layers, count * self.logits, *shared)
        self.box_head = RetinaHead(head_dim, head_layers, count * BOX_CODE, *shared)
        class_bias = self.class_head.last_conv.bias
        assert class_bias is not None
        nn.init.constant_(class_bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
        self._anchors: dict[Sides, Tensor] = {}

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
        anchors = self.anchors(images, tuple((f.shape[-2], f.shape[-1]) for f in features))
        return torch.cat(logits, 1), torch.cat(codes, 1), anchors

    def scores(self, logits: Tensor) -> Tensor:
        """Probabilities [N, A, classes], each class for itself."""
        return logits[..., self.first_class :].sigmoid()

    def anchors(self, images: Tensor, sides: Sides) -> Tensor:
        """Anchors [A, 4] for features of these sides; made once for each size."""
        if sides not in self._anchors or self._anchors[sides].device != images.device:
            self._anchors[sides] = make_anchors(sides, self.matching, images.device)
        return self._anchors[sides]

    def loss_divisor(self, count: Tensor) -> Tensor:
        """The positives plus one (the authors' code)."""
        return count + 1

    def class_loss(self, logits: Tensor, assigned: Assignment) -> Tensor:
        """Focal loss."""
        classes = (assigned.labels + self.first_class).where(assigned.positive, NEGATIVE)
        alpha, gamma = self.settings.focal_alpha, self.settings.focal_gamma
        return focal_loss_sum(logits, classes, ~assigned.ignored, alpha, gamma)

    def box_loss(self, codes: Tensor, wanted: Tensor) -> Tensor:
        """Huber loss, the mean over a box's four numbers."""
        delta, weight = self.settings.huber_delta, self.settings.box_loss_weight
        return weight * F.huber_loss(codes, wanted, reduction="sum", delta=delta) / BOX_CODE


def best_of_all(scores: Tensor, candidates: int, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The best of an image's scores [A, C], in falling order: scores, labels, anchors [K]."""
    flat, classes = scores.flatten(), scores.shape[1]
    confident = torch.nonzero(flat > threshold).squeeze(1)
    values, order = flat[confident].topk(min(candidates, len(confident)))
    confident = confident[order]
    return values, confident % classes, confident.div(classes, rounding_mode="floor")


def best_by_class(
    scores: Tensor, candidates: int, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `best_of_all`, of each class its best."""
    values, anchors = scores.T.contiguous().sort(dim=1, descending=True, stable=True)
    labels, rank = torch.nonzero(values[:, :candidates] > threshold, as_tuple=True)
    values, order = values[labels, rank].sort(descending=True, stable=True)
    labels, rank = labels[order], rank[order]
    return values, labels, anchors[labels, rank]


def _by_anchor(prediction: Tensor, width: int) -> Tensor:
    """Reorder [N, K * width, H, W] to [N, H * W * K, width], as the anchors are ordered."""
    return prediction.permute(0, 2, 3, 1).reshape(prediction.shape[0], -1, width)


def focal_loss_sum(
    logits: Tensor, classes: Tensor, kept: Tensor, alpha: float, gamma: float
) -> Tensor:
    """Sum of the focal loss of independent classes (RetinaNet), in float32.

    The value of torchvision's `sigmoid_focal_loss`. Every class is first taken to be absent, then
    one class an anchor is corrected: a third to a half of its time on a CPU (512 pixels, 90
    classes).

    Args:
        logits: [N, A, C].
        classes: int64 [N, A], the class of each anchor; negative where it has none.
        kept: bool [N, A], the anchors that count; all that have a class do.
        alpha: weight of the classes that are there; the others have one minus it.
        gamma: power of what is missing to the right probability.

    Returns:
        A scalar.
    """
    logits = logits.float()
    absent = (1 - alpha) * _loss_of_absent(logits, gamma).sum(-1)
    own = logits.gather(-1, classes.clamp(min=0)[..., None]).squeeze(-1)
    correction = alpha * _loss_of_absent(-own, gamma) - (1 - alpha) * _loss_of_absent(own, gamma)
    return absent.where(kept, 0).sum() + correction.where(classes >= 0, 0).sum()


def _loss_of_absent(logits: Tensor, gamma: float) -> Tensor:
    """Focal loss of classes that should be absent, without its weight: -p^gamma log(1 - p)."""
    surprise = F.softplus(logits)  # -log(1 - p)
    return surprise * (gamma * (logits - surprise)).exp()
