"""Building blocks: normalised convolutions, MBConv, resampling, weighted fusion."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from effspinenet_lib.kernels import DepthwiseConv2d, PointwiseConv2d
from effspinenet_lib.native import norm_activation, scale_channels

# Section 5.1.1: batch normalisation momentum 0.99, which PyTorch counts from the other end.
# Epsilon: released config.
NORM_MOMENTUM = 1 - 0.99
NORM_EPSILON = 1e-3
# Equation 1 prints 0.001 in the denominator.
FUSION_EPSILON = 1e-3
DEPTHWISE_KERNEL = 3
POOLING_KERNEL = 3
# The released code multiplies by this rounding of 1/6; with 1/6 its outputs differ by 1e-5.
HARD_SIGMOID_SLOPE = 0.16667

# In place only where the gradient needs the result alone: of the others torch copies the input.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "swish": nn.SiLU,
    "relu": lambda: nn.ReLU(inplace=True),
    "hard_swish": nn.Hardswish,
}


def make_activation(name: str) -> nn.Module:
    """Make an activation: `swish` (the paper's), `relu` (Table 4) or `hard_swish` (released)."""
    return ACTIVATIONS[name]()


def hard_sigmoid(values: Tensor) -> Tensor:
    """The released code's hard sigmoid: relu6(values + 3) * 0.16667."""
    return F.relu6(values + 3) * HARD_SIGMOID_SLOPE


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": hard_sigmoid,
}


def make_norm(channels: int) -> nn.BatchNorm2d:
    """Make the batch normalisation used everywhere in the library."""
    return nn.BatchNorm2d(channels, eps=NORM_EPSILON, momentum=NORM_MOMENTUM)


class ConvNorm(nn.Sequential):
    """A convolution, its norm and, if there is one, its activation."""

    def forward(self, features: Tensor) -> Tensor:
        """Map [N, C, H, W] as the layers do one after the other."""
        layers = list(self)
        if len(layers) not in (2, 3):  # a slice, or more was appended
            return super().forward(features)
        activation = layers[2] if len(layers) > 2 else None
        return norm_activation(layers[1], activation, layers[0](features))


