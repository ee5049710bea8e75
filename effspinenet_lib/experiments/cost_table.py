"""What every model costs for every task, and the #FLOPs and #Params cells of the paper."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from tqdm.auto import tqdm

from effspinenet_lib.experiments.items import ITEMS
from effspinenet_lib.models.cost import Cost, measure_cost
from effspinenet_lib.models.specs import COUNTED_BY_AUTHORS, TASKS
from effspinenet_lib.models.zoo import (
    create_model,
    default_image_size,
    list_models,
    model_entry,
)
from effspinenet_lib.results.paper import ITEMS as TABLES
from effspinenet_lib.results.paper import paper_values, printed_table
from effspinenet_lib.results.tables import COST_UNITS


@cache
def model_cost(
    model: str,
    task: str,
    image_size: int,
    options: tuple[tuple[str, Any], ...] = (),
    num_classes: int | None = None,
) -> Cost:
    """The cost of a model, built without memory for its weights.

    Args:
        model: a name of the zoo.
        task: of the model.
        image_size: side in pixels.
        options: of `create_model`, as pairs.
        num_classes: default as many as the paper's data has.
    """
    with torch.device("meta"):
        built = create_model(model, task, num_classes, **dict(options))
    return measure_cost(built, image_size)


def cost_table() -> list[dict[str, Any]]:
    """Count every model for every task that it can do, at the paper's image size and classes.

    Returns:
        Records of the schema `cost`: one for each cell that the paper prints, in the order of its
        tables, then those that it does not print.
    """
    records = []
    for cell in tqdm(_cells(), "count", disable=None):
        options = row_options(cell["item"], cell["row"])
        name, task, printed = cell["model"], cell["task"], cell["value"]
        size = default_image_size(name, task)
        cost = model_cost(name, task, size, tuple(options.items()))
        scale, unit = COST_UNITS[cell["metric"]]
        measured = getattr(cost, cell["metric"]) / scale
        counted = measured
        if cell["metric"] == "multi_adds":
            counted = cost.authors_count / scale
        as_printed = ""
        if not math.isnan(printed):
            compared = counted if name in COUNTED_BY_AUTHORS else measured
            as_printed = "yes" if rounds_to(compared, cell) else "no"
        records.append(
            {
                **{column: cell[column] for column in ("item", "row", "model", "task", "metric")},
                "options": ", ".join(f"{option}={value}" for option, value in options.items()),
                "image_size": size,
                "num_classes": TASKS[task],
                "measured": round(measured, 6),
                "authors_count": round(counted, 6),
                "printed": printed,
                "unit": unit,
                "difference_percent": round(100 * (measured / printed - 1), 2),
                "authors_difference_percent": round(100 * (counted / printed - 1), 2),
                "as_printed": as_printed,
                "note": model_entry(name).note,
            }
        )
    return records


def rounds_to(counted: float, cell: Mapping[str, Any]) -> bool:
    """Whether a count rounds to the digits that the paper prints in one of `printed_cells`."""
    printed = str(printed_table(cell["item"]).at[cell["row"], cell["metric"]])
    return math.isclose(round(counted, len(printed.partition(".")[2])), float(printed))


def printed_cells() -> list[dict[str, Any]]:
    """The #FLOPs and #Params cells of the paper's tables: item, row, model, task, metric, value."""
    return [
        {str(name): value for name, value in cell.items()}
        for item in TABLES
        for cell in paper_values(item).to_dict("records")
        if cell["metric"] in COST_UNITS and not math.isnan(cell["value"])
    ]


def _cells() -> list[dict[str, Any]]:
    """What is counted; `value` is the printed number, NaN where the paper prints none."""
    cells = printed_cells()
    printed = {(cell["model"], cell["task"], cell["metric"]) for cell in cells}
    others = [
        {"item": "", "row": "", "model": name, "task": task, "metric": metric, "value": math.nan}
        for name in list_models()
        for task in model_entry(name).image_sizes
        for metric in COST_UNITS
        if (name, task, metric) not in printed
    ]
    return cells + others


def row_options(item: str, label: str) -> dict[str, Any]:
    """The model options that a row of a table switches."""
    for row in ITEMS[item].rows if item else ():
        if row.label == label:
            return dict(row.options)
    return {}
