"""What every model costs for every task, and the #FLOPs and #Params cells of the paper."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from effspinenet_lib.experiments.items import ITEMS
from effspinenet_lib.models.cost import Cost, measure_cost
from effspinenet_lib.models.specs import MODELS, TASKS
from effspinenet_lib.models.zoo import (
    create_model,
    default_image_size,
    list_models,
    model_entry,
)
from effspinenet_lib.results import current_commit, today
from effspinenet_lib.results.paper import ITEMS as TABLES
from effspinenet_lib.results.paper import paper_values
from effspinenet_lib.results.tables import COST_UNITS, read_table, write_table

COST = "cost"
COST_FOLDER, COST_FILE = "cost", "costs.csv"
# Digits behind the point that a table prints of its costs; MnasNet-A1's row of Table 7 has one.
PRINTED_DECIMALS = {"table-07": 2, "table-10": 2}
OTHER_DECIMALS = 1
FEWER_DECIMALS = ("mnasnet_a1_ssdlite",)
# Others' models that the authors built and counted; the remaining rows are quoted from papers.
COUNTED_BY_AUTHORS = (
    *("spinenet_49", "resnet50_fpn"),
    *("efficientnet_b0_fpn", "efficientnet_b1_fpn", "efficientnet_b2_fpn"),
)


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


def cost_table(progress: bool = True) -> list[dict[str, Any]]:
    """Count every model for every task that it can do, at the paper's image size and classes.

    Args:
        progress: show a bar where stderr is a terminal.

    Returns:
        Records of the schema `cost`: one for each cell that the paper prints, in the order of its
        tables, then those that it does not print.
    """
    stamp = {"commit": current_commit(), "date": today()}
    records = []
    for cell in tqdm(_cells(), "count", disable=None if progress else True):
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
            by_authors = name in MODELS or name in COUNTED_BY_AUTHORS
            compared = counted if by_authors else measured
            as_printed = "yes" if rounds_to(compared, printed, cell["item"], name) else "no"
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
                **stamp,
            }
        )
    return records


def rounds_to(counted: float, printed: float, item: str, model: str) -> bool:
    """Whether a count rounds to the digits that the table of the paper prints."""
    decimals = PRINTED_DECIMALS.get(item, OTHER_DECIMALS)
    if model in FEWER_DECIMALS:
        decimals = OTHER_DECIMALS
    return math.isclose(round(counted, decimals), printed)


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


def write_cost_table(results_dir: str | Path, progress: bool = True) -> Path:
    """Count every model and write `cost/costs.csv` under a results folder, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(results_dir) / COST_FOLDER / COST_FILE
    write_table(path, COST, cost_table(progress))
    return path


def read_cost_table(results_dir: str | Path) -> pd.DataFrame:
    """The rows of `cost/costs.csv`.

    Raises:
        DataError: the file is missing or invalid.
    """
    return read_table(Path(results_dir) / COST_FOLDER / COST_FILE, COST)
