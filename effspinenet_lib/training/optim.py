"""The optimizer over two parameter groups, the learning rate of every step, the weight average."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.optim.rmsprop_tf import RMSpropTF
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from effspinenet_lib.training.device import XLA
from effspinenet_lib.training.recipe import Recipe

# Device types for which torch has no optimizer that updates a parameter in one pass.
UNFUSED_DEVICES = (XLA, "meta")
KERNELS = ("foreach", "fused")  # entries of a parameter group that say how it is updated
# TensorFlow's rule for a young average, which EfficientNet's code uses: after n steps the share
# of the old average is at most (1 + n) / (10 + n). It is timm's warmup at these settings, whose
# count of steps starts two ahead.
EMA_WARMUP_GAMMA, EMA_WARMUP_POWER, EMA_START = 9.0, 1.0, -2


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """The learning rate of 0-based step `step`: linear warmup, then the schedule.

    The warmup ends at the rate that the schedule has there, so that the two meet; before an
    exponential schedule it ends at `recipe.learning_rate`, as EfficientNet's code has it.
    """
    if step >= recipe.warmup_steps:
        return _scheduled_rate(recipe, step)
    if recipe.schedule == "exponential":
        target = recipe.learning_rate
    else:
        target = _scheduled_rate(recipe, recipe.warmup_steps)
    share = step / recipe.warmup_steps
    return recipe.warmup_start + (target - recipe.warmup_start) * share


def _scheduled_rate(recipe: Recipe, step: int) -> float:
    if recipe.schedule == "cosine":
        return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    if recipe.schedule == "exponential":
        assert recipe.decay_rate is not None
        assert recipe.decay_steps is not None
        return recipe.learning_rate * recipe.decay_rate ** (step // recipe.decay_steps)
    passed = [f for before_end, f in recipe.lr_drops if step >= recipe.steps - before_end]
    return recipe.learning_rate * (passed[-1] if passed else 1.0)


def decayed_parameters(model: nn.Module, recipe: Recipe) -> tuple[list[str], list[str]]:
    """Names of the trainable parameters with and without weight decay.

    Without are the parameters of at most one dimension: affine norms, biases and the weights
    of the block fusions (unless `recipe.decay_norms_and_biases`).
    """
    decayed: list[str] = []
    kept: list[str] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim > 1 or recipe.decay_norms_and_biases
            (decayed if plain else kept).append(name)
    return decayed, kept


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer; two parameter groups, with and without weight decay.

    SGD and RMSProp add the decay to the gradient (L2), as in the released config; AdamW shrinks the
    weights by it. SGD is PyTorch's: its momentum multiplies the rate in last, so that a drop of the
    rate acts at once on the whole step. RMSProp is TensorFlow's, which EfficientNet was trained
    with: the mean of squares starts at one, epsilon is inside the root, and the rate is multiplied
    in before the momentum.
    """
    parameters = dict(model.named_parameters())
    decayed, kept = decayed_parameters(model, recipe)
    groups = [
        {"params": [parameters[name] for name in decayed], "weight_decay": recipe.weight_decay},
        {"params": [parameters[name] for name in kept], "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    rate = learning_rate_at(recipe, 0)
    fused = all(p.device.type not in UNFUSED_DEVICES for p in parameters.values())
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(filled, lr=rate, momentum=recipe.momentum, fused=fused)
    assert recipe.optimizer_decay is not None
    assert recipe.optimizer_epsilon is not None
    if recipe.optimizer == "adamw":
        betas = (recipe.momentum, recipe.optimizer_decay)
        return torch.optim.AdamW(
            filled, lr=rate, betas=betas, eps=recipe.optimizer_epsilon, fused=fused
        )
    return RMSpropTF(
        filled,
        lr=rate,
        alpha=recipe.optimizer_decay,
        eps=recipe.optimizer_epsilon,
        momentum=recipe.momentum,
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a saved state, but keep how this device updates parameters.

    torch would restore the kernels of the device that the state was saved on.
    """
    own = [{k: g[k] for k in KERNELS if k in g} for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, kernels in zip(optimizer.param_groups, own, strict=True):
        group.update(kernels)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def build_ema(model: nn.Module, recipe: Recipe) -> ModelEmaV3 | None:
    """The recipe's moving average of weights and statistics; None where it asks for none.

    It starts at the model's state; `update(model, n)` takes in the state after n steps. `module` is
    the model with the averaged state, in evaluation mode.
    """
    if recipe.ema_decay is None:
        return None
    return ModelEmaV3(
        model,
        recipe.ema_decay,
        update_after_step=EMA_START,
        use_warmup=True,
        warmup_gamma=EMA_WARMUP_GAMMA,
        warmup_power=EMA_WARMUP_POWER,
    )
