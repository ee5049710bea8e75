"""Semantic segmentation (section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effspinenet_lib.data.masks import SEMANTIC_IGNORE
from effspinenet_lib.models.base import Target
from effspinenet_lib.models.logits import LogitsModel, PyramidMean
from effspinenet_lib.models.retinanet import RetinaHead


class Segmenter(LogitsModel):
    """A network that gives a class to every pixel.

    Its logits are brought to the image's size by bilinear interpolation, for the loss and for
    the predictions.
    """

    def loss(self, logits: Tensor, targets: list[Target]) -> Tensor:
        """Cross-entropy with each target's `semantic` [H, W], the mean over the pixels that count.

        0 where none counts.
        """
        labels = torch.stack([target["semantic"] for target in targets])
        size = (labels.shape[-2], labels.shape[-1])
        summed = F.cross_entropy(
            upsample(logits, size), labels, ignore_index=SEMANTIC_IGNORE, reduction="sum"
        )
        return summed / (labels != SEMANTIC_IGNORE).sum().clamp(min=1)

    def loss_count(self, images: Tensor, targets: list[Target]) -> Tensor:
        """Pixels that count."""
        del images
        return torch.stack([(t["semantic"] != SEMANTIC_IGNORE).sum() for t in targets]).sum()

    def loss_divisor(self, count: Tensor) -> Tensor:
        """The pixels, or one."""
        return count.clamp(min=1)

    def predictions(self, logits: Tensor, size: tuple[int, int]) -> list[dict[str, Tensor]]:
        """`logits` [C, H, W] of each image."""
        return [{"logits": image} for image in upsample(logits, size)]


class PyramidSegmentationHead(nn.Module):
    """The head of section 4.3: the mean of all levels at P3, separable convolutions, prediction.

    The layers are those of a detection subnet. As there, the prediction layer is separable; a
    1x1 convolution would fit the costs as well (2.12 and 3.78 B either way, 2.1 and 3.8 printed).

    Args:
        feature_dims: level to channels of the backbone's outputs.
        num_classes: classes, the background among them.
        dim: channels of the convolutions (Table 2).
        layers: separable convolutions before the prediction (Table 2).
        activation: `swish` or `relu`.
    """

    def __init__(
        self,
        feature_dims: Mapping[int, int],
        num_classes: int,
        dim: int,
        layers: int,
        activation: str,
    ) -> None:
        super().__init__()
        self.merge = PyramidMean(feature_dims, dim, activation)
        self.subnet = RetinaHead(dim, layers, num_classes, levels=1, activation=activation)

    def forward(self, features: dict[int, Tensor]) -> Tensor:
        """Map the features of P3 to P7 to logits [N, num_classes, H, W] at P3's resolution."""
        logits: Tensor = self.subnet(self.merge(features), level=0)
        return logits


def upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring logits [N, C, h, w] to [N, C, *size], bilinear."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)
