"""A trained model for use: norms folded into convolutions, or a program without this library."""

from __future__ import annotations

import copy
import itertools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from effspinenet_lib.files import atomic_write
from effspinenet_lib.models.base import TaskModel

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def inference_copy(model: nn.Module) -> nn.Module:
    """A copy of a model in evaluation mode, with norms folded into the convolutions before them.

    Folded are norms that follow a convolution in an `nn.Sequential`. Those of heads, one a level
    after convolutions that the levels share, and those inside timm's blocks stay. Outputs differ
    by rounding.
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    for module in copied.modules():
        if isinstance(module, nn.Sequential):
            _fold_norms(module)
    return copied


def _fold_norms(sequence: nn.Sequential) -> None:
    layers: list[Any] = list(sequence)
    for index, (layer, norm) in enumerate(itertools.pairwise(layers)):
        convolution = getattr(layer, "pointwise", layer)  # the last of a separable one
        # timm's norms may hold an activation
        folds = isinstance(norm, NORMS) and not hasattr(norm, "act")
        if folds and isinstance(convolution, nn.Conv2d):
            fused = fuse_conv_bn_eval(convolution, norm)
            convolution.weight, convolution.bias = fused.weight, fused.bias
            sequence[index + 1] = nn.Identity()


class _Network(nn.Module):
    """What is exported: the layers, without decoding."""

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model.network(images)


def export_model(model: TaskModel, image_size: int, path: str | os.PathLike[str]) -> Path:
    """Write the network of a model with `torch.export`, for images [1, 3, S, S].

    `torch.export.load(path).module()` maps normalised images to what the model's `network`
    gives.

    Args:
        model: of any task; on the CPU.
        image_size: S, in pixels.
        path: the file to write; `.pt2` is torch's ending.

    Raises:
        UserError: the image size is too small, or the file cannot be written.
    """
    images = torch.zeros(1, 3, image_size, image_size)
    training = model.training
    network = _Network(model).eval()
    try:
        with torch.no_grad():
            model.network(images)  # refuses a wrong size, and caches what it needs for this one
            program = torch.export.export(network, (images,))
    finally:
        model.train(training)
    with atomic_write(path, "wb") as handle:
        torch.export.save(program, handle)
    return Path(path)
