"""Tables 1 and 2 of the paper as data, learned resource distributions, and compound scaling.

The network is the authors' own, as their public code has it (tensorflow/tpu at commit 1021ed8,
models/official/detection/modeling/architecture/spinenetv2.py). This module needs no torch. Block
numbers are 1-based, as in Table 1; input 0 is the stem convolution. A level L has features of
ceil(image side / 2**L).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from effspinenet_lib.errors import UserError

STEM_INPUT = 0
OUTPUT_LEVELS = (3, 4, 5, 6, 7)
MINIMUM_IMAGE_SIZE = 64  # our choice: below it P7 would be a fraction of one pixel wide

SEGMENTATION_SIZE = 512  # section 5.3: the crop size of every model
CLASSIFICATION_DIM = 256  # section 4.2: the feature dimension of every model

# Detection and instance segmentation: 90 classes, COCO's highest category id. The paper does not
# say how many; the authors' code has 91 logits, one of them the background.
COCO_CLASSES = 90
IMAGENET_CLASSES = 1000
VOC_CLASSES = 21  # PASCAL VOC's 20 and the background, which segmentation counts as a class

# Task -> classes of the benchmark that the paper uses for it.
TASKS: dict[str, int] = {
    "detection": COCO_CLASSES,
    "instances": COCO_CLASSES,
    "classification": IMAGENET_CLASSES,
    "segmentation": VOC_CLASSES,
}

# The authors' code.
STEM_DIM = 8  # before the multiplier
EXPANSION_RATIO = 6  # of every block, block 1 included
SQUEEZE_RATIO = 0.2  # of the block's input channels
DIM_MULTIPLE = 8

BOTTLENECK_EXPANSION = 4  # ResNet: a bottleneck block's output channels over its filters

# EfficientNet-B0 as Table 1 prints it: level, kernel size, feature dimension of its 16 blocks.
EFFICIENTNET_B0 = (
    (1, 3, 16),
    (2, 3, 24),
    (2, 3, 24),
    (3, 5, 40),
    (3, 5, 40),
    (4, 3, 80),
    (4, 3, 80),
    (4, 3, 80),
    (4, 5, 112),
    (4, 5, 112),
    (4, 5, 112),
    (5, 5, 192),
    (5, 5, 192),
    (5, 5, 192),
    (5, 5, 192),
    (5, 3, 320),
)


@dataclass(frozen=True)
class BlockSpec:
    """One MBConv block group of a scale-permuted network (a row of Table 1).

    Attributes:
        index: 1-based number of the block.
        level: feature level; stride 2**level.
        kernel: side of the depthwise kernel.
        feature_dim: output channels.
        inputs: numbers of the blocks it takes as input; 0 is the stem convolution.
        is_output: whether it is one of P3 to P7.
        repeats: MBConv layers in the group (Table 2).
    """

    index: int
    level: int
    kernel: int
    feature_dim: int
    inputs: tuple[int, ...]
    is_output: bool = False
    repeats: int = 1


@dataclass(frozen=True)
class Wiring:
    """What every scale-permuted backbone has: blocks in order, each naming its inputs."""

    blocks: tuple[BlockSpec, ...]

    @property
    def outputs(self) -> dict[int, BlockSpec]:
        """Output blocks by level, P3 first."""
        outputs = {block.level: block for block in self.blocks if block.is_output}
        return dict(sorted(outputs.items()))

    @property
    def stem_blocks(self) -> int:
        """How many blocks follow the stem convolution in a chain: the leading ones of one input."""
        return len(list(takewhile(lambda block: len(block.inputs) == 1, self.blocks)))

    @property
    def extra_inputs(self) -> dict[int, tuple[int, ...]]:
        """Blocks that nothing consumes, by the output block that takes them in as they are.

        The authors' rule: an output block takes in each earlier block without a consumer that has
        its level and its channels. In Table 1 it is block 13 alone, taken in by block 16. Where a
        learned distribution gives the two other channels, nothing is taken in.
        """
        extra: dict[int, tuple[int, ...]] = {}
        consumed: set[int] = set()
        for block in self.blocks:
            consumed.update(block.inputs)
            if not block.is_output:
                continue
            idle = tuple(
                earlier.index
                for earlier in self.blocks[: block.index - 1]
                if (earlier.level, earlier.feature_dim) == (block.level, block.feature_dim)
                and earlier.index not in consumed
                and not earlier.is_output
            )
            if idle:
                extra[block.index] = idle
                consumed.update(idle)
        return extra


@dataclass(frozen=True)
class BackboneSpec(Wiring):
    """A scale-permuted backbone of MBConv blocks after a stem convolution."""

    stem_dim: int = STEM_DIM
    expansion_ratio: int = EXPANSION_RATIO
    squeeze_ratio: float = SQUEEZE_RATIO


@dataclass(frozen=True)
class ResidualBlockSpec(BlockSpec):
    """A block of SpineNet: ResNet's bottleneck block, or its residual one.

    Attributes:
        bottleneck: which of the two.
    """

    bottleneck: bool = True

    @property
    def filters(self) -> int:
        """Channels of its 3x3 convolutions."""
        return self.feature_dim // BOTTLENECK_EXPANSION if self.bottleneck else self.feature_dim


@dataclass(frozen=True)
class SpineNetSpec(Wiring):
    """A SpineNet: residual and bottleneck blocks after ResNet's stem.

    Attributes:
        blocks: residual and bottleneck blocks.
        stem_dim: channels of the 7x7 convolution.
        resample_alpha: factor on a block's filters while its features are resampled.
    """

    blocks: tuple[ResidualBlockSpec, ...]
    stem_dim: int
    resample_alpha: float


@dataclass(frozen=True)
class Scale:
    """A row of Table 2.

    Attributes:
        id: the printed model id.
        input_size: image side in pixels.
        feature_multiplier: factor on the backbone's feature dimensions.
        depth_multiplier: EfficientNet's depth coefficient (1.1 for B1, 1.2 for B2); Table 2's
            repeats follow from it, see `block_repeats`.
        head_dim: channels of the separable convolutions in the subnets.
        head_layers: separable convolutions in each subnet.
        box_fc_dim: width of the fully connected layer in Mask R-CNN's box branch (section 4.1;
            the mobile models, which the paper has no Mask R-CNN of, take D0's).
        classification_size: image side in pixels (Table 10; the mobile models take D0's).
    """

    id: str
    input_size: int
    feature_multiplier: float
    depth_multiplier: float
    head_dim: int
    head_layers: int = 3
    box_fc_dim: int = 256
    classification_size: int = 224

    @property
    def repeats(self) -> tuple[int, ...]:
        """Repeats of the 18 blocks."""
        return block_repeats(self.depth_multiplier)


@dataclass(frozen=True)
class ModelSpec:
    """A scale-permuted model by name: a resource distribution at a scale.

    Attributes:
        name: of the model.
        betas: of the 18 blocks (Equation 4).
        scale: id of a row of Table 2.
        tables: items of the paper that it stands in.
    """

    name: str
    betas: tuple[int, ...]
    scale: str
    tables: tuple[str, ...] = field(default=())

    @property
    def backbone(self) -> BackboneSpec:
        """The backbone at its scale."""
        return backbone_spec(self.betas, SCALES[self.scale])


# Level, inputs, output? of the 18 blocks (Table 1; the wiring is SpineNet-49's, from the authors'
# code). Blocks 1 to 3 follow the stem convolution in a chain.
TOPOLOGY: tuple[tuple[int, tuple[int, ...], bool], ...] = (
    (1, (STEM_INPUT,), False),
    (2, (1,), False),
    (2, (2,), False),
    (2, (2, 3), False),
    (4, (2, 3), False),
    (3, (4, 5), False),
    (4, (4, 6), False),
    (6, (5, 7), False),
    (4, (5, 7), False),
    (5, (8, 9), False),
    (7, (8, 10), False),
    (5, (10, 11), False),
    (5, (10, 12), False),
    (4, (7, 12), True),
    (3, (6, 12), True),
    (5, (9, 14), True),
    (7, (7, 16), True),
    (6, (14, 16), True),
)
KERNEL = 3  # Table 1: every block of the scale-permuted models
# Section 3.1 and Table 1: one feature dimension a level in SP-EfficientNet-B0.
_SP_DIMS = {1: 16, 2: 24, 3: 40, 4: 96, 5: 152, 6: 152, 7: 152}
SP_DIMS = tuple(_SP_DIMS[level] for level, _, _ in TOPOLOGY)

SEARCH_SPACE = (1, 5, 10, 15, 20)  # section 5.1.1
EQUAL_BETAS = (1,) * len(TOPOLOGY)  # SP-EfficientNet-B0
# Eff-SpineNet, blocks 1 to 18. Recovered from Table 1's dimensions, which these betas and the rule
# of `feature_dims` give to the digit, and from the costs of the scaled models.
LEARNED_BETAS = (10, 10, 5, 5, 15, 20, 20, 1, 20, 15, 5, 20, 10, 15, 15, 10, 10, 1)
# alpha over beta of the learned distribution. From 0.07813 to 0.07824 the dimensions of M0 to D2
# come out the same, and their printed costs are met. Equation 4 gives 0.07802 with the approximated
# Equation 2, 0.07943 with the whole one; `UNIT_FACTOR` makes up for it in every distribution.
LEARNED_UNIT = 0.0782

LARGEST_BETA = 10_000  # our choice: shares of the computation in hundredths of a percent
BETAS_JOINT = "-"

# SpineNet-49 as published (arXiv 1912.05027, and the released code): level, bottleneck block or
# else residual, inputs, output? Its blocks 3 to 17 are wired as blocks 4 to 18 of Table 1.
_SPINENET_49: tuple[tuple[int, bool, tuple[int, ...], bool], ...] = (
    (2, True, (STEM_INPUT,), False),
    (2, True, (1,), False),
    (2, True, (1, 2), False),
    (4, False, (1, 2), False),
    (3, True, (3, 4), False),
    (4, True, (3, 5), False),
    (6, False, (4, 6), False),
    (4, True, (4, 6), False),
    (5, False, (7, 8), False),
    (7, False, (7, 9), False),
    (5, True, (9, 10), False),
    (5, True, (9, 11), False),
    (4, True, (6, 11), True),
    (3, True, (5, 11), True),
    (5, True, (8, 13), True),
    (7, True, (6, 15), True),
    (6, True, (13, 15), True),
)
_SPINENET_FILTERS = {2: 64, 3: 128, 4: 256, 5: 256, 6: 256, 7: 256}
SPINENET_49 = SpineNetSpec(
    tuple(
        ResidualBlockSpec(
            index,
            level,
            KERNEL,
            _SPINENET_FILTERS[level] * (BOTTLENECK_EXPANSION if bottleneck else 1),
            inputs,
            is_output,
            bottleneck=bottleneck,
        )
        for index, (level, bottleneck, inputs, is_output) in enumerate(_SPINENET_49, start=1)
    ),
    stem_dim=64,
    resample_alpha=0.5,
)

# Table 2. The depth coefficients are EfficientNet's (B1 to B4: 1.1, 1.2, 1.4, 1.8). The paper has
# no D3 and D4: multipliers and head dimensions are the authors' code's, the repeats follow from the
# same rule; image sizes are EfficientDet's, classification sizes EfficientNet's in multiples of 16
# (section 5.2), box_fc_dim is D2's.
SCALES: dict[str, Scale] = {
    scale.id: scale
    for scale in (
        Scale("M0", 256, 0.4, 1.0, head_dim=24),
        Scale("M1", 384, 0.5, 1.0, head_dim=40),
        Scale("M2", 384, 0.8, 1.0, head_dim=64),
        Scale("D0", 512, 1.0, 1.0, head_dim=64),
        Scale("D1", 640, 1.0, 1.1, head_dim=88, classification_size=240),
        Scale("D2", 768, 1.1, 1.2, head_dim=112, box_fc_dim=512, classification_size=256),
        Scale("D3", 896, 1.2, 1.4, head_dim=160, box_fc_dim=512, classification_size=304),
        Scale("D4", 1024, 1.4, 1.8, head_dim=224, box_fc_dim=512, classification_size=384),
    )
}

_TABLES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("M0", "M1", "M2"), ("table-02", "table-07")),
    "D0": (
        *("table-01", "table-02", "table-03", "table-06", "table-08", "table-09"),
        *("table-10", "table-11"),
    ),
    "D1": ("table-02", "table-03", "table-06", "table-10"),
    "D2": (
        *("table-02", "table-03", "table-04", "table-05", "table-06"),
        *("table-10", "table-11"),
    ),
}
MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        *(
            ModelSpec(f"eff_spinenet_{scale.lower()}", LEARNED_BETAS, scale, _TABLES.get(scale, ()))
            for scale in SCALES
        ),
        ModelSpec("sp_efficientnet_b0", EQUAL_BETAS, "D0", ("table-01", "table-08")),
        # Not in the paper: SP-EfficientNet-B0 at the scale M0, its counterpart in proxy runs.
        ModelSpec("sp_efficientnet_m0", EQUAL_BETAS, "M0"),
    )
}
# What the authors counted themselves; the costs of other models are quoted from their papers.
COUNTED_BY_AUTHORS = (
    *(*MODELS, "spinenet_49", "resnet50_fpn"),
    *("efficientnet_b0_fpn", "efficientnet_b1_fpn", "efficientnet_b2_fpn"),
)


def level_side(image_side: int, level: int) -> int:
    """Side of the features of a level: ceil(image_side / 2**level)."""
    return -(-image_side // 2**level)


def round_dim(value: float) -> int:
    """The nearest multiple of 8, ties up, at least 8."""
    return max(DIM_MULTIPLE, int(value + DIM_MULTIPLE / 2) // DIM_MULTIPLE * DIM_MULTIPLE)


def resource_unit(betas: Sequence[float]) -> float:
    """The constant of Equation 4, alpha over beta, with the approximated Equation 2.

    sum(F) / sum(beta F) over the 18 blocks of SP-EfficientNet-B0; the image size cancels out.
    """
    costs = [dim**2 / 4**level for dim, (level, _, _) in zip(SP_DIMS, TOPOLOGY, strict=True)]
    return sum(costs) / sum(beta * cost for beta, cost in zip(betas, costs, strict=True))


UNIT_FACTOR = LEARNED_UNIT / resource_unit(LEARNED_BETAS)


def feature_dims(betas: Sequence[int], multiplier: float = 1.0) -> tuple[int, ...]:
    """Feature dimensions of the 18 blocks (Equations 2 to 4, then Table 2's multiplier).

    `multiplier * sqrt(alpha_i) * c_i`, rounded once. With a multiplier of 1 the learned betas give
    Table 1's Eff-SpineNet-D0, equal betas SP-EfficientNet-B0. The scaled models come from the
    learned dimensions before Table 1 rounded them: so their printed costs are met.

    Args:
        betas: of the 18 blocks, positive.
        multiplier: a scale's factor on the feature dimensions.
    """
    unit = UNIT_FACTOR * resource_unit(betas)
    return tuple(
        round_dim(multiplier * math.sqrt(unit * beta) * dim)
        for beta, dim in zip(betas, SP_DIMS, strict=True)
    )


def backbone_spec(betas: Sequence[int], scale: Scale = SCALES["D0"]) -> BackboneSpec:
    """The backbone of a resource distribution at a scale.

    Args:
        betas: of the 18 blocks, positive.
        scale: a row of Table 2.
    """
    dims = feature_dims(betas, scale.feature_multiplier)
    blocks = tuple(
        BlockSpec(index, level, KERNEL, dim, inputs, is_output, repeats)
        for index, ((level, inputs, is_output), dim, repeats) in enumerate(
            zip(TOPOLOGY, dims, scale.repeats, strict=True), start=1
        )
    )
    return BackboneSpec(blocks, stem_dim=round_dim(scale.feature_multiplier * STEM_DIM))


def block_repeats(depth_multiplier: float) -> tuple[int, ...]:
    """Repeats of the 18 blocks at EfficientNet's depth coefficient (section 3.1, Table 2).

    A level gains as many blocks as the EfficientNet-B0 stages of that level gain, each stage
    scaled to ceil(blocks * depth_multiplier); the gained blocks go one by one to the level's
    blocks, bottom up. Levels 6 and 7 have no stage and gain none. This gives what Table 2 prints
    and what the authors' code has for D1 to D4.
    """
    gained: Counter[int] = Counter()
    for (level, _, _), blocks in Counter(EFFICIENTNET_B0).items():
        gained[level] += math.ceil(blocks * depth_multiplier) - blocks
    repeats = []
    order: Counter[int] = Counter()
    width = Counter(level for level, _, _ in TOPOLOGY)
    for level, _, _ in TOPOLOGY:
        rounds, remainder = divmod(gained[level], width[level])
        repeats.append(1 + rounds + (order[level] < remainder))
        order[level] += 1
    return tuple(repeats)


def block_multi_adds(spec: BackboneSpec, input_size: int) -> tuple[float, ...]:
    """Multiply-adds of each block by Equation 2, repeats included, for a square image.

    Two 1x1 convolutions and the depthwise one at the block's resolution; squeeze-and-excitation
    and resampling are outside Equation 2.
    """
    return tuple(
        float(
            block.repeats
            * level_side(input_size, block.level) ** 2
            * EXPANSION_RATIO
            * (2 * block.feature_dim**2 + block.kernel**2 * block.feature_dim)
        )
        for block in spec.blocks
    )


def check_betas(betas: Sequence[Any]) -> tuple[int, ...]:
    """The betas, if they are valid.

    Raises:
        UserError: another number of betas than blocks, or one that is no whole number from 1 to
            `LARGEST_BETA`.
    """
    whole = all(type(beta) is int and 1 <= beta <= LARGEST_BETA for beta in betas)
    if len(betas) != len(TOPOLOGY) or not whole:
        raise UserError(
            f"betas are {betas_text(betas)!r}; they must be {len(TOPOLOGY)} whole numbers from 1 "
            f"to {LARGEST_BETA}, written as {betas_text(LEARNED_BETAS)}"
        )
    return tuple(betas)


def betas_text(betas: Sequence[Any]) -> str:
    """Betas as one word, such as 10-10-5, for options and CSV files."""
    return BETAS_JOINT.join(map(str, betas))


def parse_betas(text: str) -> tuple[int, ...]:
    """The betas that `betas_text` made `text` of.

    Raises:
        UserError: the text does not hold 18 valid betas.
    """
    return check_betas(
        [int(part) if part.isdecimal() else part for part in text.split(BETAS_JOINT)]
    )
