"""Networks of timm as feature extractors, and the pyramids P3 to P7 on them: FPN and BiFPN."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import timm
from torch import Tensor, nn
from torch.nn import functional as F

from effspinenet_lib.models.layers import (
    PyramidBackbone,
    SeparableConv,
    WeightedFusion,
    initialise,
    make_activation,
    make_norm,
    set_norms,
    upsample,
)
from effspinenet_lib.models.scale_permuted import check_image_size
from effspinenet_lib.models.specs import OUTPUT_LEVELS

EXTRACTED_LEVELS = (3, 4, 5)  # C3 to C5, what feature pyramids are built on
KERNEL = 3
FINEST, COARSEST = OUTPUT_LEVELS[0], OUTPUT_LEVELS[-1]
DEEPEST = EXTRACTED_LEVELS[-1]
BIFPN_EPSILON = 1e-4  # EfficientDet's paper, of its fast normalised fusion


class TimmFeatures(nn.Module):
    """The stages C3 to C5 of a network of timm, without its classifier.

    The weights are fresh, initialised as timm does for this network; the norms have this
    library's epsilon and momentum. A 1x1 convolution that belongs to the classifier, such as
    EfficientNet's to 1280 channels, is left out.

    Args:
        name: a convolutional network of timm with five stages, of strides 2 to 32.
        activation: name of the activation in all blocks (`swish`, `relu`, or any that timm
            knows); None keeps the network's own.
        stochastic_depth: drop rate of the last block; it grows linearly with depth. In the
            EfficientNet family timm, as EfficientNet's own code, stops one block's step short.

    Attributes:
        feature_dims: level to channels, finest first.
    """

    def __init__(
        self, name: str, activation: str | None = None, stochastic_depth: float = 0.0
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"drop_path_rate": stochastic_depth} if stochastic_depth else {}
        if activation is not None:
            options["act_layer"] = activation
        stages = [level - 1 for level in EXTRACTED_LEVELS]
        network: Any = timm.create_model(name, features_only=True, out_indices=stages, **options)
        dims = network.feature_info.channels()
        self.feature_dims: dict[int, int] = dict(zip(EXTRACTED_LEVELS, dims, strict=True))
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


class FeaturePyramid(ExtractedPyramid):
    """FPN with RetinaNet's levels 6 and 7.

    A 1x1 convolution a stage, summed from the top down with nearest-neighbour upsampling; each
    sum is refined by a 3x3 convolution. P6 and P7 come by 3x3 convolutions of stride 2 from the
    level before, P7's after an activation. Each output has a norm (released code, as all of
    this).

    Args:
        extractor: gives C3 to C5.
        dim: channels of P3 to P7.
        activation: `swish` or `relu`.
        separable: make the 3x3 convolutions separable.
    """

    def __init__(self, extractor: TimmFeatures, dim: int, activation: str, separable: bool) -> None:
        super().__init__(extractor, OUTPUT_LEVELS, dim)
        self.neck = nn.ModuleDict()
        for level, inputs in extractor.feature_dims.items():
            self.neck[f"lateral_{level}"] = nn.Conv2d(inputs, dim, 1)
            self.neck[f"refine_{level}"] = _conv(dim, 1, separable)
        for level in range(DEEPEST + 1, COARSEST + 1):
            self.neck[f"coarser_{level}"] = _conv(dim, 2, separable)
        self.norms = nn.ModuleList(make_norm(dim) for _ in OUTPUT_LEVELS)
        self.activation = make_activation(activation)
        initialise(self.neck)

    def pyramid(self, stages: dict[int, Tensor]) -> dict[int, Tensor]:
        """Compute P3 to P7 of C3 to C5."""
        pyramid: dict[int, Tensor] = {}
        above: Tensor | None = None
        for level, stage in reversed(stages.items()):
            merged = self.neck[f"lateral_{level}"](stage)
            if above is not None:
                merged = merged + upsample(above, merged.shape[-2:])
            pyramid[level] = self.neck[f"refine_{level}"](merged)
            above = merged
        for level in range(DEEPEST + 1, COARSEST + 1):
            below = pyramid[level - 1]
            if level > DEEPEST + 1:
                below = self.activation(below.clone())
            pyramid[level] = self.neck[f"coarser_{level}"](below)
        return {
            level: norm(pyramid[level])
            for level, norm in zip(OUTPUT_LEVELS, self.norms, strict=True)
        }


class BiFPN(ExtractedPyramid):
    """EfficientDet's pyramid: repeated top-down and bottom-up passes with weighted fusion.

    P6 is C5 after a 1x1 convolution and max pooling, P7 the max pooling of P6. The convolutions
    have biases before their norms, as in EfficientDet's code.

    Args:
        extractor: gives C3 to C5.
        dim: channels of P3 to P7.
        repeats: passes in each direction.
        activation: `swish` or `relu`.
    """

    def __init__(self, extractor: TimmFeatures, dim: int, repeats: int, activation: str) -> None:
        super().__init__(extractor, OUTPUT_LEVELS, dim)
        self.coarser = _projection(extractor.feature_dims[DEEPEST], dim)
        dims = {**self.feature_dims, **extractor.feature_dims}
        self.cells = nn.ModuleList(
            BiFPNCell(dims if cell == 0 else self.feature_dims, dim, activation)
            for cell in range(repeats)
        )
        initialise(self.coarser)
        initialise(self.cells)

    def pyramid(self, stages: dict[int, Tensor]) -> dict[int, Tensor]:
        """Compute P3 to P7 of C3 to C5."""
        pyramid = dict(stages)
        coarsest = self.coarser(pyramid[DEEPEST])
        for level in range(DEEPEST + 1, COARSEST + 1):
            pyramid[level] = coarsest = overlapping_pool(coarsest)
        for cell in self.cells:
            pyramid = cell(pyramid)
        return pyramid


class BiFPNCell(nn.Module):
    """One top-down and one bottom-up pass over P3 to P7.

    An input of another dimension goes through a 1x1 convolution and norm, one of its own for
    each pass (EfficientDet's code).

    Args:
        dims: level to channels of the inputs.
        dim: channels of the outputs.
        activation: `swish` or `relu`.
    """

    def __init__(self, dims: dict[int, int], dim: int, activation: str) -> None:
        super().__init__()
        self.down, self.up = nn.ModuleDict(), nn.ModuleDict()
        for level in OUTPUT_LEVELS[:-1]:
            self.down[str(level)] = FusionNode((dims[level], dim), dim, activation)
        for level in OUTPUT_LEVELS[1:-1]:
            self.up[str(level)] = FusionNode((dims[level], dim, dim), dim, activation)
        self.up[str(COARSEST)] = FusionNode((dims[COARSEST], dim), dim, activation)

    def forward(self, pyramid: dict[int, Tensor]) -> dict[int, Tensor]:
        """Map inputs by level to outputs [N, dim, H, W] of the same sides by level."""
        downward = {COARSEST: pyramid[COARSEST]}
        for level in reversed(OUTPUT_LEVELS[:-1]):
            feature = pyramid[level]
            above = upsample(downward[level + 1], feature.shape[-2:])
            downward[level] = self.down[str(level)]([feature, above])
        outputs = {FINEST: downward[FINEST]}
        for level in OUTPUT_LEVELS[1:]:
            inputs = [pyramid[level], overlapping_pool(outputs[level - 1])]
            if level != COARSEST:
                inputs.insert(1, downward[level])
            outputs[level] = self.up[str(level)](inputs)
        return outputs


class FusionNode(nn.Module):
    """Fuse inputs of one resolution: 1x1 convolutions, weighted sum, activation, convolution.

    Args:
        inputs: channels of each input; one that has `dim` needs no 1x1 convolution.
        dim: channels of the output.
        activation: `swish` or `relu`.
    """

    def __init__(self, inputs: tuple[int, ...], dim: int, activation: str) -> None:
        super().__init__()
        self.project = nn.ModuleList(
            nn.Identity() if channels == dim else _projection(channels, dim) for channels in inputs
        )
        self.fuse = WeightedFusion(len(inputs), BIFPN_EPSILON)
        self.refine = nn.Sequential(
            make_activation(activation), SeparableConv(dim, dim, bias=True), make_norm(dim)
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """Fuse tensors [N, inputs[i], H, W] into [N, dim, H, W]."""
        projected = [
            project(feature) for project, feature in zip(self.project, features, strict=True)
        ]
        return self.refine(self.fuse(projected))


def _projection(inputs: int, dim: int) -> nn.Sequential:
    """A 1x1 convolution with bias, and its norm."""
    return nn.Sequential(nn.Conv2d(inputs, dim, 1), make_norm(dim))


def _conv(dim: int, stride: int, separable: bool) -> nn.Module:
    """A 3x3 convolution with bias that keeps the dimension, dense or separable."""
    groups = dim if separable else 1
    spatial = nn.Conv2d(dim, dim, KERNEL, stride, KERNEL // 2, groups=groups, bias=not separable)
    return nn.Sequential(spatial, nn.Conv2d(dim, dim, 1)) if separable else spatial


def overlapping_pool(features: Tensor, levels: int = 1) -> Tensor:
    """Divide the resolution by 2**levels, by max pooling over 3x3."""
    return F.max_pool2d(features, KERNEL, 2**levels, KERNEL // 2)
