"""Norms whose statistics are those of the batches of all processes together (section 5.1.1)."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn import functional as F

from effspinenet_lib.training.devices import CPU, XLA

UNKNOWN_TO_TORCH = (CPU, XLA)  # devices that torch has no synchronised norm for
ALONG = (0, 2, 3)  # images, rows and columns


def synchronise_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """A model with the names, weights and buffers of `model`, whose norms share statistics.

    It may be `model` itself, changed.
    """
    if device.type not in UNKNOWN_TO_TORCH:
        # torch's own converter drops the activations inside timm's norms
        converted: nn.Module = convert_sync_batchnorm(model)
        return converted
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, SynchronisedNorm(child))
    return model


class SynchronisedNorm(nn.BatchNorm2d):
    """A batch norm over the images of all processes, and what timm's norms do after it.

    Args:
        norm: whose settings, weights and buffers it takes over.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(norm.__dict__)

    def forward(self, features: Tensor) -> Tensor:
        """Normalise [N, C, H, W]; in training every process calls this the same number of times."""
        if self.training:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            result: Tensor = _Normalise.apply(
                features,
                self.weight,
                self.bias,
                self.running_mean,
                self.running_var,
                self.momentum,
                self.eps,
            )
        else:
            result = super().forward(features)
        for name in ("drop", "act"):  # of timm's norms
            result = getattr(self, name, nn.Identity())(result)
        return result


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        epsilon: float,
    ) -> Tensor:
        own = _statistics(features)
        count = own[0].new_full((1,), features.numel() // features.shape[1])
        shared = _of_all_processes(torch.cat([*own, count]))
        (means, variances), counts = shared[:, :-1].chunk(2, dim=1), shared[:, -1:]
        any_seen = counts.sum() > 0  # of regions no process may have one
        total = counts.sum().clamp(min=1)
        mean = (counts * means).sum(0) / total
        variance = (counts * (variances + (means - mean) ** 2)).sum(0) / total
        running_mean.lerp_(mean, momentum * any_seen)
        running_var.lerp_(variance * total / (total - 1).clamp(min=1), momentum * any_seen)
        ctx.save_for_backward(features, weight, mean, variance, total)
        ctx.epsilon = epsilon
        return F.batch_norm(features, mean, variance, weight, bias, False, 0.0, epsilon)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, mean, variance, total = ctx.saved_tensors
        inverse = (variance + ctx.epsilon).rsqrt()
        if features.device.type == CPU and features.numel():
            # one pass, as if the statistics were constants; what they pass on comes off below
            by_features, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
                *(gradient, features, weight, mean, variance, None, None),
                *(False, ctx.epsilon, [True] * 3),
            )
        else:
            normalised = (features - _wide(mean)) * _wide(inverse)
            by_features = (gradient * _wide(weight * inverse)).to(gradient.dtype)
            by_weight, by_bias = (gradient * normalised).sum(ALONG), gradient.float().sum(ALONG)
        shared = _of_all_processes(torch.stack([by_weight, by_bias]))
        mean_by_weight, mean_by_bias = shared.sum(0) / total
        slope = weight * inverse**2 * mean_by_weight
        offset = weight * inverse * mean_by_bias - slope * mean
        by_features.addcmul_(features, _wide(slope), value=-1).sub_(_wide(offset))
        return by_features, by_weight, by_bias, None, None, None, None


def _wide(channels: Tensor) -> Tensor:
    """[C] as [C, 1, 1], which goes with [N, C, H, W]."""
    return channels[:, None, None]


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances of the channels in float32, the variances over all the values."""
    if not features.numel():  # a process without a single region, say
        nothing = torch.zeros(features.shape[1], device=features.device)
        return nothing, nothing
    if features.device.type != CPU:
        variance, mean = torch.var_mean(features.float(), ALONG, correction=0)
        return mean, variance
    unused = torch.zeros(features.shape[1])
    mean, variance = torch.batch_norm_update_stats(features, unused, unused.clone(), 0.0)
    return mean, variance


def _of_all_processes(own: Tensor) -> Tensor:
    """The same of every process: [processes, *own.shape]."""
    state = PartialState()
    rows = own.new_zeros(state.num_processes, *own.shape)
    rows[state.process_index] = own
    if own.device.type == XLA:
        from torch_xla.core import xla_model

        summed: Tensor = xla_model.all_reduce(xla_model.REDUCE_SUM, rows)
        return summed
    torch.distributed.all_reduce(rows)
    return rows
