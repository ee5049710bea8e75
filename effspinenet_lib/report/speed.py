"""How fast this library is beside others, as the benchmarks recorded it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from effspinenet_lib.report.tables import NOT_RUN, Table, Text
from effspinenet_lib.results.csvfile import read_rows, to_frame
from effspinenet_lib.results.speed import SPEED

SPEED_FILE = Path("speed") / "speed.csv"
PROFILE, MEMORY = "profile", "memory"
RATIO = "ratio"
WHOLE_FROM = 1000  # milliseconds that are shown without fractions
PRODUCT = "matrix product"
FORMATS = ("float32", "bfloat16")


class _Row(NamedTuple):
    what: str
    settings: str
    ours: float
    peer: float
    value: float
    lowest: float
    highest: float
    goal: float


def read_speed(results_dir: str | os.PathLike[str]) -> pd.DataFrame:
    """Read the record.

    Raises:
        DataError: the file is missing or broken.
    """
    return to_frame(read_rows(Path(results_dir) / SPEED_FILE, SPEED), SPEED)


def ratio_table(speed: pd.DataFrame, *benchmarks: str) -> Table:
    """One row a comparison of some benchmarks: the ratio with its range, the goal, the times."""
    found = speed[(speed["unit"] == RATIO) & speed["benchmark"].isin(benchmarks)]
    rows = [
        {
            "what": Text(row.what),
            "ratio": f"{row.value:.2f}",
            "range": f"{row.lowest:.2f} to {row.highest:.2f}",
            "goal": "" if math.isnan(row.goal) else f"{row.goal:.1f}",
            "ours, ms": _milliseconds(row.ours),
            "peer, ms": _milliseconds(row.peer),
            "settings": Text(row.settings),
        }
        for row in map(_Row._make, found[list(_Row._fields)].itertuples(index=False))
    ]
    if not rows:
        return Table(pd.DataFrame(), f"Ratios: {NOT_RUN}")
    caption = "Medians of times taken in turn; above 1 this library is the faster one"
    return Table(pd.DataFrame(rows).set_index("what"), caption)


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= WHOLE_FROM else f"{value:.1f}"


def profile_table(speed: pd.DataFrame) -> Table:
    """Milliseconds of a training step by kind of operation, before and after."""
    found = speed[speed["benchmark"] == PROFILE]
    if found.empty:
        return Table(pd.DataFrame(), f"Milliseconds of a training step: {NOT_RUN}")
    states = found["settings"].str.rsplit(", ", n=1, expand=True)
    columns = _first_word(found) + ", " + states[1]
    frame = found.assign(column=columns).pivot_table(
        "value", "what", "column", sort=False, aggfunc="first"
    )
    shown = frame.map(lambda value: f"{value:.0f}").rename_axis(None, axis="columns")
    return Table(shown, "Milliseconds of a training step of Eff-SpineNet-D0")


def memory_table(speed: pd.DataFrame) -> Table:
    """MiB of a loading process, a column a number of images."""
    found = speed[speed["benchmark"] == MEMORY]
    if found.empty:
        return Table(pd.DataFrame(), f"Memory: {NOT_RUN}")
    frame = found.pivot_table("value", "what", "settings", sort=False, aggfunc="first")
    shown = frame.map(lambda value: f"{value:.0f}").rename_axis(None, axis="columns")
    return Table(shown.rename(index=Text), "Memory of loading, MiB")


def machine_table(speed: pd.DataFrame) -> Table:
    """What the machine can do, and what a training step reaches of it."""
    found = speed[(speed["unit"] != RATIO) & ~speed["benchmark"].isin((PROFILE, MEMORY))]
    if found.empty:
        return Table(pd.DataFrame(), f"Rates: {NOT_RUN}")
    rows = [
        {
            "what": Text(row.what),
            "figure": f"{row.value:.3g} {row.unit}",
            "settings": Text(row.settings),
        }
        for row in found.itertuples()
    ]
    return Table(pd.DataFrame(rows).set_index("what"), "Rates")


def format_sentence(speed: pd.DataFrame) -> str:
    """Which number format the machine multiplies faster, and what that means for training."""
    products = speed[speed["what"] == PRODUCT].assign(format=_first_word).set_index("format")
    if not set(FORMATS) <= set(products.index):
        return f"Rates of matrix products: {NOT_RUN}."
    rates = products["value"]
    single, half = (float(rates[name]) for name in FORMATS)
    found = f"This machine multiplies {half / single:.1f} times as fast in bfloat16 as in float32"
    if half > single:
        return f"{found}."
    return f"{found}, so bfloat16 saves memory here and no time in convolutions."


def _first_word(speed: pd.DataFrame) -> pd.Series[str]:
    return speed["settings"].str.split(",").str[0]


def goal_sentence(speed: pd.DataFrame) -> str:
    """How many goals were reached, and how near the others came."""
    found = speed[(speed["unit"] == RATIO) & speed["goal"].notna()]
    missed = found[found["value"] < found["goal"]]
    said = f"{len(found) - len(missed)} of the {len(found)} goals were reached."
    if missed.empty:
        return said
    named = "; ".join(
        f"{row.what} ({row.settings}): {row.value:.2f} of {row.goal:.1f}"
        for row in missed.itertuples()
    )
    return f"{said} Missed: {named}."


def measured_on(speed: pd.DataFrame) -> str:
    """The machine, its load, the version of torch and the code."""
    first = speed.iloc[0]
    load = f"{speed['load'].min():.0f} to {speed['load'].max():.0f}"
    return (
        f"Measured on {first['date']} on {first['hardware']} with torch {first['torch']}, commit "
        f"{first['commit']}, on one thread, while {load} programs wanted the processor."
    )
