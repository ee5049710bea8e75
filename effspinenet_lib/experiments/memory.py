"""What training a model takes of a device's memory, counted without running it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effspinenet_lib.models.base import TaskModel
from effspinenet_lib.training.recipes import Recipe

WEIGHT_BYTES = 4  # weights, gradients and the optimizer's state are float32 at every precision
# Numbers that an optimizer keeps for each weight: its momentum, RMSProp the mean of squares too.
OPTIMIZER_NUMBERS = {"sgd": 1, "rmsprop": 2}


@dataclass(frozen=True)
class Memory:
    """An estimate, in bytes.

    Counted: weights, gradients, the optimizer's state, the average of the weights, and what the
    network's layers keep for the backward pass, in float32. Left out: losses and targets,
    two-stage heads beyond the proposals of one evaluation, gradients of activations, work space
    of convolutions, what the allocator wastes, and the loader. In bfloat16 the activations take
    about half.

    Attributes:
        fixed: whatever the batch.
        image: activations of one image.
    """

    fixed: int
    image: int

    def of(self, images: int) -> int:
        """Bytes for a batch of so many images on one device."""
        return self.fixed + images * self.image


def training_memory(parameters: int, image: int, recipe: Recipe) -> Memory:
    """Estimate the memory of training.

    Args:
        parameters: trained numbers of the model.
        image: what `activation_bytes` gives for it.
        recipe: names the optimizer and the average.
    """
    kept = 2 + OPTIMIZER_NUMBERS[recipe.optimizer] + (recipe.ema_decay is not None)
    return Memory(WEIGHT_BYTES * kept * parameters, image)


def activation_bytes(model: TaskModel, image_size: int) -> int:
    """Bytes that autograd keeps for the backward pass of each image, each storage once.

    On the meta device nothing is computed. Two images are counted and halved: one alone is too
    few for norms of features of one pixel. Norms that are compiled (`native`), on processors
    alone, keep less. The model's mode is restored.
    """
    known = {tensor.untyped_storage()._cdata for tensor in model.state_dict().values()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage  # held, so that its address is not used again
        return tensor

    was_training = model.training
    device = next(model.parameters()).device
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.train().network(torch.zeros(2, 3, image_size, image_size, device=device))
    finally:
        model.train(was_training)
    return sum(storage.nbytes() for storage in saved.values()) // 2
