"""Results on disk: schema, upserts, whole writes, two writers, run keys, the data package."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import frictionless
import numpy as np
import pytest

from effspinenet_lib import files
from effspinenet_lib.errors import DataError, UnknownName, UserError
from effspinenet_lib.results import (
    ResultsStore,
    config_hash,
    current_commit,
    read_table,
    upsert,
    validate,
    write_datapackage,
)
from effspinenet_lib.results.tables import read_rows, schema, schema_of_file, write_rows

KEY = "0123456789ab"
MEASUREMENT_COLUMNS = schema("measurement").columns
COMMITTED = sorted((Path(__file__).resolve().parent.parent / "results").glob("*/*.csv"))


def measurement(**changes: Any) -> dict[str, Any]:
    row = {
        "row": "Eff-SpineNet-D0",
        "model": "eff_spinenet_m0",
        "task": "detection",
        "metric": "AP",
        "value": 41.25,
        "unit": "%",
        "seed": 0,
        "data": "ShapeScenes",
        "run": KEY,
        "commit": "abc",
        "date": "2026-01-31",
    }
    return row | changes


def run_record(**changes: Any) -> dict[str, Any]:
    row = {
        "run": KEY,
        "state": "finished",
        "model": "eff_spinenet_m0",
        "task": "detection",
        "seed": 0,
        "steps": 100,
        "images": 1600,
        "wall_seconds": 12.5,
        "images_per_second": 128.0,
        "precision": "float32",
        "threads": 1,
        "config": {"seed": 0, "model": "eff_spinenet_m0"},
        "commit": "abc",
        "date": "2026-01-31",
    }
    return row | changes


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    return ResultsStore(tmp_path / "results", "proxy")


def test_an_empty_store_has_the_columns_and_no_rows(store: ResultsStore) -> None:
    frame = store.measurements()
    assert list(frame.columns) == MEASUREMENT_COLUMNS
    assert list(store.runs().columns) == schema("run").columns
    assert len(frame) == len(store.measurements("table-08")) == 0
    assert store.finished() == {}
    assert frame.dtypes.astype(str)[["value", "seed"]].tolist() == ["float64", "Int64"]


def test_values_come_back_equal_and_typed(store: ResultsStore) -> None:
    values = [1 / 3, math.pi * 1e9, 1e-7, 0.1 + 0.2, 3.0, float(np.float32(0.1)), 2.5e300]
    store.add_measurements(
        "table-08", [measurement(row=f"r{n}", value=value) for n, value in enumerate(values)]
    )
    frame = store.measurements("table-08")
    assert frame["value"].tolist() == values
    assert frame["seed"].tolist() == [0] * len(values)
    assert set(frame["source"]) == {"proxy"}
    assert set(frame["item"]) == {"table-08"}


def test_missing_values_are_empty_cells(store: ResultsStore) -> None:
    row = measurement(value=math.nan, seed=None, note='a "quoted", note', run=None)
    store.add_measurements("table-08", [row])
    line = (store.folder / "table-08.csv").read_text().splitlines()[1]
    assert line.startswith("table-08,Eff-SpineNet-D0,eff_spinenet_m0,detection,AP,,%,proxy,,Shape")
    (back,) = store.measurements().to_dict("records")
    assert math.isnan(back["value"])
    assert back["run"] == ""
    assert back["note"] == 'a "quoted", note'
    assert store.measurements()["seed"].isna().all()


def test_a_measurement_made_again_replaces_the_old_one_only(store: ResultsStore) -> None:
    store.add_measurements("table-08", [measurement(), measurement(seed=1, value=40.0)])
    store.add_measurements("table-08", [measurement(value=43.0), measurement(metric="AP50")])
    store.add_measurements("table-09", [measurement(value=1.0)])
    frame = store.measurements("table-08").set_index(["metric", "seed"])["value"]
    assert frame.to_dict() == {("AP", 0): 43.0, ("AP", 1): 40.0, ("AP50", 0): 41.25}
    assert len(store.measurements()) == 4


def test_saying_the_same_again_changes_no_byte(store: ResultsStore) -> None:
    path = store.folder / "table-08.csv"
    store.add_measurements("table-08", [measurement()])
    before, stamp = path.read_bytes(), path.stat().st_mtime_ns
    store.add_measurements("table-08", [measurement(commit="def", date="2026-02-01")])
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, stamp)
    store.add_measurements("table-08", [measurement(commit="def", value=1.0)])
    assert store.measurements()["commit"].tolist() == ["def"]


def test_the_file_does_not_depend_on_the_order_of_writing(tmp_path: Path) -> None:
    rows = [measurement(row=f"block {n}", seed=seed) for n in (10, 2, 1) for seed in (1, 0)]
    first, second = (ResultsStore(tmp_path / name, "proxy") for name in "ab")
    first.add_measurements("table-01", rows)
    for row in reversed(rows):
        second.add_measurements("table-01", [row])
    content = (first.folder / "table-01.csv").read_bytes()
    assert content == (second.folder / "table-01.csv").read_bytes()
    assert b"\r" not in content
    assert first.measurements()["row"].drop_duplicates().tolist() == [
        "block 1",
        "block 2",
        "block 10",
    ]


def test_commit_and_date_are_filled_in(store: ResultsStore) -> None:
    store.add_measurements("table-08", [measurement(commit=None, date="")])
    (row,) = store.measurements().to_dict("records")
    assert row["commit"] == current_commit()
    assert len(row["date"]) == len("2026-01-31")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": ""}, "column metric is empty"),
        ({"value": "much"}, "'much' is not a number"),
        ({"value": math.inf}, "'inf' is not a number"),
        ({"seed": 1.5}, "'1.5' is not a whole number"),
        ({"seed": -1}, "'-1' is below 0"),
        ({"task": "detect"}, "'detect' is not one of detection,"),
        ({"source": "paper"}, "source 'paper' does not belong in .*proxy; use proxy or cost"),
        ({"source": "paper_scale"}, "does not belong"),
        ({"run": "xyz"}, "column run 'xyz' does not match"),
        ({"date": "31.1.2026"}, "is not a date"),
        ({"colour": "red"}, "'colour' is no column"),
    ],
)
def test_a_wrong_row_is_refused_and_nothing_is_written(
    store: ResultsStore, change: dict[str, Any], message: str
) -> None:
    store.add_measurements("table-08", [measurement()])
    before = (store.folder / "table-08.csv").read_bytes()
    with pytest.raises(DataError, match=message):
        store.add_measurements("table-08", [measurement(seed=7), measurement(**change)])
    assert (store.folder / "table-08.csv").read_bytes() == before


def test_unknown_profiles_and_items_are_refused(store: ResultsStore) -> None:
    with pytest.raises(UnknownName, match="did you mean proxy"):
        ResultsStore(store.results_dir, "prox")
    with pytest.raises(DataError, match=r"item '\.\./x' is no table"):
        store.add_measurements("../x", [measurement()])


def test_a_run_is_finished_when_its_metrics_are_stored(store: ResultsStore) -> None:
    store.add_run(run_record())
    assert store.finished() == {}, "it has no measurement yet"
    values = {"AP": 33.5, "AP_L": math.nan, "AR_1": 20.0}
    rows = [measurement(metric=metric, value=value) for metric, value in values.items()]
    other = measurement(row="other", run="f" * 12, value=1.0)
    store.add_measurements("table-08", [*rows, other])
    store.add_measurements("table-09", [measurement(metric="parameters", source="cost", run="")])
    assert set(store.finished()) == {KEY}, "the other is not in runs.csv"
    assert store.finished()[KEY] == pytest.approx(values, nan_ok=True)
    assert ResultsStore(store.results_dir, "paper").finished() == {}
    assert len(store.results("table-08")) == len(rows) + 1
    store.add_run(run_record(state="partial"))
    assert store.finished() == {}
    assert list(store.results("table-08")["row"]) == ["other"]
    assert len(store.results("table-09")) == 1, "a cost needs no run"


def test_a_run_comes_back_as_it_was_recorded(store: ResultsStore) -> None:
    store.add_run(run_record(profile="", steps=7))
    store.add_run(run_record(config=json.dumps(run_record()["config"])))
    (row,) = store.runs().to_dict("records")
    assert json.loads(row["config"]) == {"seed": 0, "model": "eff_spinenet_m0"}
    assert (row["profile"], row["steps"], row["state"]) == ("proxy", 100, "finished")
    with pytest.raises(DataError, match=r"run .*column state 'done' is not one of"):
        store.add_run(run_record(state="done"))
    with pytest.raises(DataError, match=r"column config .* is not a JSON object"):
        store.add_run(run_record(config="x = 1"))


BROKEN = {
    "too few cells": ("a,b\n", "line 3: does not have the 14 cells of the header"),
    "no number": (
        "table-08,r,,detection,AP,4x,%,proxy,0,,,,,\n",
        "line 3: column value '4x' is not a number",
    ),
    "unclosed quote": ('table-08,"r,,detection\n', "line 3: is not CSV"),
    "not text": (b"\xff\xfe\n", "is not UTF-8 text"),
    "a row twice": (None, "line 3: repeats the item, row, model, metric, source, seed of line 2"),
    "too many cells": ("table-08,r,,,AP,4,%,proxy,0,,,,,,\n", "line 3: does not have the 14 cells"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_row_is_named_and_the_file_is_kept(store: ResultsStore, kind: str) -> None:
    added, message = BROKEN[kind]
    store.add_measurements("table-08", [measurement()])
    path = store.folder / "table-08.csv"
    content = path.read_bytes()
    added = content.splitlines(keepends=True)[1] if added is None else added
    path.write_bytes(content + (added.encode() if isinstance(added, str) else added))
    broken = path.read_bytes()
    with pytest.raises(DataError, match=message) as caught:
        store.measurements("table-08")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=message):
        store.add_measurements("table-08", [measurement(seed=5)])
    assert path.read_bytes() == broken
    assert any(message in problem for problem in validate(store.results_dir))


@pytest.mark.parametrize(
    "header",
    ["", "item,row", ",".join(reversed(MEASUREMENT_COLUMNS))],
)
def test_a_broken_header_is_named(store: ResultsStore, header: str) -> None:
    store.folder.mkdir(parents=True)
    (store.folder / "table-08.csv").write_text(header)
    with pytest.raises(DataError, match=r"table-08.csv: line 1: the columns are not item,row,"):
        store.measurements()


def test_a_write_that_fails_leaves_the_old_file(
    store: ResultsStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add_measurements("table-08", [measurement()])
    before = (store.folder / "table-08.csv").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(UserError, match=r"table-08.csv: No space left"):
            store.add_measurements("table-08", [measurement(seed=1)])
    assert (store.folder / "table-08.csv").read_bytes() == before
    assert not list(store.folder.glob("*.tmp")) + list(store.folder.glob(".*.tmp"))
    store.add_measurements("table-08", [measurement(seed=1)])
    assert len(store.measurements()) == 2


KILLED = """
import os, signal, sys
from effspinenet_lib import files
from effspinenet_lib.results import ResultsStore
files.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
ResultsStore(sys.argv[1], "proxy").add_measurements(
    "table-08", [{"row": "r", "metric": "AP", "value": 1, "commit": "c", "date": "2026-01-31"}]
)
"""


def test_a_killed_writer_leaves_the_old_file_and_no_lock(store: ResultsStore) -> None:
    store.add_measurements("table-08", [measurement()])
    before = (store.folder / "table-08.csv").read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, str(store.results_dir)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert (store.folder / "table-08.csv").read_bytes() == before
    store.add_measurements("table-08", [measurement(seed=1)])
    assert len(store.measurements()) == 2


def _write_many(results_dir: str, first_seed: int, count: int) -> None:
    store = ResultsStore(results_dir, "proxy")
    for seed in range(first_seed, first_seed + count):
        run = f"{seed:012x}"
        store.add_measurements("table-08", [measurement(seed=seed, value=seed / 7, run=run)])
        store.add_run(run_record(run=run, seed=seed))


def test_two_processes_writing_at_once_lose_nothing(store: ResultsStore) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [
        context.Process(target=_write_many, args=(str(store.results_dir), first, 25))
        for first in (0, 25)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=120)
        assert writer.exitcode == 0
    frame = store.measurements("table-08")
    assert frame["seed"].tolist() == list(range(50))
    assert frame["value"].tolist() == [seed / 7 for seed in range(50)]
    assert len(store.runs()) == 50
    assert len(store.finished()) == 50
    assert validate(store.results_dir) == []


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file")
    with pytest.raises(UserError, match="cannot write"):
        ResultsStore(tmp_path / "results", "proxy").add_run(run_record())


def test_equal_configurations_have_equal_keys() -> None:
    config = {"lr": 1.0, "size": (3, 4), "deep": {"b": None, "a": True}}
    same = {"deep": {"a": True, "b": None}, "size": [3, 4.0], "lr": 1}
    assert config_hash(config) == config_hash(same)
    assert config_hash(json.loads(json.dumps(config))) == config_hash(config)
    assert len(config_hash(config)) == 12
    # From `printf {"seed":0} | sha256sum`, so that keys of old results stay valid.
    assert config_hash({"seed": 0}) == "bd0488843468"


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"seed": 0.5}, {"seed": "0"}, {"seed": 0, "x": None}, {}, {"s": 0}]
)
def test_unequal_configurations_have_unequal_keys(other: dict[str, Any]) -> None:
    assert config_hash(other) != config_hash({"seed": 0})


def test_a_configuration_that_is_no_json_is_refused() -> None:
    with pytest.raises(TypeError):
        config_hash({"path": Path("x")})
    with pytest.raises(ValueError, match=r"nan|JSON"):
        config_hash({"lr": math.nan})


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "checkout"
    (root / "effspinenet_lib").mkdir(parents=True)
    (root / "results").mkdir()
    (root / "effspinenet_lib" / "__init__.py").write_text("")
    git(root, "init", "-q")
    return root


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-C", str(root)]
    return subprocess.run(
        [*command, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_is_named_and_marked_when_the_code_differs(checkout: Path) -> None:
    package = checkout / "effspinenet_lib"
    assert current_commit(package) == "unknown"
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first", "--no-verify")
    commit = git(checkout, "rev-parse", "--short=10", "HEAD")
    assert current_commit(package) == commit
    (checkout / "results" / "table-08.csv").write_text("new results are no change of code")
    assert current_commit(package) == commit
    (package / "new.py").write_text("x = 1\n")
    assert current_commit(package) == f"{commit}+dirty"
    (package / "new.py").unlink()
    (checkout / "notebooks").mkdir()
    (checkout / "notebooks" / "a.ipynb").write_text("{}")
    assert current_commit(package) == f"{commit}+dirty"


def test_a_library_installed_inside_another_repository_has_no_commit(checkout: Path) -> None:
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "first", "--no-verify")
    inside = checkout / ".venv" / "site-packages" / "effspinenet_lib"
    inside.mkdir(parents=True)
    assert current_commit(inside) == "unknown"
    assert current_commit(checkout.parent / "nowhere") == "unknown"


@pytest.fixture
def filled(store: ResultsStore) -> ResultsStore:
    """A results folder with measurements of two profiles and one of smoke."""
    for profile in ("proxy", "paper", "smoke"):
        one = ResultsStore(store.results_dir, profile)
        one.add_run(run_record())
        one.add_measurements("table-08", [measurement(), measurement(seed=1, value=math.nan)])
        one.add_measurements("figure-03", [measurement(source="cost", seed=None, run=None)])
    return store


def frictionless_problems(results_dir: Path) -> list[str]:
    report = frictionless.validate(str(results_dir / "datapackage.json"))
    return [str(error) for error in report.flatten(["message"])]


def test_files_written_by_the_store_make_a_valid_package(filled: ResultsStore) -> None:
    assert validate(filled.results_dir) == []
    assert frictionless_problems(filled.results_dir) == []
    package = json.loads((filled.results_dir / "datapackage.json").read_text())
    listed = {resource["path"] for resource in package["resources"]}
    names = ("figure-03.csv", "runs.csv", "table-08.csv")
    assert listed == {f"{folder}/{name}" for folder in ("proxy", "paper_scale") for name in names}


BAD_CELLS = {
    "value": "x",
    "seed": "1.5",
    "source": "guess",
    "task": "detect",
    "date": "31.1.2026",
    "metric": "",
    "run": "xyz",
    "item": "table-8",
}


@pytest.mark.parametrize("column", BAD_CELLS)
def test_the_package_and_our_check_refuse_the_same_cells(filled: ResultsStore, column: str) -> None:
    path = filled.folder / "table-08.csv"
    with open(path, newline="") as handle:
        rows = list(csv.DictReader(handle))
    rows[1][column] = BAD_CELLS[column]
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, MEASUREMENT_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    assert frictionless_problems(filled.results_dir)
    assert any(f"line 3: column {column} " in one for one in validate(filled.results_dir))


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        ("proxy/table-09.csv", {}, "metric AP: item table-08 is in the wrong file"),
        ("paper/table-08.csv", {}, "metric AP: source proxy does not belong here"),
        ("proxy/table-08.csv", {KEY: "f" * 12}, f"run {'f' * 12} is not in .*runs.csv"),
        ("proxy/notes.csv", {}, "no results file has this name"),
    ],
)
def test_what_one_row_cannot_show_is_checked(
    filled: ResultsStore, place: str, change: dict[str, str], message: str
) -> None:
    text = (filled.folder / "table-08.csv").read_text()
    for old, new in change.items():
        text = text.replace(old, new)
    path = filled.results_dir / place
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    write_datapackage(filled.results_dir)
    (problem,) = validate(filled.results_dir)
    assert problem.startswith(f"{path}: ")
    assert re.search(message, problem)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda package: (package.parent / "proxy" / "figure-03.csv").unlink(), "differs from"),
        (lambda package: package.write_text(package.read_text()[:100]), "is not JSON"),
        (lambda package: package.unlink(), "no such file"),
        (
            lambda package: package.write_text(package.read_text().replace("undefined", "unclear")),
            "differs from",
        ),
    ],
    ids=["a file is gone", "cut short", "missing", "another description"],
)
def test_a_stale_or_broken_package_is_reported_and_written_again(
    filled: ResultsStore, change: Callable[[Path], None], problem: str
) -> None:
    package = filled.results_dir / "datapackage.json"
    change(package)
    (found,) = validate(filled.results_dir)
    assert str(package) in found
    assert problem in found
    write_datapackage(filled.results_dir)
    assert validate(filled.results_dir) == []


def test_the_committed_results_are_valid_and_the_package_is_the_schemas(repository: Path) -> None:
    assert validate(repository / "results") == []
    assert frictionless_problems(repository / "results") == []


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_committed_file_read_and_written_again_is_the_same_bytes(
    path: Path, tmp_path: Path
) -> None:
    of = schema_of_file(path)
    assert of is not None
    copy = tmp_path / path.name
    write_rows(copy, of.name, read_rows(path, of.name))
    assert copy.read_bytes() == path.read_bytes()
    if path.parent.name != "paper":  # the paper's cells keep the digits of the print
        records = read_table(path, of.name).to_dict("records")
        upsert(tmp_path / "new.csv", of.name, records, "row")
        lines = (tmp_path / "new.csv").read_bytes().splitlines()
        assert sorted(lines) == sorted(path.read_bytes().splitlines())
