"""What every model of every task has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effspinenet_lib.errors import TrainingError, UserError

# What torch says of a batch that leaves a norm one value a channel.
TOO_FEW_VALUES = "more than 1 value per channel"

Target = dict[str, Tensor]


Extents = Sequence[tuple[int, int]]  # height and width of images within their inputs


class TaskModel(nn.Module, ABC):
    """A network with a task: losses in training, predictions in evaluation.

    One loop, evaluation, checkpoint and export serve all tasks; they know of a model only this.
    """

    def forward(
        self,
        images: Tensor,
        targets: list[Target] | None = None,
        extents: Extents | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Compute losses in training, predictions in evaluation.

        Args:
            images: [N, 3, H, W], normalised.
            targets: for training, one dictionary an image. Detection: `boxes` [M, 4] (x1 y1 x2
                y2 in input pixels), `labels` int64 [M] from 0, `iscrowd` [M] (boolean, or 0 and
                1; no crowds where it is missing); rows that `data.augment.pad_target` added hold
                no object. Instances: as detection without such rows, and `masks` [M, H, W].
                Classification: `label` int64 []. Semantic segmentation: `semantic` int64 [H, W],
                255 where it does not count. Other keys are ignored. Targets made for torchvision's
                detectors, whose labels count from 1, fit a model of one class more.
            extents: for detection and instances in evaluation, the height and width that each
                image has at the top left of its input; the rest is padding, in which nothing is
                found. None: the whole input.

        Returns:
            In training scalar losses by name; their sum is minimised. In evaluation one
            dictionary an image. Detection: `boxes` [K, 4], `scores` [K] falling, `labels` int64
            [K]. Instances: as detection, and `masks` [K, 28, 28], the probability of the object
            over its box. Classification: `scores` [C], which sum to 1. Semantic segmentation:
            `logits` [C, H, W].

        Raises:
            ValueError: training without targets.
            UserError: training on a batch too small for batch normalisation.
            TrainingError: outputs in evaluation that are not finite.
        """
        if not self.training:
            return self.predict(images, extents)
        if targets is None:
            raise ValueError("targets are needed in training")
        try:
            return self.training_losses(images, targets)
        except ValueError as error:
            if TOO_FEW_VALUES not in str(error):
                raise
            count, _, height, width = images.shape
            raise UserError(
                f"{count} image of {height}x{width} is too little for batch normalisation; train "
                "on 2 images a batch or more, or on larger images"
            ) from error

    @abstractmethod
    def training_losses(self, images: Tensor, targets: list[Target]) -> dict[str, Tensor]:
        """What `forward` returns in training."""

    @abstractmethod
    def predict(self, images: Tensor, extents: Extents | None = None) -> list[dict[str, Tensor]]:
        """What `forward` returns in evaluation."""

    @abstractmethod
    def network(self, images: Tensor) -> Any:
        """Run every layer, without decoding: what costs count and what is exported.

        Args:
            images: [N, 3, H, W], normalised.

        Returns:
            A tensor, or a tuple of tensors.
        """

    def loss_count(self, images: Tensor, targets: list[Target]) -> Tensor:
        """What the losses are means over, a scalar; here, the images.

        A batch's count is the sum of its parts' counts, and its losses are divided by
        `loss_divisor` of it. So the losses of parts, computed one after the other or by several
        processes, can be weighted to add up to those of the batch.
        """
        del targets
        return torch.full((), float(len(images)), device=images.device)

    def loss_divisor(self, count: Tensor) -> Tensor:
        """What the losses of a batch of this `loss_count` are divided by."""
        return count


def check_finite(*outputs: Tensor) -> None:
    """Refuse the outputs of broken weights.

    Raises:
        TrainingError: a number is not finite.
    """
    if not all(output.isfinite().all() for output in outputs):
        raise TrainingError(
            "the model's outputs are not finite; its weights are broken: use those of an earlier "
            "checkpoint, or train with a lower learning rate"
        )


def crowds(target: Target) -> Tensor:
    """Which boxes of a target are crowd regions, bool [M]."""
    return target.get("iscrowd", torch.zeros_like(target["labels"])).bool()
