"""Building blocks: normalised convolutions, MBConv, resampling, weighted fusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

# Section 5.1.1: batch normalisation momentum 0.99, which PyTorch counts from the other end. The
# epsilon is the authors' code's. PyTorch keeps the unbiased variance of a batch, as TensorFlow's
# fused norm does; the authors' synchronised norm keeps the biased one.
NORM_MOMENTUM = 1 - 0.99
NORM_EPSILON = 1e-3
FUSION_EPSILON = 1e-3  # Equation 1
DEPTHWISE_KERNEL = 3
POOLING_KERNEL = 3
PATCH = 2 * 2  # positions that space-to-depth moves into the channels
# The Model Garden multiplies by this rounding of 1/6; with 1/6 its outputs differ by 1e-5.
HARD_SIGMOID_SLOPE = 0.16667
# Standard deviation of a normal distribution cut off at two of its own (TensorFlow divides by it).
TRUNCATED_STD = 0.87962566103423978

# ReLU's gradient needs its result alone, so it may overwrite its input; the others' need the input.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "swish": nn.SiLU,
    "relu": lambda: nn.ReLU(inplace=True),
    "hard_swish": nn.Hardswish,
}


def make_activation(name: str) -> nn.Module:
    """Make `swish` (the paper's), `relu` (Table 4) or `hard_swish` (the Model Garden's)."""
    return ACTIVATIONS[name]()


def hard_sigmoid(values: Tensor) -> Tensor:
    """The Model Garden's hard sigmoid: relu6(values + 3) * 0.16667."""
    return F.relu6(values + 3) * HARD_SIGMOID_SLOPE


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": hard_sigmoid,
}


def make_norm(channels: int) -> nn.BatchNorm2d:
    """Make the batch normalisation used everywhere in the library."""
    return nn.BatchNorm2d(channels, eps=NORM_EPSILON, momentum=NORM_MOMENTUM)


def set_norms(module: nn.Module) -> None:
    """Give norms that timm made this library's epsilon and momentum."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps, layer.momentum = NORM_EPSILON, NORM_MOMENTUM


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution that is safe on one pixel.

    There a stride moves nothing, but torch's weight gradient of a larger stride reads memory that
    nobody wrote (2.14.1 on CPUs, bfloat16, channels last).
    """

    def forward(self, features: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C, ceil(H / stride), ceil(W / stride)]."""
        if features.shape[-2:] == (1, 1):
            return F.conv2d(features, self.weight, self.bias, 1, self.padding, groups=self.groups)
        return super().forward(features)


def conv_norm(
    inputs: int,
    outputs: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    activation: str | None = None,
    same: bool = False,
) -> nn.Sequential:
    """Make a bias-free padded convolution, its norm and, if named, its activation.

    A stride gives ceil(side / stride). The padding is equal on both sides, as in the authors'
    code; with `same` it is TensorFlow's, on an even side one pixel less before than after.
    """
    make_conv: type[nn.Conv2d] = nn.Conv2d
    if same and stride > 1:
        make_conv = Conv2dSame
    elif inputs == outputs == groups:
        make_conv = DepthwiseConv2d
    layers: list[nn.Module] = [
        make_conv(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        make_norm(outputs),
    ]
    if activation is not None:
        layers.append(make_activation(activation))
    return nn.Sequential(*layers)


def upsample(features: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest neighbour to [N, C, *size]."""
    return F.interpolate(features, size=list(size), mode="nearest")


def max_pool(same: bool = False) -> nn.Module:
    """Make the 3x3 max pooling that halves the sides, rounded up; `same` as in `conv_norm`."""
    if same:
        return MaxPool2dSame(POOLING_KERNEL, stride=2)
    return nn.MaxPool2d(POOLING_KERNEL, stride=2, padding=POOLING_KERNEL // 2)


class SqueezeExcitation(nn.Module):
    """Scale channels by a gate computed from their global mean."""

    def __init__(self, channels: int, squeezed: int, activation: str, gate: str) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.activation = make_activation(activation)
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.gate = GATES[gate]

    def forward(self, features: Tensor) -> Tensor:
        """Map features [N, C, H, W] to the same shape."""
        mean = features.mean((2, 3), keepdim=True)
        return features * self.gate(self.expand(self.activation(self.reduce(mean))))


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
        gating: activation and gate of squeeze-and-excitation. The authors' code has swish there
            whatever the model's activation; the Model Garden has ReLU and a hard sigmoid.
        same: padding as TensorFlow's, see `conv_norm`.

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
        gating: tuple[str, str] = ("swish", "sigmoid"),
        same: bool = False,
    ) -> None:
        super().__init__()
        expanded = inputs * expansion_ratio
        self.expand = conv_norm(inputs, expanded, activation=activation)
        self.depthwise = conv_norm(expanded, expanded, kernel, stride, expanded, activation, same)
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

    def __init__(self, inputs: int, outputs: int, bias: bool, kernel: int = 3) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            inputs, inputs, kernel, padding=kernel // 2, groups=inputs, bias=False
        )
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map features [N, inputs, H, W] to [N, outputs, H, W]."""
        return self.pointwise(self.depthwise(features))


def separable_block(dim: int, activation: str) -> nn.Sequential:
    """Make a `SeparableConv` that keeps the channels, its norm and its activation."""
    return nn.Sequential(
        SeparableConv(dim, dim, bias=True), make_norm(dim), make_activation(activation)
    )


def dense_conv(inputs: int, outputs: int, bias: bool) -> nn.Conv2d:
    """Make a 3x3 convolution; takes the place of a `SeparableConv`."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


