"""The training loop: one generator that yields the steps whose losses it has checked.

A step is a pure function of the weights, the optimizer's state, the recipe, the seed and the step
number: all random generators are seeded at each step, and the loader's batch at step t depends on
nothing else. So a resumed run ends with the weights of one that was not interrupted.

A process may compute its share of a batch in parts (gradient accumulation), and processes share
batches. Either way the losses and gradients are those of the whole batch: each part's losses are
weighted by its share of what they are means over, such as the positive anchors. What differs is
what sees a part rather than the batch: norms use its statistics (their momentum is changed so that
a step counts as before; between processes they are synchronised); dropout, stochastic depth and
the samples of Mask R-CNN draw other numbers, and Mask R-CNN's losses are weighted by images, since
what they are means over is sampled.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from effspinenet_lib.data import Batch
from effspinenet_lib.errors import Preempted, TrainingError
from effspinenet_lib.models.base import Target, TaskModel
from effspinenet_lib.training.device import autocast, end_step, loss_check_steps
from effspinenet_lib.training.optim import Ema, learning_rate_at, set_learning_rate
from effspinenet_lib.training.preemption import Preemption
from effspinenet_lib.training.recipe import Recipe

# Our choice, as in the recipes that clip: a norm that uses its running statistics no longer bounds
# the features, and where those come from few values the gradient of the first frozen step can be
# thousands of times the usual one.
FROZEN_NORMS_CLIP = 5.0

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


@dataclass(frozen=True)
class _Unchecked:
    """A step whose losses are still on the device: this process's share of them, [losses]."""

    step: int
    learning_rate: float
    names: tuple[str, ...]
    losses: Tensor
    image_ids: tuple[int, ...]


def seed_everything(*entropy: int) -> None:
    """Seed Python's, NumPy's and torch's generators from the numbers given."""
    # torch's CPU generator keeps 32 bits of a seed, so they are mixed first
    set_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


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
    preemption: Preemption | None = None,
) -> Iterator[list[Step]]:
    """Train on `batches`, the first of which is that of step `start_step`.

    The model takes (images float32 [N, 3, S, S], targets: one dict an image) in training mode
    and returns a dict of scalar losses; their sum is minimised.

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
        preemption: whether to stop; processes agree on it when losses are checked.

    Yields:
        The steps since the last check, every `device.loss_check_steps`; all their losses are
        finite. The model is in the state after the last of them.

    Raises:
        TrainingError: a loss is not finite (names the step and the images), or the device has
            too little memory. The model's state is invalid.
        Preempted: asked to stop; the last steps have been yielded.
    """
    preemption = preemption or Preemption()
    check_steps = loss_check_steps(accelerator.device)
    freeze_at = max(start_step, recipe.steps - recipe.norm_freeze_steps)
    clip = recipe.clip_gradient_norm
    unchecked: list[_Unchecked] = []
    model.train()
    for step, batch in enumerate(batches, start_step):
        if step == freeze_at:
            freeze_norms(model)
            clip = clip or FROZEN_NORMS_CLIP
        seed_everything(seed, step, accelerator.process_index)
        rate = learning_rate_at(recipe, step)
        set_learning_rate(optimizer, rate)
        losses = _backward(
            model, _split(batch, micro_batch, recipe, accelerator), recipe, accelerator
        )
        if clip is not None:
            accelerator.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update_after(accelerator.unwrap_model(model), step + 1)
        end_step(accelerator.device)
        values = torch.stack(list(losses.values()))
        unchecked.append(_Unchecked(step + 1, rate, tuple(losses), values, batch.image_ids))
        alone_and_asked = accelerator.num_processes == 1 and preemption.signal
        if (step + 1) % check_steps == 0 or alone_and_asked:
            yield from _check(unchecked, preemption, accelerator)
            unchecked = []
    if unchecked:
        yield from _check(unchecked, preemption, accelerator)


def freeze_norms(model: nn.Module) -> None:
    """Let a model's norms use and keep their running statistics; the rest trains on."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm):
            layer.eval()


def _split(
    batch: Batch, micro_batch: int | None, recipe: Recipe, accelerator: Accelerator
) -> list[_Part]:
    """The batch on the device in parts of about one size, at most `micro_batch` images."""
    moved = batch.to(accelerator.device)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    images = moved.images.contiguous(memory_format=layout)
    count = math.ceil(len(images) / (micro_batch or len(images)))
    ends = [len(images) * part // count for part in range(count + 1)]
    return [(images[a:b], moved.targets[a:b]) for a, b in itertools.pairwise(ends)]


def _backward(
    model: nn.Module, parts: Sequence[_Part], recipe: Recipe, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Add up the gradients of the whole batch; this process's share of its losses."""
    summed: dict[str, Tensor] = {}
    weights = _weights(accelerator.unwrap_model(model), parts, accelerator)
    try:
        for part, ((images, targets), weight) in enumerate(zip(parts, weights, strict=True)):
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
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"{accelerator.device} has too little memory for {len(parts[0][0])} images at once; "
            "compute fewer at once (micro_batch), which leaves the batch as it is"
        ) from error
    return summed


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


def _check(
    unchecked: Sequence[_Unchecked], preemption: Preemption, accelerator: Accelerator
) -> Iterator[list[Step]]:
    """Wait for the losses, sum them over the processes, and stop if any process was asked to.

    Raises:
        TrainingError: a loss is not finite.
        Preempted: a process was asked to stop, after the steps were yielded.
    """
    shares = torch.stack([step.losses for step in unchecked])
    asked = shares.new_tensor([preemption.signal != ""])
    summed = accelerator.reduce(torch.cat([shares.flatten(), asked]), reduction="sum").cpu()
    steps = []
    for one, row in zip(unchecked, summed[:-1].view_as(shares).tolist(), strict=True):
        losses = dict(zip(one.names, row, strict=True))
        if not all(map(math.isfinite, row)):
            shown = ", ".join(f"{name} {value:g}" for name, value in losses.items())
            ids = accelerator.gather(torch.tensor(one.image_ids, device=accelerator.device))
            raise TrainingError(
                f"the loss of step {one.step} is not finite ({shown}); images "
                f"{', '.join(map(str, ids.tolist()))}; the last checkpoint is kept: look at these "
                "images, or lower the learning rate"
            )
        images = len(one.image_ids) * accelerator.num_processes
        steps.append(Step(one.step, one.learning_rate, losses, images))
    yield steps
    if summed[-1]:
        raise Preempted(
            f"stopped after step {steps[-1].step} by "
            f"{preemption.signal or 'a signal to another process'}; the same command resumes there"
        )
