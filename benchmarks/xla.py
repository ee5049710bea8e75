"""Training steps on XLA, the compiler of TPUs, against plain PyTorch.

    make xla                   # in an environment of its own
    python -m benchmarks.xla   # in one with torch_xla

XLA builds a program for every new shape, which takes minutes. Here it computes on the CPU.
The library's own loop trains on padded targets; the losses of every step must be those of plain
PyTorch, and after the third step nothing may be built. (An optimizer's step is computed with
the next one; the first and the second differ, for the momentum is new in the first. The learning
rate drops after the third.) The norms are those of several cores, here of one. Exits with 1 if
either does not hold.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

# Read when torch_xla is loaded, by accelerate too. The programs run for a moment: building them
# fast matters more than what they gain by optimisation.
os.environ.setdefault("PJRT_DEVICE", "CPU")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import torch
from accelerate import Accelerator

from effspinenet_lib import create_model
from effspinenet_lib.data import DataConfig, Dataset, classes_of, open_dataset
from effspinenet_lib.data.augment import MAX_OBJECTS, Augmentation
from effspinenet_lib.data.loader import Batch, training_loader
from effspinenet_lib.models.base import TaskModel
from effspinenet_lib.training.device import make_accelerator, prepare_model, synchronise_norms
from effspinenet_lib.training.loop import Losses, train_steps
from effspinenet_lib.training.optim import build_optimizer, learning_rate_at, set_learning_rate
from effspinenet_lib.training.recipes import get_recipe

# Eight images: norms over the two values that P7 of two images has magnify rounding a hundredfold.
MODEL, SIDE, IMAGES, STEPS, SEED = "eff_spinenet_m0", 64, 8, 6, 0
SETTLED = 3  # steps after which nothing may be built
LIMIT = 1e-4  # relative, of each loss
RECIPE = get_recipe("smoke_detection").replace(
    batch_size=IMAGES,
    steps=STEPS,
    learning_rate=0.001,  # at the recipe's own, rounding grows to 1e-2 within the six steps
    warmup_steps=0,
    lr_drops=((3, 0.1),),
    norm_freeze_steps=0,
    precision="float32",
    clip_gradient_norm=None,
)


def make_model(dataset: Dataset) -> TaskModel:
    """The same weights every time; no stochastic depth, whose numbers differ between devices."""
    torch.manual_seed(SEED)
    classes = classes_of(dataset, "detection")
    return create_model(MODEL, num_classes=classes, stochastic_depth=0.0)


def plain_losses(model: TaskModel, batches: list[Batch]) -> Iterator[dict[str, float]]:
    """Losses of each step of the loop written out, on the CPU."""
    optimizer = build_optimizer(model, RECIPE)
    model.train()
    for step, batch in enumerate(batches):
        set_learning_rate(optimizer, learning_rate_at(RECIPE, step))
        losses = model(batch.images, batch.targets)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield {name: loss.item() for name, loss in losses.items()}


def xla_steps(
    model: TaskModel, batches: list[Batch], accelerator: Accelerator
) -> tuple[Losses, list[int]]:
    """The library's loop on XLA's device, with the norms that several cores would share.

    The losses, and the programs built before each step.
    """
    built: list[int] = []

    def counted() -> Iterator[Batch]:
        for batch in batches:
            built.append(programs_built())
            yield batch

    shared = synchronise_norms(model, accelerator.device)
    prepared = prepare_model(shared, RECIPE, accelerator)
    optimizer = accelerator.prepare_optimizer(build_optimizer(prepared, RECIPE))
    steps = train_steps(prepared, optimizer, counted(), RECIPE, accelerator, SEED)
    losses = {step: found for checked in steps for step, found in checked.items()}
    return losses, built


def programs_built() -> int:
    """Programs that XLA has compiled so far."""
    from torch_xla.debug import metrics

    found = metrics.metric_data("CompileTime")
    return int(found[0]) if found else 0


def main() -> int:
    """Compare every step; print a line for each."""
    accelerator = make_accelerator()
    if accelerator.device.type != "xla":
        print("torch_xla is not installed here: `make xla` makes an environment that has it")
        return 1
    config = DataConfig(
        "shapescenes", train_images=IMAGES * STEPS, eval_images=IMAGES, image_size=SIDE
    )
    dataset = open_dataset(config, "train")
    jitter = Augmentation(RECIPE.scale_jitter, RECIPE.flip_probability)
    loader = training_loader(dataset, SIDE, IMAGES, jitter, SEED, 0, STEPS, pad_targets=MAX_OBJECTS)
    batches = list(loader)
    expected = list(plain_losses(make_model(dataset), batches))
    losses, built = xla_steps(make_model(dataset), batches, accelerator)
    passed = True
    for step, plain in enumerate(expected, start=1):
        error = max(abs(losses[step][name] - value) / value for name, value in plain.items())
        # those of the last step's optimizer and of the check of all losses come after it
        new = built[step] - built[step - 1] if step < STEPS else 0
        passed &= error <= LIMIT and (new == 0 or step <= SETTLED)
        print(
            f"step {step}: losses differ by {error:.1e} (limit {LIMIT:.0e}); {new} programs built",
            flush=True,
        )
    print("XLA: passed" if passed else "XLA: FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
