"""The results of one profile on disk: measurements per table or figure, and the runs behind them.

Several processes may write to the same store: each write takes the file's lock, merges its rows
into what is there and replaces the file in one step.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from effspinenet_lib.errors import DataError, UnknownName
from effspinenet_lib.files import locked
from effspinenet_lib.results.csvfile import Row, key_of, read_rows, to_frame, to_row, write_rows
from effspinenet_lib.results.keys import current_commit, today
from effspinenet_lib.results.package import FOLDER_SOURCES, write_datapackage
from effspinenet_lib.results.schemas import (
    ITEM_PATTERN,
    MEASUREMENT,
    RUN,
    SEARCH_TRIAL,
    Schema,
)

# Profile -> folder, which is also the source that its measured rows carry.
FOLDERS = {"smoke": "smoke", "proxy": "proxy", "paper": "paper_scale"}
RUNS_FILE = "runs.csv"
TRIALS_FILE = "search_trials.csv"
RUNS_FOLDER = "runs"  # one folder a run: what is not committed
CURVE_FILE = "curve.csv"  # in a run's folder


class ResultsStore:
    """The CSV files of one profile under a results folder.

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
        self.runs_folder = self.folder / RUNS_FOLDER

    def measurements(self, item: str | None = None) -> pd.DataFrame:
        """Read the measurements of one item, or of all; no rows where nothing was measured.

        Raises:
            DataError: a file has a broken row; names the file and the line.
        """
        if item is not None:
            return to_frame(self._rows(self._item_path(item), MEASUREMENT), MEASUREMENT)
        return to_frame(self._all_measurements(), MEASUREMENT)

    def results(self, item: str) -> pd.DataFrame:
        """Read the measurements of one item, without those of runs that were cut short.

        Raises:
            DataError: a file has a broken row; names the file and the line.
        """
        rows = self.measurements(item)
        runs = self.runs()
        return rows[~rows["run"].isin(runs.loc[runs["state"] == "partial", "run"])]

    def runs(self) -> pd.DataFrame:
        """Read the runs, one row each; `config` is JSON text.

        Raises:
            DataError: the file has a broken row; names the file and the line.
        """
        return to_frame(self._rows(self.folder / RUNS_FILE, RUN), RUN)

    def run(self, run_key: str) -> Row:
        """Read one run's row.

        Raises:
            KeyError: there is no such run.
        """
        return {row["run"]: row for row in self._rows(self.folder / RUNS_FILE, RUN)}[run_key]

    def add_measurements(self, item: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add measurements, each replacing the one of the same row, model, metric, source, seed.

        `item` is filled in; `source`, `commit` and `date` are where a row leaves them out. A row
        that says the same as the one on disk keeps the old commit and date.

        Raises:
            DataError: a row breaks the schema, or the file on disk is broken; nothing is changed.
            UserError: the file cannot be written; nothing is changed.
        """
        path, what = self._item_path(item), f"measurement of {item}"
        new = [
            to_row({"source": self.source, **row, "item": item}, MEASUREMENT, what)
            for row in _stamped(rows)
        ]
        for row in new:
            if row["source"] not in FOLDER_SOURCES[self.source]:
                raise DataError(
                    f"{what}: source {row['source']!r} does not belong in {self.folder}; "
                    f"use {' or '.join(FOLDER_SOURCES[self.source])}"
                )
        self._upsert(path, MEASUREMENT, new)

    def add_run(self, record: Mapping[str, Any]) -> None:
        """Add a run, replacing the one of the same key; its measurements are added before it.

        `profile`, `commit` and `date` are filled in where the record leaves them out; `config`
        may be a mapping or JSON text.

        Raises:
            DataError: the record breaks the schema, or the file on disk is broken; nothing is
                changed.
            UserError: the file cannot be written; nothing is changed.
        """
        (stamped,) = _stamped([record])
        what = f"run {record.get('run', '?')}"
        row = to_row({"profile": self.profile, **stamped}, RUN, what)
        self._upsert(self.folder / RUNS_FILE, RUN, [row])

    def trials(self) -> pd.DataFrame:
        """Read the trials of the searches, one row each.

        Raises:
            DataError: the file has a broken row; names the file and the line.
        """
        return to_frame(self._rows(self.folder / TRIALS_FILE, SEARCH_TRIAL), SEARCH_TRIAL)

    def add_trials(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add trials, each replacing the one of the same method, seed and number.

        Raises:
            DataError: a record breaks the schema, or the file on disk is broken; nothing is
                changed.
            UserError: the file cannot be written; nothing is changed.
        """
        rows = [to_row(one, SEARCH_TRIAL, f"trial {one['trial']}") for one in _stamped(records)]
        self._upsert(self.folder / TRIALS_FILE, SEARCH_TRIAL, rows)

    def drop_trials(self, method: str, seed: int) -> None:
        """Drop what one search recorded.

        Raises:
            DataError: the file on disk is broken; nothing is changed.
            UserError: the file cannot be written; nothing is changed.
        """
        path = self.folder / TRIALS_FILE
        with locked(path):
            old = self._rows(path, SEARCH_TRIAL)
            kept = [row for row in old if (row["method"], row["seed"]) != (method, str(seed))]
            if len(kept) < len(old):
                write_rows(path, SEARCH_TRIAL, kept)

    def drop_runs(self, item: str, runs: Collection[str]) -> None:
        """Drop the measurements of an item that these runs made; the runs stay in runs.csv.

        Raises:
            DataError: the file on disk is broken; nothing is changed.
            UserError: the file cannot be written; nothing is changed.
        """
        if not runs:
            return
        path = self._item_path(item)
        with locked(path):
            kept = [row for row in self._rows(path, MEASUREMENT) if row["run"] not in runs]
            write_rows(path, MEASUREMENT, kept)

    def finished(self, run_key: str) -> bool:
        """Tell whether a run ended and its metrics are stored, so that it need not run again."""
        rows = self._rows(self.folder / RUNS_FILE, RUN)
        states = {row["run"]: row["state"] for row in rows}
        return states.get(run_key) == "finished" and bool(self.metrics_of(run_key))

    def metrics_of(self, run_key: str) -> dict[str, float]:
        """Collect what a run measured, metric -> value, from whichever items hold it.

        Empty for an unknown run.
        """
        return {
            row["metric"]: float(row["value"] or "nan")
            for row in self._all_measurements()
            if row["run"] == run_key and row["source"] == self.source
        }

    def _item_path(self, item: str) -> Path:
        if not re.fullmatch(ITEM_PATTERN, item):
            raise DataError(f"item {item!r} is no table or figure; it reads like table-08")
        return self.folder / f"{item}.csv"

    def _rows(self, path: Path, schema: Schema) -> list[Row]:
        return read_rows(path, schema) if path.exists() else []

    def _all_measurements(self) -> list[Row]:
        paths = sorted(self.folder.glob("*.csv"))
        items = [path for path in paths if re.fullmatch(ITEM_PATTERN, path.stem)]
        return [row for path in items for row in read_rows(path, MEASUREMENT)]

    def _upsert(self, path: Path, schema: Schema, new: list[Row]) -> None:
        with locked(path):
            created = not path.exists()
            old = {key_of(row, schema): row for row in self._rows(path, schema)}
            merged = dict(old)
            for row in new:
                key = key_of(row, schema)
                if key not in merged or not _says_the_same(merged[key], row):
                    merged[key] = row
            if created or merged != old:
                write_rows(path, schema, [merged[key] for key in sorted(merged, key=_natural)])
        if created and self.profile != "smoke":
            write_datapackage(self.results_dir)


def _stamped(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Drop what is None or empty; fill in the commit and the day where they are left out."""
    given = [{key: v for key, v in one.items() if v is not None and v != ""} for one in records]
    if all("commit" in record and "date" in record for record in given):
        return given
    stamp = {"commit": current_commit(), "date": today()}
    return [stamp | record for record in given]


def _says_the_same(old: Row, new: Row) -> bool:
    return all(old[name] == new[name] for name in new if name not in ("commit", "date"))


def _natural(key: tuple[str, ...]) -> list[list[str | int]]:
    """Sort "block 2" before "block 10"."""
    return [
        [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", text))]
        for text in key
    ]
