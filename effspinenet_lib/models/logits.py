"""What classification and segmentation share: logits for an image, and the mean of a pyramid."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effspinenet_lib.errors import UserError
from effspinenet_lib.models.base import Target, TaskModel, check_finite
from effspinenet_lib.models.layers import conv_norm, initialise

# What torch says of a batch that leaves a norm one value a channel.
_TOO_FEW_VALUES = "more than 1 value per channel"


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

    def forward(
        self, images: Tensor, targets: list[Target] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Compute the loss `cross_entropy` in training, predictions in evaluation.

        Raises:
            ValueError: training without targets.
            UserError: training on so little that a norm has one value a channel.
            TrainingError: the outputs are not finite.
        """
        if self.training:
            if targets is None:
                raise ValueError("targets are needed in training")
            return {"cross_entropy": self.loss(self._training_logits(images).float(), targets)}
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

    def _training_logits(self, images: Tensor) -> Tensor:
        try:
            return self.network(images)
        except ValueError as error:
            if _TOO_FEW_VALUES not in str(error):
                raise
            count, _, height, width = images.shape
            raise UserError(
                f"a batch of {count} image of {height}x{width} is too little for batch "
                "normalisation; train on 2 images a batch or more"
            ) from error


class PyramidMean(nn.Module):
    """Bring P3 to P7 to one dimension, upsample them to P3 by nearest neighbour, average them.

    The dimension is made by one 1x1 convolution, norm and activation a level, as in the released
    code. It comes before the upsampling: after it Table 10's models would cost 0.46, 0.78 and
    1.00 B, against 0.38, 0.70 and 0.89 B printed (sections 4.2 and 4.3 leave this open).
    """

    def __init__(self, feature_dims: Mapping[int, int], dim: int, activation: str) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(
            conv_norm(inputs, dim, activation=activation) for inputs in feature_dims.values()
        )
        initialise(self)

    def forward(self, features: dict[int, Tensor]) -> Tensor:
        """Map the features of P3 to P7 to [N, dim, H, W] of P3's height and width."""
        pairs = zip(self.lateral, features.values(), strict=True)
        finest, *coarser = (lateral(feature) for lateral, feature in pairs)
        upsampled: list[Tensor] = [
            F.interpolate(f, finest.shape[-2:], mode="nearest") for f in coarser
        ]
        return torch.stack([finest, *upsampled]).mean(0)
