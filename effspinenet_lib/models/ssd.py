"""SSDLite, and the tower of convolutions that lite RetinaNets share between their branches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import batched_nms, clip_boxes_to_image

from effspinenet_lib.models.anchors import (
    AnchorSettings,
    assign_anchors,
    decode_boxes,
    encode_boxes,
)
from effspinenet_lib.models.base import Target
from effspinenet_lib.models.layers import PyramidBackbone, SeparableConv, initialise, make_norm
from effspinenet_lib.models.retinanet import OneStageDetector, Sides

BACKGROUND = 0  # its column of the predictions; the classes follow


@dataclass(frozen=True)
class SSDSettings:
    """Prior boxes, losses and post-processing.

    Attributes:
        smallest: side of the square priors of the finest level, of the image's side (SSDLite's
            released configs; so are the next three).
        largest: the same of the coarsest level; those between are spaced evenly.
        aspect_ratios: used with their inverses and 1.
        lowest_scale: side of the finest level's one square prior; it has no others and only the
            first of the ratios.
        box_scale: factors on the four numbers of a box code (SSD's and the released configs').
        negatives: negative priors for each positive one, the hardest (SSD's paper).
        score_threshold: detections below are dropped (torchvision's SSDLite; so are the next two).
        nms_iou: class-wise non-maximum suppression.
        candidates: boxes a class and image that enter the suppression.
        detections: boxes an image that leave it (COCO's limit).
    """

    smallest: float = 0.2
    largest: float = 0.95
    aspect_ratios: tuple[int, ...] = (2, 3)
    lowest_scale: float = 0.1
    box_scale: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    negatives: float = 3.0
    score_threshold: float = 0.001
    nms_iou: float = 0.55
    candidates: int = 300
    detections: int = 100


class PriorBoxes(DefaultBoxGenerator):
    """torchvision's prior boxes, with three a location at the finest level instead of six.

    The released configs' default, which the cost columns confirm.
    """

    def __init__(self, settings: SSDSettings, levels: int) -> None:
        ratios = [list(settings.aspect_ratios) for _ in range(levels)]
        super().__init__(ratios, min_ratio=settings.smallest, max_ratio=settings.largest)
        first = settings.aspect_ratios[0] ** 0.5
        wide, narrow = settings.smallest * first, settings.smallest / first
        lowest = settings.lowest_scale
        pairs = [[lowest, lowest], [wide, narrow], [narrow, wide]]
        self._wh_pairs[0] = torch.tensor(pairs, device="cpu")  # where torchvision has the others

    def num_anchors_per_location(self) -> list[int]:
        """Priors of one location, by level."""
        return [len(pairs) for pairs in self._wh_pairs]


class SSDLite(OneStageDetector):
    """A one-stage detector with prior boxes and softmax scores.

    The predictions have a column for the background, as the originals' have.

    Args:
        backbone: computes the features, of six levels in SSDLite.
        num_classes: classes, without background.
        settings: prior boxes, losses and post-processing.
    """

    def __init__(
        self, backbone: PyramidBackbone, num_classes: int, settings: SSDSettings | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.settings = settings or SSDSettings()
        self.matching = AnchorSettings()
        dims = list(backbone.feature_dims.values())
        self.priors = PriorBoxes(self.settings, len(dims))
        self.head = SSDLiteHead(
            dims, self.priors.num_anchors_per_location(), num_classes + 1, make_norm
        )

    def network(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the network: class logits [N, A, 1 + C], box codes [N, A, 4], prior boxes [A, 4]."""
        features = list(self.backbone(images).values())
        outputs = self.head(features)
        anchors = self.anchors(images, tuple((f.shape[-2], f.shape[-1]) for f in features))
        return outputs["cls_logits"], outputs["bbox_regression"], anchors

    def scores(self, logits: Tensor) -> Tensor:
        """Probabilities [N, A, classes], which with the background's sum to 1."""
        return logits.softmax(-1)[..., BACKGROUND + 1 :]

    def anchors(self, images: Tensor, sides: Sides) -> Tensor:
        """Prior boxes [A, 4] in pixels of the images, for features of these sides."""
        size = (images.shape[-2], images.shape[-1])
        # the generator reads the sides, dtype and device of these, no values
        grids = [torch.empty(1, 1, *side, device=images.device) for side in sides]
        with torch.device("cpu"):
            return self.priors(ImageList(images, [size]), grids)[0]

    def loss_divisor(self, count: Tensor) -> Tensor:
        """The positives, or one."""
        return count.clamp(min=1)

    def losses(
        self, logits: Tensor, codes: Tensor, anchors: Tensor, targets: list[Target]
    ) -> dict[str, Tensor]:
        """SSD's loss: smooth L1 and softmax over positives and the hardest negatives.

        Both are sums over the batch divided by its positives. Priors in crowd regions are
        neither positive nor negative.
        """
        assigned = assign_anchors(anchors, targets, self.matching)
        positive = assigned.positive
        negative = ~(positive | assigned.ignored)
        expected = (assigned.labels + 1).where(positive, BACKGROUND)

        entropy = F.cross_entropy(logits.float().mT, expected, reduction="none")
        hardness = entropy.detach().where(negative, -torch.inf)
        rank = hardness.argsort(1, descending=True).argsort(1)
        hardest = (rank < self.settings.negatives * positive.sum(1, keepdim=True)) & negative
        scale = codes.new_tensor(self.settings.box_scale, dtype=torch.float32)
        wanted = encode_boxes(assigned.boxes, anchors) * scale
        distance = F.smooth_l1_loss(
            codes.float().where(positive[..., None], wanted), wanted, reduction="sum"
        )
        divisor = self.loss_divisor(positive.sum())
        return {
            "classification": entropy.where(positive | hardest, 0).sum() / divisor,
            "box": distance / divisor,
        }

    def detections(
        self, scores: Tensor, codes: Tensor, anchors: Tensor, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Decode one image: scores [A, C] and codes [A, 4] to at most 100 boxes."""
        settings = self.settings
        values, anchor = scores.topk(min(settings.candidates, len(scores)), dim=0)
        confident = values > settings.score_threshold
        labels = confident.nonzero()[:, 1]
        values, anchor = values[confident], anchor[confident]
        codes = codes / codes.new_tensor(settings.box_scale)
        boxes = clip_boxes_to_image(decode_boxes(codes[anchor], anchors[anchor]), size)
        kept = batched_nms(boxes, values, labels, settings.nms_iou)[: settings.detections]
        return {"boxes": boxes[kept], "scores": values[kept], "labels": labels[kept]}


class SharedTower(PyramidBackbone):
    """A pyramid and the separable convolutions that both branches of a detector share.

    As in the released configs of FPNLite and MnasFPN: convolutions shared over the levels, a
    norm for each level, ReLU6. The detector behind it has prediction layers only.

    Args:
        pyramid: gives features of one dimension.
        dim: channels of the tower.
        layers: its convolutions.
    """

    def __init__(self, pyramid: PyramidBackbone, dim: int, layers: int) -> None:
        super().__init__()
        self.pyramid = pyramid
        levels = pyramid.feature_dims
        self.feature_dims = dict.fromkeys(levels, dim)
        first = next(iter(levels.values()))
        self.convs = nn.ModuleList(
            SeparableConv(dim if layer else first, dim, bias=False) for layer in range(layers)
        )
        self.norms = nn.ModuleList(make_norm(dim) for _ in range(len(levels) * layers))
        self.activation = nn.ReLU6(inplace=True)
        initialise(self.convs)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Map images [N, 3, H, W] to level: [N, dim, ...], of the pyramid's levels and sides."""
        towers: dict[int, Tensor] = {}
        norms = iter(self.norms)
        for level, features in self.pyramid(images).items():
            for conv in self.convs:
                features = self.activation(next(norms)(conv(features)))
            towers[level] = features
        return towers
