"""Which levels the best samples of a search favour, beside what section 5.1.4 says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from effspinenet_lib.models.specs import (
    LEARNED_BETAS,
    MODELS,
    BackboneSpec,
    backbone_spec,
    parse_betas,
)
from effspinenet_lib.report.checks import LEVEL_GROUPS, block_parameters
from effspinenet_lib.report.search import SP, absent, bullets, nothing, sampled
from effspinenet_lib.report.style import words
from effspinenet_lib.report.tables import NOT_PRINTED, Table
from effspinenet_lib.report.verdict import LEAST_SEEDS, Difference, difference

BEFORE = MODELS["sp_efficientnet_b0"].backbone
BEST_SHARE = 0.1  # our choice: the best tenth of the samples
THOUSAND = 1e3
# Section 5.1.4: which groups of levels lose and gain by the learned distribution.
CLAIMED_SIGNS = {"L2": -1, "L3 to L5": 1, "L6 and L7": -1}


def beta_frame(trials: pd.DataFrame) -> pd.DataFrame:
    """The betas of the samples: a row a sample, columns 1 to 18."""
    blocks = range(1, len(LEARNED_BETAS) + 1)
    betas = [parse_betas(text) for text in sampled(trials)["betas"]]
    return pd.DataFrame(betas, columns=list(blocks), dtype=float)


def is_best(trials: pd.DataFrame) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which rows of `sampled` are the best tenth by AP; at least one where there are any."""
    rows = sampled(trials)
    count = math.ceil(BEST_SHARE * len(rows))
    ranks = rows["AP"].rank(ascending=False, method="first")
    return np.asarray(ranks <= count)


def group_betas(trials: pd.DataFrame) -> pd.DataFrame:
    """Mean beta of each group of levels in each sample: a row a sample, a column a group."""
    betas = beta_frame(trials)
    return pd.DataFrame(
        {group: betas[_blocks(levels)].mean(axis=1) for group, levels in level_groups().items()}
    )


def group_parameters(specs: Sequence[BackboneSpec]) -> pd.DataFrame:
    """Parameters of the blocks of each group of levels, thousands: a row a distribution."""
    totals = np.array([block_parameters(spec) for spec in specs]).reshape(-1, len(LEARNED_BETAS))
    frame = pd.DataFrame(totals / THOUSAND, columns=range(1, len(LEARNED_BETAS) + 1))
    return pd.DataFrame(
        {group: frame[_blocks(levels)].sum(axis=1) for group, levels in level_groups().items()}
    )


def sample_parameters(trials: pd.DataFrame) -> pd.DataFrame:
    """`group_parameters` of the rows of `sampled`."""
    return group_parameters([backbone_spec(parse_betas(t)) for t in sampled(trials)["betas"]])


def level_groups() -> Mapping[str, tuple[int, ...]]:
    """The groups of levels that section 5.1.4 names, and level 1."""
    return {"L1": (1,), **LEVEL_GROUPS}


def _blocks(levels: tuple[int, ...]) -> list[int]:
    blocks = BEFORE.blocks
    return [block.index for block in blocks if block.level in levels]


def level_table(trials: pd.DataFrame) -> Table:
    """Betas and parameters by group of levels: the best tenth, the rest, SP-EfficientNet-B0."""
    best, betas, parameters = is_best(trials), group_betas(trials), sample_parameters(trials)
    before = group_parameters([BEFORE]).iloc[0]
    columns: dict[tuple[str, str], list[str]] = {}
    for quantity, values, digits in (("mean β", betas, 1), ("parameters (k)", parameters, 0)):
        if quantity != "mean β":
            columns[quantity, SP] = [f"{before[group]:.0f}" for group in level_groups()]
        columns[quantity, "all samples"] = _means(values, digits, absent(trials))
        columns[quantity, "best tenth"] = _means(values[best], digits, absent(trials))
        columns[quantity, "difference"] = [
            _difference(values.loc[best, group], values.loc[~best, group], digits)
            for group in level_groups()
        ]
    frame = pd.DataFrame(columns, index=pd.Index(list(betas), name="levels"))
    return Table(
        frame,
        "Levels in all samples and in the best tenth; difference: the best tenth less the rest, "
        "with its 95 % interval",
    )


def _means(values: pd.DataFrame, digits: int, reason: str) -> list[str]:
    if values.empty:
        return [reason] * values.shape[1]
    return [f"{mean:.{digits}f}" for mean in values.mean()]


def _difference(first: pd.Series[float], second: pd.Series[float], digits: int) -> str:
    found = difference(first, second)
    if math.isnan(found.half_width):
        return NOT_PRINTED
    return f"{found.mean:+.{digits}f} ± {found.half_width:.{digits}f}"


def level_sentences(trials: pd.DataFrame) -> str:
    """Compare the best tenth with section 5.1.4's claim about levels, as a list."""
    best = is_best(trials)
    if not len(best):
        return nothing(trials)
    if min(best.sum(), (~best).sum()) < LEAST_SEEDS:
        return "Too few samples for a best tenth."
    betas, parameters = group_betas(trials), sample_parameters(trials)
    before = group_parameters([BEFORE]).iloc[0]
    change = parameters[best].mean() - before
    every = parameters.mean() - before
    return bullets(
        (
            f"Against {SP} the best tenth ({best.sum()} of {len(best)}) has block parameters "
            f"changed by {_changes(change)}: {_agreement(change)}.",
            f"All samples, good and bad, have on average {_changes(every)}: {_agreement(every)}. "
            "This much comes from what was sampled, not from the AP.",
            _choice_sentence("Mean β", betas[best], betas[~best], 1, ""),
            _choice_sentence("Parameters", parameters[best], parameters[~best], 0, " k"),
        )
    )


def _changes(change: pd.Series[float]) -> str:
    return words(f"{change[group]:+.0f} k in {group}" for group in LEVEL_GROUPS)


def _agreement(change: pd.Series[float]) -> str:
    wrong = [group for group, sign in CLAIMED_SIGNS.items() if change[group] * sign <= 0]
    if not wrong:
        return "as the paper claims, L3 to L5 gain and L2, L6 and L7 lose"
    return f"not as the paper claims in {words(wrong)}"


def _choice_sentence(
    what: str, best: pd.DataFrame, rest: pd.DataFrame, digits: int, unit: str
) -> str:
    found = {group: difference(best[group], rest[group]) for group in CLAIMED_SIGNS}
    listed = "; ".join(
        f"{group} {one.mean:+.{digits}f} ± {one.half_width:.{digits}f}{unit}, "
        f"{_way(one, CLAIMED_SIGNS[group])}"
        for group, one in found.items()
    )
    return f"{what}, the best tenth less the rest (95 % intervals): {listed}."


def _way(found: Difference, claimed: int) -> str:
    if not found.conclusive:
        return "inconclusive"
    return "the paper's way" if found.mean * claimed > 0 else "against the paper's way"


def silent_levels_sentence(image_size: int, anchors: dict[int, float]) -> str:
    """Say which levels find nothing themselves at an image size.

    Args:
        image_size: side of the square image in pixels.
        anchors: side in pixels of each output level's smallest square anchor.
    """
    silent = [level for level, side in anchors.items() if side > image_size]
    if not silent:
        return f"At {image_size}×{image_size} every output level has anchors inside the image."
    names = words(f"L{level}" for level in silent)
    sides = words(f"{anchors[level]:g}" for level in silent)
    return (
        f"At {image_size}×{image_size} the smallest anchors of {names} ({sides} pixels) are larger "
        "than the image: these levels find nothing themselves and only serve other blocks. What "
        "the search gives or takes there says little about COCO at 512×512."
    )
