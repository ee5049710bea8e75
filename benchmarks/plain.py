"""This library's detectors as one would write them with torch's and torchvision's own parts.

The same network with the same weights, without what this library does for speed: plain
convolutions, norms and activations one after the other, in-place SiLU, the mean in
squeeze-and-excitation, torchvision's focal loss, memory given back to the system.
"""

from __future__ import annotations

import torch
from effspinenet_lib.kernels import DepthwiseConv2d, PointwiseConv2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from effspinenet_lib.models.anchors import encode_boxes, match_anchors
from effspinenet_lib.models.layers import ConvNorm, SqueezeExcitation
from effspinenet_lib.models.retinanet import BOX_CODE, RetinaHead, RetinaNet


class _SqueezeExcitation(SqueezeExcitation):
    def forward(self, features: Tensor) -> Tensor:
        return features * self.gates(features)

    def gates(self, features: Tensor) -> Tensor:
        mean = features.mean((2, 3), keepdim=True)
        return self.gate(self.expand(self.activation(self.reduce(mean))))


class _RetinaHead(RetinaHead):
    def forward(self, features: Tensor, level: int) -> Tensor:
        for layer, conv in enumerate(self.convs):
            norm = self.norms[level * self.layers + layer]
            features = self.activation(norm(conv(features)))
        return self.predict(features)


class _RetinaNet(RetinaNet):
    def losses(
        self,
        logits: Tensor,
        codes: Tensor,
        anchors: Tensor,
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        settings = self.settings
        classes = torch.zeros_like(logits, dtype=torch.float32)
        found, wanted, positives = [], [], 1
        for image, target in enumerate(targets):
            crowds = torch.zeros_like(target["labels"], dtype=torch.bool)
            matches = match_anchors(anchors, target["boxes"], crowds, self.anchor_settings)
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


TWINS: dict[type[nn.Module], type[nn.Module]] = {
    DepthwiseConv2d: nn.Conv2d,
    PointwiseConv2d: nn.Conv2d,
    ConvNorm: nn.Sequential,
    SqueezeExcitation: _SqueezeExcitation,
    RetinaHead: _RetinaHead,
    RetinaNet: _RetinaNet,
}


def make_plain(model: RetinaNet) -> RetinaNet:
    """Change a detector, its weights left as they are, to its plain twin."""
    for module in model.modules():
        module.__class__ = TWINS.get(type(module), type(module))
        if isinstance(module, nn.SiLU):
            module.inplace = True
    return model
