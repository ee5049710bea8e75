"""Tables of the paper's numbers beside the measured ones, of costs, of runs and of speed."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from effspinenet_lib.models.specs import COUNTED_BY_AUTHORS
from effspinenet_lib.report.statistics import (
    PAPER,
    PAPER_SCALE,
    PROXY,
    mean_std,
)
from effspinenet_lib.report.style import NOT_PRINTED, NOT_RUN, Link, Table, Text
from effspinenet_lib.results import FOLDERS, ItemResults, ResultsStore, merged_results, read_table
from effspinenet_lib.results.paper import (
    ITEMS,
    RESULTS_DIR,
    misprints,
    paper_values,
    printed_table,
)

SMOKE = "smoke"  # a profile whose accuracy means nothing
AP_METRICS = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")
# As the paper heads its columns.
METRIC_NAMES = {
    "multi_adds": "#FLOPs",
    "parameters": "#Params",
    "AP50": "AP₅₀",
    "AP75": "AP₇₅",
    "AP_S": "APₛ",
    "AP_M": "APₘ",
    "AP_L": "APₗ",
    "AP_mask": "mask AP",
    "AP50_mask": "mask AP₅₀",
    "AP75_mask": "mask AP₇₅",
    "AP_gain": "gain",
    "top1": "Top-1",
    "top5": "Top-5",
    "imagenet_pretrain": "ImageNet pre-train",
    "coco_pretrain": "COCO pre-train",
}
TICKS = {"1": "✓", "0": "–"}  # of columns that are printed as a tick or a dash
PAPER_SCALE_HEADING = "measured, paper's settings"
MEASURED, COUNTED = "measured", "counted"
SMALLEST_DIFFERENCE = "smallest difference"  # study of proxy/instrument.csv
NOT_KEPT = "not kept"  # run folders are not committed
BROWSER_DIGITS = 6  # the CSVs have all of them
MEASUREMENT_COLUMNS = ["item", "row", "metric", "value", "unit", "source", "model", "seed"]
MEASUREMENT_COLUMNS += ["data", "date", "commit", "note"]
RUN_COLUMNS = ["profile", "model", "seed", "state", "steps", "images", "wall_seconds"]
RUN_COLUMNS += ["images_per_second", "precision", "hardware", "torch", "date", "commit", "run"]

Dir = str | os.PathLike[str]
Cells = Mapping[tuple[str, str], float]


# The paper's tables and what was measured


def printed(item: str) -> Table:
    """A table as the paper prints it, in its own digits, misprints included.

    Args:
        item: such as `table-08`.
    """
    values = paper_values(item)
    units = dict(zip(values["metric"], values["unit"], strict=True))
    frame = printed_table(item).reindex(columns=list(units))
    frame = frame.reindex(list(dict.fromkeys(values["row"])))
    columns = {}
    for metric, unit in units.items():
        cells = frame[metric].fillna("")
        cells = cells.map(lambda cell: TICKS.get(cell, cell)) if unit == "flag" else cells
        name = METRIC_NAMES.get(metric, metric.replace("_", " "))
        sign = "" if unit in ("flag", "epochs") else f" ({unit})"
        columns[f"{name}{sign}"] = cells.replace("", NOT_PRINTED)
    number = table_number(item)
    return Table(pd.DataFrame(columns).rename_axis("model"), f"Table {number} as printed")


def misprinted(item: str) -> Table:
    """The misprints of a table: what is printed, what is meant, and why."""
    rows = misprints()
    rows = rows[rows["item"] == item]
    frame = pd.DataFrame(
        {
            "metric": rows["metric"].map(lambda name: METRIC_NAMES.get(name, name)),
            "printed": rows["printed"].map("{:g}".format, na_action="ignore"),
            "corrected": rows["corrected"].map("{:g}".format),
            "reason": rows["reason"].map(Text),
        }
    ).set_axis(rows["row"].rename("model"))
    return Table(frame, f"Misprints of Table {table_number(item)}: {len(frame) or 'none known'}")


def costs(item: str) -> Table:
    """What the models of a table cost: as printed and as counted on the built models."""
    rows = read_costs()
    return Table(
        cost_frame(rows[rows["item"] == item]),
        f"Costs of Table {table_number(item)} as printed and as counted, by the authors' rule and "
        "by multiply-adds",
    )


def read_costs() -> pd.DataFrame:
    """The rows of the checkout's `cost/costs.csv` with a printed number."""
    return read_table(RESULTS_DIR / "cost" / "costs.csv", "cost").dropna(subset="printed")


