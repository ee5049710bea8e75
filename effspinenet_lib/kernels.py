"""Convolutions whose gradients take the fast way on processors.

torch hands convolutions to oneDNN, which has quick kernels for most of them. Some gradients fall
through to slow ones, 5 to 40 times slower: in channels_last layout the weight gradient of a
depthwise kernel wider than 3 or larger than its map, and the input gradient of a depthwise
convolution of stride 2 in bfloat16. They are computed here by way of the quick kernels; the results
differ by rounding only. Everywhere else torch's own way is taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# The widest kernel whose weight gradient oneDNN computes by its depthwise code.
QUICK_WIDTH = 3
# The kernel width that this module knows to take apart.
SPLIT_WIDTH = 5


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution; parameters and results are those of `nn.Conv2d`."""

    def forward(self, features: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C, h, w]."""
        if self.bias is None and self.padding_mode == "zeros" and _on_processor(features):
            features, weight = _autocast(features, self.weight)
            # On one pixel a stride moves nothing; torch's weight gradient of a stride of 2 reads
            # memory there that nobody wrote (seen with 2.14.1 in bfloat16).
            stride = (1, 1) if features.shape[2:].numel() == 1 else self.stride
            result: Tensor = _Depthwise.apply(features, weight, stride, self.padding)
            return result
        return super().forward(features)


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution; parameters and results are those of `nn.Conv2d`.

    In float32 a matrix product over the channels: torch gives 1x1 convolutions on one thread to
    code of its own, whose weight gradient is slower.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H, W]."""
        if features.dtype == torch.float32 and not _autocasting() and _on_processor(features):
            pixels = features.permute(0, 2, 3, 1)
            return F.linear(pixels, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        return super().forward(features)


def _on_processor(features: Tensor) -> bool:
    """Whether gradients will be computed on a processor, channels last."""
    return (
        torch.is_grad_enabled()
        and features.device.type == "cpu"
        and features.is_contiguous(memory_format=torch.channels_last)
    )


def _autocasting() -> bool:
    return torch.is_autocast_enabled("cpu")


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast gives them to a convolution."""
    if not _autocasting():
        return tensors
    dtype = torch.get_autocast_dtype("cpu")
    return tuple(tensor.to(dtype) for tensor in tensors)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(features, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        stride, padding = ctx.stride, ctx.padding
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        by_features, by_weight = None, None
        if ctx.needs_input_grad[0]:
            by_features = _features_gradient(gradient, features, weight, stride, padding)
        if ctx.needs_input_grad[1]:
            by_weight = _weight_gradient(gradient, features, weight, stride, padding)
        return by_features, by_weight, None, None


def _features_gradient(
    gradient: Tensor,
    features: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    slow = stride != (1, 1) and gradient.dtype == torch.bfloat16
    if not slow:
        return _gradients(gradient, features, weight, stride, padding, (True, False))[0]
    # The transposed convolution as a plain one: zeros between the gradients, kernel turned round.
    before = [kernel - 1 - pad for kernel, pad in zip(weight.shape[2:], padding, strict=True)]
    height, width = features.shape[2] + padding[0], features.shape[3] + padding[1]
    spread = torch.zeros(
        (*features.shape[:2], height + before[0], width + before[1]),
        dtype=gradient.dtype,
        device=gradient.device,
    ).contiguous(memory_format=torch.channels_last)
    rows = slice(before[0], before[0] + stride[0] * gradient.shape[2], stride[0])
    columns = slice(before[1], before[1] + stride[1] * gradient.shape[3], stride[1])
    spread[:, :, rows, columns] = gradient
    return F.conv2d(spread, weight.flip(2, 3), groups=len(weight))


def _weight_gradient(
    gradient: Tensor,
    features: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    height, width = weight.shape[2:]
    same = stride == (1, 1) and padding == (height // 2, width // 2)
    if not same or width not in (QUICK_WIDTH, SPLIT_WIDTH):
        return _gradients(gradient, features, weight, stride, padding, (False, True))[1]
    split = 2 if width == SPLIT_WIDTH else 1
    least = height, split * QUICK_WIDTH
    features, gradient = (_enlarge(tensor, least, split) for tensor in (features, gradient))
    if split == 1:
        return _gradients(gradient, features, weight, stride, padding, (False, True))[1]
    # Columns 1 to 3 are those of a kernel of 3 columns. Columns 0, 2 and 4 are too, where two
    # neighbouring pixels count as one of twice the channels.
    channels, padding = len(weight), (padding[0], QUICK_WIDTH // 2)
    inner = weight.new_empty((channels, 1, weight.shape[2], QUICK_WIDTH))
    outer = weight.new_empty((2 * channels, *inner.shape[1:]))
    by_inner = _gradients(gradient, features, inner, stride, padding, (False, True))[1]
    by_outer = _gradients(
        _pair_columns(gradient), _pair_columns(features), outer, stride, padding, (False, True)
    )[1]
    found = torch.empty_like(weight)
    found[..., ::2] = by_outer.view(2, *inner.shape).sum(0)
    found[..., 1:-1] = by_inner
    return found


def _enlarge(features: Tensor, least: tuple[int, int], multiple: int) -> Tensor:
    """Add zeros at the bottom and the right: to `least` sides, the width to a multiple.

    The quick kernels want a map of the size of their kernel or larger.
    """
    height, width = features.shape[2:]
    rows = max(0, least[0] - height)
    columns = max(0, least[1] - width)
    columns += -(width + columns) % multiple
    if rows == columns == 0:
        return features
    padded = F.pad(features, (0, columns, 0, rows))
    return padded.contiguous(memory_format=torch.channels_last)


def _pair_columns(features: Tensor) -> Tensor:
    """View [N, C, H, W] as [N, 2C, H, W/2], even columns first, without copying."""
    count, channels, height, width = features.shape
    pixels = features.permute(0, 2, 3, 1)
    return pixels.reshape(count, height, width // 2, 2 * channels).permute(0, 3, 1, 2)


def _gradients(
    gradient: Tensor,
    features: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """The gradients as torch has them, by the features and by the weight, those that are wanted."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        gradient, features, weight, None, stride, padding, (1, 1), False, (0, 0), len(weight),
        (*wanted, False),
    )  # fmt: skip
    return found[0], found[1]
