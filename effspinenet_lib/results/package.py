"""The Frictionless data package over the results folder: writing it and checking against it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from effspinenet_lib.errors import DataError
from effspinenet_lib.files import locked, read_json, write_json
from effspinenet_lib.results.csvfile import Row, scan
from effspinenet_lib.results.schemas import (
    CHOICE,
    CLAIM,
    COST,
    EVALUATION,
    ITEM_PATTERN,
    MEASUREMENT,
    MISPRINT,
    PARITY,
    RUN,
    SEARCH_TRIAL,
    SPACE,
    Schema,
)
from effspinenet_lib.results.speed import SPEED

PACKAGE_FILE = "datapackage.json"

# Folder -> the sources that its measurements may carry; smoke is never part of the package.
FOLDER_SOURCES = {
    "paper": ("paper",),
    "cost": ("cost",),
    "parity": (),
    "search": (),
    "speed": (),
    "proxy": ("proxy", "cost"),
    "paper_scale": ("paper_scale", "cost"),
    "smoke": ("smoke", "cost"),
}
PACKAGED_FOLDERS = ("paper", "cost", "parity", "search", "speed", "proxy", "paper_scale")
FOLDER_TITLES = {
    "paper": "transcribed from the paper, as printed",
    "cost": "counted on the built models",
    "parity": "released models against TensorFlow",
    "search": "the space of resource distributions",
    "speed": "benchmarks beside other libraries",
    "proxy": "measured by the proxy profile",
    "paper_scale": "measured at the paper's settings",
}


def schema_of_file(name: str) -> Schema | None:
    """Give the schema that a file called `name` must follow, or None if no file has that name."""
    named = {
        "runs.csv": RUN,
        "misprints.csv": MISPRINT,
        "claims.csv": CLAIM,
        "costs.csv": COST,
        "choices.csv": CHOICE,
        "parity.csv": PARITY,
        "speed.csv": SPEED,
        "evaluations.csv": EVALUATION,
        "search_trials.csv": SEARCH_TRIAL,
        "space.csv": SPACE,
    }
    if re.fullmatch(ITEM_PATTERN + r"\.csv", name):
        return MEASUREMENT
    return named.get(name)


def write_datapackage(results_dir: str | Path) -> None:
    """Write `datapackage.json` for the CSV files that lie under `results_dir` now.

    Raises:
        UserError: the folder cannot be written.
    """
    path = Path(results_dir) / PACKAGE_FILE
    with locked(path):
        write_json(path, _descriptor(Path(results_dir)))


def validate(results_dir: str | Path) -> list[str]:
    """Check every results file against its schema and the data package.

    Returns:
        The problems, one line each, with the file's path under `results_dir`; empty if none.
    """
    folder = Path(results_dir)
    problems = _package_problems(folder)
    for name in FOLDER_SOURCES:
        problems += _folder_problems(folder, name)
    return problems


def _descriptor(folder: Path) -> dict[str, Any]:
    return {
        "name": "eff-spinenet-results",
        "title": "Eff-SpineNet: the paper's tables and what this suite measured",
        "description": "One row a measurement; see README.md beside this file.",
        "profile": "tabular-data-package",
        "licenses": [{"name": "Apache-2.0", "path": "https://www.apache.org/licenses/LICENSE-2.0"}],
        "resources": [_resource(folder, path) for path in _packaged_files(folder)],
    }


def _packaged_files(folder: Path) -> list[Path]:
    files = [path for name in PACKAGED_FOLDERS for path in sorted((folder / name).glob("*.csv"))]
    return [path for path in files if schema_of_file(path.name)]


def _resource(folder: Path, path: Path) -> dict[str, Any]:
    schema = schema_of_file(path.name)
    assert schema is not None
    place = path.parent.name
    return {
        "name": f"{place}-{path.stem}".replace("_", "-"),
        "title": f"{path.stem}, {FOLDER_TITLES[place]}",
        "path": path.relative_to(folder).as_posix(),
        "profile": "tabular-data-resource",
        "format": "csv",
        "mediatype": "text/csv",
        "encoding": "utf-8",
        "schema": schema.descriptor(),
    }


def _package_problems(folder: Path) -> list[str]:
    path = folder / PACKAGE_FILE
    remedy = "write it anew with effspinenet_lib.results.write_datapackage"
    try:
        found = read_json(path)
    except DataError as error:
        return [f"{str(error).replace(str(path), PACKAGE_FILE)}; {remedy}"]
    wanted = _descriptor(folder)
    if found == wanted:
        return []
    listed, present = _listed(found), _listed(wanted)
    problems = [f"{PACKAGE_FILE}: does not list {name}" for name in present if name not in listed]
    problems += [f"{PACKAGE_FILE}: lists {name}, absent" for name in listed if name not in present]
    problems = problems or [f"{PACKAGE_FILE}: differs from the schemas of this version"]
    return [f"{problem}; {remedy}" for problem in problems]


def _listed(package: Any) -> list[str]:
    resources = package.get("resources", []) if isinstance(package, dict) else []
    return [str(one.get("path")) for one in resources if isinstance(one, dict)]


def _folder_problems(folder: Path, name: str) -> list[str]:
    problems: list[str] = []
    tables: dict[Path, list[Row]] = {}
    for path in sorted((folder / name).glob("*.csv")):
        shown = path.relative_to(folder).as_posix()
        schema = schema_of_file(path.name)
        if schema is None:
            problems.append(f"{shown}: no results file has this name")
            continue
        rows, found = scan(path, schema)
        problems += [f"{shown}: {problem}" for problem in found]
        if not found:
            tables[path] = rows
    runs = {row["run"] for path, rows in tables.items() if path.stem == "runs" for row in rows}
    for path, rows in tables.items():
        if schema_of_file(path.name) is MEASUREMENT:
            shown = path.relative_to(folder).as_posix()
            problems += [f"{shown}: {one}" for one in _measurement_problems(path, rows, name, runs)]
    return problems


def _measurement_problems(path: Path, rows: list[Row], folder: str, runs: set[str]) -> list[str]:
    """Check what one row's schema cannot: the item, the source and the run it points to."""
    problems = []
    for row in rows:
        where = f"row {row['row']!r}, metric {row['metric']}"
        if row["item"] != path.stem:
            problems.append(f"{where}: item {row['item']} is in the wrong file")
        if row["source"] not in FOLDER_SOURCES[folder]:
            problems.append(f"{where}: source {row['source']} does not belong in {folder}/")
        if row["run"] and row["run"] not in runs:
            problems.append(f"{where}: run {row['run']} is not in {folder}/runs.csv")
    return problems
