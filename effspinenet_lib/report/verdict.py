"""What measured differences say about the paper's, in a computed sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from effspinenet_lib.report.tables import PROXY

# Two-sided 95 % quantiles of Student's t for 1 to 10 degrees of freedom; from 11 on the last
# one is used, which is the more careful side.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
LEAST_SEEDS = 2  # a single seed has no spread


@dataclass(frozen=True)
class Difference:
    """Mean of one row's seeds minus mean of another's.

    Attributes:
        mean: the difference of the means.
        half_width: of its 95 % interval (Welch); NaN where a row has a single seed.
        seeds: seeds of the two rows.
    """

    mean: float
    half_width: float
    seeds: tuple[int, int]

    @property
    def conclusive(self) -> bool:
        """Whether the 95 % interval leaves out zero."""
        return abs(self.mean) > self.half_width


def difference(first: pd.Series[float], second: pd.Series[float]) -> Difference:
    """Welch's comparison of two samples, one value a seed.

    Args:
        first: values of one row.
        second: values of the other.
    """
    mean = float(first.mean() - second.mean())
    counts = (len(first), len(second))
    if min(counts) < LEAST_SEEDS:
        return Difference(mean, math.nan, counts)
    shares = [float(values.var()) / len(values) for values in (first, second)]
    total = sum(shares)
    if total == 0:
        return Difference(mean, 0.0, counts)
    freedom = total**2 / sum(s**2 / (n - 1) for s, n in zip(shares, counts, strict=True))
    quantile = T_QUANTILES[min(int(freedom), len(T_QUANTILES)) - 1]
    return Difference(mean, quantile * math.sqrt(total), counts)


def verdict(
    item: str,
    paper: pd.DataFrame,
    measurements: pd.DataFrame,
    better: str,
    worse: str,
    metric: str = "AP",
    source: str = PROXY,
) -> str:
    """Say whether measured seeds agree with the paper's order of two rows.

    Args:
        item: which table.
        paper: rows of source `paper`.
        measurements: measured rows.
        better: name of the row that the paper puts ahead.
        worse: name of the row behind it.
        metric: what is compared.
        source: which measurements.
    """
    printed = paper[(paper["item"] == item) & (paper["metric"] == metric)]
    values = printed.set_index("row")["value"]
    claim = values[better] - values[worse]
    opening = f"{better} against {worse}: the paper's {metric} differs by {claim:+.1f}."
    rows = measurements[
        (measurements["item"] == item)
        & (measurements["metric"] == metric)
        & (measurements["source"] == source)
    ]
    samples = [rows.loc[rows["row"] == name, "value"].dropna() for name in (better, worse)]
    if not all(len(sample) for sample in samples):
        return f"{opening} The {source} runs are not there, so nothing can be said."
    found = difference(*samples)
    if math.isnan(found.half_width):
        return (
            f"{opening} The {source} runs differ by {found.mean:+.1f}: inconclusive, a single "
            "seed has no spread."
        )
    measured = (
        f"The {source} runs ({found.seeds[0]} and {found.seeds[1]} seeds) differ by "
        f"{found.mean:+.1f} ± {found.half_width:.1f} (95 % interval):"
    )
    if not found.conclusive:
        return f"{opening} {measured} inconclusive, the interval holds zero."
    word = "agrees with" if found.mean * claim > 0 else "disagrees with"
    return f"{opening} {measured} this {word} the paper's order."
