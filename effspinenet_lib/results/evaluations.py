"""The metrics of evaluated weights, one row each, in a CSV of the schema `evaluation`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effspinenet_lib.results.tables import upsert


def add_evaluation(
    path: Path,
    facts: Mapping[str, Any],
    metrics: Mapping[str, float],
    published: Mapping[str, float],
) -> None:
    """Add the metrics of one evaluation to a CSV, in place of those of the same evaluation."""
    records = [
        {**facts, "metric": name, "value": value, "published": published.get(name), "unit": "%"}
        for name, value in metrics.items()
    ]
    upsert(path, "evaluation", records, f"evaluation of {facts['weights']}")