def smallest_difference(item: str, task: str, *results_dirs: Dir) -> Table:
    """The smallest difference between two rows that the proxy's design could have seen.

    Args:
        item: such as `table-08`.
        task: of its rows.
        results_dirs: results folders; `proxy/instrument.csv` of the first that has it is read.
    """
    caption = (
        f"Smallest difference that the proxy of Table {table_number(item)} could see, by the "
        "spread of one pair of this task: Eff-SpineNet-M0 with and without squeeze-and-excitation "
        "and swish"
    )
    found = [rows for rows in map(read_instrument, results_dirs) if len(rows)]
    rows = found[0] if found else read_instrument(RESULTS_DIR)
    rows = rows[(rows["study"] == SMALLEST_DIFFERENCE) & (rows["task"] == task)]
    if rows.empty:
        return Table(pd.DataFrame(), f"{caption}: not measured")
    columns = {"metric": "metric", "value": "difference", "low": "from", "high": "to"}
    frame = rows.set_index("setting")[list(columns)].rename(columns=columns)
    return Table(frame, caption)


def cost_and_accuracy(item: str, measured: pd.DataFrame) -> pd.DataFrame:
    """What the rows of a table cost and how accurate they are, one row a model.

    Args:
        item: such as `table-03`.
        measured: measurements of the item.

    Returns:
        Columns `accuracy`, the AP as printed, `multi_adds` and `parameters` as printed,
        `counted_multi_adds` (by the authors' rule) and `counted_parameters`, and `measured`, the
        mean AP at the paper's settings, NaN where it was not run.
    """
    values = paper_values(item).pivot_table("value", "row", "metric", sort=False)
    counted = read_costs().query("item == @item")
    counted = counted.pivot_table("authors_count", "row", "metric").add_prefix("counted_")
    own = measured.query("metric == 'AP' and source == @PAPER_SCALE")
    frame = values[["AP", "multi_adds", "parameters"]].rename(columns={"AP": "accuracy"})
    means = own.groupby("row")["value"].mean().rename("measured")
    return frame.join(counted).join(means)


def compare(
    results: ItemResults,
    metrics: Sequence[str] = AP_METRICS,
    caption: str = "The paper's numbers beside the measured ones",
) -> Table:
    """Put the paper's values beside the measured ones: a row a model, a group a metric.

    Measured are the proxy's mean, standard deviation and number of seeds, and the same at the
    paper's own settings where there is any. A measured cell without a measurement says "not run";
    a paper cell without a number says "–". No number crosses from one side to the other.

    Args:
        results: of an item; measurements of other sources are ignored.
        metrics: in the order wanted; those that the paper does not print are left out.
        caption: of the table.
    """
    paper = results.paper[results.paper["source"] == PAPER]
    cells = results.measured.dropna(subset="value").groupby(["row", "metric", "source"])["value"]
    found = {cell: mean_std(values) for cell, values in cells}
    own_rows = [row for row, metric, _ in found if metric in metrics]
    names = list(dict.fromkeys([*paper["row"], *own_rows]))  # a proxy may have rows of its own
    given = paper.pivot_table("value", "row", "metric", aggfunc="first").reindex(names)
    units = dict(zip(paper["metric"], paper["unit"], strict=True))
    origins = [(PROXY, PROXY)]
    if any(source == PAPER_SCALE for _, _, source in found):
        origins.append((PAPER_SCALE, PAPER_SCALE_HEADING))
    columns: dict[tuple[str, str], list[str]] = {}
    for metric in (metric for metric in metrics if metric in units):
        heading = f"{METRIC_NAMES.get(metric, metric)} ({units[metric]})"
        values = [float(given[metric][name]) if metric in given else math.nan for name in names]
        columns[heading, PAPER] = [_printed(value) for value in values]
        for source, origin in origins:
            columns[heading, origin] = [
                str(found.get((name, metric, source), NOT_RUN)) for name in names
            ]
    frame = pd.DataFrame(columns, index=pd.Index(names, name="model"))
    frame.columns = pd.MultiIndex.from_tuples(list(columns))
    return Table(frame, caption)


