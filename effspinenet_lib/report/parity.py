"""How close the released models are to TensorFlow's."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from effspinenet_lib.report.tables import Table
from effspinenet_lib.results.csvfile import read_rows, to_frame
from effspinenet_lib.results.schemas import EVALUATION, PARITY

PARITY_FILE = Path("parity") / "parity.csv"
EVALUATIONS_FILE = Path("parity") / "evaluations.csv"
# Heading -> beginning of the quantities whose largest difference it shows.
GROUPS = {
    "levels": "level_",
    "class head": "class_",
    "box head": "box_",
    "detections, pixels": "detections_box",
    "detections, classes that differ": "detections_class",
    "classification loss": "loss_classification",
    "box loss": "loss_box",
    "input": "input",
}


def parity_table(results_dir: str | os.PathLike[str]) -> Table:
    """One row a model: the largest difference of each kind, and how many are within their limit.

    Raises:
        DataError: the file is missing or broken.
    """
    rows = to_frame(read_rows(Path(results_dir) / PARITY_FILE, PARITY), PARITY)
    table = {}
    for model, found in rows.groupby("model", sort=False):
        worst = {
            heading: found.loc[found["quantity"].str.startswith(start), "value"].max()
            for heading, start in GROUPS.items()
        }
        within = f"{(found['passed'] == 'true').sum()} of {len(found)}"
        table[model] = {"within limits": within, **{k: f"{v:.1e}" for k, v in worst.items()}}
    frame = pd.DataFrame.from_dict(table, orient="index").rename_axis("model")
    return Table(frame, "Largest differences from TensorFlow")


def evaluations_table(results_dir: str | os.PathLike[str]) -> Table:
    """What converted weights gave on COCO, beside what their authors publish; empty if not run.

    Raises:
        DataError: the file is broken.
    """
    path = Path(results_dir) / EVALUATIONS_FILE
    rows = to_frame(read_rows(path, EVALUATION) if path.exists() else [], EVALUATION)
    columns = ["model", "data", "images", "metric", "value", "published", "commit", "date"]
    title = "Converted weights on COCO" if len(rows) else "Converted weights on COCO: not run"
    return Table(rows[columns].set_index("model"), title)
