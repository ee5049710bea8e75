"""The training loop: one generator that yields after every optimizer step.

What happens between steps (the curve, checkpoints, the progress bar) is the caller's. A step
is a pure function of the weights, the optimizer's state, the recipe, the seed and the step
number: all random generators are seeded anew at each step, and the loader's batch at step t
depends on nothing else. So a run that goes on from a checkpoint ends with the weights of one
that was not interrupted.

A process may compute its share of a batch in parts (gradient accumulation), and processes share
batches. Either way the losses and gradients are those of the whole batch: each part's losses are
weighted by its share of what they are means over, such as the positive anchors. What differs is
what sees a part rather than the batch: norms use its statistics (their momentum is changed so that
a step counts as before; between processes they are synchronised); dropout, stochastic depth and the
samples of Mask R-CNN draw other numbers, and Mask R-CNN's losses are weighted by images, for what
they are means over is sampled.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import is_bf16_available, set_seed
from torch import Tensor, nn

from effspinenet_lib.data import Batch
from effspinenet_lib.errors import Preempted, TrainingError, UserError
from effspinenet_lib.models.base import Target, TaskModel
from effspinenet_lib.training.ema import Ema
from effspinenet_lib.training.norms import synchronise_norms
from effspinenet_lib.training.optim import learning_rate_at, set_learning_rate
from effspinenet_lib.training.recipes import Recipe
from effspinenet_lib.training.stopping import StopRequest

# As torch.cpu names the instructions. Our choice: where a processor has bfloat16 in its vector
# instructions alone, this library trains faster in float32 (benchmarks, `proxy`).
FAST_BFLOAT16 = "amx_bf16"

_Part = tuple[Tensor, list[Target]]  # images and targets that are computed at once


@dataclass(frozen=True)
class Step:
    """What one optimizer step did.

    Attributes:
        step: steps done, this one included.
        learning_rate: the rate of this step.
        losses: the model's losses, of the whole batch.
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


def fast_bfloat16(device: torch.device) -> bool:
    """Whether `device` has units that multiply matrices in bfloat16."""
    if device.type != "cpu":
        return bool(is_bf16_available())
    return bool(_processor_facts().get(FAST_BFLOAT16))


def describe_hardware(accelerator: Accelerator) -> str:
    """The device by name and how much of it there is: cores, or devices in use."""
    device = accelerator.device
    if device.type == "cpu":
        name = _processor_facts().get("cpu_name") or platform.machine()
        return f"{name}, {os.cpu_count()} cores"
    # XLA has no module of torch's
    named = getattr(getattr(torch, device.type, None), "get_device_name", None)
    return f"{accelerator.num_processes} x {named(device) if named else device.type}"


def _processor_facts() -> Mapping[str, Any]:
    # older torch cannot tell: then float32 is the safe answer
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return known


def resolve_precision(recipe: Recipe, device: torch.device) -> str:
    """The precision a run has on `device`: "float32" or "bfloat16"."""
    if recipe.precision != "auto":
        return recipe.precision
    return "bfloat16" if fast_bfloat16(device) else "float32"


def prepare_model(
    model: nn.Module, recipe: Recipe, accelerator: Accelerator, parts: int = 1
) -> nn.Module:
    """Give a model the recipe's norms, the accelerator's device and the memory layout.

    Norms are synchronised over processes, as the paper's are. With `parts` of a batch one after
    the other, their running statistics move as far in a step as with the whole batch.
    """
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1 - recipe.norm_momentum ** (1 / parts)
    if accelerator.num_processes > 1:
        model = synchronise_norms(model, accelerator.device)
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
    micro_batch: int | None = None,
    ema: Ema | None = None,
    stop: StopRequest | None = None,
) -> Iterator[Step]:
    """Train on `batches`, the first of which is that of step `start_step`; yield every step.

    The model takes (images float32 [N, 3, S, S], targets: one dict an image) in training mode
    and returns a dict of scalar losses; their sum is minimised. What is raised leaves the model
    and the optimizer as after `stop.step` steps.

    Args:
        model: as `prepare_model` gave it; a `TaskModel` where batches have several parts.
        optimizer: of its parameters.
        batches: this process's share of every batch.
        recipe: how to train.
        accelerator: the device, and the other processes.
        seed: of the run.
        start_step: steps done before.
        micro_batch: images that are computed at once; None: the whole share.
        ema: takes in the weights after every step.
        stop: looked at before every step, where the processes stop together; its `step` is kept.

    Raises:
        TrainingError: a loss is not finite (names the step and the images), or the device has
            too little memory.
        Preempted: `stop` was asked for, or another process cannot go on.
        UserError: the batches, or what follows the steps, have failed.
    """
    stop = stop or StopRequest()
    freeze_at = recipe.steps - recipe.norm_freeze_steps
    buffers = _Buffers(model)
    model.train()
    step, source = start_step, iter(batches)
    stop.step = step
    while True:
        given = _next_batch(source, stop)
        _stop_together(stop, accelerator, step)
        if given is None:
            return
        if step == max(start_step, freeze_at):
            freeze_norms(model)
        parts = _split(given, micro_batch, recipe, accelerator.device)
        seed_everything(seed, step, accelerator.process_index)
        rate = learning_rate_at(recipe, step)
        set_learning_rate(optimizer, rate)
        buffers.keep()
        try:
            losses = _backward(model, parts, recipe, accelerator)
            _refuse_non_finite(losses, step, given.image_ids, accelerator)
        except Exception as error:
            buffers.restore()
            optimizer.zero_grad(set_to_none=True)
            if isinstance(error, torch.OutOfMemoryError):
                raise _out_of_memory(len(parts[0][0]), accelerator.device) from error
            raise
        if recipe.clip_gradient_norm is not None:
            accelerator.clip_grad_norm_(model.parameters(), recipe.clip_gradient_norm)
        stop.step = None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if ema is not None:
            ema.update(accelerator.unwrap_model(model), step)
        stop.step = step
        yield Step(step, rate, losses, len(given.images) * accelerator.num_processes)


