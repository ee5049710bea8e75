"""The paper's recipes of instance segmentation, classification and semantic segmentation.

"EfficientNet's code" is `models/official/efficientnet` of the repository `tensorflow/tpu`
(`main.py` and `utils.py`), the code of the paper that section 5.2 follows.
"""

from __future__ import annotations

from effspinenet_lib.training.recipes.detection import PAPER_DETECTION_SETTINGS
from effspinenet_lib.training.recipes.recipe import declare
from effspinenet_lib.training.recipes.shared import PAPER_BATCH, PAPER_REGULARISATION, PAPER_SGD

IMAGENET_TRAIN_IMAGES = 1_281_167  # images of the ILSVRC 2012 training set
# EfficientNet's code: `train_batch_size` and `train_steps`, which it says is about 350 epochs.
IMAGENET_BATCH, IMAGENET_STEPS = 2_048, 218_949
IMAGENET_STEPS_PER_EPOCH = IMAGENET_TRAIN_IMAGES / IMAGENET_BATCH

PAPER_INSTANCES = declare(
    "paper_instances",
    **{
        name: (value, f"{source} (section 5.1.2 gives Mask R-CNN no settings of its own)")
        for name, (value, source) in PAPER_DETECTION_SETTINGS.items()
    },
)

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
    lr_drops=((), "paper 5.2: none beside the exponential schedule"),
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

PAPER_SEGMENTATION = declare(
    "paper_segmentation",
    batch_size=(PAPER_BATCH, "paper 5.3"),
    steps=(10_000, "paper 5.3"),
    learning_rate=(0.05, "paper 5.3"),
    warmup_steps=(500, "paper 5.3"),
    warmup_start=(0.0, "our choice: paper 5.3 gives the length of the warmup, not its start"),
    schedule=("cosine", "paper 5.3"),
    lr_drops=((), "paper 5.3: none beside the cosine"),
    scale_jitter=((0.1, 2.0), "paper 5.3: generally as in 5.1.1"),
    **PAPER_SGD,
    **PAPER_REGULARISATION,
)
