"""From betas to feature dimensions (Equations 2 to 4), and the betas behind Table 1.

Table 1 prints multiples of 8. With the search space of section 5.1.1 and Equation 4 they come
apart: dimension i is sqrt(unit * beta_i) times SP-EfficientNet-B0's, where the unit is
sum(F) / sum(beta * F) over all 18 blocks. By rounding to the nearest multiple of 8 only three sets
of betas give Table 1 and have the unit that they need; they differ in blocks 6 and 15 alone.
Taken is the one that fits the cost columns best. Its unit is 0.0794, or 0.0780 with Equation 2 as
the paper approximates it; costs fit best between, from 0.0784 to 0.0789.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from effspinenet_lib.errors import UserError
from effspinenet_lib.models.specs import (
    BASES,
    EXPANSION_RATIO,
    SCALES,
    BackboneSpec,
    block_multi_adds,
    level_side,
    round_dim,
)

SEARCH_SPACE = (1, 5, 10, 15, 20)  # section 5.1.1
TABLE_1_MULTIPLE = 8  # Table 1 prints multiples of 8: with `BETAS` this rounding gives all of it
BETAS_JOINT = "-"
LARGEST_BETA = 10_000  # our choice: shares of the computation in hundredths of a percent
SHOWN_CHARACTERS = 100  # our choice: of betas that are none, in a message
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


def distributed(betas: Sequence[int]) -> BackboneSpec:
    """The base distribution that betas give, rounded as Table 1 is; `scale_backbone` scales it.

    `BETAS` give Table 1's Eff-SpineNet-D0, equal betas SP-EfficientNet-B0.

    Args:
        betas: of the 18 blocks, positive.

    Raises:
        UserError: as `check_betas`.
    """
    checked = check_betas(betas)
    base = BASES["sp_efficientnet"]
    dims = unrounded_dims(resource_unit(checked), checked)
    blocks = tuple(
        replace(block, feature_dim=round_dim(dim, TABLE_1_MULTIPLE))
        for block, dim in zip(base.blocks, dims, strict=True)
    )
    return replace(base, name="distributed", blocks=blocks)


def check_betas(betas: Sequence[int]) -> tuple[int, ...]:
    """Betas as they are, or a refusal.

    Raises:
        UserError: another number of betas than blocks, or one that is no whole number from 1 to
            `LARGEST_BETA`.
    """
    whole = all(type(beta) is int and 1 <= beta <= LARGEST_BETA for beta in betas)
    if len(betas) != len(BETAS) or not whole:
        raise _refusal(BETAS_JOINT.join(map(_shown, betas)))
    return tuple(betas)


def betas_text(betas: Sequence[int]) -> str:
    """Betas as one word, such as 10-10-5, for options and CSV files."""
    return BETAS_JOINT.join(map(str, betas))


def parse_betas(text: str) -> tuple[int, ...]:
    """The betas that `betas_text` gave `text` of.

    Raises:
        UserError: the text is none.
    """
    parts = text.split(BETAS_JOINT)
    digits = len(str(LARGEST_BETA))
    if not all(part.isdecimal() and len(part) <= digits for part in parts):
        raise _refusal(text)
    return check_betas([int(part) for part in parts])


def _shown(beta: object) -> str:
    """Any value in a message; Python itself refuses to write very long numbers."""
    huge = isinstance(beta, int) and abs(beta) > LARGEST_BETA
    return "(too large)" if huge else str(beta)


def _refusal(text: str) -> UserError:
    return UserError(
        f"betas are {text[:SHOWN_CHARACTERS]!r}; they must be {len(BETAS)} whole numbers from 1 to "
        f"{LARGEST_BETA}, written as {betas_text(BETAS)}"
    )
