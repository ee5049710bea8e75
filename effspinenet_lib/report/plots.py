"""Plots of specifications, measurements, costs, training curves and data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from effspinenet_lib.models.specs import BackboneSpec
from effspinenet_lib.report.statistics import PROXY, SOURCE_NAMES, resource_shares
from effspinenet_lib.report.style import (
    FAMILY_COLOURS,
    INK,
    NOT_RUN,
    PANEL_HEIGHT,
    PANEL_WIDTH,
    WIDE,
    Gallery,
    Picture,
    drawing,
    empty_picture,
    family_colour,
    new_figure,
    to_picture,
    words,
)
from effspinenet_lib.report.tables import METRIC_NAMES, ItemResults, table_number
from effspinenet_lib.report.tables import cost_differences as counted_differences

if TYPE_CHECKING:
    from effspinenet_lib.data import Dataset

ROW_HEIGHT, COST_ROW_HEIGHT, TILE = 0.6, 0.24, 2.4  # inches
BAR_SHARE = 0.8  # of the room between two blocks
MEAN_REACH = 0.28  # of the room between two rows, to either side
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
    """A dot a seed and a bar at the mean for each row of an item, measured by the proxy.

    Args:
        results: of an item; rows without a measurement keep their place and say so.
        metric: what is drawn.
    """
    rows = results.measured.query("metric == @metric and source == @PROXY")
    names = dict.fromkeys(results.paper["row"])
    values = {name: rows.loc[rows["row"] == name, "value"].dropna().tolist() for name in names}
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
    said = []
    with drawing():
        figure = new_figure(WIDE, 0.9 + ROW_HEIGHT * len(values))
        axes = figure.add_subplot()
        for place, (name, own) in enumerate(values.items()):
            if not own:
                axes.text(0.5, place, NOT_RUN, transform=axes.get_yaxis_transform(), ha="center")
                said.append(f"{name}: {NOT_RUN}")
                continue
            mean = sum(own) / len(own)
            axes.plot(own, [place] * len(own), "o", color=family_colour(name), alpha=0.75, ms=9)
            reach = [place - MEAN_REACH, place + MEAN_REACH]
            axes.plot([mean] * 2, reach, color=INK, linewidth=2)
            top: dict[str, Any] = {"ha": "center", "va": "bottom", "annotation_clip": False}
            axes.annotate(f"{mean:.{digits}f}", (mean, reach[0]), **top)
            shown = ", ".join(f"{value:.{digits}f}" for value in own)
            said.append(f"{name}: {shown}, mean {mean:.{digits}f}")
        axes.set_yticks(range(len(values)), list(values))
        axes.set(ylim=(len(values) - 0.5, -0.5), xlabel=label)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.15)
        return to_picture(figure, f"{label}. {'; '.join(said)}.")


def curves(results: ItemResults) -> Picture:
    """Training loss against step, a line a run, in the colour of its model's family."""
    if not results.curves:
        return empty_picture("Training curves", "the runs' folders are not on this machine")
    dashes = ("-", "--", ":", "-.")
    with drawing():
        figure = new_figure(WIDE, PANEL_HEIGHT)
        axes = figure.add_subplot()
        for number, (label, curve) in enumerate(results.curves.items()):
            style: dict[str, Any] = {
                "linestyle": dashes[number % len(dashes)],
                "color": family_colour(label),
            }
            axes.plot(curve["step"], curve["loss"], label=label, **style)
        axes.set(xlabel="step", ylabel="training loss (mean of the last steps)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        ends = words(
            f"{label} from {curve['loss'].iloc[0]:.2f} to {curve['loss'].iloc[-1]:.2f}"
            for label, curve in results.curves.items()
        )
        return to_picture(figure, f"Training loss against step: {ends}.")


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
        for metric, marker in (("multi_adds", "o"), ("parameters", "s")):
            cells = costs[costs["metric"] == metric]
            colours = [family_colour(name) for name in cells["row"]]
            axes.scatter(
                cells["off"],
                cells["label"].map(places),
                marker=marker,
                edgecolors=colours,
                facecolors=colours if metric == "multi_adds" else "none",
                label=METRIC_NAMES[metric],
            )
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
