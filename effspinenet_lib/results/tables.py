"""CSV files that follow the schemas of schemas.yaml: read with every row checked, upserted.

A file is written atomically, under a lock and in the order of its key: several processes may add
rows at once, and the same content gives the same bytes.
"""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from effspinenet_lib.errors import DataError
from effspinenet_lib.files import atomic_write, locked

SCHEMAS_FILE = Path(__file__).with_name("schemas.yaml")
PACKAGE_DIR = Path(__file__).resolve().parents[1]
CODE_FOLDERS = ("effspinenet_lib", "notebooks")
STAMP = ("commit", "date")
# Metric of a cost -> what its printed unit stands for, and the unit.
COST_UNITS = {"multi_adds": (1e9, "B"), "parameters": (1e6, "M")}
GIT_SECONDS = 20
EXACT = 2**53  # up to here every whole number is a float64

_TYPES = {
    "number": (r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?", "is not a number"),
    "integer": (r"-?[0-9]+", "is not a whole number"),
    "date": (
        r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])",
        "is not a date such as 2026-01-31",
    ),
}

Row = dict[str, str]  # the cells of a row as they are in the file
Key = tuple[str, ...]


# Schemas


@dataclass(frozen=True)
class Schema:
    """The columns of one kind of file.

    Attributes:
        name: in schemas.yaml.
        file: pattern of the names of its files, without `.csv`.
        key: the columns that identify a row.
        fields: the columns in order, as Frictionless describes them.
    """

    name: str
    file: str
    key: tuple[str, ...]
    fields: tuple[dict[str, Any], ...]

    @property
    def columns(self) -> list[str]:
        """The column names in the order of the file."""
        return [field["name"] for field in self.fields]

    def key_of(self, row: Row) -> Key:
        """The cells that identify a row."""
        return tuple(row[name] for name in self.key)


class Settings(NamedTuple):
    """What schemas.yaml says: the package's header, the folders, the schemas."""

    package: dict[str, Any]
    folders: dict[str, dict[str, Any]]
    schemas: dict[str, Schema]


@cache
def settings() -> Settings:
    """Read schemas.yaml."""
    data = yaml.safe_load(SCHEMAS_FILE.read_text(encoding="utf-8"))
    schemas = {
        name: Schema(name, one["file"], tuple(one["primaryKey"]), tuple(one["fields"]))
        for name, one in data["schemas"].items()
    }
    return Settings(data["package"], data["folders"], schemas)


def schema(name: str) -> Schema:
    """The schema of this name, such as "measurement"."""
    return settings().schemas[name]


def schema_of_file(path: Path) -> Schema | None:
    """The schema that a file of this name follows, or None."""
    schemas = settings().schemas.values()
    return next((one for one in schemas if re.fullmatch(one.file, path.stem)), None)


def _problem(field: Mapping[str, Any], text: str) -> str | None:
    """What is wrong with a cell, or None."""
    rules = field.get("constraints", {})
    if text == "":
        return "is empty" if rules.get("required") else None
    pattern, complaint = _TYPES.get(field["type"], (".*", ""))
    if not re.fullmatch(pattern, text, re.DOTALL):
        return f"{text!r} {complaint}"
    if field["type"] == "object" and not _is_json_object(text):
        return f"{text!r} is not a JSON object"
    if text not in rules.get("enum", (text,)):
        return f"{text!r} is not one of {', '.join(rules['enum'])}"
    if not re.fullmatch(rules.get("pattern", ".*"), text, re.DOTALL):
        return f"{text!r} does not match {rules['pattern']}"
    if "minimum" in rules and float(text) < rules["minimum"]:
        return f"{text!r} is below {rules['minimum']}"
    return None


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


# Reading


