"""Plots of specifications, measurements, costs, training curves and data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator

from effspinenet_lib.models.specs import BackboneSpec
from effspinenet_lib.report.claims import ACCURACY, COST, EXACT, PRINT
from effspinenet_lib.report.statistics import (
    CONTRADICTED,
    HOLDS,
    INCONCLUSIVE,
    JOINED_FAMILIES,
    PAPER,
    PROXY,
    SOURCE_NAMES,
    resource_shares,
)
from effspinenet_lib.report.style import (
    FAMILY_COLOURS,
    FONT_SIZE,
    HOVER,
    INK,
    NEUTRAL,
    NOT_RUN,
    PANEL_HEIGHT,
    PANEL_WIDTH,
    WIDE,
    Gallery,
    Picture,
    drawing,
    empty_picture,
    family_colour,
    family_of,
    new_figure,
    to_picture,
    words,
)
from effspinenet_lib.report.tables import METRIC_NAMES, table_number
from effspinenet_lib.report.tables import cost_differences as counted_differences
from effspinenet_lib.results import ItemResults

if TYPE_CHECKING:
    from effspinenet_lib.data import Dataset

ROW_HEIGHT, COST_ROW_HEIGHT, LEGEND_LINE, TILE = 0.6, 0.24, 0.2, 2.4  # inches
BAR_SHARE = 0.8  # of the room between two blocks
MEAN_REACH = 0.28  # of the room between two rows, to either side
RISE, FALL = "#009E73", "#D55E00"
STATUS_COLOURS = {
    EXACT: "#0072B2",
    HOLDS: "#009E73",
    CONTRADICTED: "#C04A00",
    INCONCLUSIVE: "#B07800",
    NOT_RUN: NEUTRAL,
}
EVIDENCE = {PRINT: "a table by itself", COST: "cost", ACCURACY: "accuracy"}
RIGHT_SHARE = 0.9  # of the largest cost, beyond which a name stands before its point
CLOSE_PERCENT = 3.0  # the grey band of the cost plot


def legend_above(axes: Axes, columns: int = 2) -> None:
    """A legend over the plot, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)


def distribution(specs: Mapping[str, BackboneSpec], input_size: int) -> Gallery:
    """Figure 3: feature dimension (left) and share of Multi-Adds (right) of the blocks in order.

    Args:
        specs: backbones of the same topology by their printed names.
        input_size: side of the square input image in pixels.
    """
    dims = {name: [block.feature_dim for block in spec.blocks] for name, spec in specs.items()}
    shares = {name: resource_shares(spec, input_size) for name, spec in specs.items()}
    levels = [block.level for block in next(iter(specs.values())).blocks]
    return Gallery(
        (
            _block_bars(dims, levels, "feature dimension", "{:.0f}"),
            _block_bars(shares, levels, "share of Multi-Adds (%)", "{:.1f}"),
        )
    )


def _block_bars(
    values: Mapping[str, Sequence[float]], levels: Sequence[int], label: str, number: str
) -> Picture:
    width = BAR_SHARE / len(values)
    with drawing():
        figure = new_figure(PANEL_WIDTH, PANEL_HEIGHT)
        axes = figure.add_subplot()
        for series, (name, heights) in enumerate(values.items()):
            offset = (series - (len(values) - 1) / 2) * width
            places = [block + offset for block in range(1, len(levels) + 1)]
            axes.bar(places, heights, width, label=name, color=family_colour(name))
        axes.set_xticks(range(1, len(levels) + 1), map(str, levels))
        axes.grid(visible=False, axis="x")
        axes.set(xlabel="level of blocks 1 to 18, in order", ylabel=label)
        legend_above(axes)
        lists = words(f"{name}: {', '.join(map(number.format, v))}" for name, v in values.items())
        return to_picture(figure, f"Bars: {label} of the blocks in order. {lists}.")


def seeds(results: ItemResults, metric: str = "AP") -> Picture:
    """A dot a seed and a bar at the mean for each row of an item that the proxy trains.

    Args:
        results: of an item; rows without a measurement keep their place and say so.
        metric: what is drawn.
    """
    rows = results.measured.query("metric == @metric and source == @PROXY")
    values = {
        name: rows.loc[rows["row"] == name, "value"].dropna().tolist()
        for name in results.proxy_rows
    }
    return seed_dots(values, f"{metric} (%), {SOURCE_NAMES[PROXY]}, one dot a seed")


