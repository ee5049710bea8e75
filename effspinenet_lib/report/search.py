"""The search for a resource distribution: its record as tables and plots."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.ticker import MaxNLocator
from scipy import stats

from effspinenet_lib.models.specs import (
    EQUAL_BETAS,
    LEARNED_BETAS,
    SEARCH_SPACE,
    backbone_spec,
    betas_text,
    parse_betas,
)
from effspinenet_lib.report.plots import legend_above, seed_dots
from effspinenet_lib.report.statistics import (
    LEAST_SEEDS,
    LEVEL_GROUPS,
    PERCENT,
    PROXY,
    SOURCE_NAMES,
    block_parameters,
    by_level_group,
    compare_seeds,
    difference,
    mean_std,
)
from effspinenet_lib.report.style import (
    INK,
    NOT_PRINTED,
    NOT_RUN,
    PANEL_HEIGHT,
    PANEL_WIDTH,
    WIDE,
    Gallery,
    Picture,
    Table,
    Text,
    drawing,
    empty_picture,
    family_colour,
    new_figure,
    to_picture,
)
from effspinenet_lib.results import FOLDERS, REFERENCE, ResultsStore, read_table
from effspinenet_lib.results.paper import RESULTS_DIR


class Method(NamedTuple):
    """How a method is named and drawn."""

    name: str
    colour: str
    marker: str
    line: str


# Of Okabe and Ito's palette, without the colours of the models that are drawn in the same plots.
METHODS = {
    "ppo": Method("PPO", "#D55E00", "o", "-"),
    "reinforce": Method("REINFORCE", "#CC79A7", "v", ":"),
    "random": Method("random search", "#56B4E9", "s", "--"),
    "evolution": Method("evolution", "#009E73", "^", "-."),
}
SP, D0 = "SP-EfficientNet-B0", "Eff-SpineNet-D0"
FOUND, GIVEN = "search's best", "given distribution"
PROFILE_OF = {source: profile for profile, source in FOLDERS.items()}
SPACE_FILE = "search/space.csv"
BILLION, MILLION, THOUSAND, HOUR = 1e9, 1e6, 1e3, 3600
FLOPS_PERCENT, AXIS_PERCENT = 10.0, 20.0  # section 5.1.5 and the caption of Figure 5
BEST_SHARE = 0.1  # our choice: the best tenth of the samples
BEFORE = backbone_spec(EQUAL_BETAS)
COST_COLUMNS = {
    "multi_adds_d0": "Multi-Adds at D0",
    "parameters_d0": "#Params at D0",
    "multi_adds": "Multi-Adds of the trained model",
    "parameters": "#Params of the trained model",
}

Dir = str | os.PathLike[str]
Cost = tuple[float, float]  # Multi-Adds, parameters


# The record


def read_trials(*results_dirs: Dir) -> pd.DataFrame:
    """The search on record: at the paper's settings where there is one, else the proxy's.

    A smoke search is never read.

    Args:
        *results_dirs: at least one; the first that has a record of the source is read.

    Returns:
        The columns of the record and `source`; empty where there is no record.

    Raises:
        DataError: a record is broken.
    """
    for source in reversed(SOURCE_NAMES):
        for folder in results_dirs:
            trials = ResultsStore(Path(folder), PROFILE_OF[source]).trials()
            if len(trials):
                return trials.assign(source=source)
    return trials.assign(source="")


def record_file(trials: pd.DataFrame) -> str:
    """Path inside the results folder of the record that `read_trials` read; "" without one."""
    return "" if trials.empty else f"{trials['source'].iloc[0]}/search_trials.csv"


def searched(trials: pd.DataFrame) -> pd.DataFrame:
    """The samples of the methods that have an AP, in the order of the record."""
    return trials[(trials["method"] != REFERENCE) & trials["AP"].notna()]


def sampled(trials: pd.DataFrame) -> pd.DataFrame:
    """As `searched`, each trained model once."""
    return searched(trials).drop_duplicates("run")


def best_sample(trials: pd.DataFrame) -> Any:
    """The sample of the highest reward, of several the one with the fewest parameters.

    None without samples.
    """
    order = searched(trials).sort_values(
        ["reward", "parameters", "trial"], ascending=[False, True, True]
    )
    return None if order.empty else order.iloc[0]


def references(trials: pd.DataFrame) -> pd.DataFrame:
    """Runs of chosen distributions with several seeds, with a column `row` that names them.

    A run that a search chose the distribution by is left out: it was picked for being high.
    """
    rows = trials[(trials["method"] == REFERENCE) & trials["AP"].notna()]
    rows = rows[~rows["run"].isin(searched(trials)["run"])]
    return rows.assign(row=rows["betas"].replace(_names(trials)).astype(str))


def _names(trials: pd.DataFrame) -> dict[str, str]:
    """Names of distributions by betas: the best of each method and of all, and the paper's two."""
    rows = searched(trials)
    groups = {f"best of {m.name}": rows[rows["method"] == key] for key, m in METHODS.items()}
    found = {name: best_sample(own) for name, own in {**groups, FOUND: rows}.items()}
    named = {best["betas"]: name for name, best in found.items() if best is not None}
    equal = (text for text in trials["betas"].unique() if len(set(parse_betas(text))) == 1)
    return named | dict.fromkeys(equal, SP) | {betas_text(LEARNED_BETAS): D0}


