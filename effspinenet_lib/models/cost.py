"""Multi-Adds and parameters, measured on the module itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effspinenet_lib.errors import UserError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Cost:
    """What one image costs.

    Attributes:
        multi_adds: multiplications, each with its addition, of all convolutions and linear
            layers; norms, activations and post-processing are not counted, as in the paper.
        parameters: trained numbers; the affine pair of a norm counts, its statistics do not.
    """

    multi_adds: int
    parameters: int

    def __str__(self) -> str:
        return f"{self.multi_adds / 1e9:.2f} B multi-adds, {self.parameters / 1e6:.2f} M parameters"


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
    counted: list[int] = []
    hooks = [
        layer.register_forward_hook(_counter(counted))
        for layer in model.modules()
        if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear))
    ]
    parameter = next(model.parameters())
    run = getattr(model, "network", model)
    was_training = model.training
    try:
        model.eval()
        with torch.inference_mode():
            run(torch.zeros(1, 3, height, width, device=parameter.device, dtype=parameter.dtype))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return Cost(sum(counted), sum(p.numel() for p in model.parameters()))


def _counter(counted: list[int]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counted.append(layer_multi_adds(layer, inputs[0], output))

    return count


def layer_multi_adds(layer: nn.Module, features: Tensor, output: Tensor) -> int:
    """Multi-Adds of one convolution or linear layer for the tensors it was run on.

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