def _printed(value: float) -> str:
    if math.isnan(value):
        return NOT_PRINTED
    return f"{value:.1f}" if value.is_integer() else f"{value:g}"


def compare_cells(paper: pd.DataFrame, library: Cells) -> pd.DataFrame:
    """Set every cell of a printed table beside the library's value for it.

    Args:
        paper: rows of source `paper`.
        library: (row, metric) to value.

    Returns:
        Columns `row`, `metric`, `paper`, `library` (NaN where there is no number), `agrees` (a
        cell that the print leaves empty is no disagreement) and `text`: "24 / 24", or with an
        unequal sign where they differ.
    """
    printed = paper.set_index(["row", "metric"])["value"].astype(float)
    own = pd.Series(library, dtype=float).rename_axis(["row", "metric"])
    index = list(dict.fromkeys((*printed.index, *own.index)))
    cells = pd.DataFrame({"paper": printed.reindex(index), "library": own.reindex(index)})
    cells["agrees"] = cells["paper"].isna() | (cells["paper"] == cells["library"])
    cells["text"] = [
        f"{_number(c.paper)} {'/' if c.agrees else '≠'} {_number(c.library)}" for c in _rows(cells)
    ]
    return cells.reset_index()


def agreement(cells: pd.DataFrame) -> str:
    """Say how many of the printed cells of `compare_cells` the library's values match."""
    printed = cells[cells["paper"].notna()]
    return f"{int(printed['agrees'].sum())} of {len(printed)} printed cells agree."


def _number(value: float) -> str:
    return NOT_PRINTED if math.isnan(value) else f"{value:g}"


def _rows(frame: pd.DataFrame) -> list[Any]:
    return list(frame.itertuples(index=False))


def runs(results: ItemResults) -> Table:
    """What this machine ran: one row a run, with its loss but without any accuracy."""
    rows = {}
    for run in _rows(results.runs):
        curve = results.curves.get(run.label)
        ends = (
            [NOT_KEPT] * 2 if curve is None else [f"{curve['loss'].iloc[i]:.2f}" for i in (0, -1)]
        )
        rows[run.label] = {
            **{name: getattr(run, name) for name in ("model", "seed", "steps", "images")},
            "seconds": f"{run.wall_seconds:.0f}",
            "first loss": ends[0],
            "last loss": ends[1],
            "finished": "yes" if run.state == "finished" else "no",
        }
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")
    return Table(frame, "Runs" if rows else f"Runs: {NOT_RUN}")


# Costs


def table_number(item: str) -> int:
    """8 of `table-08`."""
    return int(item.removeprefix("table-"))


def cost_frame(costs: pd.DataFrame, index: str = "row") -> pd.DataFrame:
    """Printed and counted costs: a row a model, a group of columns a metric.

    The last column of a group says "yes" where the count rounds to the printed digits, else by how
    much it differs.

    Args:
        costs: rows of `cost/costs.csv` with a printed number, one for each metric and row.
        index: column that names the rows.
    """
    names = list(dict.fromkeys(costs[index]))
    columns: dict[tuple[str, str], Any] = {}
    for metric, own in costs.groupby("metric", sort=False):
        cells = own.set_index(index).reindex(names)
        heading = f"{METRIC_NAMES[str(metric)]} ({own['unit'].iloc[0]})"
        columns[heading, PAPER] = cells["printed"].map(_printed)
        if metric == "multi_adds":
            columns[heading, "authors' count"] = cells["authors_count"].map(_four)
        counted = "multiply-adds" if metric == "multi_adds" else "counted"
        columns[heading, counted] = cells["measured"].map(_four)
        off = cost_differences(cells).round(1) + 0.0  # no "-0.0"
        missed = off.map("{:+.1f} %".format)
        columns[heading, "as printed"] = cells["as_printed"].where(
            cells["as_printed"] != "no", missed
        )
    frame = pd.DataFrame(columns, index=pd.Index(names, name="model"))
    return frame.fillna("").replace(NOT_PRINTED, "")


