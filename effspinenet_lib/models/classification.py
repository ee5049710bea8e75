"""Image classification (section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effspinenet_lib.models.base import Target
from effspinenet_lib.models.logits import LogitsModel, PyramidMean
from effspinenet_lib.models.specs import CLASSIFICATION_DIM

# EfficientNet's rate before the classifier for B0 and B1 (its released code). Section 5.2 follows
# EfficientNet's training and names no rate for Eff-SpineNet; one for all is our choice.
DROPOUT = 0.2


class Classifier(LogitsModel):
    """A network that gives one of many classes to an image.

    Args:
        backbone: maps images [N, 3, H, W] to what the head takes.
        head: gives the logits [N, C].
        label_smoothing: share of the target spread over all classes (the paper names none).
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, label_smoothing: float = 0.0) -> None:
        super().__init__(backbone, head)
        self.label_smoothing = label_smoothing

    def loss(self, logits: Tensor, targets: list[Target]) -> Tensor:
        """Softmax cross-entropy with each target's `label`, the mean over the images."""
        labels = torch.stack([target["label"] for target in targets])
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def predictions(self, logits: Tensor, size: tuple[int, int]) -> list[dict[str, Tensor]]:
        """`scores` [C] of each image, which sum to 1."""
        del size
        return [{"scores": scores} for scores in logits.softmax(1)]


def pyramid_classification_head(
    feature_dims: Mapping[int, int], num_classes: int, activation: str, dropout: float
) -> nn.Sequential:
    """Make the head of section 4.2: all levels at P3, their mean, its global mean, a linear layer.

    It maps the features of P3 to P7 to logits [N, num_classes]; `dropout` is the rate before the
    linear layer.
    """
    return nn.Sequential(
        PyramidMean(feature_dims, CLASSIFICATION_DIM, activation),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(CLASSIFICATION_DIM, num_classes),
    )
