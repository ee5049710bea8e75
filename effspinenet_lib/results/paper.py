"""The paper's tables as printed, its misprints, and its numeric claims checked on the tables.

All of it is data under `results/paper/`; the arithmetic is done here, on the printed cells.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from fnmatch import fnmatchcase
from pathlib import Path

import pandas as pd

from effspinenet_lib.errors import DataError, UnknownName
from effspinenet_lib.results.tables import Row, read_rows, to_frame

RESULTS_DIR = Path(__file__).resolve().parents[2] / "results"  # of a checkout
ITEMS = tuple(f"table-{number:02d}" for number in range(1, 12))

Cell = tuple[str, str, str]  # item, row and metric
# A claim that no table bears on: its operation and its verdict.
STATED, NOT_CHECKABLE = "stated", "not checkable"

# Units whose printed numbers are rounded; a size, a count or a dimension is exact.
ROUNDED_UNITS = ("B", "M", "%")
# Our reading of "around" and "roughly": within a tenth of the number stated.
AROUND = Decimal("0.1")
# Of Equation 2: r is the authors' code's, k is Table 1's.
EXPANSION_RATIO, DEPTHWISE_AREA = 6, 9


def paper_values(item: str, results_dir: str | Path = RESULTS_DIR) -> pd.DataFrame:
    """Read a table of the paper as printed, misprints included.

    Args:
        item: "table-01" to "table-11".
        results_dir: the folder that holds `paper/`.

    Returns:
        The measurement columns, one row a cell, in the order of the print. A cell printed as
        "-" or "N/A" is NaN with a note.

    Raises:
        UnknownName: the paper has no such table.
        DataError: the file is missing or broken.
    """
    return to_frame(_cells(item, results_dir), "measurement")


def paper_values_corrected(item: str, results_dir: str | Path = RESULTS_DIR) -> pd.DataFrame:
    """Read a table of the paper with the known misprints corrected and lost entries added.

    Such a row says "corrected" in its note, with what was printed. Arguments, columns and errors
    as `paper_values`.
    """
    rows = list(_cells(item, results_dir))
    for misprint in _rows("misprints", "misprint", results_dir):
        if misprint["item"] != item:
            continue
        shown = misprint["printed"] or "nothing"
        change = {"value": misprint["corrected"], "note": f"corrected; printed {shown}"}
        same_row = [n for n, row in enumerate(rows) if row["row"] == misprint["row"]]
        if not same_row:
            raise DataError(f"misprints.csv: {item} has no row {misprint['row']!r}")
        hits = [n for n in same_row if rows[n]["metric"] == misprint["metric"]]
        for n in hits:
            rows[n] = rows[n] | change
        if not hits:
            named = {name: misprint[name] for name in ("metric", "unit")}
            rows.insert(same_row[-1] + 1, rows[same_row[-1]] | named | change)
    return to_frame(rows, "measurement")


def printed_table(item: str, results_dir: str | Path = RESULTS_DIR) -> pd.DataFrame:
    """A table of the paper in its own digits: a row a printed row, a column a metric, text cells.

    A cell that the print leaves empty is empty; a column that a row does not have is missing.
    Arguments and errors as `paper_values`.
    """
    cells = pd.DataFrame(_cells(item, results_dir))
    return cells.pivot_table("value", "row", "metric", aggfunc="first", sort=False)


def misprints(results_dir: str | Path = RESULTS_DIR) -> pd.DataFrame:
    """Read the known misprints of the tables, each with the reason for its correction."""
    return to_frame(_rows("misprints", "misprint", results_dir), "misprint")


def claims(
    results_dir: str | Path = RESULTS_DIR, counted: Mapping[Cell, float] | None = None
) -> pd.DataFrame:
    """Check the paper's numeric claims against the cells of its tables as printed.

    Args:
        results_dir: the folder that holds `paper/`.
        counted: numbers by (item, row, metric) that stand in for the printed ones.

    Returns:
        The claims with two more columns: `computed`, what the cells give, and `verdict`: "holds";
        "rounding" where only the rounding of the printed cells could make it hold; "mismatch";
        "not checkable" where no cell bears on it.

    Raises:
        DataError: a file is missing or broken, or a claim names no cell or no operation.
    """
    rows = _rows("claims", "claim", results_dir)
    tables = {item: _cells(item, results_dir) for item in ITEMS}
    if counted is not None:
        tables = {
            item: [
                row | {"value": str(counted.get((item, row["row"], row["metric"]), row["value"]))}
                for row in cells
            ]
            for item, cells in tables.items()
        }
    checked = [_check(row, tables) for row in rows]
    computed, verdicts = zip(*checked, strict=True) if checked else ((), ())
    return to_frame(rows, "claim").assign(computed=list(computed), verdict=list(verdicts))


def _rows(file: str, schema: str, results_dir: str | Path) -> list[Row]:
    path = Path(results_dir) / "paper" / f"{file}.csv"
    if not path.exists():
        raise DataError(f"{path}: no such file; the paper's tables come with the repository")
    return read_rows(path, schema)


def _cells(item: str, results_dir: str | Path) -> list[Row]:
    if item not in ITEMS:
        raise UnknownName("table of the paper", item, ITEMS)
    return _rows(item, "measurement", results_dir)


# The arithmetic of claims

Values = Sequence[Decimal]


def _needed(argument: Decimal | None) -> Decimal:
    if argument is None:
        raise ValueError("the operation needs an argument")
    return argument


def _above_line(cells: Values, _: Decimal | None) -> Decimal:
    """How far the point (a, b) is above the line from (c, d) to (e, f)."""
    x, y, x0, y0, x1, y1 = cells
    return y - y0 - (y1 - y0) * (x - x0) / (x1 - x0)


def _block_weights(cells: Values) -> Iterator[tuple[Decimal, Decimal, Decimal]]:
    """Level of each block and its weights by Equation 2, of two models that share the levels.

    Args:
        cells: levels of the blocks, then feature dimensions of the one, then of the other.
    """
    blocks = len(cells) // 3
    for level, *dims in zip(*(cells[i * blocks : (i + 1) * blocks] for i in range(3)), strict=True):
        before, after = (EXPANSION_RATIO * (2 * dim**2 + DEPTHWISE_AREA * dim) for dim in dims)
        yield level, before, after


def _blocks_percent(cells: Values, _: Decimal | None) -> Decimal:
    """Equation 2 of the second model's blocks over the first's; a position counts 1 / 4^level."""
    found = list(_block_weights(cells))
    before, after = (
        sum((row[model] / 4 ** row[0] for row in found), Decimal(0)) for model in (1, 2)
    )
    return 100 * after / before


def _blocks_change(cells: Values, levels: Decimal | None) -> Decimal:
    """Thousands of weights that the levels, each a digit, gain from the first to the second."""
    wanted = [Decimal(digit) for digit in str(_needed(levels))]
    rows = (row for row in _block_weights(cells) if row[0] in wanted)
    return sum((after - before for _, before, after in rows), Decimal(0)) / 1000


# Operation -> (number of cells, or None for any; the arithmetic on values and argument).
OPERATIONS: dict[str, tuple[int | None, Callable[[Values, Decimal | None], Decimal]]] = {
    "value": (1, lambda cells, _: cells[0]),
    "difference": (2, lambda cells, _: cells[0] - cells[1]),
    "percent_saved": (2, lambda cells, _: 100 * (1 - cells[0] / cells[1])),
    "ratio_percent": (2, lambda cells, _: 100 * cells[0] / cells[1]),
    "mean": (None, lambda cells, _: sum(cells, Decimal(0)) / len(cells)),
    "maximum": (None, lambda cells, _: max(cells)),
    "spread": (None, lambda cells, _: max(cells) - min(cells)),
    "count": (None, lambda cells, _: Decimal(len(cells))),
    "count_above": (None, lambda cells, _: Decimal(sum(cell > cells[0] for cell in cells[1:]))),
    "feature_side": (1, lambda cells, n: Decimal(math.ceil(cells[0] / 2 ** _needed(n)))),
    "remainder": (1, lambda cells, n: cells[0] % _needed(n)),
    "above_line": (6, _above_line),
    "blocks_percent": (None, _blocks_percent),
    "blocks_change": (None, _blocks_change),
}


def _check(claim: Row, tables: dict[str, list[Row]]) -> tuple[float, str]:
    """Compute what the cells of a claim give, and how it compares with what is stated."""
    where = f"claims.csv, claim {claim['claim']}"
    if claim["operation"] == STATED:
        return math.nan, NOT_CHECKABLE
    if claim["operation"] not in OPERATIONS:
        raise UnknownName(f"operation of {where}", claim["operation"], OPERATIONS)
    size, operation = OPERATIONS[claim["operation"]]
    cells = [cell for text in claim["cells"].split(";") for cell in _find(text, tables, where)]
    if size not in (None, len(cells)):
        raise DataError(f"{where}: {claim['operation']} takes {size} cells, found {len(cells)}")
    argument = Decimal(claim["argument"]) if claim["argument"] else None
    try:
        computed = operation([Decimal(cell["value"]) for cell in cells], argument)
        corners = itertools.product(*map(_range, cells))
        possible = [operation(corner, argument) for corner in corners]
    except (ArithmeticError, ValueError) as error:
        raise DataError(f"{where}: cannot be computed: {error}") from error
    return float(computed), _verdict(claim, computed, min(possible), max(possible))


def _find(text: str, tables: dict[str, list[Row]], where: str) -> list[Row]:
    """The cells with a number that `item|row|metric` names."""
    parts = text.split("|")
    if len(parts) != 3 or parts[0] not in tables:
        raise DataError(f"{where}: {text!r} is not item|row|metric of a table of the paper")
    item, row, metric = parts
    found = [
        cell
        for cell in tables[item]
        if cell["value"] and fnmatchcase(cell["row"], row) and fnmatchcase(cell["metric"], metric)
    ]
    if not found:
        raise DataError(f"{where}: no number is printed at {text!r}")
    return found


def _range(cell: Row) -> tuple[Decimal, ...]:
    """The least and the greatest value that print as this cell; one value where it is exact."""
    value = Decimal(cell["value"])
    if cell["unit"] not in ROUNDED_UNITS:
        return (value,)
    half_digit = Decimal(1).scaleb(int(value.as_tuple().exponent)) / 2
    return (value - half_digit, value + half_digit)


def _verdict(claim: Row, computed: Decimal, least: Decimal, greatest: Decimal) -> str:
    """Judge `computed`; the printed cells allow anything from `least` to `greatest`."""
    low = Decimal(claim["stated_low"])
    high = Decimal(claim["stated_high"] or claim["stated_low"])
    if _meets(claim["relation"], computed, low, high):
        return "holds"
    within = [end for end in (low, high) if least <= end <= greatest]
    if any(_meets(claim["relation"], value, low, high) for value in (least, greatest, *within)):
        return "rounding"
    return "mismatch"


def _meets(relation: str, value: Decimal, low: Decimal, high: Decimal) -> bool:
    if relation == "less_than":
        return value < low
    if relation == "more_than":
        return value > low
    if relation == "around":
        return abs(value - low) <= AROUND * abs(low)
    if relation == "between":
        return low <= value <= high
    return value.quantize(low, ROUND_HALF_UP) == low
