"""The metrics of evaluated weights, one row each, in a CSV of the schema `evaluation`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effspinenet_lib.files import locked
from effspinenet_lib.results.csvfile import key_of, read_rows, to_row, write_rows
from effspinenet_lib.results.keys import current_commit, today
from effspinenet_lib.results.schemas import EVALUATION


def add_evaluation(
    path: Path,
    facts: Mapping[str, Any],
    metrics: Mapping[str, float],
    published: Mapping[str, float],
) -> None:
    """Add the metrics of one evaluation to a CSV, in place of those of the same evaluation.

    Args:
        path: the file; it is made where there is none.
        facts: the columns that say what was evaluated on what.
        metrics: name to value in percent; NaN where it is not defined.
        published: what the authors of the weights publish, by the same names.

    Raises:
        DataError: the file on disk is broken; nothing is changed.
        UserError: the file cannot be written; nothing is changed.
    """
    stamp = {"unit": "%", "commit": current_commit(), "date": today()}
    new = [
        to_row(
            {**facts, "metric": name, "value": value, "published": published.get(name), **stamp},
            EVALUATION,
            f"evaluation of {facts['weights']}",
        )
        for name, value in metrics.items()
    ]
    with locked(path):
        old = read_rows(path, EVALUATION) if path.exists() else []
        rows = {key_of(row, EVALUATION): row for row in [*old, *new]}
        write_rows(path, EVALUATION, list(rows.values()))
