"""SSDLite, and the tower of convolutions that lite RetinaNets share between their branches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssdlite import SSDLiteHead

from effspinenet_lib.models.anchors import AnchorSettings, Assignment, BoxScale
from effspinenet_lib.models.layers import PyramidBackbone, SeparableConv, initialise, make_norm
from effspinenet_lib.models.retinanet import OneStageDetector, OneStageSettings, Sides

BACKGROUND = 0  # its column of the predictions; the classes follow


@dataclass(frozen=True)
class SSDSettings(OneStageSettings):
    """Prior boxes, losses and post-processing.

    The latter is torchvision's SSDLite's, the priors are those of SSDLite's released configs.

    Attributes:
        box_scale: SSD's and the released configs'.
        smallest: side of the square priors of the finest level, of the image's side.
        largest: the same of the coarsest level; those between are spaced evenly.
        aspect_ratios: used with their inverses and 1.
        lowest_scale: side of the finest level's one square prior; it has no others and only the
            first of the ratios.
        negatives: negative priors for each positive one, the hardest (SSD's paper).
    """

    score_threshold: float = 0.001
    nms_iou: float = 0.55
    candidates: int = 300
    candidates_by_class: bool = True
    box_scale: BoxScale = (10.0, 5.0)
    smallest: float = 0.2
    largest: float = 0.95
    aspect_ratios: tuple[int, ...] = (2, 3)
    lowest_scale: float = 0.1
    negatives: float = 3.0


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
    """

    settings: SSDSettings

    def __init__(self, backbone: PyramidBackbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.settings = SSDSettings()
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

    def class_loss(self, logits: Tensor, assigned: Assignment) -> Tensor:
        """Softmax over positives and the hardest negatives; priors in crowds are neither."""
        positive = assigned.positive
        negative = ~(positive | assigned.ignored)
        expected = (assigned.labels + 1).where(positive, BACKGROUND)
        entropy = F.cross_entropy(logits.mT, expected, reduction="none")
        hardness = entropy.detach().where(negative, -torch.inf)
        rank = hardness.argsort(1, descending=True).argsort(1)
        hardest = (rank < self.settings.negatives * positive.sum(1, keepdim=True)) & negative
        return entropy.where(positive | hardest, 0).sum()

    def box_loss(self, codes: Tensor, wanted: Tensor) -> Tensor:
        """Smooth L1."""
        return F.smooth_l1_loss(codes, wanted, reduction="sum")


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
