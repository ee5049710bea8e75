"""Every training setting, each value beside its source. Needs no torch.

A recipe is declared as `field=(value, source)`. Above each stand what it reproduces, on what data,
how long it is and a command that runs it. Sources:

- "paper 5.1.1" and the like: a section of the paper;
- "released config": `coco_spinenet49_mobile_tpu.yaml` and the RetinaNet configs of the
  authors' code (TensorFlow Model Garden, package `tf-models-official`);
- "as EfficientNet": what section 5.2 refers to, that paper or its code (`main.py` and `utils.py`
  in `models/official/efficientnet` of the repository `tensorflow/tpu`);
- "our choice": neither says it; the reason follows.

The learning rate of a step is `training.optim.learning_rate_at`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, replace
from typing import TYPE_CHECKING, Any

from effspinenet_lib.errors import UnknownName
from effspinenet_lib.training.recipe import CHANGED, Recipe, Setting, declare

if TYPE_CHECKING:
    import pandas as pd

EVALUATION_BATCH = 16  # our choice; the same for every model

COCO_TRAIN_IMAGES = 118_287  # images of COCO train2017
# Paper 5.1.1, search details: images of train2017 that no trial trains on, for its reward. The
# paper does not say which; `data.splits.HeldOutSplit` takes them by a rule that anyone can repeat.
SEARCH_HELD_OUT_IMAGES = 7_392
PAPER_BATCH = 256  # paper 5.1.1
PAPER_LEARNING_RATE = 0.28  # paper 5.1.1
PAPER_STEPS_PER_EPOCH = COCO_TRAIN_IMAGES // PAPER_BATCH  # 462, as in the released config
BASELINE_EPOCHS = 72  # paper Table 4: the baseline's
RESNET_EPOCHS = 250  # paper Table 4: ResNet-50-FPN's in its later rows
SCHEDULE_EPOCHS = (72, 200, 350, 500)  # paper Table 5; the 650 are `paper_detection`

# --- Settings that several recipes share --------------------------------------------------------

# The paper's and the released config's for every detector.
PAPER_SGD: dict[str, Setting] = {
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
        "our choice: bfloat16 on accelerators and on CPUs with matrix units for it, float32 "
        "elsewhere; released config: bfloat16",
    ),
    "clip_gradient_norm": (None, "neither the paper nor the released config clips for detection"),
    "channels_last": (True, "our choice: a memory layout for speed; the arithmetic is the same"),
}
PAPER_REGULARISATION: dict[str, Setting] = {
    "stochastic_depth": (0.2, "paper 5.1.1 names it; 0.2 from the released config"),
    "norm_momentum": (0.99, "paper 5.1.1"),
    "norm_freeze_steps": (0, "neither the paper nor the released config freezes the norms"),
}
SHORT_SCHEDULE: dict[str, Setting] = {
    "warmup_start": (0.0, "our choice: from zero, as the warmup is short"),
    "stochastic_depth": (0.0, "our choice: a small model trained this briefly underfits"),
    "norm_momentum": (
        0.95,
        "our choice: with the paper's 0.99 the statistics lag behind the weights of a schedule "
        "this short",
    ),
}
CLIPPED_SGD: dict[str, Setting] = {
    **PAPER_SGD,
    "clip_gradient_norm": (5.0, "our choice: frozen norms do not bound the features"),
}
NO_STOCHASTIC_DEPTH: dict[str, Setting] = {
    "stochastic_depth": (0.0, "paper Table 4: the last strategy that is added")
}


def _epochs(epochs: int, source: str) -> Setting:
    return (epochs * PAPER_STEPS_PER_EPOCH, f"{source}: {epochs} epochs, here of 462 steps")


# --- Detection ----------------------------------------------------------------------------------

# Tables 3, 7, 8 and 9: section 5.1.1. COCO 2017, 650 epochs (300,300 steps of 256 images).
#   effspinenet reproduce table-03 --profile paper --data-root coco
PAPER_DETECTION_SETTINGS: dict[str, Setting] = {
    "batch_size": (PAPER_BATCH, "paper 5.1.1"),
    "steps": _epochs(650, "paper 5.1.1"),
    "learning_rate": (PAPER_LEARNING_RATE, "paper 5.1.1"),
    "warmup_steps": (2_000, "released config; the paper does not mention a warmup"),
    "warmup_start": (0.0067, "released config; the paper does not mention a warmup"),
    "schedule": ("step", "paper 5.1.1"),
    "lr_drops": (
        ((30 * PAPER_STEPS_PER_EPOCH, 0.1), (10 * PAPER_STEPS_PER_EPOCH, 0.01)),
        "paper 5.1.1: 0.1x and 0.01x at the last 30 and 10 epochs",
    ),
    "scale_jitter": ((0.1, 2.0), "paper 5.1.1"),
    **PAPER_SGD,
    **PAPER_REGULARISATION,
}
PAPER_DETECTION = declare("paper_detection", **PAPER_DETECTION_SETTINGS)


def _paper_detection(name: str, **changes: Setting) -> Recipe:
    return declare(name, **{**PAPER_DETECTION_SETTINGS, **changes})


# Table 5: the same over 72, 200, 350 and 500 epochs, and over ResNet-50-FPN's 250 in Tables 3, 4.
#   effspinenet reproduce table-05 --profile paper --data-root coco
PAPER_SCHEDULES = tuple(
    _paper_detection(f"paper_detection_{epochs}_epochs", steps=_epochs(epochs, f"paper {table}"))
    for epochs, table in (*((e, "Table 5") for e in SCHEDULE_EPOCHS), (RESNET_EPOCHS, "Table 4"))
)

# Table 4: training strategies added one at a time. The activation and squeeze-and-excitation,
# which it switches as well, are options of the models. COCO 2017, 72, 650 and 250 epochs.
#   effspinenet reproduce table-04 --profile paper --data-root coco
PAPER_STRATEGIES = (
    _paper_detection(
        "paper_strategies_baseline",
        steps=_epochs(BASELINE_EPOCHS, "paper Table 4"),
        scale_jitter=((0.8, 1.2), "paper Table 4"),
        **NO_STOCHASTIC_DEPTH,
    ),
    _paper_detection("paper_strategies_ms_train", **NO_STOCHASTIC_DEPTH),
    _paper_detection(
        f"paper_strategies_ms_train_{RESNET_EPOCHS}_epochs",
        steps=_epochs(RESNET_EPOCHS, "paper Table 4"),
        **NO_STOCHASTIC_DEPTH,
    ),
)

# Section 5.1.1, search details: what a sampled architecture is trained with before its AP is its
# reward. COCO `train2017-rest-7392`, evaluated on `train2017-held-7392`; 4,500 steps of 256.
#   effspinenet search --profile paper --data coco
PAPER_SEARCH_TRIAL = _paper_detection(
    "paper_search_trial",
    steps=(4_500, "paper 5.1.1, search details: 4.5k iterations"),
    lr_drops=(
        ((208, 0.1), (69, 0.01)),
        "our choice: the paper's last 30 and 10 epochs are longer than the run; the same "
        "shares of the schedule, 30 / 650 and 10 / 650",
    ),
)

# The profile `proxy`: small models on ShapeScenes, 2,400 steps of 16 images, about 15 minutes of
# one thread for M0 at 128 pixels. Chosen by the runs in `results/proxy/instrument.csv`, which the
# book shows. Classification takes single objects, cut out of the scenes.
#   effspinenet reproduce table-08 --profile proxy
TUNED = "our choice: results/proxy/instrument.csv"
PROXY_SETTINGS: dict[str, Setting] = {
    **PAPER_SGD,
    **SHORT_SCHEDULE,
    "batch_size": (16, "our choice: below it, on one thread, torch's 1x1 convolutions are slow"),
    "steps": (2_400, f"{TUNED}: half of them leave a third of the AP unlearned"),
    "optimizer": (
        "adamw",
        "our choice: SGD with the paper's schedule needs far more steps to learn the textures",
    ),
    "learning_rate": (0.03, TUNED),
    "warmup_steps": (100, "our choice: 4 % of the steps"),
    "schedule": ("cosine", "our choice: no drops to place in so few steps"),
    "lr_drops": ((), "our choice: none besides the cosine"),
    "momentum": (0.9, "our choice: AdamW's default"),
    "optimizer_decay": (0.99, "our choice: a short run forgets its start sooner than by 0.999"),
    "optimizer_epsilon": (1e-8, "our choice: AdamW's default"),
    "weight_decay": (1e-4, "our choice: decoupled; too small to matter in so few steps"),
    "scale_jitter": ((0.8, 1.25), "our choice: the paper's [0.1, 2.0] needs its long schedule"),
    "clip_gradient_norm": (5.0, "our choice: a rare large gradient of the first steps"),
    "ema_decay": (0.99, "our choice: less noise of the last steps"),
    "norm_momentum": (0.97, "our choice: the paper's 0.99 lags behind the weights of a short run"),
    "norm_freeze_steps": (0, f"{TUNED}: freezing showed no gain"),
    "renorm_values": (2_048, f"{TUNED}: with fewer a run can run away in evaluation"),
    "precision": ("float32", "our choice: the same arithmetic on every machine"),
}
PROXY_DETECTION = declare("proxy_detection", **PROXY_SETTINGS)
PROXY_CLASSIFICATION = declare("proxy_classification", **PROXY_SETTINGS)
PROXY_SEGMENTATION = declare("proxy_segmentation", **PROXY_SETTINGS)

# Table 5 in the profile `proxy`: the lengths in the paper's proportions, 650 epochs being the whole
# of `proxy_detection`. As in the paper the rate drops for the last 30 and 10 epochs at any length.
#   effspinenet reproduce table-05 --profile proxy
PAPER_EPOCHS = 650  # paper 5.1.1


def _proxy_epochs(epochs: int, name: str, **changes: Any) -> Recipe:
    share = PROXY_DETECTION.steps / PAPER_EPOCHS
    drops = tuple((round(last * share), factor) for last, factor in ((30, 0.1), (10, 0.01)))
    recipe = PROXY_DETECTION.scale_to_steps(round(epochs * share))
    recipe = recipe.replace(name=name, schedule="step", lr_drops=drops, **changes)
    why = "our choice: proxy_detection, changed as Tables 4 and 5 change the paper's recipe"
    sources = {n: why if s == CHANGED else s for n, s in recipe.sources.items()}
    return replace(recipe, sources=sources)


PROXY_SCHEDULES = tuple(
    _proxy_epochs(epochs, f"proxy_detection_{epochs}_epochs")
    for epochs in (*SCHEDULE_EPOCHS, PAPER_EPOCHS)
)

# Table 4 in the profile `proxy`: the short and the long schedule, each with the narrow jitter, and
# the long one with a wider jitter and with stochastic depth. The paper's [0.1, 2.0] would shrink
# an object of 128 pixels to nothing, so the wider one is Mobile SpineNet-49's.
#   effspinenet reproduce table-04 --profile proxy
_NARROW, _WIDE = (0.8, 1.2), (0.5, 2.0)
PROXY_STRATEGIES = tuple(
    _proxy_epochs(epochs, f"proxy_strategies_{name}", scale_jitter=jitter, stochastic_depth=rate)
    for name, epochs, jitter, rate in (
        ("baseline", BASELINE_EPOCHS, _NARROW, 0.0),
        ("long", PAPER_EPOCHS, _NARROW, 0.0),
        ("ms_train", PAPER_EPOCHS, _WIDE, 0.0),
        ("stochastic_depth", PAPER_EPOCHS, _WIDE, 0.2),
    )
)

# The profile `smoke`, all tasks: every part of the loop in 12 steps, seconds a run.
#   effspinenet reproduce all --profile smoke
SMOKE_DETECTION = declare(
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
    **PAPER_SGD,
    **PAPER_REGULARISATION,
)

# --- The paper's other tasks --------------------------------------------------------------------

# Table 6: section 5.1.2, Mask R-CNN. COCO 2017, 650 epochs.
#   effspinenet reproduce table-06 --profile paper --data-root coco
PAPER_INSTANCES = declare(
    "paper_instances",
    **{
        name: (value, f"{source} (section 5.1.2 gives Mask R-CNN no settings of its own)")
        for name, (value, source) in PAPER_DETECTION_SETTINGS.items()
    },
)

IMAGENET_TRAIN_IMAGES = 1_281_167  # images of the ILSVRC 2012 training set
# EfficientNet's code: `train_batch_size` and `train_steps`, which it says is about 350 epochs.
IMAGENET_BATCH, IMAGENET_STEPS = 2_048, 218_949
IMAGENET_STEPS_PER_EPOCH = IMAGENET_TRAIN_IMAGES / IMAGENET_BATCH

# Table 10: section 5.2. ImageNet (ILSVRC 2012), 350 epochs (218,949 steps of 2,048 images).
#   effspinenet reproduce table-10 --profile paper --data-root imagenet
PAPER_CLASSIFICATION = declare(
    "paper_classification",
    batch_size=(
        IMAGENET_BATCH,
        "our choice: the default of EfficientNet's code; neither paper states it",
    ),
    steps=(IMAGENET_STEPS, "paper 5.2: as EfficientNet, whose code has 218,949 (350 epochs)"),
    learning_rate=(
        0.016 * IMAGENET_BATCH / PAPER_BATCH,
        "paper 5.2: as EfficientNet, whose code has 0.016 for each 256 images of the batch",
    ),
    warmup_steps=(
        int(5 * IMAGENET_STEPS_PER_EPOCH),
        "paper 5.2: as EfficientNet, whose code has 5 epochs",
    ),
    warmup_start=(0.0, "paper 5.2: as EfficientNet's code"),
    schedule=("exponential", "paper 5.2: as EfficientNet; in steps, as its code has it"),
    decay_rate=(0.97, "paper 5.2: as EfficientNet: 0.97 every 2.4 epochs"),
    decay_steps=(
        round(2.4 * IMAGENET_STEPS_PER_EPOCH),
        "paper 5.2: as EfficientNet: 0.97 every 2.4 epochs",
    ),
    lr_drops=((), "paper 5.2: none besides the exponential schedule"),
    optimizer=("rmsprop", "paper 5.2: as EfficientNet"),
    optimizer_decay=(0.9, "paper 5.2: as EfficientNet"),
    optimizer_epsilon=(1e-3, "paper 5.2: as EfficientNet; the number from its code"),
    momentum=(0.9, "paper 5.2: as EfficientNet"),
    weight_decay=(1e-5, "paper 5.2: as EfficientNet; coupled with the gradient, as in its code"),
    decay_norms_and_biases=(
        False,
        "our choice: as in detection; EfficientNet's code leaves norms out but decays the biases "
        "of squeeze-and-excitation and of the classifier",
    ),
    ema_decay=(0.9999, "paper 5.2: as EfficientNet; the number from its code"),
    label_smoothing=(0.1, "paper 5.2: as EfficientNet; the number from its code"),
    dropout=(
        0.2,
        "paper 5.2: as EfficientNet, whose B0 and B1 have 0.2; one for all is our choice",
    ),
    stochastic_depth=(0.2, "paper 5.2: as EfficientNet: survival probability 0.8"),
    auto_augment=("imagenet", "paper 5.2: as EfficientNet, which names AutoAugment"),
    scale_jitter=(
        (1.0, 1.0),
        "our choice: a random crop changes the scale of ImageNet pictures (see the data settings)",
    ),
    flip_probability=(0.5, "paper 5.2: as EfficientNet's code"),
    norm_momentum=(0.99, "paper 5.2: as EfficientNet"),
    norm_freeze_steps=(0, "neither the paper nor EfficientNet's code freezes the norms"),
    precision=PAPER_SGD["precision"],
    clip_gradient_norm=(None, "neither the paper nor EfficientNet's code clips"),
    channels_last=PAPER_SGD["channels_last"],
)

# Table 11: section 5.3. PASCAL VOC 2012 with SBD (`train_aug`), 10,000 steps of 256 images, from
# the backbones of Table 3.
#   effspinenet reproduce table-11 --profile paper --data-root voc
PAPER_SEGMENTATION = declare(
    "paper_segmentation",
    batch_size=(PAPER_BATCH, "paper 5.3"),
    steps=(10_000, "paper 5.3"),
    learning_rate=(0.05, "paper 5.3"),
    warmup_steps=(500, "paper 5.3"),
    warmup_start=(0.0, "our choice: paper 5.3 gives the length of the warmup, not its start"),
    schedule=("cosine", "paper 5.3"),
    lr_drops=((), "paper 5.3: none besides the cosine"),
    scale_jitter=((0.1, 2.0), "paper 5.3: generally as in 5.1.1"),
    **PAPER_SGD,
    **PAPER_REGULARISATION,
)

# --- A user's own pictures: the defaults of `effspinenet train` ---------------------------------

# A few hundred images from scratch, detection and instances: 2,000 steps of 8, under an hour.
#   effspinenet train --data my_pictures --image-size 256
SMALL_DATA_DETECTION = declare(
    "small_data_detection",
    batch_size=(8, "our choice: many steps from few images"),
    steps=(2_000, "our choice: a few hundred images from scratch in well under an hour"),
    learning_rate=(0.1, "our choice: below proxy_detection's, as the images vary less"),
    warmup_steps=(200, "our choice: 10 % of the steps"),
    schedule=("step", "paper 5.1.1"),
    lr_drops=(
        ((400, 0.1), (120, 0.01)),
        "our choice: the paper's factors; the last 20 % and 6 % so that both phases train",
    ),
    scale_jitter=((0.5, 2.0), "released config of Mobile SpineNet-49"),
    norm_freeze_steps=(0, "our choice: as the paper; level 7 of real pictures has more values"),
    **PAPER_SGD,
    **SHORT_SCHEDULE,
)

# Pictures of single objects, or objects cut out of pictures.
#   effspinenet train --data my_pictures --task classification --image-size 64
SMALL_DATA_CLASSIFICATION = declare(
    "small_data_classification",
    batch_size=(16, "our choice: many steps from few images"),
    steps=(2_000, "our choice: as small_data_detection"),
    learning_rate=(0.1, "our choice: as small_data_detection"),
    warmup_steps=(200, "our choice: 10 % of the steps"),
    schedule=("cosine", "our choice: no drops to place"),
    lr_drops=((), "our choice: none besides the cosine"),
    scale_jitter=((0.8, 1.25), "our choice: the object stays in the picture"),
    norm_freeze_steps=(400, "our choice: level 7 of a small picture is one value"),
    **CLIPPED_SGD,
    **SHORT_SCHEDULE,
)

# Semantic segmentation.
#   effspinenet train --data my_pictures --task segmentation --image-size 256
SMALL_DATA_SEGMENTATION = declare(
    "small_data_segmentation",
    batch_size=(8, "our choice: many steps from few images"),
    steps=(2_000, "our choice: as small_data_detection"),
    learning_rate=(0.05, "paper 5.3"),
    warmup_steps=(200, "our choice: 10 % of the steps; paper 5.3: 500 of 10,000"),
    schedule=("cosine", "paper 5.3"),
    lr_drops=((), "our choice: none besides the cosine"),
    scale_jitter=((0.5, 2.0), "our choice: as small_data_detection"),
    norm_freeze_steps=(400, "our choice: level 7 of a small picture is one value"),
    **CLIPPED_SGD,
    **SHORT_SCHEDULE,
)

# What `effspinenet train` takes for a task by default.
SMALL_DATA_RECIPES: dict[str, str] = {
    "detection": SMALL_DATA_DETECTION.name,
    "instances": SMALL_DATA_DETECTION.name,
    "classification": SMALL_DATA_CLASSIFICATION.name,
    "segmentation": SMALL_DATA_SEGMENTATION.name,
}

# --- Small searches (section 5.1.1's trials, made short) ----------------------------------------

# A trial of the proxy search: Eff-SpineNet-M0 on ShapeScenes at 96 pixels.
#   effspinenet search --profile proxy
PROXY_SEARCH = declare(
    "proxy_search",
    **{
        **PROXY_SETTINGS,
        "steps": (200, "our choice: about a minute of one core a trial"),
        "warmup_steps": (16, "our choice: 8 % of the steps"),
    },
)

# A trial of the smoke search: every part of it in 2 steps.
#   effspinenet search --profile smoke
SMOKE_SEARCH = declare(
    "smoke_search",
    batch_size=(4, "our choice: the smallest that exercises batching"),
    steps=(2, "our choice: every part of a trial runs; says nothing about accuracy"),
    learning_rate=(0.01, "our choice: too little to diverge in two steps"),
    warmup_steps=(1, "our choice: so that every phase of the schedule runs"),
    schedule=("cosine", "our choice: as proxy_search"),
    lr_drops=((), "our choice: none besides the cosine"),
    scale_jitter=((0.8, 1.25), "our choice: as proxy_search"),
    norm_freeze_steps=(0, "our choice: statistics of two steps say nothing"),
    **CLIPPED_SGD,
    **SHORT_SCHEDULE,
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        PAPER_DETECTION,
        *PAPER_SCHEDULES,
        *PAPER_STRATEGIES,
        PAPER_SEARCH_TRIAL,
        PAPER_INSTANCES,
        PAPER_CLASSIFICATION,
        PAPER_SEGMENTATION,
        PROXY_DETECTION,
        PROXY_CLASSIFICATION,
        PROXY_SEGMENTATION,
        *PROXY_SCHEDULES,
        *PROXY_STRATEGIES,
        SMALL_DATA_DETECTION,
        SMALL_DATA_CLASSIFICATION,
        SMALL_DATA_SEGMENTATION,
        SMOKE_DETECTION,
        PROXY_SEARCH,
        SMOKE_SEARCH,
    )
}


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        UnknownName: no such recipe; the message lists near names.
    """
    if name not in RECIPES:
        raise UnknownName("recipe", name, RECIPES)
    return RECIPES[name]


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """The recipe that `Recipe.to_dict` gave `values` of; sources are those of its named recipe.

    Raises:
        UnknownName: the named recipe or a field does not exist.
    """
    named = get_recipe(values["name"])
    defaults = {f.name: f.default for f in fields(Recipe) if f.default is not MISSING}
    lists = {
        "lr_drops": tuple((int(step), float(factor)) for step, factor in values["lr_drops"]),
        "scale_jitter": tuple(values["scale_jitter"]),
    }
    plain = {**defaults, **values, **lists}
    return named.replace(**{k: v for k, v in plain.items() if v != getattr(named, k)})


def recipes_frame(recipes: Iterable[Recipe] = tuple(RECIPES.values())) -> pd.DataFrame:
    """One row a setting: columns `recipe`, `setting`, `value` (as text; "–" for none), `source`.

    The settings of a recipe come in the order of its fields.
    """
    import pandas as pd

    rows = [
        {
            "recipe": recipe.name,
            "setting": item.name,
            "value": _text(getattr(recipe, item.name)),
            "source": recipe.sources[item.name],
        }
        for recipe in recipes
        for item in fields(Recipe)
        if item.name in recipe.sources
    ]
    return pd.DataFrame(rows)


def _text(value: object) -> str:
    if value is None or value == () or value == "":
        return "–"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
