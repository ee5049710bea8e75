"""The device of a process: accelerator, precision, memory, and norms shared between processes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import is_bf16_available, is_torch_xla_available
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn

from effspinenet_lib.training.recipe import Recipe

AUTO = "auto"  # an accelerator where there is one
CPU, GPU, TPU = "cpu", "gpu", "tpu"  # GPU: the accelerator that torch finds, of any maker
ACCELERATORS = (AUTO, CPU, GPU, TPU)
XLA = "xla"  # torch's device type on TPUs
STATIC_SHAPES = (XLA,)  # device types whose compiler builds a program for every shape
# Our choice: an accelerator waits for the host once in so many steps, to check the losses. A CPU
# has no queue of work that waiting would empty, so there they are checked at every step.
LOSS_CHECK_STEPS = 10
# As torch.cpu names the instructions. Our choice: a CPU that has bfloat16 in its vector
# instructions alone trains faster in float32 (benchmarks, `proxy`).
FAST_BFLOAT16 = "amx_bf16"
# Parameters of glibc's mallopt and the values that its manual gives for "never".
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER_TRIM, NEVER_MAP = -1, 0
NORMED = (0, 2, 3)  # dimensions that a norm averages over: images, rows and columns


def present_accelerators() -> set[str]:
    """The kinds of accelerators that this machine has."""
    found = torch.accelerator.current_accelerator(check_available=True)
    present = set() if found is None else {GPU}
    return present | {TPU} if is_torch_xla_available() else present


def make_accelerator() -> Accelerator:
    """The device of this process, and the others of its `torchrun` or `accelerate launch`.

    In float32: the loop opens its own autocast, since accelerate fixes one precision for the whole
    process. CPU processes share a run by gloo.
    """
    # accelerate joins CPU processes into one run only where the CPU is asked for
    return Accelerator(mixed_precision="no", cpu=not present_accelerators())


def loss_check_steps(device: torch.device) -> int:
    """Steps between two checks of the losses on `device`."""
    return 1 if device.type == CPU else LOSS_CHECK_STEPS


def end_step(device: torch.device) -> None:
    """Let XLA compute what a step has queued; other devices have begun already."""
    if device.type == XLA:
        from torch_xla.core import xla_model

        xla_model.mark_step()


def disable_malloc_trim() -> bool:
    """Let this process keep the memory of freed tensors for the next ones.

    glibc returns blocks of over 32 MiB to the system as they are freed, and the system clears
    every page of the next one, which takes a good part of a training step on a CPU.
    From here on the process keeps what it had at its peak.

    Returns:
        Whether it was done; false where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return all(
        library.mallopt(parameter, value) == 1
        for parameter, value in ((M_MMAP_MAX, NEVER_MAP), (M_TRIM_THRESHOLD, NEVER_TRIM))
    )


# --- Precision and hardware ----------------------------------------------------------------------


def resolve_precision(recipe: Recipe, device: torch.device) -> str:
    """The precision a run has on `device`: "float32" or "bfloat16"."""
    if recipe.precision != "auto":
        return recipe.precision
    fast = _cpu_facts().get(FAST_BFLOAT16) if device.type == CPU else is_bf16_available()
    return "bfloat16" if fast else "float32"


