"""Recipes of Tables 4 and 5: shorter schedules, and training strategies added one at a time.

The activation and squeeze-and-excitation, which Table 4 switches as well, are options of the
models.
"""

from __future__ import annotations

from effspinenet_lib.training.recipes.detection import PAPER_DETECTION_SETTINGS
from effspinenet_lib.training.recipes.recipe import Recipe, Setting, declare
from effspinenet_lib.training.recipes.shared import PAPER_STEPS_PER_EPOCH

BASELINE_EPOCHS = 72  # paper Table 4: what the baseline is trained for
RESNET_EPOCHS = 250  # paper Table 4: what ResNet-50-FPN is trained for in its later steps
SCHEDULE_EPOCHS = (72, 200, 350, 500)  # paper Table 5; the 650 are `paper_detection`


def _epochs(epochs: int, source: str) -> Setting:
    return (epochs * PAPER_STEPS_PER_EPOCH, f"{source}: {epochs} epochs, here of 462 steps")


_NO_STOCHASTIC_DEPTH: dict[str, Setting] = {
    "stochastic_depth": (0.0, "paper Table 4: the last strategy that is added")
}


def _detection(name: str, **changes: Setting) -> Recipe:
    """The paper's recipe of detection with some settings declared anew."""
    return declare(name, **{**PAPER_DETECTION_SETTINGS, **changes})


SCHEDULES_OF_TABLE_5 = tuple(
    _detection(f"paper_detection_{epochs}_epochs", steps=_epochs(epochs, "paper Table 5"))
    for epochs in SCHEDULE_EPOCHS
)
# 250 epochs with every strategy: the last step of ResNet-50-FPN in Table 4.
RESNET_SCHEDULE = _detection(
    f"paper_detection_{RESNET_EPOCHS}_epochs", steps=_epochs(RESNET_EPOCHS, "paper Table 4")
)
STRATEGIES_OF_TABLE_4 = (
    _detection(
        "paper_strategies_baseline",
        steps=_epochs(BASELINE_EPOCHS, "paper Table 4"),
        scale_jitter=((0.8, 1.2), "paper Table 4"),
        **_NO_STOCHASTIC_DEPTH,
    ),
    _detection("paper_strategies_ms_train", **_NO_STOCHASTIC_DEPTH),
    _detection(
        f"paper_strategies_ms_train_{RESNET_EPOCHS}_epochs",
        steps=_epochs(RESNET_EPOCHS, "paper Table 4"),
        **_NO_STOCHASTIC_DEPTH,
    ),
)
