"""The feature dimensions of Eff-SpineNet-D0 before they were rounded (Equations 2 to 4).

Table 1 prints multiples of 8. With the search space of section 5.1.1 and Equation 4 they come
apart: dimension i is sqrt(unit * beta_i) times SP-EfficientNet-B0's, where the unit is
sum(F) / sum(beta * F) over all 18 blocks. By rounding to the nearest multiple of 8 only three sets
of betas give Table 1 and have the unit that they need; they differ in blocks 6 and 15 alone.
Taken is the one that fits the cost columns best. Its unit is 0.0794, or 0.0780 with Equation 2 as
the paper approximates it; costs fit best between, from 0.0784 to 0.0789.
"""

from __future__ import annotations

import math

from effspinenet_lib.specs import BASES, EXPANSION_RATIO, SCALES, block_multi_adds, level_side

SEARCH_SPACE = (1, 5, 10, 15, 20)  # section 5.1.1
# Recovered from Table 1, for blocks 1 to 18.
BETAS = (10, 10, 5, 5, 15, 20, 20, 1, 20, 15, 5, 20, 10, 15, 15, 10, 10, 1)


def resource_unit(betas: tuple[int, ...] = BETAS, approximate: bool = False) -> float:
    """The constant of Equation 4, alpha_i over beta_i, at the scale D0.

    Args:
        betas: of the 18 blocks.
        approximate: take Equation 2 as the paper approximates it, without the depthwise
            convolution.
    """
    base, size = BASES["sp_efficientnet"], SCALES["D0"].input_size
    costs = list(block_multi_adds(base, size))
    if approximate:
        costs = [
            level_side(size, block.level) ** 2 * 2 * EXPANSION_RATIO * block.feature_dim**2
            for block in base.blocks
        ]
    return sum(costs) / sum(beta * cost for beta, cost in zip(betas, costs, strict=True))


def unrounded_dims(unit: float, betas: tuple[int, ...] = BETAS) -> tuple[float, ...]:
    """Feature dimensions of the 18 blocks before rounding, for a constant of Equation 4."""
    base = BASES["sp_efficientnet"]
    return tuple(
        block.feature_dim * math.sqrt(unit * beta)
        for block, beta in zip(base.blocks, betas, strict=True)
    )
