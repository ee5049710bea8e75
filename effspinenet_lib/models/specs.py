"""Tables 1 and 2 of the paper as data, and the compound scaling that connects them.

This module needs no torch. Block numbers are 1-based, as in Table 1; input 0 is the stem
convolution. A level L has features of ceil(image side / 2**L).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

STEM_INPUT = 0
STEM_BLOCKS = 2  # blocks 1 and 2 follow the stem convolution in a chain (SpineNet's stem)
OUTPUT_LEVELS = (3, 4, 5, 6, 7)
MINIMUM_IMAGE_SIZE = 64  # our choice: below it P7 would be a fraction of one pixel wide

SEGMENTATION_SIZE = 512  # section 5.3: the crop size of every model
CLASSIFICATION_DIM = 256  # section 4.2: the feature dimension of every model

# Recovered by fitting the cost columns (book/recovered.md); not stated in the paper.
STEM_DIM = 16
EXPANSION_RATIO = 6
SQUEEZE_RATIO = 0.2
DIM_MULTIPLE = 4
DIM_KEPT_FRACTION = 0.9

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

    name: str
    blocks: tuple[BlockSpec, ...]

    @property
    def outputs(self) -> dict[int, BlockSpec]:
        """Output blocks by level, P3 first."""
        return {block.level: block for block in sorted(self.blocks, key=_level) if block.is_output}

    @property
    def extra_inputs(self) -> dict[int, tuple[int, ...]]:
        """Blocks that nothing consumes, by the output block of their level that adds them.

        The rule is the released code's: when an output block is built, each earlier block of
        its level that has no consumer so far is added to it. In Table 1 it is block 13 alone,
        added to block 16.
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
                if earlier.level == block.level
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
    """A scale-permuted model by name: a base distribution at a scale."""

    name: str
    base: str
    scale: str
    tables: tuple[str, ...] = field(default=())

    @property
    def backbone(self) -> BackboneSpec:
        """The scaled backbone."""
        return scale_backbone(BASES[self.base], SCALES[self.scale])


def _level(block: BlockSpec) -> int:
    return block.level


