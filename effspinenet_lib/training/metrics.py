"""Top-k accuracy and mean intersection over union, summed over batches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effspinenet_lib.data.dataset import SEMANTIC_IGNORE
from effspinenet_lib.errors import UserError

TOP_K = (1, 5)  # Table 10


class Accuracy:
    """Top-1 and top-5 accuracy.

    With fewer than 5 classes the top 5 are all of them.
    """

    def __init__(self) -> None:
        self.images = 0
        self.hits = dict.fromkeys(TOP_K, 0)

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Count the images whose label is among the highest scores.

        Args:
            scores: [N, C]; of equal ones any may come first.
            labels: int64 [N].

        Raises:
            UserError: a label is no class of the scores.
        """
        _check_labels(labels, scores.shape[1])
        best = scores.topk(min(max(TOP_K), scores.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        for k in TOP_K:
            self.hits[k] += int(hits[:, :k].sum())
        self.images += len(labels)

    def merge(self, other: Accuracy) -> None:
        """Count in the images that another one has counted."""
        self.images += other.images
        for k, hits in other.hits.items():
            self.hits[k] += hits

    def metrics(self) -> dict[str, float]:
        """`top1` and `top5` in percent; NaN where no image was added."""
        return {
            f"top{k}": 100.0 * hits / self.images if self.images else math.nan
            for k, hits in self.hits.items()
        }


class ConfusionMatrix:
    """How many pixels of each class are predicted as each class.

    Args:
        num_classes: classes, the background among them.

    Attributes:
        counts: int64 [C, C]; row: the expected class, column: the predicted one.
    """

    def __init__(self, num_classes: int) -> None:
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def add(self, predicted: Tensor, expected: Tensor) -> None:
        """Count the pixels of images of one size; where 255 is expected they do not count.

        Args:
            predicted: classes, integers [.., H, W].
            expected: semantic labels, integers of the same shape.

        Raises:
            ValueError: the shapes differ.
            UserError: a label is no class of this matrix.
        """
        if predicted.shape != expected.shape:
            raise ValueError(
                f"{tuple(predicted.shape)} predicted, {tuple(expected.shape)} expected"
            )
        kept = expected != SEMANTIC_IGNORE
        rows, columns = expected[kept].long(), predicted[kept].long()
        classes = len(self.counts)
        _check_labels(rows, classes)
        _check_labels(columns, classes)
        counts = torch.bincount(rows * classes + columns, minlength=classes**2)
        self.counts += counts.reshape(classes, classes).cpu()

    def merge(self, other: ConfusionMatrix) -> None:
        """Count in the pixels that another one has counted."""
        self.counts += other.counts

    def intersection_over_union(self) -> Tensor:
        """Pixels that are of a class and predicted so, over those that are either: float64 [C].

        NaN for a class that is neither expected nor predicted anywhere.
        """
        both = self.counts.diagonal().double()
        return both / (self.counts.sum(0) + self.counts.sum(1) - both)

    def metrics(self) -> dict[str, float]:
        """`mIOU` in percent, the mean over the classes that are expected or predicted anywhere.

        The counts are summed over all images first, as in PASCAL VOC. NaN where nothing counts.
        """
        return {"mIOU": 100.0 * float(self.intersection_over_union().nanmean())}


def _check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that are no class, which would be counted as another one."""
    if labels.numel() and (labels.min() < 0 or labels.max() >= classes):
        raise UserError(
            f"labels from {int(labels.min())} to {int(labels.max())} do not fit the model's "
            f"{classes} classes, 0 to {classes - 1}; create it with the num_classes of the data"
        )
