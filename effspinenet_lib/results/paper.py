"""The paper's tables as printed, its misprints, and its numeric statements checked on the tables.

All of it is data under `results/paper/`; the arithmetic is done here, on the printed cells.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from fnmatch import fnmatchcase
from pathlib import Path

import pandas as pd

from effspinenet_lib.errors import DataError, UnknownName
from effspinenet_lib.results.csvfile import Row, read_rows, to_frame
from effspinenet_lib.results.schemas import CLAIM, MEASUREMENT, MISPRINT

RESULTS_DIR = Path(__file__).resolve().parents[2] / "results"  # of a checkout
ITEMS = tuple(f"table-{number:02d}" for number in range(1, 12))

# Units whose printed numbers are rounded; a size, a count or a dimension is exact.
ROUNDED_UNITS = ("B", "M", "%")
# Our reading of "around" and "roughly": within a tenth of the number stated.
AROUND = Decimal("0.1")

COMPUTED_COLUMNS = ("computed", "verdict")


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
    return to_frame(_cells(item, Path(results_dir)), MEASUREMENT)


def paper_values_corrected(item: str, results_dir: str | Path = RESULTS_DIR) -> pd.DataFrame:
    """Read a table of the paper with the known misprints put right and lost entries added.

    Such a row says "corrected" in its note, with what was printed. Arguments, columns and errors
    as `paper_values`.
    """
    rows = _cells(item, Path(results_dir))
    for misprint in _rows(Path(results_dir), "misprints.csv"):
        if misprint["item"] == item:
            rows = _corrected(rows, misprint)
    return to_frame(rows, MEASUREMENT)


def misprints(results_dir: str | Path = RESULTS_DIR) -> pd.DataFrame:
    """Read the known misprints of the tables, each with the reason for its correction."""
    return to_frame(_rows(Path(results_dir), "misprints.csv"), MISPRINT)


def claims(results_dir: str | Path = RESULTS_DIR) -> pd.DataFrame:
    """Check the paper's numeric statements against the cells of its tables as printed.

    Returns:
        The claims with two columns more: `computed`, what the cells give, and `verdict`:
        "holds"; "rounding" where only the rounding of the printed cells could make it hold;
        "mismatch".

    Raises:
        DataError: a file is missing or broken, or a claim names no cell or no operation.
    """
    folder = Path(results_dir)
    rows = _rows(folder, "claims.csv")
    tables = {item: _cells(item, folder) for item in ITEMS}
    checked = [_check(row, tables) for row in rows]
    frame = to_frame(rows, CLAIM)
    for name, column in zip(COMPUTED_COLUMNS, zip(*checked, strict=True), strict=True):
        frame[name] = list(column)
    return frame


def _rows(results_dir: Path, name: str) -> list[Row]:
    schema = {"misprints.csv": MISPRINT, "claims.csv": CLAIM}.get(name, MEASUREMENT)
    path = results_dir / "paper" / name
    if not path.exists():
        raise DataError(f"{path}: no such file; the paper's tables come with the repository")
    return read_rows(path, schema)


def _cells(item: str, results_dir: Path) -> list[Row]:
    if item not in ITEMS:
        raise UnknownName("table of the paper", item, ITEMS)
    return _rows(results_dir, f"{item}.csv")


def _corrected(rows: list[Row], misprint: Row) -> list[Row]:
    shown = misprint["printed"] or "nothing"
    change = {"value": misprint["corrected"], "note": f"corrected; printed {shown}"}
    place = [row["row"] == misprint["row"] and row["metric"] == misprint["metric"] for row in rows]
    if any(place):
        return [row | change if hit else row for row, hit in zip(rows, place, strict=True)]
    same_row = [index for index, row in enumerate(rows) if row["row"] == misprint["row"]]
    if not same_row:
        raise DataError(f"misprints.csv: {misprint['item']} has no row {misprint['row']!r}")
    named = {name: misprint[name] for name in ("metric", "unit")}
    at = same_row[-1] + 1
    return [*rows[:at], rows[at - 1] | named | change, *rows[at:]]


@dataclass(frozen=True)
class _Printed:
    """A printed number and half a unit of its last digit, 0 where it is exact."""

    value: Decimal
    half_digit: Decimal

    @property
    def ends(self) -> tuple[Decimal, ...]:
        """The least and the greatest value that print so."""
        if not self.half_digit:
            return (self.value,)
        return (self.value - self.half_digit, self.value + self.half_digit)


def _printed(row: Row) -> _Printed:
    value = Decimal(row["value"])
    rounded = row["unit"] in ROUNDED_UNITS
    return _Printed(value, _half_digit(value) if rounded else Decimal(0))


def _half_digit(value: Decimal) -> Decimal:
    exponent = value.as_tuple().exponent
    assert isinstance(exponent, int)
    return Decimal(1).scaleb(exponent) / 2


Values = Sequence[Decimal]


def _mean(values: Values, _: Decimal | None) -> Decimal:
    return sum(values, Decimal(0)) / len(values)


def _percent_saved(values: Values, _: Decimal | None) -> Decimal:
    return 100 * (1 - values[0] / values[1])


def _count_above(values: Values, _: Decimal | None) -> Decimal:
    return Decimal(sum(value > values[0] for value in values[1:]))


def _feature_side(values: Values, level: Decimal | None) -> Decimal:
    return Decimal(math.ceil(values[0] / 2 ** _needed(level)))


def _remainder(values: Values, divisor: Decimal | None) -> Decimal:
    return values[0] % _needed(divisor)


def _needed(argument: Decimal | None) -> Decimal:
    if argument is None:
        raise ValueError("the operation needs an argument")
    return argument


# Operation -> (number of cells, or None for any; the arithmetic on values and argument).
OPERATIONS: dict[str, tuple[int | None, Callable[[Values, Decimal | None], Decimal]]] = {
    "value": (1, lambda values, _: values[0]),
    "difference": (2, lambda values, _: values[0] - values[1]),
    "percent_saved": (2, _percent_saved),
    "ratio_percent": (2, lambda values, _: 100 * values[0] / values[1]),
    "mean": (None, _mean),
    "maximum": (None, lambda values, _: max(values)),
    "spread": (None, lambda values, _: max(values) - min(values)),
    "count": (None, lambda values, _: Decimal(len(values))),
    "count_above": (None, _count_above),
    "feature_side": (1, _feature_side),
    "remainder": (1, _remainder),
}


def _check(claim: Row, tables: dict[str, list[Row]]) -> tuple[float, str]:
    """Compute what the cells of a claim give, and how it stands to what is stated."""
    where = f"claims.csv, claim {claim['claim']}"
    if claim["operation"] not in OPERATIONS:
        raise UnknownName(f"operation of {where}", claim["operation"], OPERATIONS)
    size, operation = OPERATIONS[claim["operation"]]
    cells = [cell for text in claim["cells"].split(";") for cell in _find(text, tables, where)]
    if size not in (None, len(cells)):
        raise DataError(f"{where}: {claim['operation']} takes {size} cells, found {len(cells)}")
    argument = Decimal(claim["argument"]) if claim["argument"] else None
    try:
        computed = operation([cell.value for cell in cells], argument)
        corners = itertools.product(*(cell.ends for cell in cells))
        possible = [operation(corner, argument) for corner in corners]
    except (ArithmeticError, ValueError) as error:
        raise DataError(f"{where}: cannot be computed: {error}") from error
    return float(computed), _verdict(claim, computed, min(possible), max(possible))


def _find(text: str, tables: dict[str, list[Row]], where: str) -> list[_Printed]:
    parts = text.split("|")
    if len(parts) != 3 or parts[0] not in tables:
        raise DataError(f"{where}: {text!r} is not item|row|metric of a table of the paper")
    item, row, metric = parts
    found = [
        _printed(cell)
        for cell in tables[item]
        if cell["value"] and fnmatchcase(cell["row"], row) and fnmatchcase(cell["metric"], metric)
    ]
    if not found:
        raise DataError(f"{where}: no number is printed at {text!r}")
    return found


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
