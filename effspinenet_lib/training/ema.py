"""A moving average of the weights, which is evaluated in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from effspinenet_lib.training.recipes import Recipe

# TensorFlow's rule for a young average, which EfficientNet's code uses: after n steps the share
# of the old average is at most (1 + n) / (10 + n). It is timm's warmup at these settings, whose
# count of steps is two ahead.
WARMUP_GAMMA, WARMUP_POWER, STEPS_AHEAD = 9.0, 1.0, 2


class Ema:
    """The moving average of everything in a model's state: weights and norms' statistics."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start from the state that `model` (not wrapped for several processes) has now."""
        self._average = ModelEmaV3(
            model,
            decay=decay,
            use_warmup=True,
            warmup_gamma=WARMUP_GAMMA,
            warmup_power=WARMUP_POWER,
        )

    @property
    def module(self) -> nn.Module:
        """The model with the averaged state, in evaluation mode."""
        module: nn.Module = self._average.module
        return module

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the model's state after `step` steps, this one included."""
        self._average.update(model, step + STEPS_AHEAD)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged state, under the model's own names."""
        return self.module.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.module.load_state_dict(state)


def build_ema(model: nn.Module, recipe: Recipe) -> Ema | None:
    """The average that the recipe asks for, started from the model's state; None for none."""
    return None if recipe.ema_decay is None else Ema(model, recipe.ema_decay)
