"""Plots of how well each answer to an open question fits the printed costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from effspinenet_lib.choices import CHOICES, Choice
from effspinenet_lib.report.style import (
    FAMILY_COLOURS,
    INK,
    Gallery,
    Picture,
    drawing,
    new_figure,
    to_picture,
)
from effspinenet_lib.report.tables import Table, Text

WIDTH, ROW_HEIGHT, MARGIN = 4.4, 0.21, 0.75  # inches
TITLE_ROWS, TITLE_GAP = 1.45, 0.55  # a title with the gap above it, and that gap, in rows
CHOSEN_COLOUR, OTHER_COLOUR = FAMILY_COLOURS["Eff-SpineNet"], FAMILY_COLOURS["SP-EfficientNet"]
CHOSEN_MARK, OTHER_MARK = "D", "o"  # told apart by shape as well
MEAN_AT = 1.07  # of the axes' width


def choice_fits(rows: pd.DataFrame, around: str = "library") -> Gallery:
    """Cells within 3 % for every answer, one changed at a time; a picture a group of choices.

    A diamond is the answer of the set that is varied; the number on the right is the mean
    deviation.

    Args:
        rows: what `choices.read_scan` gives.
        around: the set that is varied, `library` or `closest`.
    """
    chosen = rows[(rows["scan"] == "one") & (rows["around"] == around)]
    groups = dict.fromkeys(choice.group for choice in CHOICES)
    return Gallery(
        tuple(
            _group(chosen, group, [choice for choice in CHOICES if choice.group == group])
            for group in groups
        )
    )


def _group(rows: pd.DataFrame, group: str, choices: Sequence[Choice]) -> Picture:
    answers = {choice: rows[rows["choice"] == choice.name].to_dict("records") for choice in choices}
    height = sum(TITLE_ROWS + len(found) for found in answers.values())
    cells = int(rows["cells"].max())
    sentences = []
    with drawing():
        figure = new_figure(WIDTH, MARGIN + ROW_HEIGHT * height)
        axes = figure.add_subplot()
        place, places, labels = 0.0, [], []
        for choice, found in answers.items():
            place += TITLE_ROWS
            title_place = place - TITLE_ROWS + TITLE_GAP
            axes.text(0, title_place, choice.title, va="center", weight="bold")
            for answer in found:
                _dot(axes, place, answer)
                places.append(place)
                labels.append(answer["value"])
                place += 1
            sentences.append(_sentence(choice, found))
        axes.set_yticks(places, labels)
        axes.set(xlim=(0, cells), ylim=(place, 0), xlabel=f"cells within 3 % (of {cells})")
        beside = axes.get_yaxis_transform()
        axes.text(MEAN_AT, TITLE_GAP, "deviation", transform=beside, va="center")
        axes.set_title(group)
        axes.grid(visible=False, axis="y")
        return to_picture(figure, f"Answers and cells within 3 %, {group}. {' '.join(sentences)}")


def _dot(axes: Axes, place: float, answer: dict[Any, Any]) -> None:
    chosen = answer["chosen"] == "yes"
    count = answer["cells_within_3_percent"]
    axes.plot([0, count], [place, place], color=INK, alpha=0.35, linewidth=1)
    axes.plot(
        [count],
        [place],
        CHOSEN_MARK if chosen else OTHER_MARK,
        color=CHOSEN_COLOUR if chosen else OTHER_COLOUR,
        ms=7 if chosen else 6,
        clip_on=False,
    )
    axes.text(
        MEAN_AT,
        place,
        f"{answer['mean_deviation_percent']:.1f} %",
        transform=axes.get_yaxis_transform(),
        va="center",
    )


def _sentence(choice: Choice, answers: Sequence[dict[Any, Any]]) -> str:
    parts = (
        f"{answer['value']}{' (chosen)' if answer['chosen'] == 'yes' else ''} "
        f"{answer['cells_within_3_percent']}, {answer['mean_deviation_percent']:.1f} %"
        for answer in answers
    )
    return f"{choice.title.capitalize()}: {'; '.join(parts)}."


def sets_table(rows: pd.DataFrame) -> Table:
    """Whole sets of answers and the cells that they meet.

    Args:
        rows: what `choices.read_scan` gives.
    """
    sets = rows[rows["scan"] == "set"]
    frame = pd.DataFrame(
        {
            "within 3 %": [
                f"{n} of {of}"
                for n, of in zip(sets["cells_within_3_percent"], sets["cells"], strict=True)
            ],
            "as printed": list(sets["cells_as_printed"].astype(str)),
            "mean deviation": [f"{value:.2f} %" for value in sets["mean_deviation_percent"]],
            "missed most": [
                Text(f"{cell} ({value:+.1f} %)")
                for cell, value in zip(
                    sets["worst_cell"], sets["worst_deviation_percent"], strict=True
                )
            ],
        },
        index=pd.Index([Text(name) for name in sets["around"]], name="set of answers"),
    )
    return Table(frame, "Sets of answers, each with one change more than the one above")
