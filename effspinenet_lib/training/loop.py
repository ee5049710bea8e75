"""The training loop: one generator that yields after every optimizer step.

What happens between steps (the curve, checkpoints, the progress bar) is the caller's. A step
is a pure function of the weights, the optimizer's state, the recipe, the seed and the step
number: all random generators are seeded anew at each step, and the loader's batch at step t
depends on nothing else. So a run that goes on from a checkpoint ends with the weights of one
that was not interrupted, whatever the number of processes.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import is_bf16_available, set_seed
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from effspinenet_lib.data import Batch
from effspinenet_lib.errors import TrainingError
from effspinenet_lib.recipes import Recipe
from effspinenet_lib.training.optim import learning_rate_at, set_learning_rate

NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16")  # as torch.cpu names the instructions


@dataclass(frozen=True)
class Step:
    """What one optimizer step did.

    Attributes:
        step: steps done, this one included.
        learning_rate: the rate of this step.
        losses: the model's losses, the mean over processes.
        images: images in the step, over all processes.
    """

    step: int
    learning_rate: float
    losses: dict[str, float]
    images: int


def seed_everything(*entropy: int) -> None:
    """Seed Python's, NumPy's and torch's generators from the numbers given."""
    # torch's generator on the processor keeps 32 bits of a seed, so they are mixed beforehand
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    set_seed(seed)


def native_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 itself rather than by way of float32."""
    if device.type != "cpu":
        return bool(is_bf16_available())
    return any(_processor_facts().get(name) for name in NATIVE_BFLOAT16)


def describe_hardware(accelerator: Accelerator) -> str:
    """The device by name and how much of it there is: cores, or devices in use."""
    device = accelerator.device
    if device.type == "cpu":
        name = _processor_facts().get("cpu_name") or platform.machine()
        return f"{name}, {os.cpu_count()} cores"
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    return f"{accelerator.num_processes} x {named(device) if named else device.type}"


def _processor_facts() -> Mapping[str, Any]:
    # older torch cannot tell: then float32 is the safe answer
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return known


def resolve_precision(recipe: Recipe, device: torch.device) -> str:
    """The precision a run has on `device`: "float32" or "bfloat16"."""
    if recipe.precision != "auto":
        return recipe.precision
    return "bfloat16" if native_bfloat16(device) else "float32"


def prepare_model(model: nn.Module, recipe: Recipe, accelerator: Accelerator) -> nn.Module:
    """Give a model the recipe's norms, the accelerator's device and the memory layout.

    Norms are synchronised over processes, as the paper's are.
    """
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1 - recipe.norm_momentum
    if accelerator.num_processes > 1 and accelerator.device.type != "cpu":
        # torch has no synchronised norm for processors
        # torch's own converter drops the activations inside timm's norms
        model = convert_sync_batchnorm(model)
    model = model.to(accelerator.device)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return accelerator.prepare_model(model)


def freeze_norms(model: nn.Module) -> None:
    """Let a model's norms use their running statistics and keep them; the rest trains on."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm):
            layer.eval()


def train_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    recipe: Recipe,
    accelerator: Accelerator,
    seed: int,
    start_step: int = 0,
) -> Iterator[Step]:
    """Train on `batches`, the first of which is that of step `start_step`; yield every step.

    The model takes (images float32 [N, 3, S, S], targets: one dict an image) in training mode
    and returns a dict of scalar losses; their sum is minimised.

    Raises:
        TrainingError: a loss is not finite; names the step and the images. The parameters are
            those of the step before.
    """
    device = accelerator.device
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    freeze_at = recipe.steps - recipe.norm_freeze_steps
    model.train()
    for step, given in enumerate(batches, start=start_step):
        if step == max(start_step, freeze_at):
            freeze_norms(model)
        batch = given.to(device)
        seed_everything(seed, step, accelerator.process_index)
        rate = learning_rate_at(recipe, step)
        set_learning_rate(optimizer, rate)
        images = batch.images.contiguous(memory_format=layout)
        with autocast(recipe, device):
            losses = model(images, batch.targets)
        stacked = torch.stack([loss.float() for loss in losses.values()])
        values = accelerator.reduce(stacked.detach().clone(), reduction="mean").tolist()
        named = dict(zip(losses, values, strict=True))
        _refuse_non_finite(named, step, batch.image_ids)
        accelerator.backward(stacked.sum())
        if recipe.clip_gradient_norm is not None:
            accelerator.clip_grad_norm_(model.parameters(), recipe.clip_gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield Step(step + 1, rate, named, len(images) * accelerator.num_processes)


def autocast(recipe: Recipe, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context in which a model computes at the recipe's precision on `device`."""
    if resolve_precision(recipe, device) == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _refuse_non_finite(losses: dict[str, float], step: int, image_ids: Iterable[int]) -> None:
    if all(math.isfinite(value) for value in losses.values()):
        return
    shown = ", ".join(f"{name} {value:g}" for name, value in losses.items())
    raise TrainingError(
        f"the loss of step {step + 1} is not finite ({shown}); images "
        f"{', '.join(map(str, image_ids))}; the last checkpoint is kept: look at these "
        "images, or lower the learning rate"
    )
