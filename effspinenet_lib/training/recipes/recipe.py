"""What a recipe is: the settings of a training run, each with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from effspinenet_lib.errors import UnknownName, UserError

OPTIMIZERS = ("sgd", "rmsprop")
SCHEDULES = ("step", "cosine", "exponential")
PRECISIONS = ("auto", "float32", "bfloat16")
AUTO_AUGMENTS = ("", "imagenet")
CHANGED = "changed from the recipe"
Setting = tuple[Any, str]  # a value and where it comes from


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
        momentum: of the optimizer.
        weight_decay: coupled L2: `weight_decay * weight` is added to the gradient.
        decay_norms_and_biases: whether one-dimensional parameters are decayed too.
        scale_jitter: range of the random resize, 1 = long side at the image size.
        flip_probability: of a horizontal flip.
        stochastic_depth: drop rate of the deepest block; linear in depth.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where it is fast.
        clip_gradient_norm: largest global gradient norm; None = no clipping.
        channels_last: memory layout of images and weights.
        norm_momentum: of batch normalisation's running statistics: the share of the old ones.
        norm_freeze_steps: steps at the end that normalise by the running statistics and keep
            them, so that the weights fit the statistics that evaluation uses.
        sources: field -> where its value comes from.
        optimizer: "sgd" or "rmsprop" (as TensorFlow computes it).
        optimizer_decay: of RMSProp's mean of squared gradients: the share of the old one.
        optimizer_epsilon: added to that mean, inside the root.
        decay_rate: of the exponential schedule.
        decay_steps: of the exponential schedule.
        ema_decay: of the moving average of the weights that is evaluated; None = no average.
        label_smoothing: share of a class target that is spread over all classes.
        dropout: rate before the classifier; None = the model's own.
        auto_augment: name of the policy that pictures are changed by; "" = none.
        scaled_from_batch: batch that the named recipe has, after `for_batch`.
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
    optimizer: str = "sgd"
    optimizer_decay: float | None = None
    optimizer_epsilon: float | None = None
    decay_rate: float | None = None
    decay_steps: int | None = None
    ema_decay: float | None = None
    label_smoothing: float = 0.0
    dropout: float | None = None
    auto_augment: str = ""
    scaled_from_batch: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that cannot be trained with."""
        for name, known in _WORDS.items():
            if getattr(self, name) not in known:
                raise UnknownName(name, str(getattr(self, name)), known)
        for name, (lowest, highest) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value <= highest:
                raise UserError(
                    f"recipe {self.name}: {name} is {value}; it must be from {lowest:g} to "
                    f"{highest:g}"
                )
        self._check_schedule()
        self._check_companions()

    def _check_schedule(self) -> None:
        if self.warmup_steps > self.steps:
            raise UserError(
                f"recipe {self.name}: {self.warmup_steps} warmup steps do not fit into "
                f"{self.steps} steps; use scaled_to(steps) to shorten a recipe"
            )
        starts = [before_end for before_end, _ in self.lr_drops]
        if starts != sorted(starts, reverse=True) or any(not 0 < s < self.steps for s in starts):
            raise UserError(
                f"recipe {self.name}: lr_drops must lie within the {self.steps} steps, the "
                f"earliest first (steps before the end: {starts}); use scaled_to(steps) to "
                "shorten a recipe"
            )
        low, high = self.scale_jitter
        if not 0 < low <= high:
            raise UserError(
                f"recipe {self.name}: scale_jitter is {low}..{high}; it must be 0 < low <= high"
            )

    def _check_companions(self) -> None:
        for setting, value, companions in _COMPANIONS:
            chosen = getattr(self, setting) == value
            wrong = [name for name in companions if (getattr(self, name) is not None) != chosen]
            if wrong:
                rule = "is missing" if chosen else "has no meaning"
                raise UserError(
                    f"recipe {self.name}: {wrong[0]} {rule} with {setting} "
                    f"{getattr(self, setting)!r}"
                )

    def with_(self, **changes: Any) -> Recipe:
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
        return replace(self, **changes, sources=sources)

    def scaled_to(self, steps: int) -> Recipe:
        """The recipe over `steps` steps: warmup and drops keep their share of the schedule."""
        share = steps / self.steps
        drops = ((max(1, round(before_end * share)), f) for before_end, f in self.lr_drops)
        return self.with_(
            steps=steps,
            warmup_steps=round(self.warmup_steps * share),
            norm_freeze_steps=round(self.norm_freeze_steps * share),
            decay_steps=self.decay_steps and max(1, round(self.decay_steps * share)),
            lr_drops=tuple((before_end, f) for before_end, f in drops if before_end < steps),
        )

    def for_batch(self, batch_size: int) -> Recipe:
        """The recipe for another batch: it sees as many images, at the same rate for each.

        Our choice, as EfficientNet's code and the authors' do it: the learning rate goes with the
        batch, the steps against it. The average of the weights keeps its length in images. The
        momenta of the optimizer and of the norms stay.

        Raises:
            UserError: the batch is not positive.
        """
        if batch_size == self.batch_size:
            return self
        share = batch_size / self.batch_size
        if share <= 0:
            raise UserError(f"recipe {self.name}: batch_size is {batch_size}; it must be 1 or more")
        origin = self.scaled_from_batch or self.batch_size
        drops = [(max(1, round(before_end / share)), f) for before_end, f in self.lr_drops]
        changes = {
            "batch_size": batch_size,
            "scaled_from_batch": origin,
            "learning_rate": self.learning_rate * share,
            "warmup_start": self.warmup_start * share,
            "steps": max(1, round(self.steps / share)),
            "warmup_steps": round(self.warmup_steps / share),
            "norm_freeze_steps": round(self.norm_freeze_steps / share),
            "lr_drops": tuple(drops),
            "decay_steps": self.decay_steps and max(1, round(self.decay_steps / share)),
            "ema_decay": self.ema_decay and self.ema_decay**share,
        }
        scaled = {name: value for name, value in changes.items() if value != getattr(self, name)}
        sources = {
            name: f"scaled from a batch of {origin}: {self.sources[name]}" for name in scaled
        }
        changed = self.with_(**scaled)
        sources["scaled_from_batch"] = "our choice: see Recipe.for_batch"
        return replace(changed, sources={**changed.sources, **sources})

    def to_dict(self) -> dict[str, Any]:
        """The values without their sources, as JSON types: what a run key is made of.

        A setting that later versions added is left out while it has its default, so that the keys
        of older runs stay.
        """
        values = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name != "sources" and (f.default is MISSING or getattr(self, f.name) != f.default)
        }
        values["lr_drops"] = [list(drop) for drop in self.lr_drops]
        values["scale_jitter"] = list(self.scale_jitter)
        return values


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
    "clip_gradient_norm": (1e-9, 1e9),
    "optimizer_decay": (0, 1),
    "optimizer_epsilon": (1e-12, 1),
    "decay_rate": (1e-9, 1),
    "decay_steps": (1, 1e9),
    "ema_decay": (0, 1),
    "label_smoothing": (0, 0.99),
    "dropout": (0, 0.99),
    "scaled_from_batch": (1, 1e6),
}
_WORDS = {
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "auto_augment": AUTO_AUGMENTS,
}
# Settings that belong together: they are given if, and only if, the setting has the value.
_COMPANIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("optimizer", "rmsprop", ("optimizer_decay", "optimizer_epsilon")),
    ("schedule", "exponential", ("decay_rate", "decay_steps")),
)
# Sources of the settings that a recipe leaves at their defaults.
_DEFAULT_SOURCES = {
    "optimizer": "paper 5.1.1: stochastic gradient descent",
    **dict.fromkeys(("optimizer_decay", "optimizer_epsilon"), "neither the paper nor SGD has one"),
    **dict.fromkeys(
        ("decay_rate", "decay_steps"), "neither the paper nor another schedule has one"
    ),
    "ema_decay": "neither the paper nor the released config names an average of the weights",
    "label_smoothing": "neither the paper nor the released config smooths labels here",
    "dropout": "our choice: the model's own, of a classifier only",
    "auto_augment": "neither the paper nor the released config has a policy here",
    "scaled_from_batch": "our choice: the batch is the recipe's own",
}


def declare(name: str, **declared: Setting) -> Recipe:
    """Make a recipe from `field=(value, source)`; what is left out has its default."""
    values = {key: value for key, (value, _) in declared.items()}
    sources = {key: source for key, (_, source) in declared.items()}
    sources = {**_DEFAULT_SOURCES, **sources}
    return Recipe(name=name, **values, sources=sources)
