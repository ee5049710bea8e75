"""How fast this library is beside others, as the benchmarks recorded it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from effspinenet_lib.report.tables import NOT_RUN, PERCENT, Table, Text
from effspinenet_lib.results.csvfile import read_rows, to_frame
from effspinenet_lib.results.speed import SPEED

SPEED_FILE = Path("speed") / "speed.csv"
PROFILE, MEMORY = "profile", "memory"
RATIO = "ratio"
WHOLE_FROM = 1000  # milliseconds that are shown without fractions
PRODUCT = "matrix product"
COPY_SHARE = "share of the copying rate that training Eff-SpineNet-D0 reaches"
CONVOLUTION_SHARE = "share of the time of Eff-SpineNet-D0's inference that convolutions take"
FORMATS = SINGLE, HALF = "float32", "bfloat16"
# As `benchmarks.profile` names parts of a step, and the state of it with all that was done.
CONVOLUTIONS = ("convolutions, forward", "convolutions, backward")
PASSES = ("norms", "activations", "sums and products")
AFTER = ", after"
OF_IT = "of it "  # begins the name of what other parts hold already


class _Row(NamedTuple):
    benchmark: str
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
    ratio = _half_over_single(speed)
    if math.isnan(ratio):
        return f"Rates of matrix products: {NOT_RUN}."
    found = f"This machine multiplies {ratio:.1f} times as fast in bfloat16 as in float32"
    if ratio > 1:
        return f"{found}."
    return f"{found}, so bfloat16 saves memory here and no time in convolutions."


def _half_over_single(speed: pd.DataFrame) -> float:
    """The rate of matrix products in bfloat16 over that in float32; nan without the two."""
    products = speed[speed["what"] == PRODUCT].assign(format=_first_word).set_index("format")
    rates = products["value"].reindex(FORMATS)
    return float(rates[HALF] / rates[SINGLE])


def _first_word(speed: pd.DataFrame) -> pd.Series[str]:
    return speed["settings"].str.split(",").str[0]


def goal_sentence(speed: pd.DataFrame) -> str:
    """How many goals were reached; ends so that `missed_goals` can follow."""
    goals, missed = int(speed["goal"].notna().sum()), len(_missed(speed))
    said = f"{goals - missed} of the {goals} goals were reached."
    return f"{said} These were not:" if missed else said


def missed_goals(speed: pd.DataFrame) -> str:
    """A Markdown list of the missed goals: how near each came and, as far as the record says, why.

    Empty if all were reached.
    """
    lines = []
    for row in map(_Row._make, _missed(speed)[list(_Row._fields)].itertuples(index=False)):
        said = [
            f"{row.what} ({row.settings}): **{row.value:.2f} of {row.goal:.1f}**. "
            f"The goal asks for {PERCENT * (1 - row.value / row.goal):.2g} % less time."
        ]
        said += [reason(speed, row) for reason in REASONS.get(row.benchmark, ())]
        lines.append("- " + " ".join(filter(None, said)))
    return "\n".join(lines)


def _missed(speed: pd.DataFrame) -> pd.DataFrame:
    return speed[speed["value"] < speed["goal"]]


def _own_format(row: _Row) -> str:
    """The number format that this library had: the first that the settings name."""
    return row.settings.split(",")[0].split(" against ")[0]


def _same_format(speed: pd.DataFrame, row: _Row) -> str:
    """That both libraries are faster in float32, which the machine multiplies faster."""
    ratio = _half_over_single(speed)
    if not (row.settings.startswith(f"{SINGLE} against {SINGLE}, the faster") and ratio <= 1):
        return ""
    return (
        f"Float32 is the faster format for both: this machine multiplies {ratio:.1f} times as fast "
        "in bfloat16."
    )


def _passes(speed: pd.DataFrame, row: _Row) -> str:
    """What part of a step is no convolution."""
    own = _own_format(row)
    share = _step_share(speed, own, PASSES)
    if math.isnan(share):
        return ""
    found = (
        f"{share:.0f} % of a step of Eff-SpineNet-D0 is {', '.join(PASSES)}: passes over memory, "
        "which no faster convolution shortens."
    )
    copied = _machine_figure(speed, COPY_SHARE, own)
    if math.isnan(copied):
        return found
    return (
        f"{found} All that a step's operations read and write is {copied:.0f} % of what copying "
        "alone would move in the time."
    )


def _machine_figure(speed: pd.DataFrame, what: str, number_format: str) -> float:
    """A figure of the machine in a number format; nan if it is not recorded."""
    found = speed[(speed["what"] == what) & speed["settings"].str.startswith(number_format)]
    return math.nan if found.empty else float(found["value"].iloc[0])


def _inference(speed: pd.DataFrame, row: _Row) -> str:
    """That hardly more than torch's convolutions is left."""
    share = _machine_figure(speed, CONVOLUTION_SHARE, _own_format(row))
    if math.isnan(share):
        return ""
    return (
        f"Convolutions take {share:.0f} % of this library's time, most norms and activations being "
        "part of them already. Both libraries leave them to torch."
    )


def _slow_half(speed: pd.DataFrame, row: _Row) -> str:
    """That bfloat16 makes convolutions a larger part of a step, and what float32 gives instead."""
    ratio = _half_over_single(speed)
    other = speed[
        (speed["what"] == row.what)
        & (speed["settings"] == row.settings.replace(HALF, SINGLE, 1))
        & (speed["value"] > row.value)
    ]
    if _own_format(row) != HALF or not ratio <= 1 or other.empty:
        return ""
    said = f"This machine multiplies {ratio:.1f} times as fast in bfloat16 as in float32."
    half, single = (_step_share(speed, name, CONVOLUTIONS) for name in (HALF, SINGLE))
    if half > single:
        said += (
            " So convolutions, which both mostly leave to the same code of torch, are "
            f"{half:.0f} % of a step of Eff-SpineNet-D0 in bfloat16 and {single:.0f} % in float32."
        )
    better = _Row._make(next(other[list(_Row._fields)].itertuples(index=False)))
    return (
        f"{said} In float32, which `precision: auto` takes on such a processor, a step takes "
        f"{_milliseconds(better.ours)} ms, not {_milliseconds(row.ours)}, and the ratio to the "
        f"same peer is {better.value:.2f}."
    )


# Benchmark -> what may explain a missed goal; each says nothing where the record does not.
REASONS = {
    "training": (_same_format, _passes),
    "inference": (_same_format, _inference),
    "proxy": (_slow_half, _passes),
}


def _step_share(speed: pd.DataFrame, number_format: str, parts: tuple[str, ...]) -> float:
    """Percent of a step of Eff-SpineNet-D0 that some parts take; nan where it is not recorded."""
    settings = speed["settings"]
    found = speed[
        (speed["benchmark"] == PROFILE)
        & settings.str.startswith(number_format)
        & settings.str.endswith(AFTER)
        & ~speed["what"].str.startswith(OF_IT)
    ].set_index("what")["value"]
    return float(PERCENT * found.reindex(parts).sum(skipna=False) / found.sum())


def measured_on(speed: pd.DataFrame) -> str:
    """The machine, its load, the version of torch and the code."""
    first = speed.iloc[0]
    load = f"{speed['load'].min():.0f} to {speed['load'].max():.0f}"
    commits = " and ".join(speed["commit"].unique())
    return (
        f"Measured on {first['date']} on {first['hardware']} with torch {first['torch']}, commit "
        f"{commits}, on one thread, while {load} programs wanted the processor."
    )
