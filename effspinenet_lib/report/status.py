"""What of the paper is rebuilt, as a table computed from the results files."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pandas as pd

from effspinenet_lib.report.tables import NOT_RUN, Link, Table, Text

MEASURED = "measured"
NOTHING = "–"  # the item has no number of this kind, or is not rebuilt yet
NOT_YET = "not yet"


def status_sentence(status: pd.DataFrame) -> str:
    """Say how many tables and figures are rebuilt.

    Args:
        status: from `experiments.item_status`.
    """
    rebuilt = status[status["notebook"] != ""]
    parts = []
    for kind in ("table", "figure"):
        done = int(rebuilt["item"].str.startswith(kind).sum())
        parts.append(f"{done} of {int(status['item'].str.startswith(kind).sum())} {kind}s")
    cells = int(status["paper_values"].sum())
    return (
        f"Rebuilt: {' and '.join(parts)}. Transcribed from the paper: {cells} cells of "
        f"{int((status['paper_values'] > 0).sum())} tables."
    )


def status_table(status: pd.DataFrame, trained: Collection[str], caption: str) -> Table:
    """Show the status of items, with links to their pages as seen from `book/`.

    Args:
        status: from `experiments.item_status`.
        trained: items whose rows are trained.
        caption: of the table.
    """
    rows = {item.item: _row(item, item.item in trained) for item in status.itertuples(index=False)}
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("item")
    return Table(frame, caption)


def _row(item: Any, is_trained: bool) -> dict[str, Any]:
    page = Link("page", f"../notebooks/{item.notebook}.html") if item.notebook else NOT_YET
    accuracy = NOT_RUN if is_trained else NOTHING
    return {
        "shows": Text(item.title),
        "rebuilt": page,
        "cells": item.paper_values or NOTHING,
        "cost": MEASURED if item.cost_rows else accuracy,
        "proxy": MEASURED if item.proxy_rows else accuracy,
        "paper's settings": MEASURED if item.paper_scale_rows else accuracy,
    }
