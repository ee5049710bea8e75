"""Multi-Adds and parameters of a scale-permuted model in closed form, under any choices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

from effspinenet_lib.choices.heads import HEADS
from effspinenet_lib.choices.settings import ROUNDINGS, SIDES, SQUEEZE_ROUNDINGS, Choices
from effspinenet_lib.choices.tally import KERNEL, ModelCost, Tally
from effspinenet_lib.models.learned import unrounded_dims
from effspinenet_lib.models.specs import BASES, OUTPUT_LEVELS, BackboneSpec, BlockSpec, Scale

IMAGE_CHANNELS = 3
STEM_LEVEL = 1
PATCH = 2 * 2  # space-to-depth: positions that become channels
# Released code: one strided depthwise convolution has a kernel of 3 for a factor of 2, else of 5.
SHORT_KERNEL, LONG_KERNEL = 3, 5

Area = Callable[[int], int]  # level -> positions of its features


def cost(
    base: BackboneSpec,
    scale: Scale,
    task: str,
    choices: Choices,
    size: int,
    space_to_depth: bool = True,
    weighted_fusion: bool = True,
) -> ModelCost:
    """Count a model without building it.

    Args:
        base: a distribution at the scale D0, before multiplication and rounding.
        scale: a row of Table 2.
        task: `detection`, `instances`, `classification` or `segmentation`.
        choices: what the paper leaves open.
        size: side of the square image in pixels.
        space_to_depth: off in Table 9's model 1; classification follows its own choice.
        weighted_fusion: off in Table 9's model 2.

    Raises:
        KeyError: no such task or answer.
    """
    side = SIDES[choices.sides]
    areas = {level: side(size, level) ** 2 for level in range(STEM_LEVEL, max(OUTPUT_LEVELS) + 1)}
    if task == "classification":
        space_to_depth = choices.classification_downsampling == "space-to-depth"
    tally = Tally(choices)
    dims = _backbone(tally, base, scale, areas.__getitem__, space_to_depth, weighted_fusion)
    HEADS[task](tally, scale, dims, areas)
    return tally.cost


def scaled_dims(base: BackboneSpec, multiplier: float, choices: Choices) -> list[int]:
    """Feature dimensions of the blocks after multiplication and rounding."""
    dims: Iterable[float] = (block.feature_dim for block in base.blocks)
    if choices.dims != "as printed" and base is BASES["eff_spinenet"]:
        dims = unrounded_dims(float(choices.dims.split()[-1]))
    rounded = ROUNDINGS[choices.rounding]
    return [rounded(dim * multiplier) for dim in dims]


def scaled_repeats(scale: Scale, choices: Choices) -> tuple[int, ...]:
    """Repeats of the 18 blocks; the last two follow from Table 2's rule, or are a choice."""
    repeats = _repeats(scale)
    if choices.lost_repeats == "17 and 18: 2":
        return (*repeats[:-2], *[max(repeats)] * 2)
    if choices.lost_repeats == "1 and 2: 1":
        return (1, 1, *repeats[:-2])
    return repeats


@cache
def _repeats(scale: Scale) -> tuple[int, ...]:
    return scale.repeats


