"""Norms folded into the convolutions before them, for evaluation."""

from __future__ import annotations

import copy
import itertools

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from effspinenet_lib.layers import SeparableConv


def fold_norms(model: nn.Module) -> nn.Module:
    """A copy of a model for evaluation in which convolutions do the work of the norms after them.

    Each norm that follows a convolution in an `nn.Sequential` is folded, which are all of a
    backbone of this library; the norms of a head, one a level behind convolutions that the levels
    share, and those inside timm's blocks stay. Outputs differ by rounding.

    Args:
        model: any; it is left as it is.

    Returns:
        A model in evaluation mode, which cannot be trained.
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    for module in folded.modules():
        if isinstance(module, nn.Sequential):
            for index, (layer, norm) in enumerate(itertools.pairwise(list(module))):
                if type(norm) is nn.BatchNorm2d and _fold(layer, norm):
                    module[index + 1] = nn.Identity()
    return folded


def _fold(layer: nn.Module, norm: nn.BatchNorm2d) -> bool:
    """Fold the norm into the last convolution of a layer; false where the layer has none."""
    convolution = layer.pointwise if isinstance(layer, SeparableConv) else layer
    if not isinstance(convolution, nn.Conv2d):
        return False
    fused = fuse_conv_bn_eval(convolution, norm)
    convolution.weight, convolution.bias = fused.weight, fused.bias
    return True