def seed_dots(values: Mapping[str, Sequence[float]], label: str, digits: int = 1) -> Picture:
    """A dot a value and a bar at the mean, a row a name; a row without values says "not run".

    Args:
        values: by name, first at the top.
        label: of the axis.
        digits: decimals of the numbers.
    """
    if not any(values.values()):
        return empty_picture(label)
    import seaborn as sns  # takes seconds to load, and pages without results draw no dots

    said = []
    dots = pd.DataFrame([(value, name) for name, own in values.items() for value in own])
    with drawing():
        figure = new_figure(WIDE, 0.9 + ROW_HEIGHT * len(values))
        axes = figure.add_subplot()
        colours = {name: family_colour(name) for name in values}
        looks: dict[str, Any] = {"palette": colours, "size": 9, "alpha": 0.75, "jitter": False}
        sns.stripplot(dots, x=0, y=1, hue=1, order=values, legend=False, ax=axes, **looks)
        for place, (name, own) in enumerate(values.items()):
            if not own:
                axes.text(0.5, place, NOT_RUN, transform=axes.get_yaxis_transform(), ha="center")
                said.append(f"{name}: {NOT_RUN}")
                continue
            mean = sum(own) / len(own)
            reach = [place - MEAN_REACH, place + MEAN_REACH]
            axes.plot([mean] * 2, reach, color=INK, linewidth=2)
            top: dict[str, Any] = {"ha": "center", "va": "bottom", "annotation_clip": False}
            axes.annotate(f"{mean:.{digits}f}", (mean, reach[0]), **top)
            shown = ", ".join(f"{value:.{digits}f}" for value in own)
            said.append(f"{name}: {shown}, mean {mean:.{digits}f}")
        axes.set_yticks(range(len(values)), list(values))
        axes.set(ylim=(len(values) - 0.5, -0.5), xlabel=label, ylabel="")
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.15)
        return to_picture(figure, f"{label}. {'; '.join(said)}.")


