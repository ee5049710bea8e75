"""Which runs each table and figure of the paper needs, and running those that are missing."""

from effspinenet_lib.experiments.items import (
    ITEMS,
    PROFILES,
    Item,
    Profile,
    Row,
    find_row,
    get_item,
)
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
from effspinenet_lib.experiments.single import train_row

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
    "find_row",
    "get_item",
    "item_status",
    "planned_runs",
    "reproduce",
    "train_row",
]
