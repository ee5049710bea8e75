"""Run every benchmark and print one table: `python -m benchmarks`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from benchmarks import evaluation, models


def main() -> None:
    """Time every pair; takes about two minutes on two cores."""
    table = Table(title="Median of paired runs; a ratio above 1 means that this library is faster")
    for heading in ("what", "this library", "peer", "ratio", "range"):
        table.add_column(heading)
    for make in (*models.PAIRS, *evaluation.PAIRS):
        pair = make()
        table.add_row(
            pair.name,
            f"{pair.ours * 1e3:.0f} ms",
            f"{pair.peer * 1e3:.0f} ms",
            f"{pair.ratio:.2f}",
            f"{pair.lowest:.2f} to {pair.highest:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
