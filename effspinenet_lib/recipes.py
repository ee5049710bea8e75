"""Every training setting as data, each number beside its source. Needs no torch.

A recipe is declared as `field=(value, source)`, so that a value cannot be given without
saying where it comes from. Sources:

- "paper 5.1.1" and the like: a section of the paper;
- "released config": `coco_spinenet49_mobile_tpu.yaml` and the RetinaNet configs of the
  authors' code (TensorFlow Model Garden, package `tf-models-official`);
- "our choice": neither says it; the reason follows.

The learning rate that a recipe gives at each step is `training.optim.learning_rate_at`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from effspinenet_lib.errors import UnknownName, UserError

SCHEDULES = ("step", "cosine")
PRECISIONS = ("auto", "float32", "bfloat16")
CHANGED = "changed from the recipe"
EVALUATION_BATCH = 16  # our choice; the same for every model

COCO_TRAIN_IMAGES = 118_287  # images of COCO train2017
PAPER_BATCH = 256  # paper 5.1.1
PAPER_LEARNING_RATE = 0.28  # paper 5.1.1
PAPER_STEPS_PER_EPOCH = COCO_TRAIN_IMAGES // PAPER_BATCH  # 462, as in the released config


@dataclass(frozen=True)
class Recipe:
    """The settings of one training run, apart from the model, the data and the seed.

    Attributes:
        name: key in `RECIPES`.
        batch_size: images a step, over all processes.
        steps: optimizer steps.
        learning_rate: rate after the warmup.
        warmup_steps: steps of the linear warmup.
        warmup_start: rate at step 0.
        schedule: "step" (see `lr_drops`) or "cosine" (to 0 at the last step).
        lr_drops: pairs (steps before the end, factor of `learning_rate` from there on).
        momentum: of SGD.
        weight_decay: coupled L2: `weight_decay * weight` is added to the gradient.
        decay_norms_and_biases: whether one-dimensional parameters are decayed too.
        scale_jitter: range of the random resize, 1 = long side at the image size.
        flip_probability: of a horizontal flip.
        stochastic_depth: drop rate of the deepest block; linear in depth.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where it is native.
        clip_gradient_norm: largest global gradient norm; None = no clipping.
        channels_last: memory layout of images and weights.
        norm_momentum: of batch normalisation's running statistics: the share of the old ones.
        norm_freeze_steps: steps at the end that normalise by the running statistics and keep
            them, so that the weights fit the statistics that evaluation uses.
        sources: field -> where its value comes from.
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

    def __post_init__(self) -> None:
        """Refuse settings that cannot be trained with."""
        for name, known in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
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
            lr_drops=tuple((before_end, f) for before_end, f in drops if before_end < steps),
        )

    def to_dict(self) -> dict[str, Any]:
        """The values without their sources, as JSON types: what a run key is made of."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sources"}
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
}


def _declare(name: str, **declared: tuple[Any, str]) -> Recipe:
    """Make a recipe from `field=(value, source)`."""
    values = {key: value for key, (value, _) in declared.items()}
    sources = {key: source for key, (_, source) in declared.items()}
    return Recipe(name=name, **values, sources=sources)


# Settings that the paper and the released config give for every detector.
_PAPER_SGD: dict[str, tuple[Any, str]] = {
    "momentum": (0.9, "paper 5.1.1"),
    "weight_decay": (
        4e-5,
        "paper 5.1.1; coupled with the gradient as in the released config, whose L2 term is "
        "weight_decay / 2 times the squared weights",
    ),
    "decay_norms_and_biases": (
        False,
        "released config: only kernels have a regulariser, norms and biases have none (it leaves "
        "depthwise and head kernels out as well; here every kernel is decayed)",
    ),
    "flip_probability": (0.5, "paper 5.1.1: horizontal flipping; 0.5 in the released code"),
    "precision": (
        "auto",
        "our choice: bfloat16 where the processor has it; released config: bfloat16",
    ),
    "clip_gradient_norm": (None, "neither the paper nor the released config clips for detection"),
    "channels_last": (True, "our choice: a memory layout for speed; the arithmetic is the same"),
}

_PAPER_REGULARISATION: dict[str, tuple[Any, str]] = {
    "stochastic_depth": (0.2, "paper 5.1.1 names it; 0.2 from the released config"),
    "norm_momentum": (0.99, "paper 5.1.1"),
    "norm_freeze_steps": (0, "neither the paper nor the released config freezes the norms"),
}
_SHORT_SCHEDULE: dict[str, tuple[Any, str]] = {
    "stochastic_depth": (0.0, "our choice: a small model trained this briefly underfits"),
    "norm_momentum": (
        0.95,
        "our choice: with the paper's 0.99 the statistics lag behind the weights of a schedule "
        "this short",
    ),
}

PAPER_DETECTION = _declare(
    "paper_detection",
    batch_size=(PAPER_BATCH, "paper 5.1.1"),
    steps=(650 * PAPER_STEPS_PER_EPOCH, "paper 5.1.1: 650 epochs, here of 462 steps"),
    learning_rate=(PAPER_LEARNING_RATE, "paper 5.1.1"),
    warmup_steps=(2_000, "released config; the paper does not mention a warmup"),
    warmup_start=(0.0067, "released config; the paper does not mention a warmup"),
    schedule=("step", "paper 5.1.1"),
    lr_drops=(
        ((30 * PAPER_STEPS_PER_EPOCH, 0.1), (10 * PAPER_STEPS_PER_EPOCH, 0.01)),
        "paper 5.1.1: 0.1x and 0.01x at the last 30 and 10 epochs",
    ),
    scale_jitter=((0.1, 2.0), "paper 5.1.1"),
    **_PAPER_SGD,
    **_PAPER_REGULARISATION,
)

PROXY_DETECTION = _declare(
    "proxy_detection",
    batch_size=(8, "our choice: more steps from the images that the time allows"),
    steps=(2_500, "our choice: a run of about 10 minutes on one thread"),
    learning_rate=(
        0.25,
        "our choice: the loss falls faster than with 0.1; far above the paper's "
        "scaled with the batch (0.00875), since the schedule is 120 times shorter",
    ),
    warmup_steps=(200, "our choice: 8 % of the steps"),
    warmup_start=(0.0, "our choice: from zero, as the warmup is short"),
    schedule=("step", "paper 5.1.1"),
    lr_drops=(
        ((500, 0.1), (150, 0.01)),
        "our choice: the paper's factors; the last 20 % and 6 % so that both phases train",
    ),
    scale_jitter=((0.8, 1.25), "our choice: the paper's [0.1, 2.0] needs its long schedule"),
    norm_freeze_steps=(
        400,
        "our choice: at 128 pixels and batch 8 a norm at level 7 sees 8 values a step; without "
        "this, what a run reaches depends on how far its running statistics are from those",
    ),
    **_PAPER_SGD,
    **_SHORT_SCHEDULE,
)

SMALL_DATA_DETECTION = _declare(
    "small_data_detection",
    batch_size=(8, "our choice: many steps from few images"),
    steps=(2_000, "our choice: a few hundred images from scratch in well under an hour"),
    learning_rate=(0.1, "our choice: below proxy_detection's, as the images vary less"),
    warmup_steps=(200, "our choice: 10 % of the steps"),
    warmup_start=(0.0, "our choice: from zero, as the warmup is short"),
    schedule=("step", "paper 5.1.1"),
    lr_drops=(
        ((400, 0.1), (120, 0.01)),
        "our choice: the paper's factors; the last 20 % and 6 % so that both phases train",
    ),
    scale_jitter=((0.5, 2.0), "released config of Mobile SpineNet-49"),
    norm_freeze_steps=(0, "our choice: as the paper; level 7 of real pictures has more values"),
    **_PAPER_SGD,
    **_SHORT_SCHEDULE,
)

SMALL_DATA_CLASSIFICATION = _declare(
    "small_data_classification",
    batch_size=(16, "our choice: many steps from few images"),
    steps=(2_000, "our choice: as small_data_detection"),
    learning_rate=(0.1, "our choice: as small_data_detection"),
    warmup_steps=(200, "our choice: 10 % of the steps"),
    warmup_start=(0.0, "our choice: from zero, as the warmup is short"),
    schedule=("cosine", "our choice: no drops to place"),
    lr_drops=((), "our choice: none beside the cosine"),
    scale_jitter=((0.8, 1.25), "our choice: the object stays in the picture"),
    norm_freeze_steps=(400, "our choice: level 7 of a small picture is one value"),
    **{**_PAPER_SGD, "clip_gradient_norm": (5.0, "our choice: frozen norms bound nothing")},
    **_SHORT_SCHEDULE,
)

SMALL_DATA_SEGMENTATION = _declare(
    "small_data_segmentation",
    batch_size=(8, "our choice: many steps from few images"),
    steps=(2_000, "our choice: as small_data_detection"),
    learning_rate=(0.05, "paper 5.3"),
    warmup_steps=(200, "our choice: 10 % of the steps; paper 5.3: 500 of 10,000"),
    warmup_start=(0.0, "our choice: from zero, as the warmup is short"),
    schedule=("cosine", "paper 5.3"),
    lr_drops=((), "our choice: none beside the cosine"),
    scale_jitter=((0.5, 2.0), "our choice: as small_data_detection"),
    norm_freeze_steps=(400, "our choice: level 7 of a small picture is one value"),
    **{**_PAPER_SGD, "clip_gradient_norm": (5.0, "our choice: frozen norms bound nothing")},
    **_SHORT_SCHEDULE,
)

SMOKE_DETECTION = _declare(
    "smoke_detection",
    batch_size=(4, "our choice: the smallest that exercises batching"),
    steps=(12, "our choice: every part of the loop runs; says nothing about accuracy"),
    learning_rate=(
        PAPER_LEARNING_RATE * 4 / PAPER_BATCH,
        "our choice: the paper's, scaled linearly with the batch",
    ),
    warmup_steps=(4, "our choice: so that every phase of the schedule runs"),
    warmup_start=(0.0, "our choice: from zero, as the warmup is short"),
    schedule=("step", "paper 5.1.1"),
    lr_drops=(((4, 0.1), (2, 0.01)), "our choice: so that every phase of the schedule runs"),
    scale_jitter=((0.8, 1.25), "our choice: as proxy_detection"),
    **_PAPER_SGD,
    **_PAPER_REGULARISATION,
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        PAPER_DETECTION,
        PROXY_DETECTION,
        SMALL_DATA_DETECTION,
        SMALL_DATA_CLASSIFICATION,
        SMALL_DATA_SEGMENTATION,
        SMOKE_DETECTION,
    )
}
# What `effspinenet train` takes for a task unless told otherwise.
SMALL_DATA_RECIPES: dict[str, str] = {
    "detection": SMALL_DATA_DETECTION.name,
    "instances": SMALL_DATA_DETECTION.name,
    "classification": SMALL_DATA_CLASSIFICATION.name,
    "segmentation": SMALL_DATA_SEGMENTATION.name,
}


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        UnknownName: there is none; the message lists the near names.
    """
    if name not in RECIPES:
        raise UnknownName("recipe", name, RECIPES)
    return RECIPES[name]


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """The recipe that `Recipe.to_dict` gave `values` of; its named recipe says the sources.

    Raises:
        UnknownName: the named recipe or a field does not exist.
    """
    named = get_recipe(values["name"])
    lists = {
        "lr_drops": tuple((int(step), float(factor)) for step, factor in values["lr_drops"]),
        "scale_jitter": tuple(values["scale_jitter"]),
    }
    plain = {**values, **lists}
    return named.with_(**{k: v for k, v in plain.items() if v != getattr(named, k)})
