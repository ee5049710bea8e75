"""The compiled functions as torch's: what they take, and their gradients."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from effspinenet_lib.native.library import load_library

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
SWISH = "_swish"
REFUSED = -1.0  # what the focal loss is where a class is none of the logits'; torch then says so
KEPT = 4  # numbers a channel that the gradient of a norm needs
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def norm_activation(norm: nn.Module, activation: nn.Module | None, features: Tensor) -> Tensor:
    """What `activation(norm(features))` is, or `norm(features)` without one.

    In training on a processor, of torch's batch norm and SiLU on a channels-last tensor in
    float32 or bfloat16, it is computed in two passes over memory and its gradient in two, with
    the features alone kept for the gradient; results differ by rounding. Everything else is
    left to the modules. The gradient cannot be differentiated again.

    Args:
        norm: any.
        activation: any, or None.
        features: [N, C, H, W].

    Returns:
        As the modules give it: [N, C, H, W] for a norm.
    """
    if not _takes(norm, activation, features):
        result: Tensor = norm(features)
        return result if activation is None else activation(result)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    fused: Tensor = _NormActivation.apply(
        features,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        norm.momentum,
        norm.eps,
        NAMES[features.dtype] + (SWISH if activation is not None else ""),
    )
    return fused


def scale_channels(features: Tensor, gates: Tensor) -> Tensor:
    """What `features * gates` is; on a processor its gradients take one pass over memory.

    Args:
        features: [N, C, H, W].
        gates: [N, C, 1, 1].

    Returns:
        [N, C, H, W].
    """
    fits = gates.dtype == features.dtype and gates.shape == (*features.shape[:2], 1, 1)
    if not (fits and _may_compute(features) and _is_plain(gates)):
        return features * gates
    result: Tensor = _ScaleChannels.apply(features, gates)
    return result


def write_focal_slopes(
    logits: Tensor, classes: Tensor, kept: Tensor, alpha: float, gamma: float, slopes: Tensor
) -> Tensor | None:
    """The sum of the focal loss of independent classes; writes its gradient to `slopes`.

    Args:
        logits: [R, C].
        classes: int64 [R], the class of each row; negative where it has none.
        kept: bool [R], the rows that count.
        alpha: weight of the classes that are there; the others have one minus it.
        gamma: power of what is missing to the right probability.
        slopes: as `logits`, contiguous; what it holds is lost.

    Returns:
        A scalar in float32, or None where torch is to compute it.
    """
    if not _is_for_compiled(logits):
        return None
    logits, classes, kept = logits.contiguous(), classes.long(), kept.bool()
    total = ctypes.c_double()
    run(
        f"focal_{NAMES[logits.dtype]}",
        *(logits, classes.contiguous(), kept.contiguous(), slopes, ctypes.addressof(total)),
        *(alpha, gamma, *logits.shape, torch.get_num_threads()),
    )
    if total.value == REFUSED:
        return None
    return logits.new_tensor(total.value, dtype=torch.float32)


def run(name: str, *arguments: Any) -> None:
    """Call a compiled function; of tensors it gets the addresses."""
    library = load_library()
    assert library is not None
    given = (value.data_ptr() if isinstance(value, Tensor) else value for value in arguments)
    getattr(library, name)(*given)


def _takes(norm: nn.Module, activation: nn.Module | None, features: Tensor) -> bool:
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.track_running_stats
        and norm.num_batches_tracked is not None
        and norm.momentum is not None
        and (activation is None or type(activation) is nn.SiLU)
        and not any(getattr(norm, hooks) or getattr(activation, hooks, None) for hooks in HOOKS)
        and features.numel() > norm.num_features  # of one number torch refuses the variance
        and _may_compute(features)
        and all(
            isinstance(values, Tensor)
            and _is_plain(values)
            and values.dtype == torch.float32
            and values.shape == features.shape[1:2]
            and values.is_contiguous()
            for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
    )


def _may_compute(features: Tensor) -> bool:
    return (
        torch.is_grad_enabled()
        and features.dim() == len("NCHW")
        and features.is_contiguous(memory_format=torch.channels_last)
        and _is_for_compiled(features)
    )


def _is_for_compiled(values: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and _is_plain(values)
        and values.dtype in NAMES
        and load_library() is not None
    )


def _is_plain(values: Tensor) -> bool:
    """Whether it has memory of the processor's; subclasses may only pretend to."""
    return type(values) in (Tensor, nn.Parameter) and values.device.type == "cpu"


class _NormActivation(torch.autograd.Function):
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
        ending: str,
    ) -> Tensor:
        channels = features.shape[1]
        result = torch.empty_like(features)
        kept = features.new_empty(KEPT, channels, dtype=torch.float32)
        run(
            f"forward_{ending}",
            *(features, weight, bias, running_mean, running_var, result, kept),
            *(momentum, epsilon, features.numel(), channels, torch.get_num_threads()),
        )
        ctx.save_for_backward(features, kept)
        ctx.ending = ending
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, kept = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        channels = features.shape[1]
        by_features = torch.empty_like(features)
        by_weight, by_bias = kept.new_empty(channels), kept.new_empty(channels)
        run(
            f"backward_{ctx.ending}",
            *(features, gradient, kept, by_features, by_weight, by_bias),
            *(features.numel(), channels, torch.get_num_threads()),
        )
        return by_features, by_weight, by_bias, None, None, None, None, None


class _ScaleChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, gates: Tensor) -> Tensor:
        ctx.save_for_backward(features, gates)
        return features * gates

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        features, gates = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        images, channels = features.shape[:2]
        by_features = torch.empty_like(features)
        by_gates = features.new_empty(images, channels, dtype=torch.float32)
        run(
            f"scale_backward_{NAMES[features.dtype]}",
            *(features, gradient, gates.flatten(1).float().contiguous(), by_features, by_gates),
            *(images, features[0].numel(), channels, torch.get_num_threads()),
        )
        return by_features, by_gates.to(gates.dtype).view_as(gates)
