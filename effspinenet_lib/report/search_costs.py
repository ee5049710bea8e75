"""What the samples of a search cost (Figure 5), and whether their AP goes with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pandas as pd

from effspinenet_lib.report.search import METHOD_NAMES, SP, ModelCost, cost_at_d0, sampled
from effspinenet_lib.report.style import words
from effspinenet_lib.report.tables import NOT_PRINTED, Table
from effspinenet_lib.report.verdict import LEAST_SEEDS

FLOPS_PERCENT, AXIS_PERCENT = 10.0, 20.0  # section 5.1.5 and the caption of Figure 5
PERCENT = 100.0
NORMAL_QUANTILE = 1.96  # two-sided 95 % of the normal distribution
COST_COLUMNS = {
    "multi_adds_d0": "#FLOPs at D0",
    "parameters_d0": "#Params at D0",
    "multi_adds": "#FLOPs of the trained model",
    "parameters": "#Params of the trained model",
}

Numbers = npt.ArrayLike
Percents = npt.NDArray[np.float64]


@lru_cache(maxsize=1)
def target() -> ModelCost:
    """What SP-EfficientNet-B0's detector costs: the target of the paper's search."""
    return cost_at_d0("sp_efficientnet_b0")


def cost_table(samples: Mapping[str, tuple[Numbers, Numbers]]) -> Table:
    """The costs of samples at the scale D0 against SP-EfficientNet-B0's: a row a group.

    Args:
        samples: by name, the Multi-Adds [N] and the parameters [N] of a group, counted.
    """
    rows = {}
    for name, (multi_adds, parameters) in samples.items():
        flops, weights = _deviations(multi_adds, parameters)
        if not flops.size:
            continue
        rows[name] = {
            "samples": f"{flops.size:,}",
            f"#FLOPs ±{FLOPS_PERCENT:g} %": _percent(np.abs(flops) <= FLOPS_PERCENT),
            "#FLOPs range": _reach(flops),
            "fewer #Params": _percent(weights < 0),
            f"#Params ±{AXIS_PERCENT:g} %": _percent(np.abs(weights) <= AXIS_PERCENT),
            "#Params range": _reach(weights),
        }
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("samples of")
    return Table(
        frame, f"Share of the samples within a range of {SP}'s cost at D0, and their range"
    )


def cost_sentence(what: str, multi_adds: Numbers, parameters: Numbers) -> str:
    """Check the two statements of section 5.1.5 on the costs of samples at the scale D0.

    Args:
        what: the samples, in words.
        multi_adds: [N], counted.
        parameters: [N], counted.
    """
    flops, weights = _deviations(multi_adds, parameters)
    if not flops.size:
        return f"{what}: there are none."
    near, fewer = np.abs(flops) <= FLOPS_PERCENT, weights < 0
    return (
        f"{what}: {_percent(near)} have #FLOPs within ±{FLOPS_PERCENT:g} % of {SP}'s; that all "
        f"have {_holds(bool(near.all()))}. {_percent(fewer)} have fewer parameters; that most have "
        f"{_holds(bool(fewer.mean() > 1 / 2))}, read as more than half."
    )


def _deviations(multi_adds: Numbers, parameters: Numbers) -> tuple[Percents, Percents]:
    known = target()
    flops = PERCENT * (np.asarray(multi_adds, float) / known.multi_adds - 1)
    return flops, PERCENT * (np.asarray(parameters, float) / known.parameters - 1)


def _percent(which: npt.NDArray[np.bool_]) -> str:
    return f"{PERCENT * which.mean():.0f} %"


def _reach(values: Percents) -> str:
    return f"{values.min():+.0f} to {values.max():+.0f} %"


def _holds(true: bool) -> str:
    return "holds" if true else "does not hold"


def sample_costs(trials: pd.DataFrame) -> dict[str, tuple[Numbers, Numbers]]:
    """Multi-Adds and parameters at the scale D0 by method, and of all samples together."""
    rows = sampled(trials)
    groups = {name: rows[rows["method"] == method] for method, name in METHOD_NAMES.items()}
    groups["all methods"] = rows
    return {
        name: (own["multi_adds_d0"], own["parameters_d0"])
        for name, own in groups.items()
        if len(own)
    }


# AP against cost


def rank_correlation(first: pd.Series[float], second: pd.Series[float]) -> float:
    """Spearman's correlation."""
    return float(first.rank().corr(second.rank()))


def chance_correlation(samples: int) -> float:
    """How large Spearman's correlation of unrelated numbers gets in 95 % of the cases."""
    return NORMAL_QUANTILE / math.sqrt(samples - 1) if samples > 1 else math.nan


def correlation_table(trials: pd.DataFrame) -> Table:
    """Rank correlation of the AP with what a sample costs: random search's samples, and all."""
    every = sampled(trials)
    groups = {"random search": every[every["method"] == "random"], "all methods": every}
    columns = {
        f"{name} ({len(rows)} samples)": [
            _or_dash("{:+.2f}", rank_correlation(rows["AP"], rows[column]))
            for column in COST_COLUMNS
        ]
        + [_or_dash("±{:.2f}", chance_correlation(len(rows)))]
        for name, rows in groups.items()
    }
    names = [*COST_COLUMNS.values(), "chance alone, 95 %"]
    frame = pd.DataFrame(columns, index=pd.Index(names, name="AP against"))
    return Table(frame, "Rank correlation (Spearman) of AP with cost")


def _or_dash(form: str, value: float) -> str:
    return NOT_PRINTED if math.isnan(value) else form.format(value)


def correlation_sentence(trials: pd.DataFrame) -> str:
    """Say whether AP goes with cost among the samples of random search, which chose blindly."""
    rows = sampled(trials)
    rows = rows[rows["method"] == "random"]
    if len(rows) <= LEAST_SEEDS:
        return "Correlation of AP with cost: there are too few samples of random search."
    limit = chance_correlation(len(rows))
    found = {
        name: rank_correlation(rows["AP"], rows[column]) for column, name in COST_COLUMNS.items()
    }
    clear = [f"{name} ({value:+.2f})" for name, value in found.items() if abs(value) > limit]
    if not clear:
        return (
            f"Among the {len(rows)} samples of random search AP goes with no cost by more than "
            f"chance (±{limit:.2f})."
        )
    return (
        f"Among the {len(rows)} samples of random search AP goes, by more than chance "
        f"(±{limit:.2f}), with {words(clear)}."
    )
