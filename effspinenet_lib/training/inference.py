"""A copy of a model that gives the same predictions sooner."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from effspinenet_lib.kernels import DepthwiseConv2d, PointwiseConv2d
from effspinenet_lib.models.layers import (
    MBConv,
    Resample,
    SeparableConv,
    SpaceToDepth,
    SqueezeExcitation,
    pad_to_even,
)

PATCH = 2  # side of what space-to-depth moves into the channels
# Convolutions that compute what nn.Conv2d does; timm's have classes of their own.
CONVOLUTIONS = (nn.Conv2d, DepthwiseConv2d, PointwiseConv2d)
# Norms that may be folded, unless they have an activation (timm's).
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
# What torch's compiler calls for a convolution with an activation; no release documents it.
QUICK_CONVOLUTION = "_convolution_pointwise"
QUICK_DTYPES = (torch.float32, torch.bfloat16)


def inference_copy(model: nn.Module) -> nn.Module:
    """A copy of a model for evaluation, with less work and fewer passes over memory.

    Norms become part of the convolutions before them, where the two stand in an
    `nn.Sequential`. On processors convolutions add biases and apply swish as they write. In
    MBConv the gate of squeeze-and-excitation scales the weights of the projection rather than
    the features, and space-to-depth moves whole pixels. The norms of heads, one a level behind
    convolutions that the levels share, and those inside timm's blocks stay. Outputs differ by
    rounding.

    Args:
        model: any; it is left as it is.

    Returns:
        A model in evaluation mode, on the same device and of the same number format. It is to
        be used without gradients and outside autocast, which cost it its advantage.
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    for module in copied.modules():
        if isinstance(module, nn.Sequential):
            _fold_norms(module)
    for module in list(copied.modules()):
        if isinstance(module, Resample):
            _move_whole_pixels(module)
        elif isinstance(module, MBConv) and isinstance(module.excite, SqueezeExcitation):
            module.project = nn.Sequential(_GatedProjection(module.excite, module.project[0]))
            module.excite = nn.Identity()
    for module in list(copied.modules()):
        if not isinstance(module, _GatedProjection):
            _quicken(module)
    return copied


def _fold_norms(sequence: nn.Sequential) -> None:
    for index, (layer, norm) in enumerate(itertools.pairwise(list(sequence))):
        convolution = layer.pointwise if isinstance(layer, SeparableConv) else layer
        if not isinstance(norm, NORMS) or hasattr(norm, "act"):
            continue
        if isinstance(convolution, nn.Conv2d):
            fused = fuse_conv_bn_eval(convolution, norm)
            convolution.weight, convolution.bias = fused.weight, fused.bias
            sequence[index + 1] = nn.Identity()


def _quicken(module: nn.Module) -> None:
    """Replace the convolutions among a module's children, with the swish after them."""
    children = dict(module.named_children())
    names = list(children)
    for position, name in enumerate(names):
        if type(children[name]) not in CONVOLUTIONS:
            continue
        after = names[position + 1 : position + 3]
        swish = isinstance(module, nn.Sequential) and (
            [type(children[other]) for other in after] == [nn.Identity, nn.SiLU]
        )
        setattr(module, name, _QuickConv(children[name], swish))
        if swish:
            setattr(module, after[1], nn.Identity())


class _QuickConv(nn.Module):
    """A convolution, and the swish after it if there is one, in one pass where that can be."""

    def __init__(self, convolution: nn.Module, swish: bool) -> None:
        super().__init__()
        assert isinstance(convolution, nn.Conv2d)
        self.convolution = convolution
        self.swish = swish
        quick = convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)
        self.quick = quick and hasattr(torch.ops.mkldnn, QUICK_CONVOLUTION)

    def forward(self, features: Tensor) -> Tensor:
        layer = self.convolution
        if not self.quick or not _on_plain_processor(features, layer.weight):
            result: Tensor = layer(features)
            return F.silu(result) if self.swish else result
        quick: Tensor = getattr(torch.ops.mkldnn, QUICK_CONVOLUTION)(
            features,
            layer.weight,
            layer.bias,
            layer.padding,
            layer.stride,
            layer.dilation,
            layer.groups,
            "swish" if self.swish else "none",
            [],
            "",
        )
        return quick


def _on_plain_processor(features: Tensor, weight: Tensor) -> bool:
    return (
        features.device.type == "cpu"
        and features.dtype == weight.dtype
        and features.dtype in QUICK_DTYPES
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_grad_enabled()
    )


class _GatedProjection(nn.Module):
    """Squeeze-and-excitation and the 1x1 convolution after it: a matrix product an image."""

    def __init__(self, excite: SqueezeExcitation, project: nn.Module) -> None:
        super().__init__()
        assert isinstance(project, nn.Conv2d)
        self.excite = excite
        self.project = project

    def forward(self, features: Tensor) -> Tensor:
        bias = self.project.bias
        assert bias is not None
        gates = self.excite.gates(features).flatten(1)
        weights = gates[:, :, None] * self.project.weight.flatten(1).T
        pixels = features.permute(0, 2, 3, 1).flatten(1, 2)
        projected = torch.baddbmm(bias.to(pixels.dtype), pixels, weights.to(pixels.dtype))
        return projected.unflatten(1, features.shape[2:]).permute(0, 3, 1, 2)


def _move_whole_pixels(resample: Resample) -> None:
    """Let space-to-depth put the channels of a pixel side by side; they lie so in memory.

    The weights after it are put in the same order; pooling in between has none.
    """
    layers = list(resample.layers)
    if layers and isinstance(layers[0], SpaceToDepth):
        assert isinstance(layers[-1], nn.Sequential)
        convolution = layers[-1][0]
        assert isinstance(convolution, nn.Conv2d)
        by_pixel = convolution.weight.data.unflatten(1, (-1, PATCH**2)).transpose(1, 2)
        convolution.weight.data = by_pixel.flatten(1, 2).contiguous()
        resample.layers[0] = _PixelsToDepth()


class _PixelsToDepth(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        pixels = pad_to_even(features).permute(0, 2, 3, 1)
        patches = pixels.unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH))
        return patches.transpose(2, 3).flatten(3).permute(0, 3, 1, 2)
