"""Measured and transcribed numbers as tidy CSV files, and the runs they came from."""

from __future__ import annotations

from effspinenet_lib.results.store import (
    CURVE_FILE,
    FOLDERS,
    REFERENCE,
    ItemResults,
    ResultsStore,
    config_hash,
    merged_results,
    validate,
    write_datapackage,
)
from effspinenet_lib.results.tables import (
    COST_UNITS,
    current_commit,
    read_table,
    today,
    upsert,
    write_table,
)

__all__ = [
    "COST_UNITS",
    "CURVE_FILE",
    "FOLDERS",
    "REFERENCE",
    "ItemResults",
    "ResultsStore",
    "config_hash",
    "current_commit",
    "merged_results",
    "read_table",
    "today",
    "upsert",
    "validate",
    "write_datapackage",
    "write_table",
]
