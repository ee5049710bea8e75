"""Image classification (section 4.2) and semantic segmentation (section 4.3)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effspinenet_lib.data.dataset import SEMANTIC_IGNORE
from effspinenet_lib.models.base import Extents, Target, TaskModel, check_finite
from effspinenet_lib.models.layers import conv_norm, initialise, separable_block, upsample
from effspinenet_lib.models.specs import CLASSIFICATION_DIM

# EfficientNet's rate before the classifier for B0 and B1 (its released code). Section 5.2 follows
# EfficientNet's training and names no rate for Eff-SpineNet; one for all is our choice.
DROPOUT = 0.2


class LogitsModel(TaskModel):
    """A backbone under a head that gives logits, trained by cross-entropy.

    Args:
        backbone: maps images [N, 3, H, W] to what the head takes.
        head: gives the logits [N, C, ..].
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def training_losses(self, images: Tensor, targets: list[Target]) -> dict[str, Tensor]:
        """The loss `cross_entropy`."""
        return {"cross_entropy": self.loss(self.network(images).float(), targets)}

    def predict(self, images: Tensor, extents: Extents | None = None) -> list[dict[str, Tensor]]:
        """The predictions of finite logits."""
        del extents
        logits = self.network(images).float()
        check_finite(logits)
        return self.predictions(logits, (images.shape[-2], images.shape[-1]))

    def network(self, images: Tensor) -> Tensor:
        """Run the network: logits [N, C, ..]."""
        logits: Tensor = self.head(self.backbone(images))
        return logits

    @abstractmethod
    def loss(self, logits: Tensor, targets: list[Target]) -> Tensor:
        """The scalar loss of the network's logits."""

    @abstractmethod
    def predictions(self, logits: Tensor, size: tuple[int, int]) -> list[dict[str, Tensor]]:
        """The predictions of images of this height and width, from the network's logits."""


class PyramidMean(nn.Module):
    """Bring P3 to P7 to one dimension, upsample them to P3 by nearest neighbour, average them.

    The dimension is made before the upsampling, by a 1x1 convolution, norm and activation a level
    (the endpoints of the authors' code). Levels that `feature_dims` lacks are left out.
    """

    def __init__(self, feature_dims: Mapping[int, int], dim: int, activation: str) -> None:
        super().__init__()
        self.levels = tuple(feature_dims)
        self.lateral = nn.ModuleList(
            conv_norm(inputs, dim, activation=activation) for inputs in feature_dims.values()
        )
        initialise(self)

    def forward(self, features: dict[int, Tensor]) -> Tensor:
        """Map the features of P3 to P7 to [N, dim, H, W] of P3's height and width."""
        pairs = zip(self.lateral, self.levels, strict=True)
        finest, *coarser = (lateral(features[level]) for lateral, level in pairs)
        upsampled = [upsample(feature, finest.shape[-2:]) for feature in coarser]
        return torch.stack([finest, *upsampled]).mean(0)


class Classifier(LogitsModel):
    """A network that gives one of many classes to an image.

    Attributes:
        label_smoothing: share of the target spread over all classes (the paper names none).
    """

    label_smoothing = 0.0

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


class Segmenter(LogitsModel):
    """A network that gives a class to every pixel.

    Its logits are brought to the image's size by bilinear interpolation, for the loss and for
    the predictions.
    """

    def loss(self, logits: Tensor, targets: list[Target]) -> Tensor:
        """Cross-entropy with each target's `semantic` [H, W], the mean over the pixels that count.

        0 where no pixel counts.
        """
        labels = torch.stack([target["semantic"] for target in targets])
        size = (labels.shape[-2], labels.shape[-1])
        summed = F.cross_entropy(
            resize(logits, size), labels, ignore_index=SEMANTIC_IGNORE, reduction="sum"
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
        return [{"logits": image} for image in resize(logits, size)]


class PyramidSegmentationHead(nn.Module):
    """The head of section 4.3: mean of all levels at P3, separable convolutions, 1x1 prediction.

    The separable convolutions are those of a detection subnet; the prediction is plain (the
    authors' code, and the cost of Table 11).

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
        convs = [separable_block(dim, activation) for _ in range(layers)]
        self.subnet = nn.Sequential(*convs, nn.Conv2d(dim, num_classes, 1))
        initialise(self.subnet)

    def forward(self, features: dict[int, Tensor]) -> Tensor:
        """Map the features of P3 to P7 to logits [N, num_classes, H, W] at P3's resolution."""
        logits: Tensor = self.subnet(self.merge(features))
        return logits


def resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring logits [N, C, h, w] to [N, C, *size], bilinear."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)
