"""What seeds and specifications say in numbers: spreads, intervals, verdicts, shares of blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from effspinenet_lib.models.specs import BackboneSpec, block_multi_adds, level_side
from effspinenet_lib.report.style import NOT_PRINTED, NOT_RUN, Table, family_of

PAPER, PROXY, PAPER_SCALE = "paper", "proxy", "paper_scale"
# What the pages call measured accuracy, by its source. That of a smoke run is never shown.
SOURCE_NAMES = {PROXY: "proxy", PAPER_SCALE: "paper's settings"}
HOLDS, CONTRADICTED, INCONCLUSIVE = "holds", "contradicted", "inconclusive"
CONFIDENCE = 0.95
LEAST_SEEDS = 2  # a single seed has no spread
PERCENT = 100.0
# Families whose models are one design at several sizes, so that a line between them is one.
OWN_FAMILY = "Eff-SpineNet"
JOINED_FAMILIES = (OWN_FAMILY, "EfficientNet", "EfficientDet")
# Section 5.1.4 names these groups of levels; level 1 is in none of them.
LEVEL_GROUPS: dict[str, tuple[int, ...]] = {"L2": (2,), "L3 to L5": (3, 4, 5), "L6 and L7": (6, 7)}


@dataclass(frozen=True)
class MeanStd:
    """Values of one cell over seeds.

    Attributes:
        mean: over the seeds.
        sd: standard deviation of the sample; NaN for a single seed.
        seeds: number of seeds.
    """

    mean: float
    sd: float
    seeds: int

    def __str__(self) -> str:
        return self.text()

    def text(self, digits: int = 1) -> str:
        """Mean ± standard deviation (number of seeds)."""
        spread = "" if math.isnan(self.sd) else f" ± {self.sd:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread} ({self.seeds})"


def mean_std(values: pd.Series[float]) -> MeanStd:
    """Mean, standard deviation and number of the values that are defined."""
    return MeanStd(float(values.mean()), float(values.std()), int(values.count()))


@dataclass(frozen=True)
class Difference:
    """Mean of one row's seeds minus mean of another's.

    Attributes:
        mean: the difference of the means; NaN where a row has no seed.
        half_width: of its 95 % interval; NaN where there are fewer than two seeds.
        seeds: seeds of the two rows.
    """

    mean: float
    half_width: float
    seeds: tuple[int, int]

    @property
    def conclusive(self) -> bool:
        """Whether the 95 % interval leaves out zero."""
        return abs(self.mean) > self.half_width

    def verdict(self, claimed: float) -> str:
        """What the difference says of one that is claimed: the rule of every page.

        `holds` or `contradicted` where the 95 % interval leaves out zero, by the sign of what is
        claimed; `inconclusive` where it does not, or where there is no interval; `not run`
        without seeds.
        """
        if not min(self.seeds):
            return NOT_RUN
        if not self.conclusive:
            return INCONCLUSIVE
        return HOLDS if self.mean * claimed > 0 else CONTRADICTED

    def text(self, digits: int = 1) -> str:
        """The difference with its interval; "–" where there is no interval."""
        if math.isnan(self.half_width):
            return NOT_PRINTED
        return f"{self.mean:+.{digits}f} ± {self.half_width:.{digits}f}"

    def interval(self, digits: int = 1) -> str:
        """The ends of the interval; "–" where there is none."""
        if math.isnan(self.half_width):
            return NOT_PRINTED
        low, high = self.mean - self.half_width, self.mean + self.half_width
        return f"{low:+.{digits}f} to {high:+.{digits}f}"


def difference(first: Iterable[float], second: Iterable[float]) -> Difference:
    """Compare two rows by Welch's interval of the difference of their means.

    The rows of a table share seeds, and a seed its images and their order. The values are not
    paired by seed all the same: the proxy's five pairs show no gain, and pairs would cost up to
    half the degrees of freedom.
    """
    one, two = (pd.Series(values, dtype=float).dropna() for values in (first, second))
    counts = (len(one), len(two))
    mean = float(one.mean() - two.mean())
    if min(counts) < LEAST_SEEDS:
        return Difference(mean, math.nan, counts)
    shares = [float(values.var()) / len(values) for values in (one, two)]
    if not any(shares):
        return Difference(mean, 0.0, counts)
    freedom = sum(shares) ** 2 / sum(s**2 / (n - 1) for s, n in zip(shares, counts, strict=True))
    return Difference(mean, t_quantile(freedom) * math.sqrt(sum(shares)), counts)


def t_quantile(freedom: float) -> float:
    """Half width of a 95 % interval in standard errors, by degrees of freedom."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


