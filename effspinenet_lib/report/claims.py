"""What came of the paper's claims: the scorecard of all, and the claims of one table or figure.

A claim is decided in this order, by `scorecard`:

1. The paper's own printed numbers deny it: contradicted; inconclusive where the accuracies are of
   two tables, whose trainings may differ.
2. It is about what a table says of itself: exact, or inconclusive where only the rounding of the
   print could save it.
3. It is about cost: exact or contradicted by the authors' count on the rebuilt models;
   inconclusive where the count denies it and misses a printed cost that it is about.
4. It is about accuracy: by a measurement with a 95 % interval, at the paper's settings or, where
   there is none, in the proxy, which tests the direction of a difference alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import pandas as pd

from effspinenet_lib.report.statistics import (
    CONTRADICTED,
    HOLDS,
    INCONCLUSIVE,
    PAPER_SCALE,
    PROXY,
    SOURCE_NAMES,
    difference,
)
from effspinenet_lib.report.style import NOT_PRINTED, NOT_RUN, Table, Text
from effspinenet_lib.report.tables import AP_METRICS, read_costs, table_number
from effspinenet_lib.results import COST_UNITS, FOLDERS, merged_results
from effspinenet_lib.results.paper import NOT_CHECKABLE, claims

EXACT = "exact"
STATUSES = (EXACT, HOLDS, CONTRADICTED, INCONCLUSIVE, NOT_RUN)
PRINT, COST, ACCURACY = "print", "cost", "accuracy"
ACCURACY_METRICS = (*AP_METRICS, "AP_mask", "top1", "top5", "mIOU")
# Sections that begin so hold a table to its own numbers, which no measurement bears on.
OF_A_TABLE = ("Table ", "Tables ")
RELATIONS = {
    "equals": "{low:g}",
    "around": "around {low:g}",
    "more_than": "more than {low:g}",
    "less_than": "less than {low:g}",
    "between": "{low:g} to {high:g}",
}
# Verdict of the arithmetic -> what it makes of a claim that it decides.
DECIDED = {
    "holds": EXACT,
    "rounding": INCONCLUSIVE,
    "mismatch": CONTRADICTED,
    NOT_CHECKABLE: NOT_RUN,
}

Dir = str | os.PathLike[str]


def scorecard(*results_dirs: Dir) -> pd.DataFrame:
    """Decide every claim of the ledger from the CSV files.

    Args:
        results_dirs: where measurements are looked for, the first found counts.

    Returns:
        The columns of `results.paper.claims`, with `items` (the tables that it names, a tuple),
        `decided_by` (`print`, `cost` or `accuracy`), `status` (one of `STATUSES`) and `found`
        (what decided it, in words).
    """
    printed = claims()
    counted = claims(counted=counted_costs()).set_index("claim")
    measured = _measurements(results_dirs)
    costs = read_costs()
    missed = set(
        costs.loc[costs["as_printed"] == "no", ["item", "row", "metric"]].itertuples(
            index=False, name=None
        )
    )
    rows = []
    for claim in printed.to_dict("records"):
        cells = _cells(claim)
        metrics = {cell[2] for cell in cells}
        kind = PRINT
        if not claim["section"].startswith(OF_A_TABLE):
            kind = ACCURACY if metrics & {*ACCURACY_METRICS} else kind
            kind = COST if metrics & {*COST_UNITS} and kind == PRINT else kind
        unit = "" if claim["unit"] == "count" else f" {claim['unit']}"
        status = DECIDED[claim["verdict"]]
        found = "" if status == NOT_RUN else f"{claim['computed']:.4g}{unit} printed"
        items = tuple(dict.fromkeys(cell[0] for cell in cells))
        if kind == COST and status != CONTRADICTED:
            count = counted.loc[claim["claim"]]
            status = DECIDED[count["verdict"]]
            found = f"{count['computed']:.4g}{unit} counted"
            if status == CONTRADICTED and missed.intersection(cells):
                status = INCONCLUSIVE
        elif kind == ACCURACY and status != CONTRADICTED:
            status, found = _by_measurement(claim, cells, measured)
        elif kind == ACCURACY and len(items) > 1:
            status = INCONCLUSIVE
        rows.append({**claim, "items": items, "decided_by": kind, "status": status, "found": found})
    return pd.DataFrame(rows)


class Score:
    """How many claims of a scorecard have which status; shows itself as large numbers."""

    def __init__(self, card: pd.DataFrame) -> None:
        self.numbers = {status: int((card["status"] == status).sum()) for status in STATUSES}

    def _repr_html_(self) -> str:
        cells = {"claims": sum(self.numbers.values()), **self.numbers}
        boxes = "".join(f"<div><b>{number}</b>{name}</div>" for name, number in cells.items())
        return f'<div class="esn-score">{boxes}</div>'

    def __repr__(self) -> str:
        return ", ".join(f"{number} {name}" for name, number in self.numbers.items())


def counted_costs() -> Mapping[Any, float]:
    """The authors' count of every printed cost, by (item, row, metric)."""
    return read_costs().set_index(["item", "row", "metric"])["authors_count"].to_dict()


def _measurements(results_dirs: tuple[Dir, ...]) -> dict[str, pd.DataFrame]:
    """Measured rows by source, of the first folder that has the row and seed."""
    return {
        source: merged_results(results_dirs, [profile])
        .query("source == @source")
        .dropna(subset="value")
        for profile, source in FOLDERS.items()
        if source in SOURCE_NAMES
    }


