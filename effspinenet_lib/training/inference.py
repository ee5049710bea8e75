"""A copy of a model for evaluation, with its norms folded into the convolutions before them."""

from __future__ import annotations

import copy
import itertools

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from effspinenet_lib.models.layers import SeparableConv

NORMS = nn.BatchNorm2d | nn.SyncBatchNorm


def inference_copy(model: nn.Module) -> nn.Module:
    """A copy of a model in evaluation mode, with norms folded where they can be.

    A norm becomes part of the convolution right before it in an `nn.Sequential`. Norms of heads,
    one a level behind convolutions that the levels share, and norms inside timm's blocks stay.
    Outputs differ by rounding.

    Args:
        model: any; it is left as it is.
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    for sequence in copied.modules():
        if not isinstance(sequence, nn.Sequential):
            continue
        for index, (layer, norm) in enumerate(itertools.pairwise(list(sequence))):
            convolution = layer.pointwise if isinstance(layer, SeparableConv) else layer
            # timm's norms may have an activation of their own
            if hasattr(norm, "act"):
                continue
            if isinstance(norm, NORMS) and isinstance(convolution, nn.Conv2d):
                fused = fuse_conv_bn_eval(convolution, norm)
                convolution.weight, convolution.bias = fused.weight, fused.bias
                sequence[index + 1] = nn.Identity()
    return copied
