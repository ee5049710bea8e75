"""Every choice held against every printed cost of the scale-permuted models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from effspinenet_lib.choices.arithmetic import cost
from effspinenet_lib.choices.settings import CHOICES, CLOSEST, LIBRARY, SETS, Choice, Choices
from effspinenet_lib.choices.tally import ModelCost
from effspinenet_lib.files import ensure_folder, locked
from effspinenet_lib.models.specs import BASES, MODELS, SCALES, SEGMENTATION_SIZE
from effspinenet_lib.results.csvfile import (
    number_text,
    read_rows,
    to_frame,
    to_row,
    write_rows,
)
from effspinenet_lib.results.paper import RESULTS_DIR, paper_values
from effspinenet_lib.results.schemas import CHOICE, COST_UNITS

CHOICES_FILE = "cost/choices.csv"
TABLES = ("table-03", "table-06", "table-07", "table-08", "table-09", "table-10", "table-11")
NEAR_PERCENT = 3.0
# Table 9's rows with a resampling or a fusion of their own.
VARIANTS = {"model 1": (False, True), "model 2": (False, False)}
# The sets in which every choice is varied, by what the file calls them.
CENTRES = {"library": LIBRARY, "closest": CLOSEST}
# Choices that move many cells; they are varied in pairs.
PAIRED = (
    "stem_dim",
    "stem_blocks",
    "dims",
    "rounding",
    "downsampling",
    "same_shape_conv",
    "counted",
    "classes",
)


@dataclass(frozen=True)
class Cell:
    """A printed cost.

    Attributes:
        item: table.
        row: label of its row.
        model: name of the model.
        task: what it is built for.
        metric: `multi_adds` or `parameters`.
        printed: the number, in billions or millions.
        decimals: digits printed behind the point.
    """

    item: str
    row: str
    model: str
    task: str
    metric: str
    printed: float
    decimals: int

    @property
    def name(self) -> str:
        """Where it stands."""
        return f"{self.item} {self.row} {self.metric}"


@dataclass(frozen=True)
class Fit:
    """How a set of answers meets the printed cells.

    Attributes:
        deviations: in percent of what is printed, by cell.
        as_printed: cells that round to what is printed.
    """

    deviations: dict[Cell, float]
    as_printed: int

    @property
    def within(self) -> int:
        """Cells within 3 %."""
        return sum(abs(value) <= NEAR_PERCENT for value in self.deviations.values())

    @property
    def mean(self) -> float:
        """Mean absolute deviation in percent."""
        return sum(map(abs, self.deviations.values())) / len(self.deviations)

    @property
    def worst(self) -> Cell:
        """The cell that is missed most."""
        return max(self.deviations, key=lambda cell: abs(self.deviations[cell]))


@cache
def printed_cells() -> tuple[Cell, ...]:
    """The printed #FLOPs and #Params of every Eff-SpineNet and SP-EfficientNet model."""
    cells = []
    for item in TABLES:
        frame = paper_values(item)
        frame = frame[frame["metric"].isin(COST_UNITS)]
        # A column is printed with as many digits as its longest number has.
        decimals = {
            metric: max(map(_decimals, column.dropna()))
            for metric, column in frame.groupby("metric")["value"]
        }
        cells += [
            Cell(
                item, row["row"], row["model"], row["task"], metric, row["value"], decimals[metric]
            )
            for row in frame.to_dict("records")
            if row["model"] in MODELS and not math.isnan(row["value"])
            for metric in (row["metric"],)
        ]
    return tuple(cells)


def _decimals(value: float) -> int:
    return len(number_text(value).partition(".")[2])


def fit(choices: Choices) -> Fit:
    """Hold a set of answers against every printed cell."""
    known: dict[tuple[str, str, str], ModelCost] = {}
    deviations, as_printed = {}, 0
    for cell in printed_cells():
        key = (cell.model, cell.task, cell.row if cell.row in VARIANTS else "")
        if key not in known:
            known[key] = _cost(cell, choices)
        value = getattr(known[key], cell.metric) / COST_UNITS[cell.metric][0]
        deviations[cell] = 100 * (value / cell.printed - 1)
        as_printed += round(value, cell.decimals) == cell.printed
    return Fit(deviations, as_printed)


def _cost(cell: Cell, choices: Choices) -> ModelCost:
    model = MODELS[cell.model]
    scale = SCALES[model.scale]
    size = {
        "classification": scale.classification_size,
        "segmentation": SEGMENTATION_SIZE,
    }.get(cell.task, scale.input_size)
    variant = VARIANTS.get(cell.row, (True, True))
    return cost(BASES[model.base], scale, cell.task, choices, size, *variant)


def scan() -> list[dict[str, Any]]:
    """Compare the sets, every answer in two of them, and pairs of the influential ones.

    Returns:
        Records of the schema `choice`, a few hundred.
    """
    records = [
        _record(("set", name, "", ""), chosen=name == "library", choices=choices)
        for name, choices in SETS.items()
    ]
    for around, centre in CENTRES.items():
        for choice in CHOICES:
            records += [
                _record(
                    ("one", around, choice.name, answer_text(value)),
                    chosen=getattr(centre, choice.name) == value,
                    choices=changed,
                )
                for value, changed in _changed(centre, choice)
            ]
    by_name = {choice.name: choice for choice in CHOICES}
    for first, second in itertools.combinations(map(by_name.__getitem__, PAIRED), 2):
        records += list(_pairs(first, second))
    return records


def _changed(centre: Choices, choice: Choice) -> Iterator[tuple[Any, Choices]]:
    for value in choice.values:
        yield value, replace(centre, **{choice.name: value})


def _pairs(first: Choice, second: Choice) -> Iterator[dict[str, Any]]:
    """Both answers other than the library's."""
    for one, changed in _changed(LIBRARY, first):
        for other, both in _changed(changed, second):
            if getattr(LIBRARY, first.name) != one and getattr(LIBRARY, second.name) != other:
                name = f"{first.name} + {second.name}"
                value = f"{answer_text(one)} + {answer_text(other)}"
                yield _record(("pair", "library", name, value), chosen=False, choices=both)


def answer_text(value: Any) -> str:
    """An answer as the file has it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number_text(value) if isinstance(value, float) else str(value)


def _record(key: tuple[str, str, str, str], chosen: bool, choices: Choices) -> dict[str, Any]:
    found = fit(choices)
    return {
        **dict(zip(("scan", "around", "choice", "value"), key, strict=True)),
        "chosen": answer_text(chosen),
        "cells_within_3_percent": found.within,
        "cells_as_printed": found.as_printed,
        "cells": len(found.deviations),
        "mean_deviation_percent": round(found.mean, 2),
        "worst_cell": found.worst.name,
        "worst_deviation_percent": round(found.deviations[found.worst], 1),
    }


def write_scan(path: str | Path = RESULTS_DIR / CHOICES_FILE) -> Path:
    """Run the scan and write it, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    ensure_folder(path.parent)
    records: Iterable[dict[str, Any]] = scan()
    with locked(path):
        write_rows(path, CHOICE, [to_row(record, CHOICE, path.name) for record in records])
    return path


def read_scan(path: str | Path = RESULTS_DIR / CHOICES_FILE) -> pd.DataFrame:
    """The comparison as it was written, one row an answer.

    Raises:
        DataError: the file is missing or broken.
    """
    return to_frame(read_rows(Path(path), CHOICE), CHOICE)