def cost_differences(costs: pd.DataFrame) -> pd.Series[float]:
    """Difference of each count from the print in percent.

    What the authors counted is compared by their rule, the others by multiply-adds, as their papers
    count.
    """
    own = costs["model"].isin(COUNTED_BY_AUTHORS)
    return costs["authors_difference_percent"].where(own, costs["difference_percent"])


def _four(value: float) -> str:
    return "" if math.isnan(value) else f"{value:#.4g}"


# The book's own tables


def status(frame: pd.DataFrame, trained: Collection[str], caption: str) -> Table:
    """What of the paper is measured, with links to the pages as seen from `book/`.

    Args:
        frame: from `experiments.item_status`.
        trained: items whose rows are trained.
        caption: of the table.
    """
    rows = {}
    counted = set(read_costs()["item"])
    for item in _rows(frame):
        absent = NOT_RUN if item.item in trained else NOT_PRINTED
        rows[item.item] = {
            "shows": Text(item.title),
            "page": Link("page", f"../notebooks/{item.notebook}.html"),
            "cells": item.paper_values or NOT_PRINTED,
            "cost": COUNTED if item.item in counted else NOT_PRINTED,
            "proxy": MEASURED if item.proxy_rows else absent,
            "paper's settings": MEASURED if item.paper_scale_rows else absent,
        }
    return Table(pd.DataFrame.from_dict(rows, orient="index").rename_axis("item"), caption)


def every_measurement(results_dir: Dir) -> pd.DataFrame:
    """Every number: the paper's and the measured ones, without smoke and partial runs.

    Args:
        results_dir: the results folder; where it holds nothing of a profile, the checkout's.
    """
    measured = merged_results(_folders(results_dir), FOLDERS)
    rows = pd.concat([*map(paper_values, ITEMS), measured])
    rows = rows[rows["source"] != SMOKE]
    return rows[MEASUREMENT_COLUMNS].reset_index(drop=True).map(_plain)


def every_run(results_dir: Dir) -> pd.DataFrame:
    """Every training run on record, smoke runs included: they have no accuracy here."""
    folders = _folders(results_dir)
    rows = pd.concat([ResultsStore(folder, p).runs() for folder in folders for p in FOLDERS])
    return rows.drop_duplicates("run")[RUN_COLUMNS].reset_index(drop=True).map(_plain)


def _folders(results_dir: Dir) -> list[Path]:
    return list(dict.fromkeys((Path(results_dir).resolve(), RESULTS_DIR.resolve())))