def _searches(trials: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """The searches on record: name, method, and all trials in order."""
    for method, (name, *_) in METHODS.items():
        own = trials[trials["method"] == method]
        for seed, rows in own.groupby("seed"):
            several = own["seed"].nunique() > 1
            yield name + (f", seed {seed}" if several else ""), method, rows.sort_values("trial")


def _setting(trials: pd.DataFrame) -> str:
    """What a trial is, in the record's own words, and its source."""
    if trials.empty:
        return NOT_RUN
    return f"{_source(trials)}; {'; '.join(trials['setting'].unique())}"


def _source(trials: pd.DataFrame) -> str:
    return SOURCE_NAMES[PROXY if trials.empty else trials["source"].iloc[0]]


def _digits(value: float, form: str = "{:.2f}") -> str:
    return NOT_PRINTED if math.isnan(value) else form.format(value)


def _table(rows: dict[Any, Any], name: str, caption: str, run: bool = True) -> Table:
    """A table of cells by row and column; the caption alone where nothing was `run`."""
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index = pd.Index(list(rows), dtype=object, name=name)
    return Table(frame, caption) if run else Table(frame.iloc[:0], f"{caption}: {NOT_RUN}")


# Tables


def summary(trials: pd.DataFrame) -> Table:
    """One row a search: what it ran, what it found, and its later half against random search's."""
    chance = searched(trials[trials["method"] == "random"])["reward"]
    rows = {}
    for name, method, every in _searches(trials):
        states, own = every["state"].value_counts(), searched(every)
        batches = own.groupby("step")["reward"].mean()
        later = difference(own["reward"].iloc[len(own) // 2 :], chance)
        rows[name] = {
            "samples": len(every),
            "trained": int(states.get("finished", 0)),
            "failed": int(states.get("failed", 0)),
            "best AP": _digits(own["AP"].max()),
            "AP, mean ± sd": mean_std(own["AP"]).text(2) if len(own) else NOT_PRINTED,
            "reward, first batch": _digits(batches.iloc[0] if len(own) else math.nan),
            "last batch": _digits(batches.iloc[-1] if len(own) else math.nan),
            "second half – random": NOT_PRINTED if method == "random" else later.text(2),
            "hours": f"{every['seconds'].sum() / HOUR:.1f}",
        }
    return _table(rows, "method", f"Searches on record ({_setting(trials)})")


def reference_table(
    trials: pd.DataFrame, given: tuple[tuple[int, ...], Cost] | None = None
) -> Table:
    """Chosen distributions trained alike with several seeds, and what they cost at the scale D0.

    Args:
        trials: from `read_trials`.
        given: betas and cost at the scale D0 of a distribution in a row of its own.
    """
    again, samples = references(trials), searched(trials)
    betas = {SP: betas_text(EQUAL_BETAS), FOUND: ""}
    betas |= {name: text for text, name in _names(trials).items() if name in (D0, FOUND)}
    betas |= dict(zip(again["row"], again["betas"], strict=True))
    recorded = trials.drop_duplicates("betas").set_index("betas")
    costs = recorded[["multi_adds_d0", "parameters_d0"]].apply(tuple, axis=1).to_dict()
    costs |= {betas[SP]: paper_cost("sp_efficientnet_b0"), betas[D0]: paper_cost("eff_spinenet_d0")}
    if given is not None:
        betas[GIVEN] = betas_text(given[0])
        costs[betas[GIVEN]] = given[1]
    rows = {}
    for name in dict.fromkeys((SP, D0, *betas)):
        aps = again.loc[again["betas"] == betas[name], "AP"]
        picked = samples.loc[samples["betas"] == betas[name], "AP"].max()
        multi_adds, parameters = costs.get(betas[name], (math.nan, math.nan))
        rows[name] = {
            "AP (%), mean ± sd (seeds)": mean_std(aps).text(2) if len(aps) else NOT_RUN,
            "AP (%) it was chosen for": NOT_PRINTED if name in (SP, D0) else _digits(picked),
            "Multi-Adds at D0 (B)": _digits(multi_adds / BILLION),
            "#Params at D0 (M)": _digits(parameters / MILLION),
        }
    caption = f"Chosen distributions at equal budget ({_setting(trials)})"
    return _table(rows, "distribution", caption)


def reference_differences(trials: pd.DataFrame) -> Table:
    """The chosen distributions against SP-EfficientNet-B0, and the search's best against D0."""
    aps = _aps(trials)
    pairs = [(name, SP) for name in aps if name != SP] + [(FOUND, D0)]
    rows = {f"{one} – {two}": compare_seeds(aps[one], aps[two], digits=2) for one, two in pairs}
    caption = "Differences over seeds; a verdict takes an interval that leaves out zero"
    return _table(rows, "difference in AP", caption, run=any(map(len, aps.values())))


def _aps(trials: pd.DataFrame) -> dict[str, pd.Series[float]]:
    """AP by seed of each chosen distribution, the paper's two and the search's best first."""
    again = references(trials).set_index("seed")
    names = dict.fromkeys((SP, D0, FOUND, *again["row"]))
    return {name: again.loc[again["row"] == name, "AP"] for name in names}


def noise(trials: pd.DataFrame) -> Table:
    """How much of the difference between samples is the seed's.

    The share of right orders is of two random distributions, one trial each, were both the APs
    and the noise normal; a coin has 50 %.
    """
    own = references(trials).groupby("row")["AP"]
    freedom = int((own.count() - 1).sum())
    squares = float((own.var() * (own.count() - 1)).sum())
    seeds = math.sqrt(squares / freedom) if freedom else math.nan
    rows = sampled(trials)
    blind = rows.loc[rows["method"] == "random", "AP"].std()
    share = min(seeds / blind, 1.0) ** 2
    right = 1 / 2 + math.asin(math.sqrt(1 - share)) / math.pi
    cells = {
        "sd over seeds of one distribution": _digits(seeds, "{:.2f} AP"),
        "sd over samples of random search": _digits(blind, "{:.2f} AP"),
        "share of the samples' variance that is the seed's": _digits(PERCENT * share, "{:.0f} %"),
        "pairs that one trial each puts in the right order": _digits(PERCENT * right, "{:.0f} %"),
    }
    cells_by_row = {name: {"": cell} for name, cell in cells.items()}
    return _table(cells_by_row, "quantity", "What one trial can tell", run=len(rows) > 0)


def level_table(trials: pd.DataFrame) -> Table:
    """Betas and parameters by group of levels: all samples, the best tenth, the difference."""
    rows = sampled(trials)
    ranks = rows["AP"].rank(ascending=False, method="first").to_numpy()
    best = ranks <= math.ceil(BEST_SHARE * len(ranks))
    before = by_level_group(BEFORE, block_parameters(BEFORE)) / THOUSAND
    blocks = by_level_group(BEFORE, [1.0] * len(EQUAL_BETAS))
    drawn = [parse_betas(text) for text in rows["betas"]]
    specs = [backbone_spec(betas) for betas in drawn]
    sums = {
        "mean β": ([by_level_group(BEFORE, betas) / blocks for betas in drawn], 1),
        "parameters (k)": ([by_level_group(s, block_parameters(s)) / THOUSAND for s in specs], 0),
    }
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for group in ("L1", *LEVEL_GROUPS):
        row = cells.setdefault(group, {})
        for quantity, (found, digits) in sums.items():
            values = pd.DataFrame(found, columns=before.index, dtype=float)[group]
            if quantity != "mean β":
                row[quantity, SP] = f"{before[group]:.0f}"
            for name, own in (("all samples", values), ("best tenth", values[best])):
                row[quantity, name] = _digits(own.mean(), f"{{:.{digits}f}}")
            shift = difference(values[best], values[~best])
            row[quantity, "difference"] = shift.text(digits)
    caption = "Levels in all samples and the best tenth; difference: the best tenth less the rest"
    return _table(cells, "levels", caption, run=len(rows) > 0)


def correlation_table(trials: pd.DataFrame) -> Table:
    """Rank correlation of the AP with what a sample costs, with the chance of such a one."""
    every = sampled(trials)
    groups = {"random search": every[every["method"] == "random"], "all methods": every}
    cells: dict[str, dict[tuple[str, str], str]] = {label: {} for label in COST_COLUMNS.values()}
    for name, rows in groups.items():
        heading = f"{name} ({len(rows)} samples)"
        for column, label in COST_COLUMNS.items():
            enough = len(rows) > LEAST_SEEDS
            rho, chance = stats.spearmanr(rows["AP"], rows[column]) if enough else (math.nan,) * 2
            cells[label] |= {
                (heading, "ρ"): _digits(rho, "{:+.2f}"),
                (heading, "p"): _digits(chance, "{:.2g}"),
            }
    caption = "Rank correlation (Spearman) of AP with cost; p: as far from zero by chance"
    return _table(cells, "AP against", caption, run=len(every) > 0)


def cost_table(samples: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]) -> Table:
    """Check the two statements of section 5.1.5 on costs at the scale D0: a row a group.

    Args:
        samples: by name, the Multi-Adds [N] and the parameters [N] of a group.
    """
    rows = {}
    for name, counted in samples.items():
        flops, weights = (
            PERCENT * (np.asarray(values, float) / known - 1)
            for values, known in zip(counted, paper_cost("sp_efficientnet_b0"), strict=True)
        )
        if not flops.size:
            continue
        within = np.abs(flops) <= FLOPS_PERCENT
        rows[name] = {
            "samples": f"{flops.size:,}",
            f"Multi-Adds ±{FLOPS_PERCENT:g} %": f"{PERCENT * within.mean():.1f} %",
            "Multi-Adds range": f"{flops.min():+.0f} to {flops.max():+.0f} %",
            "fewer #Params": f"{PERCENT * (weights < 0).mean():.1f} %",
            "#Params range": f"{weights.min():+.0f} to {weights.max():+.0f} %",
        }
    return _table(rows, "samples of", f"Samples within a range of {SP}'s cost at D0")


def space_table(*results_dirs: Dir) -> Table:
    """What section 5.1.5 says of the whole space, as `effspinenet search space` counted it."""
    caption = "Section 5.1.5 on uniform samples of the space; most: more than half"
    paths = [Path(folder) / SPACE_FILE for folder in results_dirs]
    path = next((path for path in paths if path.is_file()), None)
    rows = {}
    if path is not None:
        table = read_table(path, "space")
        stated = table[table["stated"] != ""].sort_values("claim", kind="stable")
        for row in stated.itertuples():
            rows[Text(row.statement)] = {
                "stated": row.stated,
                "computed": f"{row.computed:.1f} {row.unit}",
                "verdict": row.verdict,
                "samples": f"{row.samples:,}",
            }
    return _table(rows, "statement", caption, run=path is not None)


def paper_cost(model: str) -> Cost:
    """Multi-Adds and parameters of a model's detector, from `cost/costs.csv`."""
    costs = read_table(RESULTS_DIR / "cost" / "costs.csv", "cost")
    rows = costs[(costs["model"] == model) & (costs["task"] == "detection")]
    found = rows.drop_duplicates("metric").set_index("metric")["measured"]
    return found["multi_adds"] * BILLION, found["parameters"] * MILLION


# Plots


def progress(trials: pd.DataFrame) -> Gallery:
    """The best reward so far (left) and the mean of each batch (right), a line a search."""
    best, means = {}, {}
    for name, method, every in _searches(trials):
        rows = searched(every)
        if len(rows):
            best[name, method] = pd.Series(rows["reward"].cummax().array, rows["trial"] + 1)
            batches = rows.groupby("step")
            ends = batches["trial"].max() + 1
            means[name, method] = pd.Series(batches["reward"].mean().array, ends)
    if not best:
        return Gallery((empty_picture("Reward over time"),))
    return Gallery(
        (_lines(best, "best reward so far", steps=True), _lines(means, "mean reward of a batch"))
    )


def entropy(trials: pd.DataFrame) -> Picture:
    """The entropy of a choice by each policy against samples; a line where it is uniform."""
    found = {
        (name, method): pd.Series(known["entropy"].array, known["trial"] + 1)
        for name, method, rows in _searches(trials)
        if len(known := rows.dropna(subset="entropy"))
    }
    if not found:
        return empty_picture("Entropy of a policy")
    return _lines(found, "entropy of a choice (nats)", uniform=math.log(len(SEARCH_SPACE)))


def _lines(
    series: Mapping[tuple[str, str], pd.Series[float]],
    label: str,
    steps: bool = False,
    uniform: float | None = None,
) -> Picture:
    with drawing():
        figure = new_figure(WIDE if uniform else PANEL_WIDTH, PANEL_HEIGHT)
        axes = figure.add_subplot()
        for (name, method), values in series.items():
            axes.plot(
                values.index,
                values,
                METHODS[method].line,
                color=METHODS[method].colour,
                drawstyle="steps-post" if steps else "default",
                linewidth=2,
                label=name,
            )
        if uniform:
            axes.axhline(uniform, color=INK, linestyle=":", label="uniform")
            axes.set_ylim(0, 1.1 * uniform)
        axes.set(xlabel="samples", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_above(axes, columns=3)
        ends = "; ".join(
            f"{name} from {values.iloc[0]:.2f} to {values.iloc[-1]:.2f}"
            for (name, _), values in series.items()
        )
        return to_picture(figure, f"Lines: {label} against samples. {ends}.")


def reference_dots(trials: pd.DataFrame) -> Picture:
    """A dot a seed of the distributions that were trained at equal budget."""
    values = {name: aps.tolist() for name, aps in _aps(trials).items()}
    return seed_dots(values, f"AP (%), {_source(trials)}, one dot a seed", digits=2)


def samples(trials: pd.DataFrame) -> Gallery:
    """Figure 5: Multi-Adds (left) and parameters (right) at D0 against AP, methods by colour.

    The axes reach ±20 % around SP-EfficientNet-B0, as the paper's, or further where samples do;
    the grey bands are ±20 %, and for Multi-Adds ±10 %. Stars are chosen distributions with the
    mean over their seeds.
    """
    if sampled(trials).empty:
        return Gallery((empty_picture("Samples of the search"),))
    multi_adds, parameters = paper_cost("sp_efficientnet_b0")
    bands, label = (AXIS_PERCENT, FLOPS_PERCENT), "Multi-Adds at D0 (B)"
    return Gallery(
        (
            _scatter(trials, "multi_adds_d0", BILLION, multi_adds, label, bands),
            _scatter(trials, "parameters_d0", MILLION, parameters, "#Params at D0 (M)", bands[:1]),
        )
    )


def _scatter(
    trials: pd.DataFrame,
    column: str,
    unit: float,
    centre: float,
    label: str,
    bands: Sequence[float],
) -> Picture:
    rows, middle = sampled(trials), centre / unit
    with drawing():
        figure = new_figure(PANEL_WIDTH, PANEL_HEIGHT + 0.4)
        axes = figure.add_subplot()
        for percent in bands:
            reach = middle * percent / PERCENT
            axes.axvspan(middle - reach, middle + reach, color=INK, alpha=0.1, linewidth=0)
            place, corner = (middle + reach, 1), ("data", "axes fraction")
            axes.annotate(f"±{percent:g} %", place, xycoords=corner, ha="right", va="top", size=8)
        axes.axvline(middle, color=INK, linewidth=1, linestyle=":")
        dots: dict[str, Any] = {"markersize": 4.5, "markeredgewidth": 0, "alpha": 0.75}
        for key, method in METHODS.items():
            own = rows[rows["method"] == key]
            name = method.name if len(own) else None
            axes.plot(
                own[column] / unit,
                own["AP"],
                method.marker,
                color=method.colour,
                label=name,
                **dots,
            )
        colours = {f"best of {method.name}": method.colour for method in METHODS.values()}
        stars = []
        for star, own in references(trials).groupby("row", sort=False):
            where, mean = float(own[column].iloc[0]) / unit, float(own["AP"].mean())
            colour = colours.get(str(star), family_colour(str(star)))
            edge: dict[str, Any] = {"markeredgecolor": INK, "markersize": 14, "zorder": 3}
            axes.plot([where], [mean], "*", color=colour, label=star, **edge)
            stars.append(f"{star} at {where:.2f} with AP {mean:.2f} ({len(own)} runs)")
        axes.margins(x=0.02)
        axes.set(xlabel=label, ylabel=f"AP (%), {_source(trials)}")
        legend_above(axes)
        alt = f"Scatter: {label} against AP of {len(rows)} samples ({_source(trials)})"
        chosen = "; ".join(stars) or NOT_RUN
        return to_picture(figure, f"{alt}, {SP} at {middle:.2f}. Chosen distributions: {chosen}.")
