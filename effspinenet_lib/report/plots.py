"""Plots of specifications, measurements, training curves and data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from effspinenet_lib.models.specs import BackboneSpec, block_multi_adds
from effspinenet_lib.report.style import (
    FAMILY_COLOURS,
    INK,
    Gallery,
    Picture,
    drawing,
    family_colour,
    new_figure,
    to_picture,
    words,
)
from effspinenet_lib.report.tables import NOT_RUN, PROXY

if TYPE_CHECKING:
    from effspinenet_lib.data import Dataset

PANEL_WIDTH, PANEL_HEIGHT = 4.2, 3.2  # inches
WIDE_WIDTH, ROW_HEIGHT = 7.0, 0.6
TILE = 2.4
BAR_SHARE = 0.8  # of the room between two blocks
LEGEND_COLUMNS = 2  # three names would squeeze the plot
MEAN_REACH = 0.28  # of the room between two rows, to either side
PERCENT = 100.0


def resource_shares(spec: BackboneSpec, input_size: int) -> tuple[float, ...]:
    """Share of each block in the Multi-Adds of all blocks by Equation 2, in percent."""
    costs = block_multi_adds(spec, input_size)
    total = sum(costs)
    return tuple(PERCENT * cost / total for cost in costs)


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
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=LEGEND_COLUMNS)
        lists = words(
            f"{name}: {', '.join(map(number.format, heights))}" for name, heights in values.items()
        )
        return to_picture(figure, f"Bars: {label} of the blocks in order. {lists}.")


def seed_dots(
    item: str,
    measurements: pd.DataFrame,
    rows: Sequence[str],
    metric: str = "AP",
    digits: int = 1,
    source: str = PROXY,
    called: str = PROXY,
) -> Picture:
    """A dot a seed and a bar at the mean, for each row, of the measurements of one source.

    Rows without a measurement keep their place and say so.

    Args:
        item: which table.
        measurements: measured rows.
        rows: names of the rows, first at the top.
        metric: what is drawn.
        digits: decimals of the numbers.
        source: whose measurements are drawn.
        called: what the source is called on the axis.
    """
    chosen = measurements[
        (measurements["item"] == item)
        & (measurements["metric"] == metric)
        & (measurements["source"] == source)
    ]
    sentences = []
    with drawing():
        figure = new_figure(WIDE_WIDTH, 0.9 + ROW_HEIGHT * len(rows))
        axes = figure.add_subplot()
        for place, name in enumerate(rows):
            values = chosen.loc[chosen["row"] == name, "value"].dropna().tolist()
            sentences.append(_seed_row(axes, place, name, values, digits))
        axes.set_yticks(range(len(rows)), rows)
        if chosen.empty:
            axes.set_xticks([])
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel=f"{metric} (%), {called}, one dot a seed")
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.15)
        return to_picture(figure, f"{metric} by seed ({called}). {' '.join(sentences)}")


def _seed_row(axes: Axes, place: int, name: str, values: list[float], digits: int) -> str:
    if not values:
        axes.text(0.5, place, NOT_RUN, transform=axes.get_yaxis_transform(), ha="center")
        return f"{name}: {NOT_RUN}."
    mean = sum(values) / len(values)
    axes.plot(values, [place] * len(values), "o", color=family_colour(name), alpha=0.75, ms=9)
    axes.plot([mean] * 2, [place - MEAN_REACH, place + MEAN_REACH], color=INK, linewidth=2)
    axes.annotate(
        f"{mean:.{digits}f}",
        (mean, place - MEAN_REACH),
        ha="center",
        va="bottom",
        annotation_clip=False,
    )
    shown = ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{name}: {shown}, mean {mean:.{digits}f}."


def training_curves(curves: Mapping[str, pd.DataFrame]) -> Picture:
    """Loss against step, a line a run, in the colour of the family that its label begins with.

    Args:
        curves: by label of the run, rows of `curve.csv` (columns `step` and `loss`).
    """
    dashes = ("-", "--", ":", "-.")
    with drawing():
        figure = new_figure(WIDE_WIDTH, PANEL_HEIGHT)
        axes = figure.add_subplot()
        for number, (label, curve) in enumerate(curves.items()):
            axes.plot(
                curve["step"],
                curve["loss"],
                dashes[number % len(dashes)],
                color=family_colour(label),
                label=label,
            )
        axes.set(xlabel="step", ylabel="training loss (mean of the last steps)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        ends = words(
            f"{label} from {curve['loss'].iloc[0]:.2f} to {curve['loss'].iloc[-1]:.2f}"
            for label, curve in curves.items()
        )
        return to_picture(figure, f"Training loss against step: {ends}.")


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
