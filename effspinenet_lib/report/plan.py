"""What the runs that are missing would take, for the book."""

from __future__ import annotations

import pandas as pd

from effspinenet_lib.report.tables import Table

KINDS = {
    "own": "the authors' own models",
    "search": "the search's samples",
    "carried": "models whose numbers the paper carried over",
}


def plan_table(planned: pd.DataFrame) -> Table:
    """Sums of a plan by table and kind of run, and over all of it.

    Args:
        planned: columns `item`, `kind`, `runs`, `images`, `multi_adds`, `memory_image` (bytes) and
            `hours`, one row a run.
    """
    columns = ["runs", "images", "multi_adds", "hours"]
    sums = planned.groupby(["item", "kind"], sort=False)[columns].sum()
    largest = planned.groupby(["item", "kind"], sort=False)["memory_image"].max()
    total = pd.DataFrame([planned[columns].sum()], index=pd.MultiIndex.from_tuples([("all", "")]))
    frame = pd.concat([sums, total])
    shown = pd.DataFrame(
        {
            "runs of": [KINDS.get(kind, "") for _, kind in frame.index],
            "runs": [f"{value:,.0f}" for value in frame["runs"]],
            "images, millions": [f"{value / 1e6:,.0f}" for value in frame["images"]],
            "Multi-Adds, 1e18": [f"{value / 1e18:,.1f}" for value in frame["multi_adds"]],
            "GiB an image": [*(f"{value / 2**30:.2f}" for value in largest), ""],
            "hours": [f"{value:,.0f}" for value in frame["hours"]],
        },
        index=pd.Index([item for item, _ in frame.index], name="item"),
    )
    origins = ", ".join(sorted(set(planned["throughput"])))
    return Table(shown, f"What is not run at the paper's scale; throughput: {origins}")
