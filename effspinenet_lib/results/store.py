"""The results of one profile, the data package over all of them, and the hash that names a run."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from effspinenet_lib.errors import DataError, UnknownName
from effspinenet_lib.files import locked, read_json, write_json
from effspinenet_lib.results.tables import (
    Row,
    drop,
    read_rows,
    read_table,
    schema,
    schema_of_file,
    settings,
    to_frame,
    upsert,
)

# Profile -> folder, which is also the source that its measured rows carry.
FOLDERS = {"smoke": "smoke", "proxy": "proxy", "paper": "paper_scale"}
CURVE_FILE = "curve.csv"  # in a run's folder
REFERENCE = "reference"  # in the place of a search method: distributions that no method chose
PACKAGE_FILE = "datapackage.json"
SAME = ["item", "row", "metric", "source", "seed"]  # what two results of one thing agree in
HASH_DIGITS = 12  # 48 bits, ample for the few thousand runs of a suite


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash a configuration to 12 hex digits.

    Configurations that are equal in Python have equal hashes: the order of keys, tuples against
    lists and 1 against 1.0 make no difference.

    Raises:
        TypeError: a value is not representable in JSON.
        ValueError: a number is NaN or infinite.
    """
    text = json.dumps(_canonical(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _canonical(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class ResultsStore:
    """The CSV files of one profile under a results folder.

    Reading raises DataError for a broken row and names the file and the line. Adding raises
    DataError for a record that breaks the schema and UserError for a file that cannot be written;
    nothing is changed then.

    Args:
        results_dir: the folder that holds `paper/`, `proxy/`, `paper_scale/` and `smoke/`.
        profile: "smoke", "proxy" or "paper".

    Raises:
        UnknownName: there is no such profile.
    """

    def __init__(self, results_dir: str | Path, profile: str) -> None:
        if profile not in FOLDERS:
            raise UnknownName("profile", profile, FOLDERS)
        self.results_dir = Path(results_dir)
        self.profile = profile
        self.source = FOLDERS[profile]
        self.folder = self.results_dir / self.source
        self.runs_folder = self.folder / "runs"  # one folder a run: what is not committed

    def measurements(self, item: str | None = None) -> pd.DataFrame:
        """Read the measurements of one item, or of all; no rows where nothing was measured."""
        if item is not None:
            return read_table(self._item_path(item), "measurement")
        paths = sorted(self.folder.glob("*.csv"))
        items = [path for path in paths if schema_of_file(path) is schema("measurement")]
        rows = [row for path in items for row in read_rows(path, "measurement")]
        return to_frame(rows, "measurement")

    def results(self, item: str | None = None) -> pd.DataFrame:
        """Read measurements without those of runs that were cut short."""
        rows, runs = self.measurements(item), self.runs()
        return rows[~rows["run"].isin(runs.loc[runs["state"] == "partial", "run"])]

    def runs(self) -> pd.DataFrame:
        """Read the runs, one row each; `config` is JSON text."""
        return read_table(self.folder / "runs.csv", "run")

    def finished(self) -> dict[str, dict[str, float]]:
        """Metrics of each run that need not run again: it ended, and some item holds them."""
        rows, runs = self.measurements(), self.runs()
        ended = rows[rows["run"].isin(runs.loc[runs["state"] == "finished", "run"])]
        found: dict[str, dict[str, float]] = {}
        for run, metric, value in ended[["run", "metric", "value"]].itertuples(index=False):
            found.setdefault(run, {})[metric] = value
        return found

    def trials(self) -> pd.DataFrame:
        """Read the trials of the searches, one row each."""
        return read_table(self.folder / "search_trials.csv", "search_trial")

    def add_measurements(self, item: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add measurements, each replacing the one of the same row, model, metric, source, seed.

        `item` is filled in; `source`, `commit` and `date` are where a row leaves them out.
        """
        path, what = self._item_path(item), f"measurement of {item}"
        records = [{"source": self.source, **row, "item": item} for row in rows]
        allowed = settings().folders[self.source]["sources"]
        for record in records:
            if record["source"] not in allowed:
                raise DataError(
                    f"{what}: source {record['source']!r} does not belong in {self.folder}; "
                    f"use {' or '.join(allowed)}"
                )
        self._add(path, "measurement", records, what)

    def add_run(self, record: Mapping[str, Any]) -> None:
        """Add a run, replacing the one of the same hash; its measurements are added before it.

        `profile`, `commit` and `date` are filled in where the record leaves them out; `config`
        may be a mapping or JSON text.
        """
        record = {**record, "profile": record.get("profile") or self.profile}
        self._add(self.folder / "runs.csv", "run", [record], f"run {record.get('run', '?')}")

    def add_trials(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add trials, each replacing the one of the same method, seed and number."""
        self._add(self.folder / "search_trials.csv", "search_trial", records, "trial")

    def drop_trials(self, method: str, seed: int) -> None:
        """Drop what one search recorded."""
        dropped = (method, str(seed))
        path = self.folder / "search_trials.csv"
        drop(path, "search_trial", lambda row: (row["method"], row["seed"]) == dropped)

    def drop_runs(self, item: str, runs: Collection[str]) -> None:
        """Drop the measurements of an item that these runs made; the runs stay in runs.csv."""
        drop(self._item_path(item), "measurement", lambda row: row["run"] in runs)

    def _item_path(self, item: str) -> Path:
        if not re.fullmatch(schema("measurement").file, item):
            raise DataError(f"item {item!r} is no table or figure; it reads like table-08")
        return self.folder / f"{item}.csv"

    def _add(self, path: Path, name: str, records: Iterable[Mapping[str, Any]], what: str) -> None:
        if upsert(path, name, records, what) and self.profile != "smoke":
            write_datapackage(self.results_dir)


@dataclass(frozen=True)
class ItemResults:
    """What is known of a table or figure.

    Attributes:
        paper: the paper's rows.
        measured: measurements that may be shown as results: costs, and accuracy of the profiles
            `proxy` and `paper`, first of the call's results folder, then of the checkout's.
            Without runs that stopped before their last step.
        runs: those that the item needs in the profile and that are in `runs.csv`, with a column
            `label`.
        curves: label -> rows of its `curve.csv` (`step`, `loss`, ...), where the folder is kept.
        proxy_rows: names of the rows that the proxy trains.
    """

    paper: pd.DataFrame
    measured: pd.DataFrame
    runs: pd.DataFrame
    curves: dict[str, pd.DataFrame]
    proxy_rows: list[str]


def merged_results(
    results_dirs: Iterable[str | os.PathLike[str]], profiles: Iterable[str], item: str | None = None
) -> pd.DataFrame:
    """Results of profiles in several folders, of one item or all.

    Of rows that differ in nothing of `SAME` the first found counts.
    """
    stores = [ResultsStore(Path(folder), name) for folder in results_dirs for name in profiles]
    rows = pd.concat([store.results(item) for store in stores])
    return rows.drop_duplicates(SAME, ignore_index=True)


def write_datapackage(results_dir: str | Path) -> None:
    """Write `datapackage.json` for the CSV files that lie under `results_dir` now.

    Raises:
        UserError: the folder cannot be written.
    """
    path = Path(results_dir) / PACKAGE_FILE
    with locked(path):
        write_json(path, _descriptor(Path(results_dir)))


def _descriptor(results_dir: Path) -> dict[str, Any]:
    resources = []
    for folder, facts in settings().folders.items():
        for path in sorted((results_dir / folder).glob("*.csv")):
            of = schema_of_file(path)
            if of is None or "title" not in facts:  # smoke has none: it is never packaged
                continue
            resources.append(
                {
                    "name": f"{folder}-{path.stem}".replace("_", "-"),
                    "title": f"{path.stem}, {facts['title']}",
                    "path": f"{folder}/{path.name}",
                    "profile": "tabular-data-resource",
                    "format": "csv",
                    "mediatype": "text/csv",
                    "encoding": "utf-8",
                    "schema": {
                        "fields": list(of.fields),
                        "missingValues": [""],
                        "primaryKey": list(of.key),
                    },
                }
            )
    return {**settings().package, "resources": resources}


def validate(results_dir: str | Path) -> list[str]:
    """Check every results file against its schema and the data package.

    Returns:
        The problems, one line each, at most one a file; empty if there are none.
    """
    results_dir = Path(results_dir)
    problems = []
    try:
        if read_json(results_dir / PACKAGE_FILE) != _descriptor(results_dir):
            problems.append(f"{results_dir / PACKAGE_FILE}: differs from the files or the schemas")
    except DataError as error:
        problems.append(str(error))
    remedy = "write it again with effspinenet_lib.results.write_datapackage"
    problems = [f"{problem}; {remedy}" for problem in problems]
    for folder, facts in settings().folders.items():
        for path in sorted((results_dir / folder).glob("*.csv")):
            of = schema_of_file(path)
            try:
                if of is None:
                    raise DataError(f"{path}: no results file has this name")
                rows = read_rows(path, of.name)
                if of.name == "measurement":
                    _check_measurements(path, rows, facts["sources"])
            except DataError as error:
                problems.append(str(error))
    return problems


def _check_measurements(path: Path, rows: Iterable[Row], sources: Collection[str]) -> None:
    """Check what one row's schema cannot: the item, the source and the run it points to."""
    runs_file = path.with_name("runs.csv")
    runs = {row["run"] for row in read_rows(runs_file, "run")}
    for row in rows:
        where = f"{path}: row {row['row']!r}, metric {row['metric']}"
        if row["item"] != path.stem:
            raise DataError(f"{where}: item {row['item']} is in the wrong file")
        if row["source"] not in sources:
            raise DataError(f"{where}: source {row['source']} does not belong here")
        if row["run"] and row["run"] not in runs:
            raise DataError(f"{where}: run {row['run']} is not in {runs_file}")