def conv_norm(
    inputs: int,
    outputs: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    activation: str | None = None,
    same: bool = False,
) -> nn.Sequential:
    """Make a bias-free convolution with "same" padding, its norm and, if named, its activation.

    A stride of 2 gives ceil(side / 2). With `same` it is padded as in TensorFlow: on an even side
    one pixel less before than after, where PyTorch's padding has as many at both ends.
    """
    make_conv: type[nn.Conv2d] = nn.Conv2d
    if same and stride > 1:
        make_conv = Conv2dSame
    elif kernel == stride == groups == 1:
        make_conv = PointwiseConv2d
    elif inputs == outputs == groups:
        make_conv = DepthwiseConv2d
    layers: list[nn.Module] = [
        make_conv(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        make_norm(outputs),
    ]
    if activation is not None:
        layers.append(make_activation(activation))
    return ConvNorm(*layers)


def max_pool(same: bool = False) -> nn.Module:
    """Make the 3x3 max pooling that halves the sides, rounded up; `same` as in `conv_norm`."""
    if same:
        return MaxPool2dSame(POOLING_KERNEL, stride=2)
    return nn.MaxPool2d(POOLING_KERNEL, stride=2, padding=POOLING_KERNEL // 2)


class SqueezeExcitation(nn.Module):
    """Scale channels by a gate computed from their global mean (sigmoid, EfficientNet)."""

    def __init__(
        self, channels: int, squeezed: int, activation: str, gate: str = "sigmoid"
    ) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.activation = make_activation(activation)
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.gate = GATES[gate]

    def forward(self, features: Tensor) -> Tensor:
        """Map features [N, C, H, W] to the same shape."""
        return scale_channels(features, self.gates(features))

    def gates(self, features: Tensor) -> Tensor:
        """What the features [N, C, H, W] are scaled by: [N, C, 1, 1]."""
        # Not mean(): its gradient divides every pixel, this one a pixel for each channel.
        mean = features.sum((2, 3), keepdim=True) / features[0, 0].numel()
        return self.gate(self.expand(self.activation(self.reduce(mean))))


class MBConv(nn.Module):
    """Mobile inverted bottleneck: expand, depthwise, squeeze-and-excitation, project.

    Args:
        inputs: input channels.
        outputs: output channels.
        kernel: side of the depthwise kernel.
        stride: stride of the depthwise convolution.
        expansion_ratio: expanded channels over input channels.
        squeeze_ratio: squeezed channels over *input* channels; None leaves the layer out.
        activation: `swish` or `relu`.
        drop_rate: probability of dropping the residual branch for a sample.
        released: compute as the released code does: padding as in TensorFlow, and in
            squeeze-and-excitation ReLU and a hard sigmoid.

    The input is added where shape and stride allow.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int,
        expansion_ratio: int,
        squeeze_ratio: float | None,
        activation: str,
        drop_rate: float,
        released: bool = False,
    ) -> None:
        super().__init__()
        expanded = inputs * expansion_ratio
        self.expand = conv_norm(inputs, expanded, activation=activation)
        self.depthwise = conv_norm(
            expanded, expanded, kernel, stride, expanded, activation, same=released
        )
        gating = ("relu", "hard_sigmoid") if released else (activation, "sigmoid")
        self.excite = (
            nn.Identity()
            if squeeze_ratio is None
            else SqueezeExcitation(expanded, max(1, int(inputs * squeeze_ratio)), *gating)
        )
        self.project = conv_norm(expanded, outputs)
        self.residual = stride == 1 and inputs == outputs
        self.drop = StochasticDepth(drop_rate, mode="row")

    def forward(self, features: Tensor) -> Tensor:
        """Map features [N, inputs, H, W] to [N, outputs, ceil(H/stride), ceil(W/stride)]."""
        branch = self.project(self.excite(self.depthwise(self.expand(features))))
        return self.drop(branch) + features if self.residual else branch


class SeparableConv(nn.Module):
    """A 3x3 depthwise convolution and a 1x1 pointwise one, without norm or activation."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        padding = DEPTHWISE_KERNEL // 2
        self.depthwise = DepthwiseConv2d(
            inputs, inputs, DEPTHWISE_KERNEL, padding=padding, groups=inputs, bias=False
        )
        self.pointwise = PointwiseConv2d(inputs, outputs, 1, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map features [N, inputs, H, W] to [N, outputs, H, W]."""
        return self.pointwise(self.depthwise(features))


def dense_conv(inputs: int, outputs: int, bias: bool) -> nn.Conv2d:
    """Make a 3x3 convolution; takes the place of a `SeparableConv`."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def pad_to_even(features: Tensor) -> Tensor:
    """Pad [N, C, H, W] with zeros at the bottom and right to even sides."""
    height, width = features.shape[-2:]
    if height % 2 == 0 and width % 2 == 0:
        return features
    return F.pad(features, (0, width % 2, 0, height % 2))


class SpaceToDepth(nn.Module):
    """Move each 2x2 patch into channels: [N, C, H, W] to [N, 4C, ceil(H/2), ceil(W/2)]."""

    def forward(self, features: Tensor) -> Tensor:
        """Rearrange; an odd side is padded with zeros first."""
        return F.pixel_unshuffle(pad_to_even(features), 2)


class Resample(nn.Module):
    """Bring features from one level and dimension to another (Figure 2).

    Down, with `space_to_depth`: space-to-depth by 2, stride-2 max pooling for what remains,
    then a 1x1 convolution. Down, without: a 3x3 stride-2 depthwise convolution a level, then
    the 1x1. Up: nearest-neighbour to the target's exact sides, then the 1x1. At the same level
    the 1x1 alone, or nothing where the dimension is the same too. The split between
    space-to-depth and pooling is recovered from the cost columns; max pooling is our choice
    (SpineNet's).

    With `released`, the name of an activation, the released code's way without space-to-depth:
    the activation follows each depthwise convolution, padded as in TensorFlow, and the 1x1 is
    there even between blocks of one level and dimension.
    """

    def __init__(
        self,
        inputs: int,
        input_level: int,
        outputs: int,
        output_level: int,
        space_to_depth: bool,
        released: str | None = None,
    ) -> None:
        super().__init__()
        self.upsample = output_level < input_level
        steps = max(0, output_level - input_level)
        layers: list[nn.Module] = []
        if steps and space_to_depth:
            layers.append(SpaceToDepth())
            layers += [max_pool() for _ in range(steps - 1)]
            inputs *= 4
        else:
            same = released is not None
            layers += [
                conv_norm(inputs, inputs, DEPTHWISE_KERNEL, 2, inputs, released, same)
                for _ in range(steps)
            ]
        if input_level != output_level or inputs != outputs or released is not None:
            layers.append(conv_norm(inputs, outputs))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Map features [N, inputs, h, w] to [N, outputs, *size]; `size` is the target's."""
        if self.upsample:
            features = F.interpolate(features, size=size, mode="nearest")
        return self.layers(features)


class WeightedFusion(nn.Module):
    """Fast normalised fusion of Equation 1: sum(w_i B_i) / (sum(w_j) + 0.001).

    The weights start at 1 and are kept non-negative by a ReLU, as in EfficientDet.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(inputs))

    def forward(self, features: list[Tensor]) -> Tensor:
        """Fuse tensors of one shape [N, C, H, W] into one."""
        weights = self.weights.relu()
        weights = (weights / (weights.sum() + FUSION_EPSILON)).to(features[0].dtype)
        fused = features[0] * weights[0]
        for weight, feature in zip(weights[1:], features[1:], strict=True):
            fused = fused + feature * weight
        return fused


class SumFusion(nn.Module):
    """Plain sum of the inputs (Table 9 without weighted fusion)."""

    def forward(self, features: list[Tensor]) -> Tensor:
        """Add tensors of one shape [N, C, H, W]."""
        fused = features[0]
        for feature in features[1:]:
            fused = fused + feature
        return fused


class PyramidBackbone(nn.Module):
    """A backbone whose forward maps images to features by level, P3 to P7."""

    feature_dims: dict[int, int]  # level to channels, P3 first


def initialise(module: nn.Module) -> None:
    """Initialise convolutions by variance scaling (released config: VarianceScaling, fan in)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.trunc_normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