def autocast(recipe: Recipe, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context in which a model computes at the recipe's precision on `device`."""
    if resolve_precision(recipe, device) == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def describe_hardware(accelerator: Accelerator) -> str:
    """The device by name and how much of it there is: cores, or devices in use."""
    device = accelerator.device
    if device.type == CPU:
        name = _cpu_facts().get("cpu_name") or platform.machine()
        return f"{name}, {os.cpu_count()} cores"
    # torch has no module for XLA
    named = getattr(getattr(torch, device.type, None), "get_device_name", None)
    return f"{accelerator.num_processes} x {named(device) if named else device.type}"


def _cpu_facts() -> Mapping[str, Any]:
    # older torch cannot tell: then float32 is the safe answer
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return known


# Limits of batch renormalisation: Ioffe 2017, section 4.
RENORM_FACTOR, RENORM_SHIFT = 3.0, 5.0


# --- The model on its device ---------------------------------------------------------------------


def prepare_model(
    model: nn.Module, recipe: Recipe, accelerator: Accelerator, parts: int = 1
) -> nn.Module:
    """Give a model the recipe's norms, the accelerator's device and the memory layout.

    Norms are synchronised over processes, as the paper's are (section 5.1.1). With `parts` of a
    batch one after the other, their running statistics move as far in a step as with the batch.
    """
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1 - recipe.norm_momentum ** (1 / parts)
    if accelerator.num_processes > 1:
        model = synchronise_norms(model, accelerator.device)
    elif recipe.renorm_values:
        _replace_norms(model, lambda norm: RenormalisedNorm(norm, recipe.renorm_values))
    model = model.to(accelerator.device)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return accelerator.prepare_model(model)


def synchronise_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """A model with the names, weights and buffers of `model`, whose norms share statistics.

    It may be `model` itself, changed.
    """
    if device.type not in (CPU, XLA):
        # torch's own converter drops the activations inside timm's norms
        converted: nn.Module = convert_sync_batchnorm(model)
        return converted
    _replace_norms(model, SynchronisedNorm)
    return model


def _replace_norms(model: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, make(child))


class _OwnNorm(nn.BatchNorm2d):
    """A batch norm that normalises in a way of its own in training.

    Args:
        norm: whose settings, weights and buffers it takes over; timm's activation, too.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(norm.__dict__)

    def forward(self, features: Tensor) -> Tensor:
        """Normalise [N, C, H, W]."""
        result = self._normalise(features) if self.training else super().forward(features)
        for name in ("drop", "act"):  # of timm's norms
            result = getattr(self, name, nn.Identity())(result)
        return result

    def _normalise(self, features: Tensor) -> Tensor:
        return super().forward(features)


class RenormalisedNorm(_OwnNorm):
    """A batch norm that renormalises where it sees few values (Ioffe 2017).

    The statistics of few values bound what a norm gives in training, and nothing does in
    evaluation: at 128 pixels level 7 is one value an image, and some images ran away there.
    Renormalised features are those of the running statistics, up to Ioffe's limits.

    Args:
        norm: see `_OwnNorm`.
        few: values a channel below which it renormalises.
    """

    def __init__(self, norm: nn.BatchNorm2d, few: int) -> None:
        super().__init__(norm)
        self.few = few

    def _normalise(self, features: Tensor) -> Tensor:
        count = features.numel() // self.num_features
        if count >= self.few:
            return super()._normalise(features)
        with torch.no_grad():
            # by torch's own norm: on a CPU var_mean takes three times as long
            _, mean, inverse = torch.native_batch_norm(
                features.float(), None, None, None, None, True, 0.0, self.eps
            )
            deviation = inverse.reciprocal()
            known = (self.running_var + self.eps).sqrt()
            factor = (deviation / known).clamp(1 / RENORM_FACTOR, RENORM_FACTOR)
            shift = ((mean - self.running_mean) / known).clamp(-RENORM_SHIFT, RENORM_SHIFT)
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            variance = (deviation**2 - self.eps) * count / max(1, count - 1)
            self.running_var.lerp_(variance, self.momentum)
        weight, bias = self.weight * factor, torch.addcmul(self.bias, self.weight, shift)
        # torch.batch_norm takes a single value, too; the last False: by torch's own kernel
        return torch.batch_norm(features, weight, bias, None, None, True, 0.0, self.eps, False)


class SynchronisedNorm(_OwnNorm):
    """A batch norm over the images of all processes, on devices for which torch has none.

    In training every process calls it the same number of times.
    """

    def _normalise(self, features: Tensor) -> Tensor:
        values = features.float()
        if values.numel():
            own_variance, own_mean = torch.var_mean(values, NORMED, correction=0)
        else:  # no region at all, say; the sum keeps the empty tensor in the graph
            own_variance = own_mean = values.sum(NORMED)
        own_count = own_mean.new_full((1,), values.numel() // values.shape[1])
        state = PartialState()
        place = torch.arange(state.num_processes, device=values.device) == state.process_index
        shared = _Sum.apply(place[:, None] * torch.cat([own_mean, own_variance, own_count]))
        (means, variances), counts = shared[:, :-1].chunk(2, dim=1), shared[:, -1:]
        count = counts.sum()
        mean = (counts * means).sum(0) / count.clamp(min=1)
        variance = (counts * (variances + (means - mean) ** 2)).sum(0) / count.clamp(min=1)
        with torch.no_grad():  # the running statistics stay where no process has any values
            self.num_batches_tracked.add_(1)
            share = self.momentum * (count > 0)
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), share)
        scale = self.weight * (variance + self.eps).rsqrt()
        offset = self.bias - mean * scale
        return torch.addcmul(offset[:, None, None], values, scale[:, None, None]).to(features.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        if values.device.type == XLA:
            from torch_xla.core import xla_model

            summed: Tensor = xla_model.all_reduce(xla_model.REDUCE_SUM, values)
            return summed
        summed = values.clone()
        torch.distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Sum.apply(gradient)
