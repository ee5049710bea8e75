"""Multi-Adds and parameters of a scale-permuted model in closed form, under any choices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from effspinenet_lib.choices.learned import unrounded_dims
from effspinenet_lib.choices.settings import (
    COUNTED,
    ROUNDINGS,
    SIDES,
    SQUEEZE_ROUNDINGS,
    Choices,
)
from effspinenet_lib.specs import (
    BASES,
    CLASSIFICATION_DIM,
    BackboneSpec,
    BlockSpec,
    Scale,
)

IMAGE_CHANNELS = 3
STEM_LEVEL = 1
KERNEL = 3
BOX_CODE = 4
SEGMENTATION_CLASSES = 21
# Mask R-CNN: sides of what is pooled for boxes and masks, and of the upsampling between; 100
# detections an image have masks (COCO's limit).
BOX_AREA, MASK_AREA, UPSAMPLING_AREA, MASKS = 7**2, 14**2, 2**2, 100
# Released code: one strided depthwise convolution has a kernel of 3 for a factor of 2, else of 5.
SHORT_KERNEL, LONG_KERNEL = 3, 5
# Operations an element: a norm multiplies and adds, swish multiplies its argument by its sigmoid,
# squeeze-and-excitation multiplies by the gate, sums and biases add. Two are one Multi-Add.
OPERATIONS = {"norm": 2, "activation": 1, "gate": 1, "sum": 1, "bias": 1}
OPERATIONS_A_MULTI_ADD = 2

Area = Callable[[int], int]  # level -> positions of its features


class ModelCost(NamedTuple):
    """What one image costs, and how many numbers are trained."""

    multi_adds: int
    parameters: int


@dataclass
class Tally:
    """Adds up layers.

    Attributes:
        choices: what is counted, among others.
        multi_adds: of convolutions and linear layers.
        parameters: trained numbers.
        operations: single products and sums of the other layers that are counted.
    """

    choices: Choices
    multi_adds: int = 0
    parameters: int = 0
    operations: int = 0
    counted: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self.counted = COUNTED[self.choices.counted]

    @property
    def cost(self) -> ModelCost:
        """The sum."""
        return ModelCost(
            self.multi_adds + self.operations // OPERATIONS_A_MULTI_ADD, self.parameters
        )

    def elements(self, kind: str, count: int) -> None:
        """Count what is done once an element."""
        if kind in self.counted:
            self.operations += OPERATIONS[kind] * count

    def norm(self, channels: int, area: int, copies: int = 1) -> None:
        """A norm, of which `copies` share the positions."""
        self.parameters += self.choices.norm_parameters * channels * copies
        self.elements("norm", channels * area)

    def bias(self, channels: int, area: int) -> None:
        """A bias."""
        self.parameters += channels
        self.elements("bias", channels * area)

    def weights(self, count: int, area: int) -> None:
        """Weights that are each used once a position."""
        self.parameters += count
        self.multi_adds += count * area

    def conv(
        self, inputs: int, outputs: int, area: int, norm: bool = True, active: bool = False
    ) -> None:
        """A 1x1 convolution with its norm and activation."""
        self.weights(inputs * outputs, area)
        if norm:
            self.norm(outputs, area)
        if active:
            self.elements("activation", outputs * area)

    def depthwise(self, channels: int, area: int, kernel: int = KERNEL) -> None:
        """A depthwise convolution with its norm."""
        self.weights(channels * kernel**2, area)
        self.norm(channels, area)


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
    areas = {level: side(size, level) ** 2 for level in range(STEM_LEVEL, 8)}
    if task == "classification":
        space_to_depth = choices.classification_downsampling == "space-to-depth"
    tally = Tally(choices)
    dims = _backbone(tally, base, scale, areas.__getitem__, space_to_depth, weighted_fusion)
    _TASKS[task](tally, scale, dims, areas)
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
        inputs *= 4
        if choices.space_to_depth_norm:
            tally.norm(inputs, area(done))
            tally.elements("activation", inputs * area(done))
    if method == "space-to-depth":
        inputs *= 4 ** (target - done)
    elif method == "one depthwise" and target > done:
        kernel = SHORT_KERNEL if target - done == 1 else LONG_KERNEL
        tally.depthwise(inputs, here, kernel)
    elif method == "depthwise":
        for level in range(done + 1, target + 1):
            tally.depthwise(inputs, area(level))
    tally.conv(inputs, outputs, here)


def _lateral(tally: Tally, dims: dict[int, int], dim: int, areas: dict[int, int]) -> None:
    """Count the 1x1 convolutions that bring P3 to P7 to one dimension."""
    for level, inputs in dims.items():
        tally.conv(inputs, dim, areas[level], norm=tally.choices.lateral_norm, active=True)


def _branch(
    tally: Tally, dim: int, layers: int, area: int, norms: int, counts: tuple[int, ...], last: str
) -> None:
    """Count separable convolutions and prediction layers of `counts` channels."""
    for _ in range(layers):
        tally.weights(dim * KERNEL**2 + dim * dim, area)
        if tally.choices.head_bias:
            tally.bias(dim, area)
        tally.norm(dim, area, norms)
        tally.elements("activation", dim * area)
    for outputs in counts:
        if last == "separable":
            tally.weights(dim * KERNEL**2 + dim * outputs, area)
        else:
            tally.weights(dim * outputs * (KERNEL**2 if last == "3x3" else 1), area)
        tally.bias(outputs, area)


def _norm_copies(choices: Choices, dims: dict[int, int]) -> int:
    return len(dims) if choices.head_norms == "per level" else 1


def _detection(tally: Tally, scale: Scale, dims: dict[int, int], areas: dict[int, int]) -> None:
    choices = tally.choices
    dim = scale.head_dim
    _lateral(tally, dims, dim, areas)
    area = sum(areas[level] for level in dims)
    for outputs in (choices.anchors * choices.classes, choices.anchors * BOX_CODE):
        _branch(
            tally,
            dim,
            scale.head_layers,
            area,
            _norm_copies(choices, dims),
            (outputs,),
            choices.prediction,
        )


def _merge(tally: Tally, dims: dict[int, int], dim: int, areas: dict[int, int]) -> int:
    """Count how P3 to P7 become one; returns the positions of P3."""
    finest = areas[min(dims)]
    late = tally.choices.merge == "before 1x1"
    _lateral(tally, dims, dim, dict.fromkeys(areas, finest) if late else areas)
    tally.elements("sum", (len(dims) - 1) * dim * finest)
    return finest


def _classification(
    tally: Tally, scale: Scale, dims: dict[int, int], areas: dict[int, int]
) -> None:
    del scale
    _merge(tally, dims, CLASSIFICATION_DIM, areas)
    outputs = tally.choices.classification_classes
    tally.weights(CLASSIFICATION_DIM * outputs, 1)
    tally.bias(outputs, 1)


def _segmentation(tally: Tally, scale: Scale, dims: dict[int, int], areas: dict[int, int]) -> None:
    last = tally.choices.segmentation_prediction
    dim = scale.head_dim
    area = _merge(tally, dims, dim, areas)
    _branch(tally, dim, scale.head_layers, area, 1, (SEGMENTATION_CLASSES,), last)


def _instances(tally: Tally, scale: Scale, dims: dict[int, int], areas: dict[int, int]) -> None:
    choices = tally.choices
    dim = scale.head_dim
    _lateral(tally, dims, dim, areas)
    _branch(
        tally,
        dim,
        choices.proposal_layers,
        sum(areas[level] for level in dims),
        _norm_copies(choices, dims),
        ((1 + BOX_CODE) * choices.proposal_anchors,),
        choices.proposal_prediction,
    )
    boxes = choices.proposals
    _branch(tally, dim, scale.head_layers, boxes * BOX_AREA, 1, (), "")
    inputs = dim * BOX_AREA
    for _ in range(choices.fc_layers):
        _linear(tally, inputs, scale.box_fc_dim, boxes)
        if choices.fc_norm:
            tally.norm(scale.box_fc_dim, boxes)
        inputs = scale.box_fc_dim
    classes = choices.instance_classes
    _linear(tally, inputs, classes, boxes)
    _linear(tally, inputs, BOX_CODE * (classes if choices.box_per_class else 1), boxes)
    _branch(tally, dim, scale.head_layers, MASKS * MASK_AREA, 1, (), "")
    tally.weights(UPSAMPLING_AREA * dim * dim, MASKS * MASK_AREA)
    fine = MASKS * MASK_AREA * UPSAMPLING_AREA
    tally.norm(dim, fine)
    tally.elements("activation", dim * fine)
    _branch(tally, dim, 0, fine, 1, (classes,), choices.mask_prediction)


def _linear(tally: Tally, inputs: int, outputs: int, rows: int) -> None:
    tally.weights(inputs * outputs, rows)
    tally.bias(outputs, rows)


_TASKS: dict[str, Callable[[Tally, Scale, dict[int, int], dict[int, int]], None]] = {
    "detection": _detection,
    "instances": _instances,
    "classification": _classification,
    "segmentation": _segmentation,
}
