"""What every model of every task has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from effspinenet_lib.errors import TrainingError, UserError
from effspinenet_lib.models.specs import level_side

Target = dict[str, Tensor]


class TaskModel(nn.Module, ABC):
    """A network with a task: losses in training, predictions in evaluation.

    All tasks are trained, evaluated, saved, loaded and exported by the same code, which knows
    of a model only what stands here.
    """

    @abstractmethod
    def forward(
        self, images: Tensor, targets: list[Target] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Compute losses in training, predictions in evaluation.

        Args:
            images: [N, 3, H, W], normalised.
            targets: for training, one dictionary an image. Detection: `boxes` [M, 4] (x1 y1 x2
                y2 in input pixels), `labels` int64 [M] from 0, `iscrowd` [M] (boolean, or 0 and
                1; none is a crowd where it is missing); rows that `data.padding` added hold no
                object. Instances: as detection without such rows, and `masks` bool [M, H, W].
                Classification: `label` int64 []. Semantic segmentation: `semantic` int64 [H, W],
                255 where it does not count.

        Returns:
            In training scalar losses by name; their sum is minimised. In evaluation one
            dictionary an image. Detection: `boxes` [K, 4], `scores` [K] falling, `labels` int64
            [K]. Instances: as detection, and `masks` [K, 28, 28], the probability of the object
            over its box. Classification: `scores` [C], which sum to 1. Semantic segmentation:
            `logits` [C, H, W].
        """

    @abstractmethod
    def network(self, images: Tensor) -> Any:
        """Run every layer, without decoding: the computation that costs count and that is exported.

        Args:
            images: [N, 3, H, W], normalised.

        Returns:
            Tensors, in a tuple where there are more than one.
        """

    def loss_count(self, images: Tensor, targets: list[Target]) -> Tensor:
        """What the losses are means over; here, the images.

        A batch's count is the sum of those of its parts, and `loss_divisor` of it is what its
        losses are divided by. So the losses of parts, computed one after the other or by several
        processes, can be weighted to add up to those of the batch.

        Args:
            images: as for training, [N, 3, H, W].
            targets: as for training.

        Returns:
            A scalar on the device of the images.
        """
        del targets
        return torch.full((), float(len(images)), device=images.device)

    def loss_divisor(self, count: Tensor) -> Tensor:
        """What the losses of a batch of this `loss_count` are divided by."""
        return count


def check_batch(images: Tensor, coarsest: int) -> None:
    """Refuse a batch [N, 3, H, W] that leaves a norm at the coarsest level one value a channel.

    Raises:
        UserError: it is one image so small.
    """
    count, _, height, width = images.shape
    if count * level_side(height, coarsest) * level_side(width, coarsest) == 1:
        raise UserError(
            f"one image of {height}x{width} is too little for batch normalisation at stride "
            f"{2**coarsest}; train on 2 images a batch or more, or on images of over "
            f"{2**coarsest} pixels"
        )


def check_finite(*outputs: Tensor) -> None:
    """Refuse the outputs of broken weights.

    Raises:
        TrainingError: a number is not finite.
    """
    if not all(output.isfinite().all() for output in outputs):
        raise TrainingError(
            "the model gives numbers that are not finite; its weights are broken: use those of "
            "an earlier checkpoint, or train with a lower learning rate"
        )


def crowds(target: Target) -> Tensor:
    """Which boxes of a target are crowd regions; none where it does not say."""
    return target.get("iscrowd", torch.zeros_like(target["labels"])).bool()
