"""What a recipe is: the settings of a training run, each with its source. Needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from effspinenet_lib.errors import UnknownName, UserError

OPTIMIZERS = ("sgd", "rmsprop", "adamw")
SCHEDULES = ("step", "cosine", "exponential")
PRECISIONS = ("auto", "float32", "bfloat16")
AUTO_AUGMENTS = ("", "imagenet")
CHANGED = "changed from the recipe"
Setting = tuple[Any, str]  # a value and its source


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of one training run, apart from the model, the data and the seed.

    Attributes:
        name: key in `RECIPES`.
        batch_size: images a step, over all processes.
        steps: optimizer steps.
        learning_rate: rate after the warmup.
        warmup_steps: steps of the linear warmup.
        warmup_start: rate at step 0.
        schedule: "step" (see `lr_drops`), "cosine" (to 0 at the last step) or "exponential"
            (times `decay_rate` after every `decay_steps`).
        lr_drops: pairs (steps before the end, factor of `learning_rate` from there on).
        momentum: of the optimizer; AdamW's first beta.
        weight_decay: coupled L2: `weight_decay * weight` is added to the gradient; with AdamW
            decoupled: the weight shrinks by `learning_rate * weight_decay` of itself.
        decay_norms_and_biases: whether one-dimensional parameters are decayed too.
        scale_jitter: range of the random resize, 1 = long side at the image size.
        flip_probability: of a horizontal flip.
        stochastic_depth: drop rate of the deepest block; linear in depth.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where it is fast.
        clip_gradient_norm: largest global gradient norm; None = no clipping.
        channels_last: memory layout of images and weights.
        norm_momentum: share of the old running statistics that a norm keeps each step.
        norm_freeze_steps: final steps in which norms use and keep their running statistics, so
            that the weights fit the statistics of evaluation. Without `clip_gradient_norm`,
            gradients are clipped at `loop.FROZEN_NORMS_CLIP` in these steps.
        sources: field -> source of its value.
        optimizer: "sgd", "rmsprop" (TensorFlow's) or "adamw".
        optimizer_decay: share of the old mean of squared gradients that RMSProp and AdamW keep.
        optimizer_epsilon: added to that mean, inside the root (RMSProp) or behind it (AdamW).
        decay_rate: of the exponential schedule.
        decay_steps: of the exponential schedule.
        ema_decay: of the moving average of the weights that is evaluated; None = no average.
        label_smoothing: share of a class target that is spread over all classes.
        dropout: rate before the classifier; None = the model's own.
        auto_augment: name of the AutoAugment policy; "" = none.
        renorm_values: norms that see fewer values a channel in a batch use batch renormalisation
            (`device.RenormalisedNorm`), with one process.
        anchor_size: side over stride of a detector's smallest anchor; None = the model's own.
        scaled_from_batch: the named recipe's batch size, after `scale_to_batch`.

    Raises:
        UserError: a value is out of range, or settings do not fit together.
    """

    name: str
    batch_size: int
    steps: int
    learning_rate: float
    warmup_steps: int
    warmup_start: float
    schedule: str
    lr_drops: tuple[tuple[int, float], ...]
    momentum: float
    weight_decay: float
    decay_norms_and_biases: bool
    scale_jitter: tuple[float, float]
    flip_probability: float
    stochastic_depth: float
    precision: str
    clip_gradient_norm: float | None
    channels_last: bool
    norm_momentum: float
    norm_freeze_steps: int
    sources: Mapping[str, str] = field(compare=False, repr=False, hash=False)
    # Fields with a default were added after runs had been recorded: `to_dict` leaves out one that
    # has its default, so that those runs keep their keys.
    optimizer: str = "sgd"
    optimizer_decay: float | None = None
    optimizer_epsilon: float | None = None
    decay_rate: float | None = None
    decay_steps: int | None = None
    ema_decay: float | None = None
    label_smoothing: float = 0.0
    dropout: float | None = None
    auto_augment: str = ""
    renorm_values: int = 0
    anchor_size: float | None = None
    scaled_from_batch: int | None = None

    def __post_init__(self) -> None:
        """Check the values once, here."""
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UnknownName(name, str(getattr(self, name)), known)
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                self._refuse(f"{name} is {value}; it must be from {low:g} to {high:g}")
        if self.warmup_steps > self.steps:
            self._refuse(
                f"{self.warmup_steps} warmup steps do not fit into {self.steps} steps; use "
                "scale_to_steps to shorten a recipe"
            )
        starts = [before_end for before_end, _ in self.lr_drops]
        if starts != sorted(starts, reverse=True) or any(not 0 < s < self.steps for s in starts):
            self._refuse(
                f"lr_drops must lie within the {self.steps} steps, the earliest first (steps "
                f"before the end: {starts}); use scale_to_steps to shorten a recipe"
            )
        smallest, largest = self.scale_jitter
        if not 0 < smallest <= largest:
            self._refuse(f"scale_jitter is {smallest}..{largest}; it must be 0 < low <= high")
        for setting, chosen, companions in _COMPANIONS:
            for name in companions:
                value = getattr(self, setting)
                if (getattr(self, name) is not None) != (value in chosen):
                    rule = "is missing" if value in chosen else "has no meaning"
                    self._refuse(f"{name} {rule} with {setting} {value!r}")

    def _refuse(self, reason: str) -> None:
        raise UserError(f"recipe {self.name}: {reason}")

    def replace(self, **changes: Any) -> Recipe:
        """The recipe with some fields changed; their source says so.

        Raises:
            UnknownName: no such field.
            UserError: the changed settings do not fit together.
        """
        known = [item.name for item in fields(self) if item.name != "sources"]
        for name in changes:
            if name not in known:
                raise UnknownName("recipe field", name, known)
        sources = {**self.sources, **{n: CHANGED for n in changes if n in self.sources}}
        return dataclasses.replace(self, **changes, sources=sources)

    def scale_to_steps(self, steps: int) -> Recipe:
        """The recipe over `steps` steps: warmup and drops keep their share of the schedule."""
        share = steps / self.steps
        scaled = self._rescaled(steps, lambda count: round(count * share))
        drops = tuple(drop for drop in scaled.pop("lr_drops") if drop[0] < steps)
        return self.replace(**scaled, lr_drops=drops)

    def scale_to_batch(self, batch_size: int) -> Recipe:
        """The recipe for another batch: as many images, at the same rate for each.

        Our choice, as EfficientNet's code and the authors' do it: the learning rate is
        proportional to the batch, the steps inversely. The average of the weights keeps its
        length in images. The momenta of the optimizer and of the norms stay.
        """
        if batch_size == self.batch_size:
            return self
        ratio = batch_size / self.batch_size
        origin = self.scaled_from_batch or self.batch_size
        scaled = {
            "batch_size": batch_size,
            "learning_rate": self.learning_rate * ratio,
            "warmup_start": self.warmup_start * ratio,
            "ema_decay": self.ema_decay and self.ema_decay**ratio,
            **self._rescaled(max(1, round(self.steps / ratio)), lambda count: round(count / ratio)),
        }
        scaled = {name: value for name, value in scaled.items() if value != getattr(self, name)}
        changed = self.replace(**scaled, scaled_from_batch=origin)
        sources = {n: f"scaled from a batch of {origin}: {self.sources[n]}" for n in scaled}
        sources["scaled_from_batch"] = "our choice: see Recipe.scale_to_batch"
        return dataclasses.replace(changed, sources={**changed.sources, **sources})

    def _rescaled(self, steps: int, scale: Callable[[int], int]) -> dict[str, Any]:
        """The settings counted in steps, for a schedule of `steps`."""
        return {
            "steps": steps,
            "warmup_steps": scale(self.warmup_steps),
            "norm_freeze_steps": scale(self.norm_freeze_steps),
            "decay_steps": self.decay_steps and max(1, scale(self.decay_steps)),
            "lr_drops": tuple((max(1, scale(count)), factor) for count, factor in self.lr_drops),
        }

    def to_dict(self) -> dict[str, Any]:
        """The values without their sources, as JSON types; run keys are hashes of this."""
        values = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name != "sources" and (f.default is MISSING or getattr(self, f.name) != f.default)
        }
        values["lr_drops"] = [list(drop) for drop in self.lr_drops]
        values["scale_jitter"] = list(self.scale_jitter)
        return values


