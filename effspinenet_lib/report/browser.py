"""All results as two tables for the results browser."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pandas as pd

from effspinenet_lib.results import FOLDERS, ResultsStore
from effspinenet_lib.results.paper import ITEMS, RESULTS_DIR, paper_values

SMOKE = "smoke"
DIGITS = 6  # shown of a number; the CSV has them all
MEASUREMENT_COLUMNS = ["item", "row", "metric", "value", "unit", "source", "model", "seed"]
MEASUREMENT_COLUMNS += ["data", "date", "commit", "note"]
RUN_COLUMNS = ["profile", "model", "seed", "state", "steps", "images", "wall_seconds"]
RUN_COLUMNS += ["images_per_second", "precision", "hardware", "torch", "date", "commit", "run"]


def measurements(results_dir: str | os.PathLike[str]) -> pd.DataFrame:
    """Every number: the paper's and the measured ones, without the accuracy of smoke runs.

    Args:
        results_dir: the results folder; where it holds nothing of a profile, the checkout's.
    """
    frames = [paper_values(item) for item in ITEMS]
    frames += [store.measurements() for store in _stores(results_dir)]
    rows = pd.concat(frames, ignore_index=True)
    rows = rows[rows["source"] != SMOKE]
    rows = rows.drop_duplicates(["item", "row", "model", "metric", "source", "seed"])
    return _plain(rows[MEASUREMENT_COLUMNS])


def runs(results_dir: str | os.PathLike[str]) -> pd.DataFrame:
    """Every training run on record, smoke runs included: they have no accuracy here."""
    rows = pd.concat([store.runs() for store in _stores(results_dir)], ignore_index=True)
    return _plain(rows.drop_duplicates("run")[RUN_COLUMNS])


def _stores(results_dir: str | os.PathLike[str]) -> list[ResultsStore]:
    folders = dict.fromkeys((Path(results_dir).resolve(), RESULTS_DIR.resolve()))
    return [ResultsStore(folder, profile) for folder in folders for profile in FOLDERS]


def _plain(rows: pd.DataFrame) -> pd.DataFrame:
    """Cells as text, whole numbers without a point, nothing for a missing value."""
    return rows.reset_index(drop=True).map(_text)


def _text(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.{DIGITS}g}"
    return "" if value is pd.NA else str(value)
