"""What was run: the records and training curves of an item's runs, without accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from effspinenet_lib.report.tables import NOT_RUN
from effspinenet_lib.results import CURVE_FILE, ResultsStore

NOT_KEPT = "not kept"  # run folders are not committed
COLUMNS = ("model", "seed", "steps", "images", "seconds", "first loss", "last loss", "finished")


def read_curves(store: ResultsStore, labels: Mapping[str, str]) -> dict[str, pd.DataFrame]:
    """Training curves by label, of those runs whose folder is still there.

    Args:
        store: the profile's results.
        labels: run key to a name for people.

    Returns:
        By label, the rows of `curve.csv` with at least the columns `step` and `loss`.
    """
    paths = {label: store.runs_folder / key / CURVE_FILE for key, label in labels.items()}
    return {label: pd.read_csv(path) for label, path in paths.items() if path.is_file()}


def just_ran(
    runs: pd.DataFrame, labels: Mapping[str, str], curves: Mapping[str, pd.DataFrame]
) -> pd.DataFrame:
    """What this machine ran: one row a run, with its loss but without any accuracy.

    Args:
        runs: rows of `runs.csv`.
        labels: run key to a name for people; a run without a record shows as not run.
        curves: by label, the training curve.
    """
    found: list[Any] = list(runs.itertuples(index=False))
    records = {record.run: record for record in found}
    rows: dict[str, dict[str, Any]] = {}
    for key, label in labels.items():
        record = records.get(key)
        if record is None:
            rows[label] = dict.fromkeys(COLUMNS, NOT_RUN) | {"finished": "no"}
            continue
        losses = curves[label]["loss"] if label in curves else pd.Series(dtype=float)
        rows[label] = {
            "model": record.model,
            "seed": record.seed,
            "steps": record.steps,
            "images": record.images,
            "seconds": f"{record.wall_seconds:.0f}",
            "first loss": f"{losses.iloc[0]:.2f}" if len(losses) else NOT_KEPT,
            "last loss": f"{losses.iloc[-1]:.2f}" if len(losses) else NOT_KEPT,
            "finished": "yes" if record.state == "finished" else "no",
        }
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(COLUMNS)).rename_axis("run")
