"""The paper's misprints and recomputed claims as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from effspinenet_lib.report.tables import NOT_PRINTED, Table, Text

_RELATIONS: Mapping[str, str] = {
    "equals": "{low:g}",
    "around": "around {low:g}",
    "more_than": "more than {low:g}",
    "less_than": "less than {low:g}",
    "between": "{low:g} to {high:g}",
}


def claims_sentence(claims: pd.DataFrame) -> str:
    """Count the verdicts."""
    counts = claims["verdict"].value_counts()
    listed = ", ".join(
        f"{counts.get(name, 0)} {name}" for name in ("holds", "rounding", "mismatch")
    )
    return f"{len(claims)} claims recomputed: {listed}."


def claims_table(claims: pd.DataFrame, caption: str) -> Table:
    """Show claims: what is stated, what was computed instead, and the verdict.

    Args:
        claims: from `paper.claims` or `search_space.space_claims`.
        caption: of the table.
    """
    rows = [_claim(claim) for claim in claims.itertuples(index=False)]
    index = pd.Index([Text(statement) for statement in claims["statement"]], dtype=object)
    return Table(pd.DataFrame(rows, index=index).rename_axis("statement"), caption)


def _claim(claim: Any) -> dict[str, Any]:
    stated = _RELATIONS[claim.relation].format(low=claim.stated_low, high=claim.stated_high)
    return {
        "section": claim.section,
        "stated": f"{stated} {claim.unit}",
        "computed": f"{claim.computed:.4g}",
        "verdict": claim.verdict,
        "note": Text(claim.note),
    }


def misprints_table(misprints: pd.DataFrame) -> Table:
    """Show the misprints; the same one in several rows of a table is shown once.

    Args:
        misprints: from `paper.misprints`.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    cells: list[Any] = list(misprints.itertuples(index=False))
    for cell in cells:
        change = (_number(cell.printed), _number(cell.corrected))
        groups.setdefault((cell.item, cell.metric, *change, cell.reason), []).append(cell.row)
    rows = [
        {
            "item": item,
            "rows": Text(", ".join(names)),
            "metric": metric,
            "printed": printed,
            "corrected": corrected,
            "reason": Text(reason),
        }
        for (item, metric, printed, corrected, reason), names in groups.items()
    ]
    frame = pd.DataFrame(rows).set_index("item")
    return Table(frame, f"Misprints known so far: {len(misprints)} cells")


def _number(value: Any) -> str:
    return NOT_PRINTED if pd.isna(value) else f"{value:g}"