# Wiring of SpineNet-49 (released code; facts in book/recovered.md): level, inputs, output?
_TOPOLOGY: tuple[tuple[int, tuple[int, ...], bool], ...] = (
    (1, (STEM_INPUT,), False),
    (2, (1,), False),
    (2, (1, 2), False),
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
_KERNEL = 3  # Table 1: every block of the scale-permuted models
# Section 3.1 and Table 1: one feature dimension a level.
_SP_EFFICIENTNET_DIMS = {1: 16, 2: 24, 3: 40, 4: 96, 5: 152, 6: 152, 7: 152}
# Table 1, the learned distribution.
_EFF_SPINENET_DIMS = (
    *(16, 24, 16, 16, 104, 48, 120, 40, 120),
    *(168, 96, 192, 136, 104, 40, 136, 136, 40),
)


def _base(name: str, dims: Iterable[int]) -> BackboneSpec:
    blocks = tuple(
        BlockSpec(index, level, _KERNEL, dim, inputs, is_output)
        for index, ((level, inputs, is_output), dim) in enumerate(
            zip(_TOPOLOGY, dims, strict=True), start=1
        )
    )
    return BackboneSpec(name, blocks)


BASES: dict[str, BackboneSpec] = {
    "sp_efficientnet": _base(
        "sp_efficientnet", (_SP_EFFICIENTNET_DIMS[level] for level, _, _ in _TOPOLOGY)
    ),
    "eff_spinenet": _base("eff_spinenet", _EFF_SPINENET_DIMS),
}

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
    "spinenet_49",
    tuple(
        ResidualBlockSpec(
            index,
            level,
            _KERNEL,
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

# Table 2. The depth coefficients are EfficientNet's (B1: 1.1, B2: 1.2).
SCALES: dict[str, Scale] = {
    scale.id: scale
    for scale in (
        Scale("M0", 256, 0.4, 1.0, head_dim=24),
        Scale("M1", 384, 0.5, 1.0, head_dim=40),
        Scale("M2", 384, 0.8, 1.0, head_dim=64),
        Scale("D0", 512, 1.0, 1.0, head_dim=64),
        Scale("D1", 640, 1.0, 1.1, head_dim=88, classification_size=240),
        Scale("D2", 768, 1.1, 1.2, head_dim=112, box_fc_dim=512, classification_size=256),
    )
}

_DETECTION_TABLES = ("table-01", "table-02", "table-03", "table-06", "table-10")
MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec("eff_spinenet_m0", "eff_spinenet", "M0", ("table-02", "table-07")),
        ModelSpec("eff_spinenet_m1", "eff_spinenet", "M1", ("table-02", "table-07")),
        ModelSpec("eff_spinenet_m2", "eff_spinenet", "M2", ("table-02", "table-07")),
        ModelSpec(
            "eff_spinenet_d0",
            "eff_spinenet",
            "D0",
            (*_DETECTION_TABLES, "table-08", "table-09", "table-11"),
        ),
        ModelSpec("eff_spinenet_d1", "eff_spinenet", "D1", _DETECTION_TABLES[1:]),
        ModelSpec(
            "eff_spinenet_d2",
            "eff_spinenet",
            "D2",
            (*_DETECTION_TABLES[1:], "table-04", "table-05", "table-11"),
        ),
        ModelSpec("sp_efficientnet_b0", "sp_efficientnet", "D0", ("table-01", "table-08")),
        # Not in the paper: SP-EfficientNet-B0 at the scale M0, its counterpart in proxy runs.
        ModelSpec("sp_efficientnet_m0", "sp_efficientnet", "M0"),
    )
}


def level_side(image_side: int, level: int) -> int:
    """Side of the features of a level: ceil(image_side / 2**level)."""
    return -(-image_side // 2**level)


def round_dim(value: float, multiple: int = DIM_MULTIPLE) -> int:
    """Round channels to the nearest multiple of `multiple`, at least one multiple.

    Never below 90 % of `value` (the rounding of the EfficientNet family; the multiple of 4 is
    recovered from the cost columns).
    """
    rounded = max(multiple, int(value + multiple / 2) // multiple * multiple)
    return rounded if rounded >= DIM_KEPT_FRACTION * value else rounded + multiple


def block_repeats(depth_multiplier: float) -> tuple[int, ...]:
    """Repeats of the 18 blocks at EfficientNet's depth coefficient (section 3.1, Table 2).

    A level gains as many blocks as the EfficientNet-B0 stages of that level gain, each stage
    scaled to ceil(blocks * depth_multiplier); the gained blocks go one by one to the level's
    blocks, bottom up. Levels 6 and 7 have no stage and gain none. For 1.1 and 1.2 this gives
    the repeats that Table 2 prints; the paper states the rule in part, the count per stage is
    recovered from the table.
    """
    gained: Counter[int] = Counter()
    for (level, _, _), blocks in Counter(EFFICIENTNET_B0).items():
        gained[level] += math.ceil(blocks * depth_multiplier) - blocks
    repeats = []
    order: Counter[int] = Counter()
    width = Counter(level for level, _, _ in _TOPOLOGY)
    for level, _, _ in _TOPOLOGY:
        rounds, remainder = divmod(gained[level], width[level])
        repeats.append(1 + rounds + (order[level] < remainder))
        order[level] += 1
    return tuple(repeats)


def scale_backbone(base: BackboneSpec, scale: Scale) -> BackboneSpec:
    """Apply a row of Table 2 to a base distribution: feature multiplier, rounding, repeats."""
    multiplier = scale.feature_multiplier
    blocks = tuple(
        replace(block, feature_dim=round_dim(block.feature_dim * multiplier), repeats=repeats)
        for block, repeats in zip(base.blocks, scale.repeats, strict=True)
    )
    return replace(
        base,
        name=f"{base.name}_{scale.id.lower()}",
        blocks=blocks,
        stem_dim=round_dim(base.stem_dim * multiplier),
    )


def block_multi_adds(spec: BackboneSpec, input_size: int) -> tuple[float, ...]:
    """Multi-Adds of each block by Equation 2, repeats included, for a square image.

    Two 1x1 convolutions and the depthwise one at the block's resolution; squeeze-and-excitation
    and resampling are outside Equation 2.
    """
    ratio = spec.expansion_ratio
    return tuple(
        float(
            block.repeats
            * level_side(input_size, block.level) ** 2
            * (2 * block.feature_dim**2 * ratio + block.kernel**2 * block.feature_dim * ratio)
        )
        for block in spec.blocks
    )
