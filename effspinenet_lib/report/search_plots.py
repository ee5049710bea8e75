"""Pictures of a search: progress, entropy, the blocks that gain, and Figure 5."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from effspinenet_lib.models.specs import LEARNED_BETAS, MODELS, SEARCH_SPACE
from effspinenet_lib.report.plots import seed_dots
from effspinenet_lib.report.search import (
    BILLION,
    METHOD_NAMES,
    MILLION,
    POLICIES,
    SP,
    TOO_FEW,
    absent,
    best_of,
    reference_measurements,
    reference_names,
    references,
    sampled,
    searches,
    source_name,
    source_of,
)
from effspinenet_lib.report.search_costs import AXIS_PERCENT, FLOPS_PERCENT, PERCENT, target
from effspinenet_lib.report.search_levels import beta_frame, is_best
from effspinenet_lib.report.style import (
    INK,
    Gallery,
    Picture,
    drawing,
    family_colour,
    new_figure,
    to_picture,
    words,
)
from effspinenet_lib.report.tables import NOT_RUN
from effspinenet_lib.report.verdict import difference
from effspinenet_lib.results import REFERENCE

# Of Okabe and Ito's palette, without the colours of the models that stand beside them.
METHOD_COLOURS = {
    "ppo": "#D55E00",
    "reinforce": "#CC79A7",
    "random": "#56B4E9",
    "evolution": "#009E73",
}
METHOD_MARKERS = {"ppo": "o", "reinforce": "v", "random": "s", "evolution": "^"}
METHOD_LINES = {"ppo": "-", "reinforce": ":", "random": "--", "evolution": "-."}
PANEL_WIDTH, PANEL_HEIGHT, WIDE_WIDTH = 4.2, 3.4, 7.0  # inches
STRIP_HEIGHT = 0.8
REST_COLOUR, BEST_COLOUR = "#56B4E9", "#D55E00"
OFFSET = 0.12  # of the room between two blocks
LEGEND_ROW = 0.2  # inches
AXIS_MARGIN = 0.02  # of what an axis reaches
DOT_SIZE, STAR_SIZE = 4.5, 14  # points


def _nothing(what: str, reason: str) -> Picture:
    """A strip that says why there is nothing to draw."""
    with drawing():
        figure = new_figure(WIDE_WIDTH, STRIP_HEIGHT)
        figure.text(0.5, 0.5, f"{what}: {reason}", ha="center", va="center", color=INK)
        return to_picture(figure, f"{what}: {reason}.")


def progress(trials: pd.DataFrame) -> Gallery:
    """The best reward so far (left) and the mean of each batch (right), a line a search."""
    found = list(searches(trials))
    if not found:
        return Gallery((_nothing("Reward over time", absent(trials)),))
    best = {
        (name, method): pd.Series(rows["reward"].cummax().to_numpy(), rows["trial"] + 1)
        for name, method, rows in found
    }
    means = {
        (name, method): pd.Series(
            rows.groupby("step")["reward"].mean().to_numpy(),
            rows.groupby("step")["trial"].max().to_numpy() + 1,
        )
        for name, method, rows in found
    }
    return Gallery((_lines(best, "best reward so far"), _lines(means, "mean reward of a batch")))


def _lines(series: dict[tuple[str, str], pd.Series[float]], label: str) -> Picture:
    with drawing():
        figure = new_figure(PANEL_WIDTH, PANEL_HEIGHT)
        axes = figure.add_subplot()
        for (name, method), values in series.items():
            axes.plot(
                values.index,
                values,
                METHOD_LINES[method],
                color=METHOD_COLOURS[method],
                drawstyle="steps-post" if label.startswith("best") else "default",
                linewidth=2,
                label=name,
            )
        axes.set(xlabel="samples", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend_above(axes)
        listed = words(
            f"{name} from {values.iloc[0]:.2f} to {values.iloc[-1]:.2f}"
            for (name, _), values in series.items()
        )
        return to_picture(figure, f"Lines: {label} against samples. {listed}.")


def _legend_above(axes: Axes, columns: int = 3) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)


def entropy(trials: pd.DataFrame) -> Picture:
    """The entropy of a choice by each policy against batches; a line where it is uniform."""
    found = [
        (name, method, rows.groupby("step")["entropy"].first())
        for name, method, rows in searches(trials)
        if method in POLICIES and rows["entropy"].notna().any()
    ]
    if not found:
        policies = trials[trials["method"].isin(POLICIES)]
        return _nothing("Entropy of a policy", absent(policies))
    uniform = math.log(len(SEARCH_SPACE))
    with drawing():
        figure = new_figure(WIDE_WIDTH, PANEL_HEIGHT)
        axes = figure.add_subplot()
        for name, method, values in found:
            axes.plot(
                values.index + 1,
                values,
                METHOD_LINES[method],
                color=METHOD_COLOURS[method],
                linewidth=2,
                marker=METHOD_MARKERS[method],
                label=name,
            )
        axes.axhline(uniform, color=INK, linestyle=":", label=f"uniform (ln {len(SEARCH_SPACE)})")
        axes.set(xlabel="batch", ylabel="entropy of a choice (nats)", ylim=(0, 1.1 * uniform))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend_above(axes)
        listed = words(
            f"{name} from {values.iloc[0]:.2f} to {values.iloc[-1]:.2f}"
            for name, _, values in found
        )
        return to_picture(
            figure, f"Lines: entropy of a choice by batch, uniform at {uniform:.2f}. {listed}."
        )


def block_preference(trials: pd.DataFrame) -> Picture:
    """Mean beta of each block: the best tenth with the 95 % interval of its difference, the rest.

    The bar at a block of the best tenth is that of the difference, so a bar that does not reach
    the rest's mark is a difference that leaves out zero.
    """
    best, betas = is_best(trials), beta_frame(trials)
    if best.all():
        reason = TOO_FEW if len(best) else absent(trials)
        return _nothing("Which blocks gain", reason)
    blocks = range(1, len(LEARNED_BETAS) + 1)
    levels = [block.level for block in MODELS["sp_efficientnet_b0"].backbone.blocks]
    found = [difference(betas.loc[best, block], betas.loc[~best, block]) for block in blocks]
    means, rest = betas[best].mean(), betas[~best].mean()
    with drawing():
        figure = new_figure(WIDE_WIDTH, PANEL_HEIGHT)
        axes = figure.add_subplot()
        axes.plot(
            [block - OFFSET for block in blocks],
            rest,
            "s",
            color=REST_COLOUR,
            label=f"the rest ({(~best).sum()} samples)",
        )
        axes.errorbar(
            [block + OFFSET for block in blocks],
            means,
            yerr=[one.half_width for one in found],
            fmt="o",
            color=BEST_COLOUR,
            elinewidth=1.2,
            label=f"best tenth ({best.sum()} samples), 95 % interval of the difference",
        )
        axes.set_xticks(list(blocks), [f"{level}" for level in levels])
        axes.grid(visible=False, axis="x")
        axes.set(xlabel="level of blocks 1 to 18, in order", ylabel="mean β")
        _legend_above(axes)
        clear = [
            f"block {block} (L{levels[block - 1]}) by {one.mean:+.1f}"
            for block, one in zip(blocks, found, strict=True)
            if one.conclusive
        ]
        return to_picture(
            figure,
            f"Mean β of the blocks in the best tenth: {_numbers(means)}; in the rest: "
            f"{_numbers(rest)}. Outside the 95 % interval: {words(clear) if clear else 'none'}.",
        )


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def samples(trials: pd.DataFrame) -> Gallery:
    """Figure 5: Multi-Adds (left) and parameters (right) at D0 against AP, methods by colour.

    The axes reach ±20 % around SP-EfficientNet-B0, as the paper's, or further where samples do;
    the grey bands are ±20 %, and for Multi-Adds ±10 %. Stars are chosen distributions with the
    mean over their seeds.
    """
    if sampled(trials).empty:
        return Gallery((_nothing("Samples of the search", absent(trials)),))
    known = target()
    return Gallery(
        (
            _scatter(trials, "multi_adds_d0", BILLION, known.multi_adds, "#FLOPs at D0 (B)"),
            _scatter(trials, "parameters_d0", MILLION, known.parameters, "#Params at D0 (M)"),
        )
    )


def reference_dots(trials: pd.DataFrame) -> Picture:
    """A dot a seed of the distributions that were trained at equal budget."""
    rows, names = reference_measurements(trials), reference_names(trials)
    source, called = source_of(trials), source_name(trials)
    return seed_dots(REFERENCE, rows, names, digits=2, source=source, called=called)


def _scatter(trials: pd.DataFrame, column: str, unit: float, centre: int, label: str) -> Picture:
    rows, middle = sampled(trials), centre / unit
    bands = (AXIS_PERCENT, FLOPS_PERCENT) if column == "multi_adds_d0" else (AXIS_PERCENT,)
    with drawing():
        figure = new_figure(PANEL_WIDTH, PANEL_HEIGHT + LEGEND_ROW * 2)
        axes = figure.add_subplot()
        _bands(axes, middle, bands)
        dots = words(_dots(axes, rows, column, unit))
        stars = words(_stars(axes, trials, column, unit) or [NOT_RUN])
        reach = middle * AXIS_PERCENT / PERCENT
        left = min(float(rows[column].min()) / unit, middle - reach)
        right = max(float(rows[column].max()) / unit, middle + reach)
        margin = AXIS_MARGIN * (right - left)
        axes.set(xlim=(left - margin, right + margin))
        axes.set(xlabel=label, ylabel=f"AP (%), {source_name(trials)}")
        _legend_above(axes, columns=2)
        return to_picture(
            figure,
            f"Scatter: {label} against AP of {len(rows)} samples ({source_name(trials)}), {SP} at "
            f"{middle:.2f}. {dots}. Chosen distributions: {stars}.",
        )


def _dots(axes: Axes, rows: pd.DataFrame, column: str, unit: float) -> Iterator[str]:
    """Draw the samples of each method; what they reach."""
    for method, name in METHOD_NAMES.items():
        own = rows[rows["method"] == method]
        if own.empty:
            continue
        axes.plot(
            own[column] / unit,
            own["AP"],
            METHOD_MARKERS[method],
            color=METHOD_COLOURS[method],
            markersize=DOT_SIZE,
            markeredgewidth=0,
            alpha=0.75,
            label=name,
        )
        yield f"{name} {_reach(own[column] / unit, 2)}, AP {_reach(own['AP'], 2)}"


def _reach(values: pd.Series[float], digits: int) -> str:
    return f"{values.min():.{digits}f} to {values.max():.{digits}f}"


def _stars(axes: Axes, trials: pd.DataFrame, column: str, unit: float) -> list[str]:
    """Draw the chosen distributions; where they are."""
    parts = []
    for name, own in references(trials).groupby("row", sort=False):
        place, mean = float(own[column].iloc[0]) / unit, float(own["AP"].mean())
        axes.plot(
            [place],
            [mean],
            "*",
            color=_star_colour(str(name)),
            markeredgecolor=INK,
            markersize=STAR_SIZE,
            linestyle="none",
            zorder=3,
            label=name,
        )
        parts.append(f"{name} at {place:.2f} with AP {mean:.2f} ({len(own)} runs)")
    return parts


def _star_colour(name: str) -> str:
    """The model family's colour, that of the method whose best it is, or the text's."""
    methods = {best_of(method): colour for method, colour in METHOD_COLOURS.items()}
    return methods.get(name, family_colour(name))


def _bands(axes: Axes, middle: float, percents: Sequence[float]) -> None:
    for percent in percents:
        reach = middle * percent / PERCENT
        axes.axvspan(middle - reach, middle + reach, color=INK, alpha=0.1, linewidth=0)
        axes.annotate(
            f"±{percent:g} %",
            (middle + reach, 1),
            xycoords=("data", "axes fraction"),
            ha="right",
            va="top",
            fontsize=8,
        )
    axes.axvline(middle, color=INK, linewidth=1, linestyle=":")
