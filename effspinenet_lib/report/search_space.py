"""What the paper says of its search space (section 5.1.5), as `effspinenet search space` counts."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pandas as pd

from effspinenet_lib.report.provenance import ResultFiles
from effspinenet_lib.report.search import SP
from effspinenet_lib.report.style import words
from effspinenet_lib.report.tables import NOT_RUN, Table, Text
from effspinenet_lib.results.csvfile import read_rows, to_frame
from effspinenet_lib.results.schemas import SPACE

SPACE_FILE = "search/space.csv"
EXACT, APPROXIMATE = "exact", "approximate"
# What is stated, as a relation of the paper's other claims to a share in percent; more than half
# is our reading of most.
STATED = {"all": ("equals", 100.0), "most": ("more_than", 50.0)}
NOT_COUNTED = (
    "The statements on the whole space are **not run**: `effspinenet search space` counts a "
    "million samples in under a minute of one core."
)
SAME_DIMS = "same-as-exact"
RANGE = {"multi-adds": "Multi-Adds", "parameters": "parameters"}
ENDS = (1, 99)  # percentiles that the file holds


def read_statements(*results_dirs: str | os.PathLike[str]) -> pd.DataFrame:
    """The counts of the first results folder that has them; empty without.

    Returns:
        The columns of `search/space.csv`: a row a statement or percentile, and reading of
        Equation 2.

    Raises:
        DataError: the file is broken.
    """
    paths = [Path(folder) / SPACE_FILE for folder in results_dirs]
    there = next((path for path in paths if path.is_file()), None)
    return to_frame(read_rows(there, SPACE) if there else [], SPACE)


def statement_files(statements: pd.DataFrame) -> ResultFiles:
    """What `read_statements` read as a file to look at."""
    return ResultFiles(() if statements.empty else (SPACE_FILE,))


def statement_table(statements: pd.DataFrame) -> Table:
    """The paper's statements on the space: a row a statement and reading of Equation 2."""
    rows = [
        {
            "Equation 2": row.equation,
            "stated": row.stated,
            "computed": f"{row.computed:.1f} {row.unit}",
            "verdict": row.verdict,
            "samples": f"{row.samples:,}",
        }
        for row in _rows(_stated(statements))
    ]
    names = pd.Index([Text(one) for one in _stated(statements)["statement"]], dtype=object)
    columns = ["Equation 2", "stated", "computed", "verdict", "samples"]
    frame = pd.DataFrame(rows, index=names, columns=columns).rename_axis("statement")
    title = "What section 5.1.5 says of the space, on uniform samples; most: more than half"
    return Table(frame, title if rows else f"{title}: {NOT_RUN}")


def equations_sentence(statements: pd.DataFrame) -> str:
    """Compare what Equation 2 as it stands and the paper's approximation of it give."""
    if statements.empty:
        return NOT_COUNTED
    exact, near = _by_claim(statements, EXACT), _by_claim(statements, APPROXIMATE)
    stated = _stated(statements)["claim"].unique()
    differ = [claim for claim in stated if exact[claim].verdict != near[claim].verdict]
    shares = "; ".join(
        f"{exact[claim].statement}: {exact[claim].computed:.1f} against "
        f"{near[claim].computed:.1f} %"
        for claim in stated
    )
    spans = words(
        f"{_span(exact, key)} of {SP}'s {name} ({_span(near, key)})" for key, name in RANGE.items()
    )
    verdict = f"differ in {words(differ)}" if differ else "are the same"
    return (
        "Equation 2 as it stands against the paper's approximation, which leaves out the depthwise "
        f"convolution, on {exact[SAME_DIMS].samples:,} uniform samples: {shares}. The verdicts "
        f"{verdict}. {near[SAME_DIMS].computed:.1f} % of the samples get the same dimensions by "
        f"both; {ENDS[1] - ENDS[0]} % have {spans}."
    )


def _span(rows: dict[str, Any], key: str) -> str:
    low, high = (rows[f"{key}-percentile-{end}"].computed for end in ENDS)
    return f"{low:.0f} to {high:.0f} %"


def space_claims(statements: pd.DataFrame) -> pd.DataFrame:
    """The statements as rows of `paper.claims`: the verdict is Equation 2's as it stands.

    The note has what the paper's approximation of it gives.
    """
    near = _by_claim(statements, APPROXIMATE)
    rows = []
    for row in _rows(_stated(statements)):
        if row.equation != EXACT:
            continue
        relation, share = STATED[row.stated]
        other = near[row.claim]
        rows.append(
            {
                "claim": row.claim,
                "section": row.section,
                "statement": row.statement,
                "relation": relation,
                "stated_low": share,
                "stated_high": math.nan,
                "unit": row.unit,
                "note": f"stated of {row.stated} samples; counted on {row.samples:,} uniform ones. "
                f"With Equation 2 as the paper approximates it {other.computed:.4g} %, "
                f"{other.verdict}",
                "computed": row.computed,
                "verdict": row.verdict,
            }
        )
    columns = ["claim", "section", "statement", "relation", "stated_low", "stated_high", "unit"]
    return pd.DataFrame(rows, columns=[*columns, "note", "computed", "verdict"])


def _stated(statements: pd.DataFrame) -> pd.DataFrame:
    rows = statements[statements["stated"].isin(list(STATED))]
    return rows.sort_values("claim", kind="stable")


def _by_claim(statements: pd.DataFrame, equation: str) -> dict[str, Any]:
    return {row.claim: row for row in _rows(statements[statements["equation"] == equation])}


def _rows(frame: pd.DataFrame) -> list[Any]:
    return list(frame.itertuples(index=False))
