"""Tables of the paper's numbers beside the measured ones, and of what was just run."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from effspinenet_lib.report.style import FAMILY_COLOURS, family_of
from effspinenet_lib.results import ResultsStore
from effspinenet_lib.results.schemas import COST_UNITS

# Profiles whose accuracy may be shown as a result; that of a smoke run means nothing.
RESULT_PROFILES = ("proxy", "paper")
PAPER, COST, PROXY, PAPER_SCALE = "paper", "cost", "proxy", "paper_scale"

PAPER_HEADING = "paper"
COST_HEADING = "measured"
DEVIATION_HEADING = "deviation"
PROXY_HEADING = "proxy"
PAPER_SCALE_HEADING = "measured, paper's settings"
NOT_RUN = "not run"
NOT_PRINTED = "–"

COST_METRICS = ("multi_adds", "parameters")
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
}
PERCENT = 100.0


class Text(str):
    """A cell of running words: left-aligned, and broken into lines."""


@dataclass(frozen=True)
class Link:
    """A cell that leads elsewhere.

    Attributes:
        text: what is shown.
        target: relative or absolute address.
    """

    text: str
    target: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Table:
    """A table that shows itself in notebooks and in the book, scrolling sideways where narrow.

    Attributes:
        frame: the cells; the index gives the row names.
        caption: what the table shows.
    """

    frame: pd.DataFrame
    caption: str

    def _repr_html_(self) -> str:
        return to_html(self.frame, self.caption)

    def __repr__(self) -> str:
        return f"{self.caption}\n{self.frame.to_string()}"


def to_html(frame: pd.DataFrame, caption: str) -> str:
    """Write a table as HTML: every name and cell escaped, in a box that scrolls sideways.

    A row whose name begins with a model family carries the family's colour. A missing value is
    an empty cell.
    """
    head = "".join(_header_rows(frame.columns, str(frame.index.name or "")))
    body = "".join(
        f"<tr>{_row_heading(name)}{''.join(_cell(value) for value in row)}</tr>"
        for name, row in zip(frame.index, frame.itertuples(index=False), strict=True)
    )
    label = escape(caption)
    return (
        '<figure class="esn-table" style="margin:0"><div role="region" tabindex="0" '
        f'aria-label="{label}" style="overflow-x:auto"><table class="table">'
        f"<thead>{head}</thead><tbody>{body}</tbody></table></div>"
        f"<figcaption>{label}</figcaption></figure>"
    )


def _header_rows(columns: pd.Index[Any], corner: str) -> Iterable[str]:
    if not isinstance(columns, pd.MultiIndex):
        cells = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in columns)
        yield f'<tr><th scope="col">{escape(corner)}</th>{cells}</tr>'
        return
    groups = columns.get_level_values(0)
    spans = groups.value_counts(sort=False)
    cells = "".join(
        f'<th scope="colgroup" colspan="{span}">{escape(str(group))}</th>'
        for group, span in spans.items()
    )
    yield f'<tr><th scope="col" rowspan="2">{escape(corner)}</th>{cells}</tr>'
    cells = "".join(
        f'<th scope="col">{escape(str(name))}</th>' for name in columns.get_level_values(1)
    )
    yield f"<tr>{cells}</tr>"


def _row_heading(name: Any) -> str:
    if isinstance(name, Text):
        return f'<th scope="row" class="esn-text">{escape(name)}</th>'
    colour = FAMILY_COLOURS.get(family_of(str(name)))
    mark = f' style="border-left:4px solid {colour}"' if colour else ""
    return f'<th scope="row"{mark}>{escape(str(name))}</th>'


def _cell(value: Any) -> str:
    if isinstance(value, Link):
        return f'<td><a href="{escape(value.target)}">{escape(value.text)}</a></td>'
    if isinstance(value, Text):
        return f'<td class="esn-text">{escape(value)}</td>'
    text = "" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)
    kind = ' class="esn-absent"' if text in (NOT_RUN, NOT_PRINTED) else ""
    return f"<td{kind}>{escape(text)}</td>"


def measured(item: str, profile: str, *results_dirs: str | os.PathLike[str]) -> pd.DataFrame:
    """Measurements of an item that may be shown as results.

    Costs as the profile that runs measured them, accuracy from the profiles `proxy` and `paper`;
    where several results folders have a measurement, the first one's. Rows of smoke runs, and of
    runs that stopped before their last step, are left out.
    """
    profiles = dict.fromkeys((profile, *RESULT_PROFILES))
    stores = [ResultsStore(Path(results), name) for results in results_dirs for name in profiles]
    rows = pd.concat([store.results(item) for store in stores], ignore_index=True)
    rows = rows[rows["source"].isin((COST, PROXY, PAPER_SCALE))]
    return rows.drop_duplicates(["row", "metric", "source", "seed"]).reset_index(drop=True)


class HasCost(Protocol):
    """What a cost measurement gives."""

    @property
    def multi_adds(self) -> int:
        """Multiplications with their additions, for one image."""

    @property
    def parameters(self) -> int:
        """Trained numbers."""


def cost_rows(row: str, model: str, cost: HasCost) -> list[dict[str, Any]]:
    """A measured cost as measurements, in the units of the paper's columns."""
    return [
        {
            "row": row,
            "model": model,
            "task": "detection",
            "metric": metric,
            "value": getattr(cost, metric) / scale,
            "unit": unit,
            "source": COST,
        }
        for metric, (scale, unit) in COST_UNITS.items()
    ]


