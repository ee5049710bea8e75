"""The search space, vectorised: betas to dimensions, Multi-Adds and parameters of the detector.

Equal to `cost.measure_cost` on the built module to the last digit.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effspinenet_lib.choices import LIBRARY, cost
from effspinenet_lib.models.learned import SEARCH_SPACE, TABLE_1_MULTIPLE
from effspinenet_lib.models.specs import (
    BASES,
    DIM_KEPT_FRACTION,
    DIM_MULTIPLE,
    EXPANSION_RATIO,
    SCALES,
    STEM_BLOCKS,
    BackboneSpec,
    Scale,
    block_multi_adds,
    level_side,
    scale_backbone,
)

BASE = BASES["sp_efficientnet"]
BLOCKS = len(BASE.blocks)
PATCH = 2 * 2  # space-to-depth: positions that become channels
NORM = 2  # parameters of a norm's channel
CHUNK = 8192  # models counted at a time: what fits into a processor's cache

Ints = NDArray[np.int64]


def sample_betas(count: int, seed: int) -> Ints:
    """Draw betas uniformly from the space: [count, 18]."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return np.asarray(SEARCH_SPACE, np.int64)[
        generator.integers(len(SEARCH_SPACE), size=(count, BLOCKS))
    ]


def base_dims(betas: Ints, approximate: bool = False) -> Ints:
    """Feature dimensions at the scale D0 that betas give (Equations 2 to 4): [N, 18] of both.

    Args:
        betas: [N, 18], positive.
        approximate: take Equation 2 without the depthwise convolution, as the paper's second line.
    """
    size = SCALES["D0"].input_size
    dims = np.array([block.feature_dim for block in BASE.blocks], np.float64)
    costs = np.array(block_multi_adds(BASE, size))
    if approximate:
        sides = [level_side(size, block.level) for block in BASE.blocks]
        costs = np.square(sides) * 2 * EXPANSION_RATIO * np.square(dims)
    unit = costs.sum() / (betas * costs).sum(axis=1)
    # Each row as `choices.learned` computes it: numpy and math round alike.
    return round_dims(dims * np.sqrt(unit[:, None] * betas), TABLE_1_MULTIPLE)


def reference_dims() -> Ints:
    """SP-EfficientNet-B0's dimensions at the scale D0, [1, 18]."""
    return np.array([[block.feature_dim for block in BASE.blocks]], np.int64)


def scaled_dims(dims: Ints, scale: Scale) -> Ints:
    """Dimensions of the built model at a scale, as `specs.scale_backbone` gives them."""
    return round_dims(dims * scale.feature_multiplier, DIM_MULTIPLE)


def round_dims(values: NDArray[np.floating[Any]], multiple: int) -> Ints:
    """`specs.round_dim` for arrays."""
    rounded = np.maximum(multiple, (values + multiple / 2).astype(np.int64) // multiple * multiple)
    return np.where(rounded >= DIM_KEPT_FRACTION * values, rounded, rounded + multiple)


_ONE = np.int64(1)


@dataclass
class _Sum:
    """Multi-Adds and parameters of many models at once."""

    count: int
    multi_adds: Ints = field(init=False)
    parameters: Ints = field(init=False)

    def __post_init__(self) -> None:
        self.multi_adds = np.zeros(self.count, np.int64)
        self.parameters = np.zeros(self.count, np.int64)

    def weights(self, count: Ints, area: int) -> None:
        self.parameters += count
        self.multi_adds += count * area

    def conv(self, inputs: Ints, outputs: Ints, area: int, there: Ints | np.int64 = _ONE) -> None:
        """A 1x1 convolution and its norm; `there` is 0 for the models that lack it."""
        self.weights(inputs * outputs * there, area)
        self.parameters += NORM * outputs * there


def detector_costs(dims: Ints, scale: Scale, num_classes: int, size: int) -> tuple[Ints, Ints]:
    """Multi-Adds and parameters of RetinaNet on scale-permuted backbones.

    What depends on the dimensions is counted here; the rest, one number for all, is what
    `choices.cost` has beside it for SP-EfficientNet.

    Args:
        dims: [N, 18] at the scale D0, from `base_dims`; N is at least 1.
        scale: a row of Table 2.
        num_classes: of the head.
        size: side of the square image in pixels.

    Returns:
        Multi-Adds [N] and parameters [N].
    """
    known = cost(BASE, scale, "detection", replace(LIBRARY, classes=num_classes), size)
    part = _dims_part(scaled_dims(reference_dims(), scale), scale, size)
    counted = [
        _dims_part(scaled_dims(dims[first : first + CHUNK], scale), scale, size)
        for first in range(0, len(dims), CHUNK)
    ]
    multi_adds = np.concatenate([found.multi_adds for found in counted])
    parameters = np.concatenate([found.parameters for found in counted])
    return (
        multi_adds + (known.multi_adds - part.multi_adds[0]),
        parameters + (known.parameters - part.parameters[0]),
    )


def _dims_part(dims: Ints, scale: Scale, size: int) -> _Sum:
    """Count the layers whose channels are feature dimensions: [N, 18] of the built models."""
    spec = scale_backbone(BASE, scale)
    total = _Sum(len(dims))
    columns = {0: np.full(len(dims), spec.stem_dim, np.int64)}
    by_block = np.ascontiguousarray(dims.T)
    columns |= {block.index: by_block[block.index - 1] for block in spec.blocks}
    areas = {0: level_side(size, 1) ** 2}
    areas |= {block.index: level_side(size, block.level) ** 2 for block in spec.blocks}
    for block in spec.blocks:
        here, before = areas[block.index], areas[block.index]
        own = inputs = columns[block.index]
        if block.index <= STEM_BLOCKS:
            inputs, before = columns[block.index - 1], areas[block.index - 1]
        else:
            for source in (*block.inputs, *spec.extra_inputs.get(block.index, ())):
                _resample(total, spec, source, block.index, columns, areas)
        for repeat in range(block.repeats):
            entry = (inputs, before) if repeat == 0 else (own, here)
            _mbconv(total, block.kernel, *entry, own, here, spec.squeeze_ratio)
    for block in spec.outputs.values():  # the 1x1 convolutions in front of the head
        head = np.int64(scale.head_dim)
        total.conv(columns[block.index], np.asarray(head), areas[block.index])
    return total


def _mbconv(
    total: _Sum, kernel: int, inputs: Ints, before: int, outputs: Ints, after: int, ratio: float
) -> None:
    expanded = inputs * EXPANSION_RATIO
    squeezed = np.maximum(1, (inputs * ratio).astype(np.int64))
    total.conv(inputs, expanded, before)
    total.weights(expanded * kernel**2, after)
    total.parameters += NORM * expanded
    total.weights(2 * expanded * squeezed, 1)
    total.parameters += squeezed + expanded
    total.conv(expanded, outputs, after)


def _resample(
    total: _Sum,
    spec: BackboneSpec,
    source: int,
    target: int,
    dims: dict[int, Ints],
    areas: dict[int, int],
) -> None:
    """Count the 1x1 convolution of one input; at equal level and dimension there is none."""
    levels = [spec.blocks[index - 1].level for index in (source, target)]
    inputs, outputs = dims[source], dims[target]
    there: Ints | np.int64 = _ONE
    if levels[0] < levels[1]:
        inputs = inputs * PATCH
    elif levels[0] == levels[1]:
        there = (inputs != outputs).astype(np.int64)
    total.conv(inputs, outputs, areas[target], there)
