"""Which runs each table and figure of the paper needs, and running those that are missing."""

from effspinenet_lib.experiments.items import ITEMS, PROFILES, Item, Profile, Row, get_item
from effspinenet_lib.experiments.parameters import (
    Parameters,
    check_parameters,
    default_results_dir,
)
from effspinenet_lib.experiments.reproduction import (
    PlannedRun,
    item_status,
    planned_runs,
    reproduce,
)

__all__ = [
    "ITEMS",
    "PROFILES",
    "Item",
    "Parameters",
    "PlannedRun",
    "Profile",
    "Row",
    "check_parameters",
    "default_results_dir",
    "get_item",
    "item_status",
    "planned_runs",
    "reproduce",
]
