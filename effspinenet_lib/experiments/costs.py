"""Every #FLOPs and #Params cell of the paper beside what the built model costs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from effspinenet_lib.cost import Cost, measure_cost
from effspinenet_lib.experiments.cost_notes import cost_note, rests_on
from effspinenet_lib.experiments.items import ITEMS
from effspinenet_lib.files import ensure_folder, locked
from effspinenet_lib.paper import ITEMS as TABLES
from effspinenet_lib.paper import paper_values
from effspinenet_lib.results import current_commit, today
from effspinenet_lib.results.csvfile import read_rows, to_frame, to_row, write_rows
from effspinenet_lib.results.schemas import COST
from effspinenet_lib.zoo import TASKS, create_model, default_image_size

COST_FOLDER, COST_FILE = "cost", "costs.csv"
UNITS = {"multi_adds": 1e9, "parameters": 1e6}


def cost_table(progress: bool = True) -> list[dict[str, Any]]:
    """Build every model whose cost the paper prints and count it: one row a printed cell.

    Models are built at the paper's image size and with the classes of the paper's benchmark.

    Args:
        progress: show a bar where stderr is a terminal.

    Returns:
        Records of the schema `cost`, in the order of the paper's tables.
    """
    cells = [cell for item in TABLES for cell in _printed_cells(item)]
    known: dict[tuple[Any, ...], Cost] = {}
    stamp = {"commit": current_commit(), "date": today()}
    records = []
    for cell in tqdm(cells, "count", disable=None if progress else True):
        options = _options(cell["item"], cell["row"])
        name, task = cell["model"], cell["task"]
        size = default_image_size(name, task)
        key = (name, task, size, tuple(options.items()))
        if key not in known:
            known[key] = measure_cost(create_model(name, task, **options), size)
        measured = getattr(known[key], cell["metric"]) / UNITS[cell["metric"]]
        records.append(
            {
                **{column: cell[column] for column in ("item", "row", "model", "task", "metric")},
                "options": ", ".join(f"{option}={value}" for option, value in options.items()),
                "image_size": size,
                "num_classes": TASKS[task],
                "measured": round(measured, 6),
                "printed": cell["value"],
                "unit": cell["unit"],
                "difference_percent": round(100 * (measured / cell["value"] - 1), 2),
                "rests_on": rests_on(name, task),
                "note": cost_note(name),
                **stamp,
            }
        )
    return records


def _printed_cells(item: str) -> Iterable[dict[str, Any]]:
    for cell in paper_values(item).to_dict("records"):
        if cell["metric"] in UNITS and not math.isnan(cell["value"]):
            yield {str(name): value for name, value in cell.items()}


def _options(item: str, label: str) -> dict[str, Any]:
    """The model options that a row of a table switches."""
    for row in ITEMS[item].rows:
        if row.label == label:
            return dict(row.options)
    return {}


def write_cost_table(results_dir: str | Path, progress: bool = True) -> Path:
    """Count every model and write `cost/costs.csv` under a results folder, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    records = cost_table(progress)
    path = ensure_folder(Path(results_dir) / COST_FOLDER) / COST_FILE
    with locked(path):
        write_rows(path, COST, [to_row(record, COST, "cost") for record in records])
    return path


def read_cost_table(results_dir: str | Path) -> pd.DataFrame:
    """The rows of `cost/costs.csv`.

    Raises:
        DataError: the file is missing or broken.
    """
    return to_frame(read_rows(Path(results_dir) / COST_FOLDER / COST_FILE, COST), COST)