class _Buffers:
    """The running statistics of a model before a step, which a step that fails gets back."""

    def __init__(self, model: nn.Module) -> None:
        buffers = list(model.buffers())
        # by type, for which torch copies many tensors at once
        self._groups = [[b for b in buffers if b.dtype == t] for t in {b.dtype for b in buffers}]
        self._kept = [[buffer.clone() for buffer in group] for group in self._groups]

    def keep(self) -> None:
        for kept, group in zip(self._kept, self._groups, strict=True):
            torch._foreach_copy_(kept, group)

    def restore(self) -> None:
        for kept, group in zip(self._kept, self._groups, strict=True):
            torch._foreach_copy_(group, kept)


def _next_batch(source: Iterator[Batch], stop: StopRequest) -> Batch | None:
    """The next batch, or None: at the end, or after a failure, of which `stop` tells."""
    try:
        return next(source, None)
    except UserError as error:
        stop.failure = stop.failure or error
        return None


def _stop_together(stop: StopRequest, accelerator: Accelerator, step: int) -> None:
    """Stop if any process has failed or was asked to: one that waits for another waits forever."""
    said = torch.tensor([stop.failure is not None, stop.signal != ""], device=accelerator.device)
    failed, asked = accelerator.reduce(said.float(), reduction="sum").tolist()
    if stop.failure is not None:
        raise stop.failure
    if failed:
        raise Preempted(f"stopped after step {step}, since another process cannot go on")
    if asked:
        raise Preempted(
            f"stopped after step {step} by {stop.signal or 'a signal to another process'}; the "
            "same command goes on from there"
        )


def _split(
    batch: Batch, micro_batch: int | None, recipe: Recipe, device: torch.device
) -> list[_Part]:
    """The batch on `device` in parts of about one size, at most `micro_batch` images."""
    moved = batch.to(device)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    images = moved.images.contiguous(memory_format=layout)
    count = math.ceil(len(images) / (micro_batch or len(images)))
    ends = [len(images) * part // count for part in range(count + 1)]
    return [(images[a:b], moved.targets[a:b]) for a, b in itertools.pairwise(ends)]


def _backward(
    model: nn.Module, parts: Sequence[_Part], recipe: Recipe, accelerator: Accelerator
) -> dict[str, float]:
    """Add up the gradients of the whole batch; its losses."""
    summed: dict[str, Tensor] = {}
    weights = _weights(accelerator.unwrap_model(model), parts, accelerator)
    for part, (images, targets), weight in zip(range(len(parts)), parts, weights, strict=True):
        last = part == len(parts) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            with autocast(recipe, accelerator.device):
                losses = model(images, targets)
            weighted = {name: loss.float() * weight for name, loss in losses.items()}
            # gradients are averaged over the processes, and here they are to be summed
            total = torch.stack(list(weighted.values())).sum() * accelerator.num_processes
            accelerator.backward(total)
        for name, loss in weighted.items():
            summed[name] = summed.get(name, 0.0) + loss.detach()
    values = accelerator.reduce(torch.stack(list(summed.values())), reduction="sum").tolist()
    return dict(zip(summed, values, strict=True))


def _weights(
    model: nn.Module, parts: Sequence[_Part], accelerator: Accelerator
) -> Sequence[Tensor | float]:
    """Factors with which the losses of all parts of all processes add up to the batch's."""
    if len(parts) == 1 and accelerator.num_processes == 1:
        return [1.0]
    assert isinstance(model, TaskModel)
    counts = torch.stack([model.loss_count(images, targets).float() for images, targets in parts])
    whole = accelerator.reduce(counts.sum(), reduction="sum")
    return list(model.loss_divisor(counts) / model.loss_divisor(whole))


def _out_of_memory(images: int, device: torch.device) -> TrainingError:
    return TrainingError(
        f"{device} has too little memory for {images} images at once; compute fewer at once "
        "(micro_batch), which leaves the batch as it is"
    )


def autocast(recipe: Recipe, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context in which a model computes at the recipe's precision on `device`."""
    if resolve_precision(recipe, device) == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _refuse_non_finite(
    losses: dict[str, float], step: int, image_ids: Sequence[int], accelerator: Accelerator
) -> None:
    if all(math.isfinite(value) for value in losses.values()):
        return
    shown = ", ".join(f"{name} {value:g}" for name, value in losses.items())
    ids = accelerator.gather(torch.tensor(image_ids, device=accelerator.device)).tolist()
    raise TrainingError(
        f"the loss of step {step + 1} is not finite ({shown}); images "
        f"{', '.join(map(str, ids))}; the last good state is kept: look at these images, or lower "
        "the learning rate"
    )
