"""CSV files that follow a schema: read with every row checked, written whole or not at all."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from effspinenet_lib.errors import DataError
from effspinenet_lib.files import atomic_write
from effspinenet_lib.results.schemas import Field, Schema

Row = dict[str, str]


def read_rows(path: Path, schema: Schema) -> list[Row]:
    """Read a file as rows of text cells.

    Raises:
        DataError: the file cannot be read or a row is broken; names the file and the line.
    """
    rows, problems = scan(path, schema)
    if problems:
        more = f" ({len(problems) - 1} more in this file)" if len(problems) > 1 else ""
        raise DataError(f"{path}: {problems[0]}{more}; correct it or move the file away")
    return rows


def scan(path: Path, schema: Schema) -> tuple[list[Row], list[str]]:
    """Read the rows of a file and say what is wrong with it, in words without the file's name.

    Raises:
        DataError: the file cannot be opened.
    """
    rows: list[Row] = []
    problems: list[str] = []
    lines_of_keys: dict[tuple[str, ...], int] = {}
    reader = None
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            reader = csv.reader(handle, strict=True)
            header = next(reader, [])
            if tuple(header) != schema.columns:
                return [], [_header_problem(header, schema)]
            for cells in reader:
                found = _row_problems(cells, schema)
                row = dict(zip(schema.columns, cells, strict=False))
                if not found:
                    key = key_of(row, schema)
                    first = lines_of_keys.setdefault(key, reader.line_num)
                    if first != reader.line_num:
                        found = [f"repeats the {', '.join(schema.primary_key)} of line {first}"]
                problems += [f"line {reader.line_num}: {problem}" for problem in found]
                rows.append(row)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path}: cannot be read: {reason}") from error
    except UnicodeDecodeError as error:
        problems.append(f"is not UTF-8 text (byte {error.start})")
    except csv.Error as error:
        line = reader.line_num if reader else 1
        problems.append(f"line {line}: is not CSV ({error})")
    return rows, problems


def _header_problem(header: Sequence[str], schema: Schema) -> str:
    missing = [name for name in schema.columns if name not in header]
    unknown = [name for name in header if name not in schema.columns]
    if missing or unknown:
        return f"line 1: columns missing: {missing or 'none'}, unknown: {unknown or 'none'}"
    return f"line 1: columns are not in the order {','.join(schema.columns)}"


def _row_problems(cells: Sequence[str], schema: Schema) -> list[str]:
    if len(cells) != len(schema.fields):
        return [f"has {len(cells)} cells, {len(schema.fields)} were expected"]
    return [
        f"column {field.name} {problem}"
        for field, cell in zip(schema.fields, cells, strict=True)
        if (problem := field.problem(cell))
    ]


def key_of(row: Row, schema: Schema) -> tuple[str, ...]:
    """Give the cells that identify a row."""
    return tuple(row[name] for name in schema.primary_key)


def to_row(record: Mapping[str, Any], schema: Schema, what: str) -> Row:
    """Turn a record of Python values into checked text cells.

    Numbers take their shortest form that reads back equal; None and NaN become empty cells.

    Raises:
        DataError: a key is no column or a value breaks the schema; the message starts with `what`.
    """
    unknown = [key for key in record if key not in schema.columns]
    if unknown:
        raise DataError(f"{what}: {unknown[0]!r} is no column; known: {', '.join(schema.columns)}")
    row: Row = {}
    for field in schema.fields:
        try:
            row[field.name] = _to_text(record.get(field.name), field)
        except (TypeError, ValueError) as error:
            raise DataError(f"{what}: column {field.name}: {error}") from error
        problem = field.problem(row[field.name])
        if problem:
            raise DataError(f"{what}: column {field.name} {problem}")
    return row


def _to_text(value: Any, field: Field) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value
    if field.type == "number":
        return number_text(float(value))
    if field.type == "integer":
        if int(value) != value:
            raise ValueError(f"{value!r} is not a whole number")
        return str(int(value))
    if field.type == "object":
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return str(value)


def number_text(value: float) -> str:
    """Write a number in the shortest decimal form that reads back equal; NaN is empty."""
    if math.isnan(value):
        return ""
    if value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return repr(value)


def to_frame(rows: Iterable[Row], schema: Schema) -> pd.DataFrame:
    """Give rows as a table: numbers as float64, whole numbers as Int64, the rest as text.

    A missing number is NaN or NA, a missing text is an empty string.
    """
    rows = list(rows)
    frame = pd.DataFrame(rows, columns=list(schema.columns), dtype=str)
    for field in schema.fields:
        if field.type == "number":
            frame[field.name] = [float(row[field.name] or "nan") for row in rows]
            frame[field.name] = frame[field.name].astype("float64")
        elif field.type == "integer":
            whole = [int(row[field.name]) if row[field.name] else None for row in rows]
            frame[field.name] = pd.array(whole, dtype="Int64")
    return frame


def write_rows(path: Path, schema: Schema, rows: Iterable[Row]) -> None:
    """Write a file whole or not at all, in the order given.

    Raises:
        UserError: the file cannot be written; the one that was there is kept.
    """
    with atomic_write(path) as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(schema.columns)
        writer.writerows([row[name] for name in schema.columns] for row in rows)