def _plain(value: object) -> str:
    """A cell as text, whole numbers without a point, nothing for a missing value."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.{BROWSER_DIGITS}g}"
    return "" if value is pd.NA else str(value)


# Speed


def speed_ratios(speed: pd.DataFrame, *benchmarks: str) -> Table:
    """One row a comparison of some benchmarks: the ratio with its range, the goal, the times."""
    rows = [
        {
            "ratio": f"{row.value:.2f}",
            "range": f"{row.lowest:.2f} to {row.highest:.2f}",
            "goal": "" if math.isnan(row.goal) else f"{row.goal:.1f}",
            "reached": "" if math.isnan(row.goal) else "yes" if row.value >= row.goal else "no",
            "ours, ms": _milliseconds(row.ours),
            "peer, ms": _milliseconds(row.peer),
            "settings": Text(row.settings),
            "what": Text(row.what),
        }
        for row in _rows(speed[(speed["unit"] == "ratio") & speed["benchmark"].isin(benchmarks)])
    ]
    if not rows:
        return Table(pd.DataFrame(), f"Ratios: {NOT_RUN}")
    caption = "Medians of times taken in turn; above 1 this library is the faster one"
    return Table(pd.DataFrame(rows).set_index("what"), caption)


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


# The proxy as an instrument


def read_instrument(results_dir: Dir) -> pd.DataFrame:
    """The rows of `proxy/instrument.csv`; none where it was not measured."""
    return read_table(Path(results_dir) / "proxy" / "instrument.csv", "instrument")


def read_plan(results_dir: Dir) -> pd.DataFrame:
    """The rows of `proxy/plan.csv` in order, with the seeds that are `measured` and `left`.

    Args:
        results_dir: the results folder; what it lacks is the checkout's.
    """
    folders = _folders(results_dir)
    plans = [read_table(folder / "proxy" / "plan.csv", "plan") for folder in folders]
    plan = next(filter(len, plans), plans[-1]).sort_values("order")
    rows = merged_results(folders, ["proxy"])
    done = rows[rows["seed"].notna()].groupby(["item", "row"])["seed"].nunique()
    keys = pd.MultiIndex.from_frame(plan[["item", "row"]])
    plan["measured"] = done.reindex(keys, fill_value=0).to_numpy()
    return plan.assign(left=(plan["seeds"] - plan["measured"]).clip(lower=0))


def campaign(plan: pd.DataFrame) -> Table:
    """What `read_plan` gives: what is trained for which claims, how long, and what is measured."""
    cells = pd.DataFrame(
        {
            "row": plan["row"],
            "trained": [f"{row.model}, {row.image_size} px" for row in _rows(plan)],
            "seeds": [f"{row.measured} of {row.seeds}" for row in _rows(plan)],
            "minutes a run": plan["minutes"].map("{:.0f}".format),
            "sees from": [
                NOT_PRINTED
                if math.isnan(row.smallest_difference)
                else f"{row.smallest_difference:.1f} AP"
                for row in _rows(plan)
            ],
            "claims": [Text(row.claims.replace(" ", ", ")) for row in _rows(plan)],
        }
    )
    cells.index = pd.Index(plan["item"], name="item")
    hours = (plan["minutes"] * plan["seeds"]).sum() / 60
    left = (plan["minutes"] * plan["left"]).sum() / 60
    return Table(cells, f"The plan: {hours:.0f} hours of one core, {left:.0f} of them not run")


def data_sheet(instrument: pd.DataFrame) -> Table:
    """The rows that sum up runs, with their intervals."""
    rows = instrument[instrument["seed"].isna()]
    cells = {
        f"{row.setting} ({row.study})" if row.study != "sheet" else row.setting: {
            "value": f"{row.value:.4g}",
            "95 % interval": NOT_PRINTED
            if math.isnan(row.low)
            else f"{row.low:.4g} to {row.high:.4g}",
            "unit": row.unit,
        }
        for row in _rows(rows)
    }
    caption = "The data sheet" if cells else "The data sheet: not measured yet"
    return Table(pd.DataFrame.from_dict(cells, orient="index").rename_axis("quantity"), caption)


def instrument_runs(instrument: pd.DataFrame, caption: str, *studies: str) -> Table:
    """The runs of some studies: mean ± standard deviation (seeds) of each setting and metric.

    AP by size and AP50 are left to the CSV, so that the table fits the page.
    """
    rows = instrument[instrument["study"].isin(studies) & instrument["seed"].notna()]
    rows = rows[~rows["metric"].isin(["AP50", "AP_S", "AP_M", "AP_L"])]
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    names = ["study", "model", "task", "setting"]
    for (*key, metric), own in rows.groupby([*names, "metric"], sort=False):
        digits = 3 if metric == "evaluation_loss" else 1
        heading = METRIC_NAMES.get(str(metric), str(metric)).replace("_", " ")
        cells.setdefault(tuple(map(str, key)), {})[heading] = mean_std(own["value"]).text(digits)
    if not cells:
        return Table(pd.DataFrame(), f"{caption}: {NOT_RUN}")
    frame = pd.DataFrame.from_dict(cells, orient="index")
    frame.index = pd.MultiIndex.from_tuples(list(cells), names=names)
    same = [name for name in names[:-1] if frame.index.get_level_values(name).nunique() == 1]
    frame = frame.fillna(NOT_PRINTED).reset_index().drop(columns=same)
    return Table(frame.set_index("setting"), caption)
