"""This library's detectors as one would write them with torch's and torchvision's own parts.

The same network with the same weights, without what this library does for speed: in-place SiLU,
torchvision's focal loss, matching and box codes image by image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from effspinenet_lib.models.anchors import BOX_CODE, encode_boxes, match_anchors
from effspinenet_lib.models.base import crowds
from effspinenet_lib.models.retinanet import RetinaNet


class PlainRetinaNet(RetinaNet):
    """RetinaNet with plain losses; for targets without crowds."""

    def losses(
        self, logits: Tensor, codes: Tensor, anchors: Tensor, targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        settings = self.settings
        classes = torch.zeros_like(logits, dtype=torch.float32)
        found, wanted, positives = [], [], 1
        for image, target in enumerate(targets):
            matches = match_anchors(anchors, target["boxes"], crowds(target), self.matching)
            (anchor,) = torch.nonzero(matches >= 0, as_tuple=True)
            classes[image, anchor, target["labels"][matches[anchor]]] = 1.0
            found.append(codes[image, anchor].float())
            wanted.append(encode_boxes(target["boxes"][matches[anchor]], anchors[anchor]))
            positives += len(anchor)
        focal = sigmoid_focal_loss(
            logits.float(), classes, settings.focal_alpha, settings.focal_gamma, "sum"
        )
        huber = F.huber_loss(
            torch.cat(found), torch.cat(wanted), reduction="sum", delta=settings.huber_delta
        )
        return {
            "classification": focal / positives,
            "box": settings.box_loss_weight * huber / BOX_CODE / positives,
        }


def make_plain(model: RetinaNet) -> RetinaNet:
    """Change a detector, its weights left as they are, to its plain twin."""
    model.__class__ = PlainRetinaNet
    for module in model.modules():
        if isinstance(module, nn.SiLU):
            module.inplace = True
    return model
