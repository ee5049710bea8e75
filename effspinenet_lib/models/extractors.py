"""Classification networks of timm as feature extractors, and pyramids on extractors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import timm
import torch
from torch import Tensor, nn

from effspinenet_lib.models.layers import NORM_EPSILON, NORM_MOMENTUM, PyramidBackbone
from effspinenet_lib.models.scale_permuted import check_image_size

EXTRACTED_LEVELS = (3, 4, 5)  # C3 to C5, what feature pyramids are built on


class TimmFeatures(nn.Module):
    """The stages of a network of timm, without its classifier, by level.

    The weights are fresh, initialised as timm does for this network; the norms have this
    library's epsilon and momentum. A 1x1 convolution that belongs to the classifier, such as
    EfficientNet's to 1280 channels, is left out.

    Args:
        name: any model of timm that can be created with `features_only`.
        levels: levels of the features, ascending; the coarsest should be the network's, or some
            of its weights are of no use.
        activation: name of the activation in all blocks (`swish`, `relu`, or any that timm
            knows); None keeps the network's own.
        stochastic_depth: drop rate of the last block; it grows linearly with depth. In the
            EfficientNet family timm, as EfficientNet's own code, stops one block's step short.
        options: more arguments of `timm.create_model`.

    Attributes:
        feature_dims: level to channels, finest first.

    Raises:
        ValueError: the network has no features of a level.
    """

    def __init__(
        self,
        name: str,
        levels: tuple[int, ...] = EXTRACTED_LEVELS,
        activation: str | None = None,
        stochastic_depth: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        if stochastic_depth:
            options["drop_path_rate"] = stochastic_depth
        if activation is not None:
            options["act_layer"] = activation
        indices = _stage_indices(name, levels, options)
        network: Any = timm.create_model(name, features_only=True, out_indices=indices, **options)
        self.feature_dims: dict[int, int] = dict(
            zip(levels, network.feature_info.channels(), strict=True)
        )
        self.stages = network
        set_norms(self)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Compute the features of images [N, 3, H, W], normalised.

        Returns:
            Level to features [N, feature_dims[level], ceil(H / 2**level), ceil(W / 2**level)].
        """
        return dict(zip(self.feature_dims, self.stages(images), strict=True))


class ExtractedPyramid(PyramidBackbone, ABC):
    """A pyramid of features of one dimension on the stages that an extractor gives.

    Args:
        extractor: maps images to stages by level.
        levels: of the pyramid, ascending.
        dim: channels of each.
    """

    def __init__(self, extractor: nn.Module, levels: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.extractor = extractor
        self.feature_dims = dict.fromkeys(levels, dim)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Compute the pyramid.

        Args:
            images: [N, 3, H, W], normalised; any H and W of at least 64.

        Returns:
            Level to features [N, dim, ceil(H / 2**level), ceil(W / 2**level)].

        Raises:
            UserError: a side is under 64 pixels.
        """
        check_image_size(*images.shape[-2:])
        return self.pyramid(self.extractor(images))

    @abstractmethod
    def pyramid(self, stages: dict[int, Tensor]) -> dict[int, Tensor]:
        """Compute the pyramid of the extractor's stages; both by level."""


def set_norms(module: nn.Module) -> None:
    """Give norms that timm made this library's epsilon and momentum."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps, layer.momentum = NORM_EPSILON, NORM_MOMENTUM


def _stage_indices(name: str, levels: tuple[int, ...], options: dict[str, Any]) -> tuple[int, ...]:
    """Numbers that timm gives the stages of these levels; a network without memory knows them."""
    with torch.device("meta"):
        network: Any = timm.create_model(name, features_only=True, **options)
    strides = [int(stride) for stride in network.feature_info.reduction()]
    missing = [level for level in levels if 2**level not in strides]
    if missing:
        raise ValueError(f"{name} has features of strides {strides}, not of the levels {missing}")
    return tuple(strides.index(2**level) for level in levels)
