"""What the detectors that classify anchors in one stage have in common."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from effspinenet_lib.models.base import Target, TaskModel, check_batch, check_finite
from effspinenet_lib.models.layers import PyramidBackbone


class OneStageDetector(TaskModel):
    """A network that gives each anchor class logits and a box code."""

    backbone: PyramidBackbone

    def forward(
        self, images: Tensor, targets: list[Target] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Compute losses in training, detections in evaluation.

        Args:
            images: [N, 3, H, W], normalised.
            targets: for training, one dict an image: `boxes` [M, 4] in input pixels, `labels`
                int64 [M] from 0 and, if any is, `iscrowd` bool [M].

        Returns:
            In training `classification` and `box`, scalar losses. In evaluation one dict an
            image: `boxes` [K, 4] in input pixels, `scores` [K] falling, `labels` int64 [K].

        Raises:
            ValueError: training without targets.
            UserError: training on one image whose coarsest features have one position.
            TrainingError: the outputs are not finite.
        """
        if self.training:
            if targets is None:
                raise ValueError("targets are needed in training")
            check_batch(images, max(self.backbone.feature_dims))
            return self.losses(*self.network(images), targets)
        logits, codes, anchors = self.network(images)
        check_finite(logits)
        size = (images.shape[-2], images.shape[-1])
        return [
            self.detections(scores, code, anchors, size)
            for scores, code in zip(self.scores(logits.float()), codes.float(), strict=True)
        ]

    @abstractmethod
    def network(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the network: class logits [N, A, C], box codes [N, A, 4], anchors [A, 4]."""

    @abstractmethod
    def scores(self, logits: Tensor) -> Tensor:
        """Map logits [N, A, C] to probabilities; a column of a background may be left out."""

    @abstractmethod
    def losses(
        self, logits: Tensor, codes: Tensor, anchors: Tensor, targets: list[Target]
    ) -> dict[str, Tensor]:
        """Compute `classification` and `box` of what `network` gave."""

    @abstractmethod
    def detections(
        self, scores: Tensor, codes: Tensor, anchors: Tensor, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Decode one image of `size` (height, width): scores [A, C] and codes [A, 4]."""
