"""Measured and transcribed numbers as tidy CSV files, and the runs they came from."""

from __future__ import annotations

from effspinenet_lib.results.keys import current_commit, run_key, today
from effspinenet_lib.results.package import validate, write_datapackage
from effspinenet_lib.results.schemas import (
    MEASUREMENT_COLUMNS,
    REFERENCE,
    RUN_COLUMNS,
    RUN_STATES,
    SOURCES,
)
from effspinenet_lib.results.store import CURVE_FILE, FOLDERS, ResultsStore

__all__ = [
    "CURVE_FILE",
    "FOLDERS",
    "MEASUREMENT_COLUMNS",
    "REFERENCE",
    "RUN_COLUMNS",
    "RUN_STATES",
    "SOURCES",
    "ResultsStore",
    "current_commit",
    "run_key",
    "today",
    "validate",
    "write_datapackage",
]