_CHOICES = {
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "auto_augment": AUTO_AUGMENTS,
}
_RANGES: dict[str, tuple[float, float]] = {
    "batch_size": (1, 1e6),
    "steps": (1, 1e9),
    "learning_rate": (0, 1e6),
    "warmup_steps": (0, 1e9),
    "warmup_start": (0, 1e6),
    "momentum": (0, 1),
    "weight_decay": (0, 1),
    "flip_probability": (0, 1),
    "stochastic_depth": (0, 0.99),
    "norm_momentum": (0, 1),
    "norm_freeze_steps": (0, 1e9),
    "renorm_values": (0, 1e9),
    "clip_gradient_norm": (1e-9, 1e9),
    "optimizer_decay": (0, 1),
    "optimizer_epsilon": (1e-12, 1),
    "decay_rate": (1e-9, 1),
    "decay_steps": (1, 1e9),
    "ema_decay": (0, 1),
    "label_smoothing": (0, 0.99),
    "dropout": (0, 0.99),
    "anchor_size": (0.1, 100),
    "scaled_from_batch": (1, 1e6),
}
# Settings that are given if, and only if, the first one has one of the values.
_COMPANIONS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("optimizer", ("rmsprop", "adamw"), ("optimizer_decay", "optimizer_epsilon")),
    ("schedule", ("exponential",), ("decay_rate", "decay_steps")),
)
_DEFAULT_SOURCES = {
    "optimizer": "paper 5.1.1: stochastic gradient descent",
    "optimizer_decay": "neither the paper nor SGD has one",
    "optimizer_epsilon": "neither the paper nor SGD has one",
    "decay_rate": "neither the paper nor another schedule has one",
    "decay_steps": "neither the paper nor another schedule has one",
    "ema_decay": "neither the paper nor the released config names an average of the weights",
    "label_smoothing": "neither the paper nor the released config smooths labels here",
    "dropout": "our choice: the model's own, of a classifier only",
    "auto_augment": "neither the paper nor the released config has a policy here",
    "renorm_values": "neither the paper nor the released config renormalises",
    "anchor_size": "released config: the model's own",
    "scaled_from_batch": "our choice: the batch is the recipe's own",
}


def declare(name: str, **declared: Setting) -> Recipe:
    """Make a recipe from `field=(value, source)`; what is left out has its default."""
    values = {key: value for key, (value, _) in declared.items()}
    sources = _DEFAULT_SOURCES | {key: source for key, (_, source) in declared.items()}
    return Recipe(name=name, **values, sources=sources)