@dataclass(frozen=True)
class Spread:
    """Values of one cell over seeds.

    Attributes:
        mean: over the seeds.
        sd: standard deviation of the sample; NaN for a single seed.
        seeds: number of seeds.
    """

    mean: float
    sd: float
    seeds: int

    def __str__(self) -> str:
        spread = "" if math.isnan(self.sd) else f" ± {self.sd:.1f}"
        return f"{self.mean:.1f}{spread} ({self.seeds})"


def spreads(rows: pd.DataFrame) -> dict[tuple[str, str, str], Spread]:
    """Mean, standard deviation and number of seeds by (row, metric, source).

    Undefined values (NaN) are left out.
    """
    samples: dict[tuple[str, str, str], list[float]] = {}
    for row in _rows(rows.dropna(subset="value")):
        samples.setdefault((row.row, row.metric, row.source), []).append(float(row.value))
    return {
        key: Spread(
            statistics.fmean(values),
            statistics.stdev(values) if len(values) > 1 else math.nan,
            len(values),
        )
        for key, values in samples.items()
    }


def comparison(
    item: str,
    paper: pd.DataFrame,
    measurements: pd.DataFrame,
    metrics: Sequence[str] = (*COST_METRICS, *AP_METRICS),
) -> pd.DataFrame:
    """Put the paper's values beside the measured ones: a row a model, a group a metric.

    Costs are compared with the measured cost and the deviation from the print; other metrics
    with the proxy's mean, standard deviation and number of seeds, and with runs at the paper's
    own settings where there are any. A measured cell without a measurement says "not run"; a
    paper cell without a number says "–". No number crosses from one side to the other.

    Args:
        item: which rows to take.
        paper: rows of source `paper`.
        measurements: rows of the sources `cost`, `proxy` and `paper_scale`; others are ignored.
        metrics: in the order wanted; those that the paper does not print are left out.

    Returns:
        Text cells; index "model" in the paper's order; columns (metric and unit, origin).
    """
    paper = paper[(paper["item"] == item) & (paper["source"] == PAPER)]
    found = spreads(measurements[measurements["item"] == item])
    origins = [(PROXY, PROXY_HEADING)]
    if any(source == PAPER_SCALE for _, _, source in found):
        origins.append((PAPER_SCALE, PAPER_SCALE_HEADING))
    names = list(dict.fromkeys(paper["row"]))
    printed = {(cell.row, cell.metric): float(cell.value) for cell in _rows(paper)}
    units = {cell.metric: cell.unit for cell in _rows(paper)}
    columns: dict[tuple[str, str], list[str]] = {}
    for metric in (metric for metric in metrics if metric in units):
        heading = f"{METRIC_NAMES.get(metric, metric)} ({units[metric]})"
        values = [printed.get((name, metric), math.nan) for name in names]
        columns[heading, PAPER_HEADING] = [_printed(value) for value in values]
        if metric in COST_METRICS:
            costs = [found.get((name, metric, COST)) for name in names]
            columns[heading, COST_HEADING] = [_cost(cost) for cost in costs]
            pairs = zip(costs, values, strict=True)
            columns[heading, DEVIATION_HEADING] = [_deviation(cost, v) for cost, v in pairs]
            continue
        for source, origin in origins:
            columns[heading, origin] = [
                str(found.get((name, metric, source), NOT_RUN)) for name in names
            ]
    frame = pd.DataFrame(columns, index=pd.Index(names, name="model"))
    frame.columns = pd.MultiIndex.from_tuples(list(columns))
    return frame


def _rows(frame: pd.DataFrame) -> Iterator[Any]:
    return frame.itertuples(index=False)


def _printed(value: float) -> str:
    if math.isnan(value):
        return NOT_PRINTED
    return f"{value:.1f}" if value.is_integer() else f"{value:g}"


def _cost(cost: Spread | None) -> str:
    if cost is None:
        return NOT_RUN
    return f"{cost.mean:.2f}" if cost.mean >= 1 else f"{cost.mean:.3f}"


def _deviation(cost: Spread | None, printed: float) -> str:
    if cost is None or math.isnan(printed):
        return NOT_PRINTED
    percent = round(PERCENT * (cost.mean / printed - 1), 1)
    return f"{percent + 0.0:+.1f} %"  # adding zero turns -0.0 into 0.0