def read_rows(path: Path, name: str) -> list[Row]:
    """Read a file of the schema `name` as text cells; no rows if it is missing.

    Raises:
        DataError: the file cannot be read or a row is broken; names the file and the line.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            return list(_parse(path, csv.DictReader(handle, strict=True), schema(name)))
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _parse(path: Path, reader: csv.DictReader[str], of: Schema) -> Iterator[Row]:
    first_lines: dict[Key, int] = {}
    try:
        if reader.fieldnames != of.columns:
            raise DataError(f"{path}: line 1: the columns are not {','.join(of.columns)}")
        for row in reader:
            problem = _row_problem(row, of)
            if problem is None:
                first = first_lines.setdefault(of.key_of(row), reader.line_num)
                if first != reader.line_num:
                    problem = f"repeats the {', '.join(of.key)} of line {first}"
            if problem:
                raise DataError(
                    f"{path}: line {reader.line_num}: {problem}; correct it or move the file"
                )
            yield row
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.reader.line_num}: is not CSV ({error})") from error


def _row_problem(row: Mapping[str | None, Any], of: Schema) -> str | None:
    if None in row or None in row.values():
        return f"does not have the {len(of.fields)} cells of the header"
    found = ((field["name"], _problem(field, row[field["name"]])) for field in of.fields)
    return next((f"column {name} {problem}" for name, problem in found if problem), None)


def to_frame(rows: Iterable[Row], name: str) -> pd.DataFrame:
    """Give rows as a table: numbers as float64, whole numbers as Int64, the rest as text.

    A missing number is NaN or NA, a missing text is an empty string.
    """
    of = schema(name)
    frame = pd.DataFrame(list(rows), columns=of.columns, dtype=str)
    for field in of.fields:
        column = frame[field["name"]]
        if field["type"] == "number":
            frame[field["name"]] = column.replace("", "nan").astype("float64")
        elif field["type"] == "integer":
            frame[field["name"]] = pd.array([int(v) if v else None for v in column], dtype="Int64")
    return frame


def read_table(path: str | Path, name: str) -> pd.DataFrame:
    """Read a file of the schema `name` as `to_frame` gives it; no rows where it is missing.

    Raises:
        DataError: the file has a broken row; names the file and the line.
    """
    return to_frame(read_rows(Path(path), name), name)


# Writing


def to_row(record: Mapping[str, Any], name: str, what: str) -> Row:
    """Turn a record of Python values into checked text cells.

    Numbers take their shortest form that reads back equal; None and NaN become empty cells.

    Raises:
        DataError: a key is no column or a value breaks the schema; the message starts with `what`.
    """
    of = schema(name)
    for column in record:
        if column not in of.columns:
            raise DataError(f"{what}: {column!r} is no column; known: {', '.join(of.columns)}")
    row = {field["name"]: _text(record.get(field["name"]), field["type"]) for field in of.fields}
    problem = _row_problem({**row}, of)
    if problem:
        raise DataError(f"{what}: {problem}")
    return row


def _text(value: Any, kind: str) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value
    if kind in ("number", "integer"):
        whole = float(value).is_integer() and (kind == "integer" or abs(value) < EXACT)
        return str(int(value)) if whole else repr(float(value))
    if kind == "object":
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return str(value)


def write_rows(path: Path, name: str, rows: Iterable[Row]) -> None:
    """Write rows of text cells as the whole of a file, in the order given."""
    with atomic_write(path) as handle:
        writer = csv.DictWriter(handle, schema(name).columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_table(path: str | Path, name: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as the whole of a file of the schema `name`, in the order given.

    `commit` and `date` are filled in where the schema has them and a record leaves them out.

    Raises:
        DataError: a record breaks the schema.
        UserError: the file cannot be written; the one that was there is kept.
    """
    rows = _to_rows(records, name, name)
    with locked(path):
        write_rows(Path(path), name, rows)


def upsert(path: str | Path, name: str, records: Iterable[Mapping[str, Any]], what: str) -> bool:
    """Add records to a file of the schema `name`, each replacing the row of the same key.

    A record that says the same as the row on disk keeps the old commit and date.

    Args:
        path: the file; it is made where there is none.
        name: of the schema.
        records: Python values by column; `commit` and `date` are filled in where left out.
        what: begins the message about a record that breaks the schema.

    Returns:
        Whether the file is new.

    Raises:
        DataError: a record breaks the schema, or the file on disk is broken; nothing is changed.
        UserError: the file cannot be written; nothing is changed.
    """
    path, of = Path(path), schema(name)
    new = _to_rows(records, name, what)
    with locked(path):
        created = not path.exists()
        old = {of.key_of(row): row for row in read_rows(path, name)}
        merged = dict(old)
        for row in new:
            key = of.key_of(row)
            if key not in merged or _without_stamp(merged[key]) != _without_stamp(row):
                merged[key] = row
        if created or merged != old:
            write_rows(path, name, [merged[key] for key in sorted(merged, key=_natural)])
    return created


def _to_rows(records: Iterable[Mapping[str, Any]], name: str, what: str) -> list[Row]:
    """Check records; what is None or empty is left out before commit and date are filled in."""
    given = [{key: v for key, v in one.items() if v is not None and v != ""} for one in records]
    stamp: dict[str, str] = {}
    if "commit" in schema(name).columns and not all(set(STAMP) <= set(one) for one in given):
        stamp = {"commit": current_commit(), "date": today()}
    return [to_row(stamp | one, name, what) for one in given]


def _without_stamp(row: Row) -> Row:
    return {name: cell for name, cell in row.items() if name not in STAMP}


def _natural(key: Key) -> list[list[str | int]]:
    """Sort "block 2" before "block 10"."""
    return [
        [int(part) if place % 2 else part for place, part in enumerate(re.split("([0-9]+)", text))]
        for text in key
    ]


def drop(path: Path, name: str, dropped: Callable[[Row], bool]) -> None:
    """Drop the rows of a file that `dropped` is true for."""
    with locked(path):
        old = read_rows(path, name)
        kept = [row for row in old if not dropped(row)]
        if len(kept) < len(old):
            write_rows(path, name, kept)


def current_commit(package_dir: Path = PACKAGE_DIR) -> str:
    """Name the commit of the code that is running.

    Returns:
        A short hash; with "+dirty" if the library or the notebooks differ from it or hold files
        that it does not; "unknown" where the library does not lie in a git checkout of its own.
    """
    root = package_dir.parent
    found = _git(root, "rev-parse", "--show-toplevel", "--short=10", "HEAD").splitlines()
    if len(found) != 2 or Path(found[0]).resolve() != root.resolve():
        return "unknown"
    folders = [name for name in CODE_FOLDERS if (root / name).exists()]
    return found[1] + ("+dirty" if _git(root, "status", "--porcelain", "--", *folders) else "")


def _git(folder: Path, *arguments: str) -> str:
    """Run git in `folder`; an empty text where it fails or is not installed."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def today() -> str:
    """Give the day, UTC, as the `date` columns hold it, for example 2026-01-31."""
    return datetime.now(timezone.utc).date().isoformat()