class SpaceToDepth(nn.Module):
    """Move each 2x2 patch into channels: [N, C, H, W] to [N, 4C, ceil(H/2), ceil(W/2)].

    PyTorch's order of channels (channel * 4 + offset); TensorFlow's is offset * C + channel.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Rearrange; an odd side is padded with zeros at its end first."""
        height, width = features.shape[-2:]
        if height % 2 or width % 2:
            features = F.pad(features, (0, width % 2, 0, height % 2))
        return F.pixel_unshuffle(features, 2)


class Resample(nn.Module):
    """Bring features from one level and dimension to another (Figure 2, and the authors' code).

    Down, with `space_to_depth`: space-to-depth by 2, norm, activation; for a factor above 2 one
    depthwise convolution of stride factor / 2 (kernel 3 for a factor of 4, else 5), norm,
    activation. Down, without: for each halving a 3x3 stride-2 depthwise convolution, norm,
    activation. Up: nearest neighbour to the target's exact sides. Then, at equal levels too, a 1x1
    convolution and a norm without activation.
    """

    def __init__(
        self,
        inputs: int,
        input_level: int,
        outputs: int,
        output_level: int,
        space_to_depth: bool,
        activation: str,
        same: bool = False,
    ) -> None:
        super().__init__()
        self.upsample = output_level < input_level
        steps = max(0, output_level - input_level)
        layers: list[nn.Module] = []
        if steps and space_to_depth:
            inputs *= PATCH
            layers += [SpaceToDepth(), make_norm(inputs), make_activation(activation)]
            if steps > 1:
                kernel, stride = (3 if steps == 2 else 5), 2 ** (steps - 1)
                layers.append(conv_norm(inputs, inputs, kernel, stride, inputs, activation))
        else:
            layers += [
                conv_norm(inputs, inputs, DEPTHWISE_KERNEL, 2, inputs, activation, same)
                for _ in range(steps)
            ]
        layers.append(conv_norm(inputs, outputs))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Map features [N, inputs, h, w] to [N, outputs, *size]; `size` is the target's."""
        if self.upsample:
            features = upsample(features, size)
        return self.layers(features)


class WeightedFusion(nn.Module):
    """Fast normalised fusion of Equation 1: sum(w_i B_i) / (sum(w_j) + 0.001).

    The weights start at 1 and are kept non-negative by a ReLU (EfficientDet's, and the Model
    Garden's `weighted_fusion`, which cites this paper).
    """

    def __init__(self, inputs: int, epsilon: float = FUSION_EPSILON) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(inputs))
        self.epsilon = epsilon

    def forward(self, features: list[Tensor]) -> Tensor:
        """Fuse tensors of one shape [N, C, H, W] into one."""
        weights = self.weights.relu()
        weights = (weights / (weights.sum() + self.epsilon)).to(features[0].dtype)
        fused = features[0] * weights[0]
        for weight, feature in zip(weights[1:], features[1:], strict=True):
            fused = fused + feature * weight
        return fused


class SumFusion(nn.Module):
    """Plain sum of the inputs (Table 9 without weighted fusion; the authors' code)."""

    def forward(self, features: list[Tensor]) -> Tensor:
        """Add tensors of one shape [N, C, H, W]."""
        return sum(features[1:], features[0])


class PyramidBackbone(nn.Module):
    """A backbone whose forward maps images to features by level, P3 to P7."""

    feature_dims: dict[int, int]  # level to channels, P3 first


def initialise(module: nn.Module) -> None:
    """Initialise convolutions and linear layers as the authors' backbone does.

    Variance scaling by fan in, a normal distribution cut off at two deviations; depthwise
    kernels by Glorot's uniform distribution (the sum of their fans is Keras'); biases 0.
    """
    for layer in module.modules():
        if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            continue
        if isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels:
            nn.init.xavier_uniform_(layer.weight)
        else:
            std = layer.weight[0].numel() ** -0.5 / TRUNCATED_STD
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def initialise_head(module: nn.Module) -> None:
    """Initialise separable and linear layers as the authors' heads do, by Keras' default.

    Glorot's uniform distribution, biases 0.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