def curves(results: ItemResults) -> Picture:
    """Training loss against step, a line a run, in the colour of its model's family."""
    if not results.curves:
        return empty_picture("Training curves", "the runs' folders are not on this machine")
    dashes = ("-", "--", ":", "-.")
    with drawing():
        figure = new_figure(WIDE, PANEL_HEIGHT + LEGEND_LINE * len(results.curves))
        axes = figure.add_subplot()
        for number, (label, curve) in enumerate(results.curves.items()):
            style: dict[str, Any] = {
                "linestyle": dashes[number % len(dashes)],
                "color": family_colour(label),
            }
            axes.plot(curve["step"], curve["loss"], label=label, **style)
        axes.set(xlabel="step", ylabel="training loss (mean of the last steps)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_above(axes, 1)
        ends = words(
            f"{label} from {curve['loss'].iloc[0]:.2f} to {curve['loss'].iloc[-1]:.2f}"
            for label, curve in results.curves.items()
        )
        return to_picture(figure, f"Training loss against step: {ends}.")


def trade_off(frame: pd.DataFrame, cost: str = "multi_adds", log: bool = False) -> Picture:
    """Accuracy against cost: printed (open, dashed), counted (filled), and measured (stars).

    A line joins the models of a family that has several in the order of their cost.

    Args:
        frame: from `tables.cost_and_accuracy`.
        cost: `multi_adds` or `parameters`.
        log: whether the axis of costs is logarithmic.
    """
    label = {"multi_adds": "#FLOPs (B)", "parameters": "#Params (M)"}[cost]
    said = []
    with drawing():
        figure = new_figure(PANEL_WIDTH, PANEL_HEIGHT + 0.3)
        axes = figure.add_subplot()
        for family, own in frame.groupby(frame.index.map(family_of), sort=False):
            colour, joined = family_colour(str(family)), family in JOINED_FAMILIES
            for column, line, fill in ((cost, "--", "none"), (f"counted_{cost}", "-", colour)):
                points = own.dropna(subset=column).sort_values(column)
                if joined:
                    axes.plot(points[column], points["accuracy"], line, color=colour, alpha=0.7)
                for name, point in points.iterrows():
                    text = f"{name}: {point[column]:.4g}, AP {point['accuracy']:.1f}"
                    style: dict[str, Any] = {"markerfacecolor": fill, "color": colour}
                    tip = HOVER + text + (", printed" if fill == "none" else ", counted")
                    axes.plot([point[column]], [point["accuracy"]], "o", gid=tip, **style)
            for name, point in own.dropna(subset="measured").iterrows():
                tip = f"{HOVER}{name}: {point['measured']:.1f} measured"
                place = [point[f"counted_{cost}"]], [point["measured"]]
                axes.plot(*place, "*", color=colour, markersize=12, gid=tip)
            if family:
                axes.plot([], [], "o-" if joined else "o", color=colour, label=family)
            said += [f"{n}: {p[cost]:g}, AP {p['accuracy']:.1f}" for n, p in own.iterrows()]
            if not joined:
                for name, point in own.iterrows():
                    right = point[cost] > RIGHT_SHARE * frame[cost].max()
                    ends = point[cost], point[f"counted_{cost}"]
                    place = min(ends) if right else max(ends), point["accuracy"]
                    shift: dict[str, Any] = {"xytext": (-6 if right else 6, -3)}
                    shift |= {"textcoords": "offset points", "ha": "right" if right else "left"}
                    axes.annotate(str(name), place, fontsize=FONT_SIZE - 3, **shift)
        axes.set(xlabel=label, ylabel="AP (%)")
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        legend_above(axes)
        return to_picture(figure, f"AP against {label}, as printed. {'; '.join(said)}.")


def waterfall(
    values: pd.Series[float], label: str, errors: pd.Series[float] | None = None
) -> Picture:
    """Steps from one value to the next, a bar a step, as gains over the first.

    Args:
        values: by the name of the step, in order; what is not defined is left out.
        label: of the axis.
        errors: standard deviations, where there are several seeds.
    """
    values = values.dropna()
    if values.empty:
        return empty_picture(label)
    steps, gains = values.diff(), values - values.iloc[0]
    with drawing():
        figure = new_figure(PANEL_WIDTH, PANEL_HEIGHT)
        axes = figure.add_subplot()
        axes.axhline(0, color=INK, linewidth=1)
        own = pd.Series(math.nan, values.index) if errors is None else errors.reindex(values.index)
        axes.errorbar(range(len(values)), gains, own, fmt="none", ecolor=INK, capsize=3)
        for place, (step, gain, error) in enumerate(zip(steps, gains, own.fillna(0), strict=True)):
            text = f"{step:+.1f}" if place else f"{values.iloc[0]:.1f}"
            start = gains.iloc[max(0, place - 1)]
            axes.bar(place, gain - start, 0.65, bottom=start, color=RISE if step >= 0 else FALL)
            axes.annotate(text, (place, max(start, gain + error)), ha="center", va="bottom")
        axes.set_xticks(range(len(values)), list(map(str, values.index)), rotation=20)
        axes.use_sticky_edges = False
        axes.margins(y=0.12)
        axes.set(ylabel=f"gain over {values.index[0]}", xlim=(-0.5, len(values) - 0.5))
        axes.set_title(label, loc="left")
        axes.grid(visible=False, axis="x")
        said = "; ".join(f"{name}: {value:.1f}" for name, value in values.items())
        return to_picture(figure, f"{label}, step by step. {said}.")


def schedule(lengths: pd.Series[float], values: Mapping[str, pd.Series[float]]) -> Picture:
    """Accuracy over the length of the training, a line a source, on a logarithmic axis.

    Args:
        lengths: epochs by row.
        values: by the name of the source: accuracy by row, with one value or several a row.
    """
    said = []
    with drawing():
        figure = new_figure(WIDE, PANEL_HEIGHT)
        axes = figure.add_subplot()
        for (name, own), marker in zip(values.items(), "os^", strict=False):
            if own.empty:
                said.append(f"{name}: {NOT_RUN}")
                continue
            means = own.groupby(level=0).mean().reindex(lengths.index).dropna()
            axes.plot(lengths[own.index], own, marker, alpha=0.5, color=family_colour(own.index[0]))
            line, fill = ("--", "none") if name == PAPER else ("-", None)
            axes.plot(
                lengths[means.index],
                means,
                marker + line,
                color=family_colour(own.index[0]),
                markerfacecolor=fill,
                label=name,
            )
            cells = ", ".join(f"{lengths[str(row)]:g} epochs {v:.1f}" for row, v in means.items())
            said.append(f"{name}: {cells}")
        axes.set(xscale="log", xlabel="epochs of COCO (log), or their share of it", ylabel="AP (%)")
        axes.set_xticks(list(lengths), [f"{epochs:g}" for epochs in lengths], minor=False)
        axes.minorticks_off()
        if any(not own.empty for own in values.values()):
            legend_above(axes)
        return to_picture(figure, f"AP over training length. {'; '.join(said)}.")


def scorecard(card: pd.DataFrame) -> Picture:
    """How many claims have which status, a bar for each kind of evidence.

    Args:
        card: from `claims.scorecard`.
    """
    said = []
    with drawing():
        figure = new_figure(WIDE, 2.2)
        axes = figure.add_subplot()
        left = dict.fromkeys(EVIDENCE, 0)
        for status, colour in STATUS_COLOURS.items():
            for place, kind in enumerate(EVIDENCE):
                number = int(((card["decided_by"] == kind) & (card["status"] == status)).sum())
                if number:
                    tip = f"{HOVER}{EVIDENCE[kind]}: {number} {status}"
                    axes.barh(place, number, 0.7, left[kind], color=colour)[0].set_gid(tip)
                    at = left[kind] + number / 2, place
                    axes.annotate(str(number), at, ha="center", va="center", color="white")
                    left[kind] += number
                    said.append(f"{EVIDENCE[kind]}: {number} {status}")
            axes.barh(0, 0, color=colour, label=status)
        axes.set_yticks(range(len(EVIDENCE)), list(EVIDENCE.values()))
        axes.set(xlabel="claims", ylim=(len(EVIDENCE) - 0.5, -0.5))
        axes.grid(visible=False, axis="y")
        legend_above(axes, 3)
        return to_picture(figure, f"Claims by evidence and verdict. {'; '.join(said)}.")


def cost_differences(costs: pd.DataFrame) -> Picture:
    """The difference of every counted cost from the printed one in percent, a row a model.

    Args:
        costs: rows of `cost/costs.csv` with a printed number.
    """
    numbers = costs["item"].map(table_number).astype(str)
    costs = costs.assign(label=costs["row"] + ", table " + numbers, off=counted_differences(costs))
    places = {label: place for place, label in enumerate(dict.fromkeys(costs["label"]))}
    with drawing():
        figure = new_figure(WIDE, 0.9 + COST_ROW_HEIGHT * len(places))
        axes = figure.add_subplot()
        axes.axvspan(-CLOSE_PERCENT, CLOSE_PERCENT, color=INK, alpha=0.15, linewidth=0)
        for metric, marker, fill in (("multi_adds", "o", "full"), ("parameters", "s", "none")):
            cells = costs[costs["metric"] == metric]
            colours = [family_colour(name) for name in cells["row"]]
            rows: list[Any] = list(cells.itertuples())
            for cell, colour in zip(rows, colours, strict=True):
                axes.plot(
                    [cell.off],
                    [places[cell.label]],
                    marker,
                    color=colour,
                    markerfacecolor=colour if metric == "multi_adds" else "none",
                    gid=f"{HOVER}{cell.label}: {METRIC_NAMES[metric]} {cell.off:+.1f} %",
                )
            axes.plot([], [], marker, color=INK, fillstyle=fill, label=METRIC_NAMES[metric])
        axes.set_yticks(range(len(places)), list(places))
        axes.set(ylim=(len(places) - 0.5, -0.5), xlabel="counted over printed, difference in %")
        legend_above(axes)
        alt = f"Differences of {len(costs)} counted costs from the printed ones, at most"
        worst = costs["off"].abs().max()
        return to_picture(figure, f"{alt} {worst:.1f} %; the tables below have each.")


def contact_sheet(dataset: Dataset, count: int = 12, columns: int = 3) -> Picture:
    """The first images of a data set with their boxes and class names; crowds are dashed.

    Args:
        dataset: an opened data set.
        count: images shown.
        columns: images in a row.
    """
    count = min(count, len(dataset))
    rows = -(-count // columns)
    names = [category.name for category in dataset.categories]
    colours = list(FAMILY_COLOURS.values())
    shown: Counter[str] = Counter()
    with drawing():
        figure = new_figure(TILE * columns, TILE * rows)
        for place in range(count):
            axes = figure.add_subplot(rows, columns, place + 1)
            sample = dataset.load(place)
            axes.imshow(sample.image)
            axes.axis("off")
            for box, label, crowd in zip(sample.boxes, sample.labels, sample.iscrowd, strict=True):
                line = "dashed" if crowd else "solid"
                _draw_box(axes, box, names[label], colours[label % len(colours)], line)
                shown[names[label]] += 1
    found = words(f"{number} {name}" for name, number in sorted(shown.items()))
    return to_picture(figure, f"{count} images of {dataset.name} with boxes: {found}.")


def _draw_box(axes: Axes, box: Sequence[float], name: str, colour: str, line: str) -> None:
    left, top, right, bottom = map(float, box)
    style: dict[str, Any] = {"fill": False, "ec": colour, "linewidth": 1.5, "linestyle": line}
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, **style))
    label = {"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
    axes.text(left, top, name, color="white", fontsize=7, va="top", bbox=label, clip_on=True)
