"""What one image costs, measured on the module itself: multiply-adds, and the authors' count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models._efficientnet_blocks import (
    DepthwiseSeparableConv,
    InvertedResidual,
    SqueezeExcite,
)
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation as TorchvisionSqueezeExcitation

from effspinenet_lib.errors import UserError
from effspinenet_lib.models.dense import PyramidMean
from effspinenet_lib.models.layers import MBConv, SqueezeExcitation, WeightedFusion

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
# Activations that TensorFlow computes by a product.
PRODUCTS = (nn.SiLU, nn.Hardswish)
SQUEEZES = (SqueezeExcitation, TorchvisionSqueezeExcitation, SqueezeExcite)
TIMM_BLOCKS = (InvertedResidual, DepthwiseSeparableConv)
COUNTED = (
    *(*WEIGHTED, nn.BatchNorm2d, nn.AdaptiveAvgPool2d, *PRODUCTS),
    *(*SQUEEZES, *TIMM_BLOCKS, MBConv, WeightedFusion, PyramidMean),
)
# Single operations a channel of a norm that depend on no position (two of them a reciprocal root),
# and operations a weight that its initialiser puts into the graph.
NORM_OPERATIONS, INITIALISER_OPERATIONS = 5, 2


@dataclass(frozen=True)
class Cost:
    """What one image costs.

    Attributes:
        multi_adds: multiplications, each with its addition, of all convolutions and linear layers.
        authors_count: what the authors' `utils/benchmark_utils.py` gives for the same layers:
            TensorFlow's profiler's `total_float_ops / 2`. Beside the multiply-adds it holds half
            an operation an element for the product of a norm, of swish, of the gate of
            squeeze-and-excitation, of Equation 1's weights, for means, biases and residual sums;
            for each channel of a norm 2.5 operations; and one a weight, for its initialiser. It
            holds nothing for the sum of a norm or of inputs, sigmoid and resampling.
        parameters: trained numbers; the affine pair of a norm counts, its statistics do not.
    """

    multi_adds: int
    authors_count: float
    parameters: int

    def __str__(self) -> str:
        return (
            f"{self.multi_adds / 1e9:.2f} B multiply-adds, {self.authors_count / 1e9:.2f} B by "
            f"the authors' count, {self.parameters / 1e6:.2f} M parameters"
        )


def measure_cost(model: nn.Module, image_size: int | tuple[int, int]) -> Cost:
    """Run one zero image through the model and count what its layers do.

    Args:
        model: takes images [1, 3, H, W] in evaluation mode; its mode is restored. A model of
            the zoo runs its `network`, so that what it detects does not change the count.
        image_size: side, or (height, width), in pixels.

    Raises:
        UserError: the image size is too small for the model.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise UserError(f"image size {height}x{width} is not positive")
    multi_adds: list[int] = []
    operations: list[int] = []  # of all other layers, two to a multiply-add

    def count(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(layer, WEIGHTED):
            multi_adds.append(layer_multi_adds(layer, inputs[0], output))
            operations.append(output.numel() if layer.bias is not None else 0)
        else:
            operations.append(_operations(layer, inputs[0], output))

    counted = (layer for layer in model.modules() if isinstance(layer, COUNTED))
    hooks = [layer.register_forward_hook(count) for layer in counted]
    parameter = next(model.parameters())
    run: Callable[[Tensor], Any] = getattr(model, "network", model)
    was_training = model.training
    try:
        model.eval()
        with torch.inference_mode():
            run(torch.zeros(1, 3, height, width, device=parameter.device, dtype=parameter.dtype))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    for layer in model.modules():
        if isinstance(layer, WEIGHTED):
            operations.append(INITIALISER_OPERATIONS * layer.weight.numel())
        elif isinstance(layer, nn.BatchNorm2d):
            operations.append(NORM_OPERATIONS * layer.num_features)
    return Cost(
        sum(multi_adds),
        sum(multi_adds) + sum(operations) / 2,
        sum(p.numel() for p in model.parameters()),
    )


def _operations(layer: nn.Module, features: Any, output: Tensor) -> int:
    """Operations that the authors' tool counts in a layer without weights, for these tensors."""
    if isinstance(layer, SQUEEZES):
        return 2 * features.numel()  # mean and gate
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        return features.numel()
    if isinstance(layer, WeightedFusion):
        return len(features) * output.numel()
    if isinstance(layer, MBConv):
        return output.numel() if layer.residual else 0
    if isinstance(layer, TIMM_BLOCKS):
        return output.numel() if layer.has_skip else 0
    return output.numel()  # the product of a norm, of an activation, of a mean


def layer_multi_adds(layer: nn.Module, features: Tensor, output: Tensor) -> int:
    """Multiply-adds of one convolution or linear layer for the tensors it was run on.

    A weight of a convolution is used once for each output position, of a transposed one once
    for each input position, of a linear layer once for each row.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.Linear):
        return output.numel() * weight.shape[1]
    if isinstance(layer, TRANSPOSED):
        return features.numel() * weight[0].numel()
    return output.numel() * weight[0].numel()
