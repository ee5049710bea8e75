"""The training loop: a generator that yields the losses of the steps it has done and checked.

A step is a pure function of the weights, the optimizer's state, the recipe, the seed and the step
number: all random generators are seeded at each step, and the loader's batch at step t depends on
nothing else. So a resumed run ends with the weights of one that was not interrupted.

A process may compute its share of a batch in parts (gradient accumulation), and processes share
batches. Either way the losses and gradients are those of the whole batch: a loss is a mean over
something, such as the positive anchors, and a part's counts by its number of those. What differs is
what sees a part rather than the batch: norms use its statistics (their momentum is changed so that
a step counts as before; between processes they are synchronised); dropout, stochastic depth and
the samples of Mask R-CNN draw other numbers, and Mask R-CNN's losses are weighted by images, since
what they are means over is sampled.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from effspinenet_lib.data.loader import Batch
from effspinenet_lib.errors import TrainingError
from effspinenet_lib.training.device import autocast, end_step, loss_check_steps
from effspinenet_lib.training.optim import learning_rate_at, set_learning_rate
from effspinenet_lib.training.preemption import Preemption
from effspinenet_lib.training.recipe import Recipe

# Our choice, as in the recipes that clip: a norm that uses its running statistics no longer bounds
# the features, and where those come from few values the gradient of the first frozen step can be
# thousands of times the usual one.
FROZEN_NORMS_CLIP = 5.0

Losses = dict[int, dict[str, float]]  # by the number of steps done, then by name
_OnDevice = tuple[tuple[str, ...], Tensor, tuple[int, ...]]  # names, losses and image ids of a step


def train_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    recipe: Recipe,
    accelerator: Accelerator,
    seed: int,
    start_step: int = 0,
    micro_batch: int | None = None,
    ema: ModelEmaV3 | None = None,
    preemption: Preemption | None = None,
) -> Iterator[Losses]:
    """Train on `batches`, the first of which is that of step `start_step`.

    Args:
        model: as `prepare_model` gave it. In training mode it maps images float32 [N, 3, S, S] and
            targets, one dict an image, to scalar losses, whose sum is minimised.
        optimizer: of its parameters.
        batches: this process's share of every batch.
        recipe: how to train.
        accelerator: the device, and the other processes.
        seed: of the run.
        start_step: steps done before.
        micro_batch: images that are computed at once; None: the whole share.
        ema: takes in the weights after every step.
        preemption: ends the steps when it was asked to; all processes agree on the step.

    Yields:
        The losses of the whole batch at each step since the last check; all are finite, and the
        model is in the state after the last of them. Checked is every `loss_check_steps`.

    Raises:
        TrainingError: a loss is not finite (names the step and the images), or the device has
            too little memory. The model's state is invalid.
    """
    preemption = preemption or Preemption()
    check_steps = loss_check_steps(accelerator.device)
    freeze_at = max(start_step, recipe.steps - recipe.norm_freeze_steps)
    clip = recipe.clip_gradient_norm
    unchecked: dict[int, _OnDevice] = {}
    model.train()
    for step, batch in enumerate(batches, start_step):
        if step == freeze_at:
            freeze_norms(model)
            clip = clip or FROZEN_NORMS_CLIP
        seed_everything(seed, step, accelerator.process_index)
        set_learning_rate(optimizer, learning_rate_at(recipe, step))
        losses = _backward(model, batch, recipe, accelerator, micro_batch)
        if clip is not None:
            accelerator.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update(accelerator.unwrap_model(model), step + 1)
        end_step(accelerator.device)
        values = torch.stack(list(losses.values()))
        unchecked[step + 1] = tuple(losses), values, batch.image_ids
        alone_and_asked = accelerator.num_processes == 1 and preemption.signal
        if (step + 1) % check_steps == 0 or alone_and_asked:
            yield _checked(unchecked, accelerator, preemption)
            if preemption.agreed:
                return
            unchecked = {}
    if unchecked:
        yield _checked(unchecked, accelerator, preemption)


def seed_everything(*entropy: int) -> None:
    """Seed Python's, NumPy's and torch's generators from the numbers given."""
    # torch's CPU generator keeps 32 bits of a seed, so they are mixed first
    set_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


def freeze_norms(model: nn.Module) -> None:
    """Let a model's norms use and keep their running statistics; the rest trains on."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm):
            layer.eval()


def _backward(
    model: nn.Module,
    batch: Batch,
    recipe: Recipe,
    accelerator: Accelerator,
    micro_batch: int | None,
) -> dict[str, Tensor]:
    """Add up the gradients of the whole batch; this process's share of its losses."""
    batch = batch.to(accelerator.device)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    images = batch.images.contiguous(memory_format=layout)
    count = math.ceil(len(images) / (micro_batch or len(images)))
    ends = [len(images) * part // count for part in range(count + 1)]
    parts = [(images[a:b], batch.targets[a:b]) for a, b in itertools.pairwise(ends)]

    weights: list[Tensor | float] = [1.0]
    if count * accelerator.num_processes > 1:
        task = accelerator.unwrap_model(model)
        counts = torch.stack([task.loss_count(*part).float() for part in parts])
        whole = accelerator.reduce(counts.sum(), reduction="sum")
        weights = list(task.loss_divisor(counts) / task.loss_divisor(whole))

    summed: dict[str, Tensor] = {}
    try:
        for number, (part, weight) in enumerate(zip(parts, weights, strict=True), start=1):
            last = number == count
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                with autocast(recipe, accelerator.device):
                    losses = model(*part)
                weighted = {name: loss.float() * weight for name, loss in losses.items()}
                # gradients are averaged over the processes, and here they are to be summed
                total = torch.stack(list(weighted.values())).sum() * accelerator.num_processes
                accelerator.backward(total)
            for name, loss in weighted.items():
                summed[name] = summed.get(name, 0.0) + loss.detach()
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"{accelerator.device} has too little memory for {ends[1]} images at once; "
            "compute fewer at once (micro_batch), which leaves the batch as it is"
        ) from error
    return summed


def _checked(
    steps: Mapping[int, _OnDevice], accelerator: Accelerator, preemption: Preemption
) -> Losses:
    """Wait for the losses and sum them over the processes; agree with these whether to stop."""
    shares = torch.stack([values for _, values, _ in steps.values()])
    asked = shares.new_tensor([preemption.signal != ""])
    summed = accelerator.reduce(torch.cat([shares.flatten(), asked]), reduction="sum").cpu()
    preemption.agreed = bool(summed[-1])
    checked: Losses = {}
    rows = summed[:-1].view_as(shares).tolist()
    for (step, (names, _, image_ids)), row in zip(steps.items(), rows, strict=True):
        checked[step] = dict(zip(names, row, strict=True))
        if not all(map(math.isfinite, row)):
            shown = ", ".join(f"{name} {value:g}" for name, value in checked[step].items())
            ids = accelerator.gather(torch.tensor(image_ids, device=accelerator.device))
            raise TrainingError(
                f"the loss of step {step} is not finite ({shown}); images "
                f"{', '.join(map(str, ids.tolist()))}; the last checkpoint is kept: look at these "
                "images, or lower the learning rate"
            )
    return checked
