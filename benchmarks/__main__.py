"""Measure this library's speed: `python -m benchmarks`; needs the extra `bench`.

Ratios are medians of times taken in turn, on one thread; above 1 this library is the faster one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import evaluation, loading, machine, memory, models, profile, scaling
from benchmarks.record import Figure, to_rows
from effspinenet_lib.cli.console import print_table
from effspinenet_lib.results.tables import Row, write_table
from effspinenet_lib.training.device import disable_malloc_trim

Benchmark = Callable[[int, bool], Iterator[Figure]]
BENCHMARKS: dict[str, Benchmark] = {
    "training": models.training,
    "inference": models.inference,
    "proxy": models.proxy,
    "evaluation": evaluation.evaluation,
    "loading": loading.loading,
    "scaling": scaling.scaling,
    "memory": memory.memory,
    "machine": machine.machine,
    "profile": profile.profiles,
}
ROUNDS, QUICK_ROUNDS = 7, 2


def main() -> None:
    """Run the benchmarks that were asked for; the record is written after each."""
    arguments = _parse()
    torch.set_num_threads(1)
    disable_malloc_trim()
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    rows: list[Row] = []
    for name in arguments.benchmarks or BENCHMARKS:
        start = time.perf_counter()
        found = to_rows(BENCHMARKS[name](rounds, arguments.quick))
        headings = ("what", "settings", "ours", "peer", "figure", "range", "goal")
        print_table(f"{name}, {time.perf_counter() - start:.0f} s", headings, map(_cells, found))
        rows += found
        if arguments.output:
            write_table(arguments.output, "speed", rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="\n".join(f"{name:12}{work.__doc__}" for name, work in BENCHMARKS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benchmarks", nargs="*", choices=[[], *BENCHMARKS], help="default: all")
    parser.add_argument("--quick", action="store_true", help="few rounds, and fewer images")
    parser.add_argument("--output", type=Path, help="CSV file to write")
    return parser.parse_args()


def _cells(row: Row) -> tuple[str, ...]:
    milliseconds = [f"{row[key]} ms" if row[key] else "" for key in ("ours", "peer")]
    spread = f"{row['lowest']} to {row['highest']}" if row["lowest"] else ""
    figure = f"{row['value']} {row['unit']}"
    return row["what"], row["settings"], *milliseconds, figure, spread, row["goal"]


if __name__ == "__main__":
    main()
