"""Which runs each table and figure of the paper needs, and running those that are missing.

The names below are loaded when they are first used: a process of the launcher imports this package
and needs no more of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effspinenet_lib.experiments.items import (
        ITEMS,
        PROFILES,
        default_results_dir,
        find_row,
        get_item,
        item_status,
    )
    from effspinenet_lib.experiments.reproduction import (
        PlannedRun,
        RunParameters,
        planned_runs,
        read_results,
        reproduce,
        resolve_parameters,
        train_row,
    )

__all__ = [
    "ITEMS",
    "PROFILES",
    "PlannedRun",
    "RunParameters",
    "default_results_dir",
    "find_row",
    "get_item",
    "item_status",
    "planned_runs",
    "read_results",
    "reproduce",
    "resolve_parameters",
    "train_row",
]
_IN_ITEMS = ("ITEMS", "PROFILES", "default_results_dir", "find_row", "get_item", "item_status")


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "items" if name in _IN_ITEMS else "reproduction"
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