def compare_seeds(
    first: pd.Series[float], second: pd.Series[float], digits: int = 1
) -> dict[str, str]:
    """Cells of a comparison of two rows: their difference, its interval, which is higher.

    Args:
        first: values of one row.
        second: values of the other.
        digits: decimals.
    """
    found = difference(first, second)
    seeds = str(min(found.seeds))
    if not min(found.seeds):
        return {"measured": NOT_RUN, "95 % interval": NOT_PRINTED, "seeds": seeds, "verdict": ""}
    way = "higher" if found.mean > 0 else "lower"
    return {
        "measured": f"{found.mean:+.{digits}f}",
        "95 % interval": found.interval(digits),
        "seeds": seeds,
        "verdict": way if found.conclusive else INCONCLUSIVE,
    }


# Cost against accuracy


def on_front(costs: pd.Series[float], values: pd.Series[float]) -> pd.Series[bool]:
    """Which models are on the front: none is as cheap and as good, and better in one of both."""
    return pd.Series(
        [
            not ((costs <= c) & (values >= v) & ((costs < c) | (values > v))).any()
            for c, v in zip(costs, values, strict=True)
        ],
        index=values.index,
    )


def at_cost(costs: pd.Series[float], values: pd.Series[float], cost: float) -> float:
    """Accuracy of a family at a cost, on the lines between its models; NaN outside of them."""
    order = costs.argsort()
    found = np.interp(cost, costs.iloc[order], values.iloc[order], left=np.nan, right=np.nan)
    return float(found)


def dominance(frame: pd.DataFrame, cost: str) -> Table:
    """Eff-SpineNet's models beside the other families at the same cost, and the front.

    Args:
        frame: from `tables.cost_and_accuracy`.
        cost: its column.
    """
    frame = frame.dropna(subset=[cost])
    families = frame.groupby(frame.index.map(family_of), sort=False)
    front = on_front(frame[cost], frame["accuracy"])
    rows = {}
    for name in (name for name in frame.index if family_of(name) == OWN_FAMILY):
        at, value = frame.loc[name, cost], frame.loc[name, "accuracy"]
        cells = {"cost": f"{at:.4g}", "AP": f"{value:.1f}"}
        for family, own in families:
            if family != OWN_FAMILY and family in JOINED_FAMILIES:
                other = at_cost(own[cost], own["accuracy"], at)
                text = NOT_PRINTED if math.isnan(other) else f"{value - other:+.1f}"
                cells[f"minus {family}"] = text
        rows[name] = {**cells, "on the front": "yes" if front[name] else "no"}
    shown = pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")
    others = [name for name in front.index[front] if name not in rows]
    also = f"; also on the front: {', '.join(others)}" if others else ""
    caption = f"AP above another family at equal cost, by interpolation; – outside its range{also}"
    if len(shown.columns) == 3:  # no other family to interpolate
        caption = f"Eff-SpineNet and the front{also}"
    return Table(shown, caption)


# Shares of a network


def resource_shares(spec: BackboneSpec, input_size: int) -> tuple[float, ...]:
    """Share of each block in the Multi-Adds of all blocks by Equation 2, in percent."""
    costs = block_multi_adds(spec, input_size)
    return tuple(PERCENT * cost / sum(costs) for cost in costs)


def block_parameters(spec: BackboneSpec) -> tuple[float, ...]:
    """Weights of each block by Equation 2, without the feature map's sides, repeats included."""
    side = 2 ** max(block.level for block in spec.blocks)
    costs = block_multi_adds(spec, side)
    return tuple(
        cost / level_side(side, block.level) ** 2
        for cost, block in zip(costs, spec.blocks, strict=True)
    )


def by_level_group(spec: BackboneSpec, values: Sequence[float]) -> pd.Series[float]:
    """Sums of a value of the blocks over groups of levels, and over all."""
    levels = [block.level for block in spec.blocks]
    groups = {"L1": (1,), **LEVEL_GROUPS, "all": tuple(range(1, 8))}
    return pd.Series(
        {
            group: sum(v for v, level in zip(values, levels, strict=True) if level in own)
            for group, own in groups.items()
        }
    )


def level_shift(
    before: tuple[str, BackboneSpec], after: tuple[str, BackboneSpec], input_size: int
) -> pd.DataFrame:
    """Parameters and Multi-Adds of the blocks by group of levels, by Equation 2 (section 5.1.4).

    Args:
        before: printed name and backbone before learning.
        after: the same after it.
        input_size: side of the square input image in pixels.
    """
    columns = {}
    for quantity, unit, count in (
        ("parameters (k)", 1e3, block_parameters),
        ("Multi-Adds (M)", 1e6, lambda spec: block_multi_adds(spec, input_size)),
    ):
        old, new = (by_level_group(spec, count(spec)) / unit for _, spec in (before, after))
        columns[quantity, before[0]] = old.map("{:.0f}".format)
        columns[quantity, after[0]] = new.map("{:.0f}".format)
        columns[quantity, "change"] = (new - old).map("{:+.0f}".format)
    return pd.DataFrame(columns).rename_axis("levels")