def _backbone(
    tally: Tally,
    base: BackboneSpec,
    scale: Scale,
    area: Area,
    space_to_depth: bool,
    weighted: bool,
) -> dict[int, int]:
    """Count the backbone; returns level to channels of its outputs."""
    choices = tally.choices
    dims = scaled_dims(base, scale.feature_multiplier, choices)
    stem = choices.stem_dim
    if choices.stem_scaled:
        stem = ROUNDINGS[choices.rounding](stem * scale.feature_multiplier)
    tally.weights(IMAGE_CHANNELS * stem * KERNEL**2, area(STEM_LEVEL))
    tally.norm(stem, area(STEM_LEVEL))
    tally.elements("activation", stem * area(STEM_LEVEL))
    inputs, level = stem, STEM_LEVEL
    repeats = scaled_repeats(scale, choices)
    idle = base.extra_inputs if choices.idle_block else {}
    for block, dim, repeat in zip(base.blocks, dims, repeats, strict=True):
        here = area(block.level)
        if block.index > choices.stem_blocks:
            extra = idle.get(block.index, ())
            _fusion(tally, base, block, extra, dims, area, space_to_depth, weighted)
            inputs, level = dim, block.level
        expansion = choices.first_expansion if block.index == 1 else choices.expansion
        _mbconv(tally, block.kernel, inputs, dim, area(level), here, expansion)
        for _ in range(repeat - 1):
            _mbconv(tally, block.kernel, dim, dim, here, here, choices.expansion)
        inputs, level = dim, block.level
    return {level: dims[block.index - 1] for level, block in base.outputs.items()}


def _mbconv(
    tally: Tally, kernel: int, inputs: int, outputs: int, before: int, after: int, expansion: int
) -> None:
    """Count an MBConv that leads from `before` positions to `after`."""
    choices = tally.choices
    expanded = inputs * expansion
    if expansion > 1:
        tally.conv(inputs, expanded, before, active=True)
    tally.depthwise(expanded, after, kernel)
    tally.elements("activation", expanded * after)
    if choices.squeeze_ratio:
        source = inputs if choices.squeeze_of == "input" else expanded
        squeezed = SQUEEZE_ROUNDINGS[choices.squeeze_rounding](source * choices.squeeze_ratio)
        tally.weights(2 * expanded * squeezed, 1 if choices.squeeze_counted else 0)
        tally.parameters += squeezed + expanded
        tally.elements("gate", expanded * after)
    tally.conv(expanded, outputs, after)
    if inputs == outputs and before == after:
        tally.elements("sum", outputs * after)


def _fusion(
    tally: Tally,
    base: BackboneSpec,
    block: BlockSpec,
    idle: tuple[int, ...],
    dims: list[int],
    area: Area,
    space_to_depth: bool,
    weighted: bool,
) -> None:
    """Count the resampling of a block's inputs, their sum and its activation."""
    choices = tally.choices
    dim, here = dims[block.index - 1], area(block.level)
    for source in block.inputs:
        level = base.blocks[source - 1].level
        _resample(tally, dims[source - 1], level, dim, block.level, area, space_to_depth)
    for source in idle:
        if dims[source - 1] != dim:
            tally.conv(dims[source - 1], dim, here)
    count = len(block.inputs) + len(idle)
    if weighted and choices.fusion_weights:
        tally.parameters += count
    products = count if weighted else 0
    tally.elements("sum", (products + count - 1) * dim * here)
    tally.elements("activation", dim * here)


def _resample(
    tally: Tally,
    inputs: int,
    source: int,
    outputs: int,
    target: int,
    area: Area,
    space_to_depth: bool,
) -> None:
    """Count the way from a level and dimension to another."""
    choices = tally.choices
    here = area(target)
    if target < source:
        tally.conv(inputs, outputs, area(source) if choices.upsampling == "after 1x1" else here)
        return
    if target == source:
        if inputs != outputs or choices.same_shape_conv:
            tally.conv(inputs, outputs, here)
        return
    method, done = choices.plain_downsampling, source
    if space_to_depth:
        method, done = choices.downsampling, source + 1
        inputs *= PATCH
        if choices.space_to_depth_norm:
            tally.norm(inputs, area(done))
            tally.elements("activation", inputs * area(done))
    if method == "space-to-depth":
        inputs *= PATCH ** (target - done)
    elif method == "one depthwise" and target > done:
        kernel = SHORT_KERNEL if target - done == 1 else LONG_KERNEL
        tally.depthwise(inputs, here, kernel)
    elif method == "depthwise":
        for level in range(done + 1, target + 1):
            tally.depthwise(inputs, area(level))
    tally.conv(inputs, outputs, here)