def _by_measurement(
    claim: Mapping[Any, Any],
    cells: list[tuple[str, str, str]],
    measured: Mapping[str, pd.DataFrame],
) -> tuple[str, str]:
    sign = _claimed_sign(claim)
    if not sign or not _within_a_table(cells):
        return NOT_RUN, "" if sign else "needs the paper's settings"
    for source in (PAPER_SCALE, PROXY):
        rows = measured[source]
        first, second = (
            rows.loc[
                (rows["item"] == item) & (rows["row"] == row) & (rows["metric"] == metric), "value"
            ]
            for item, row, metric in cells
        )
        if first.empty or second.empty:
            continue
        found = difference(first, second)
        seeds = " and ".join(map(str, dict.fromkeys(found.seeds))) + " seeds"
        said = f"{found.mean:+.1f}, {found.interval()} ({SOURCE_NAMES[source]}, {seeds})"
        return found.verdict(sign), said
    return NOT_RUN, ""


def _cells(claim: Mapping[Any, Any]) -> list[tuple[str, str, str]]:
    """The cells that a claim is about: item, row, metric."""
    texts = filter(None, claim["cells"].split(";"))
    return [(item, row, metric) for item, row, metric in (text.split("|") for text in texts)]


def _within_a_table(cells: list[tuple[str, str, str]]) -> bool:
    return len(cells) == 2 and cells[0][0] == cells[1][0]


def comparisons() -> dict[str, tuple[tuple[str, str], tuple[str, str]]]:
    """Claim -> the two rows of a table, (item, row), of which it says that one is more accurate.

    A profile that trains both rows can decide it.
    """
    found = {}
    for claim in claims().to_dict("records"):
        cells = _cells(claim)
        accuracy = all(cell[2] in ACCURACY_METRICS for cell in cells)
        of_a_table = claim["section"].startswith(OF_A_TABLE)
        if not of_a_table and _within_a_table(cells) and accuracy and _claimed_sign(claim):
            found[claim["claim"]] = (cells[0][:2], cells[1][:2])
    return found


def _claimed_sign(claim: Mapping[Any, Any]) -> int:
    """1 or -1 where a claim says which way a difference points; 0 where it sets a margin."""
    low, relation = claim["stated_low"], claim["relation"]
    if claim["operation"] != "difference":
        return 0
    if relation in ("less_than", "more_than"):
        way = 1 if relation == "more_than" else -1
        return way if low == 0 else 0
    return int(low > 0) - int(low < 0)


def stated(claim: Any) -> str:
    """What a claim states, such as "more than 0 %"."""
    text = RELATIONS[claim.relation].format(low=claim.stated_low, high=claim.stated_high)
    return text if claim.unit == "count" else f"{text} {claim.unit}"


def table(card: pd.DataFrame, caption: str) -> Table:
    """Claims with what they state, what was found and the verdict.

    Args:
        card: rows of `scorecard`.
        caption: of the table.
    """
    rows = list(card.itertuples(index=False))
    frame = pd.DataFrame(
        {
            "verdict": [claim.status for claim in rows],
            "stated": [stated(claim) for claim in rows],
            "found": [Text(claim.found) for claim in rows],
            "note": [Text(claim.note) for claim in rows],
        },
        index=pd.Index(
            [Text(f"{claim.statement} ({claim.section})") for claim in rows],
            name="claim (section)",
            dtype=object,
        ),
    )
    return Table(frame, caption if rows else f"{caption}: none")


def claims_of(item: str, *results_dirs: Dir, section: str = "") -> Table:
    """The claims on a table of the paper, decided.

    Args:
        item: such as `table-08`.
        results_dirs: as `scorecard`.
        section: only claims whose section names this, such as "Figure 1".
    """
    card = scorecard(*results_dirs)
    own = card[[item in items for items in card["items"]]]
    own = own[own["section"].str.contains(section)]
    return table(own, f"Claims on {item.replace('-0', ' ').replace('-', ' ')}: {len(own)}")


def open_questions(card: pd.DataFrame, plan: pd.DataFrame) -> Table:
    """Claims on accuracy that are open and that the proxy could decide, and at which price.

    Hours are of one core and for the two rows of a claim: of the planned runs that are left, and of
    as many seeds as would see a difference of the size that the paper prints in four of five
    repetitions (the seeds grow with the square of one over the difference).

    Args:
        card: from `scorecard`.
        plan: from `tables.read_plan`.
    """
    rows = {}
    claim: Any
    for claim in card[card["status"].isin([NOT_RUN, INCONCLUSIVE])].itertuples(index=False):
        own = plan[[claim.claim in names.split() for names in plan["claims"]]]
        if own.empty:
            continue
        sees, printed = own["smallest_difference"].max(), abs(claim.computed)
        cells = {
            "table": table_number(claim.items[0]),
            "verdict": claim.status,
            "printed": f"{printed:.1f}",
            "proxy sees from": NOT_PRINTED,
            "hours left": f"{(own['minutes'] * own['left']).sum() / 60:.1f}",
            "seeds to see the printed": NOT_PRINTED,
            "hours of these": NOT_PRINTED,
        }
        if pd.notna(sees):
            seeds = math.ceil(own["seeds"].min() * (sees / printed) ** 2)
            cells["proxy sees from"] = f"{sees:.1f}"
            cells["seeds to see the printed"] = f"{seeds:,}"
            cells["hours of these"] = f"{seeds * own['minutes'].sum() / 60:,.0f}"
        rows[Text(f"{claim.statement} ({claim.section})")] = cells
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("claim (section)")
    return Table(frame, f"{len(rows)} open claims that the proxy could decide; differences in AP")
