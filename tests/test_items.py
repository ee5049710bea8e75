"""Rows of the paper's tables: what each trains, by which recipe, on which data."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from effspinenet_lib.data import DataConfig, export_coco
from effspinenet_lib.errors import CheckpointError, DataError, UnknownName, UserError
from effspinenet_lib.experiments import (
    ITEMS,
    PROFILES,
    find_row,
    planned_runs,
    train_row,
)
from effspinenet_lib.experiments.items import Item, Profile, Row
from effspinenet_lib.experiments.parameters import CPU, Parameters
from effspinenet_lib.models.zoo import model_entry
from effspinenet_lib.results import ResultsStore
from effspinenet_lib.results.paper import paper_values
from effspinenet_lib.training.recipes import get_recipe
from effspinenet_lib.training.run import read_result

TABLES = ("table-03", "table-04", "table-05", "table-06", "table-07", "table-10", "table-11")
# Rows that the paper prints and that nothing here trains.
UNTRAINED = {
    "ResNet-50-FPN +SE",  # printed N/A
    "MobileNetv2 + DeepLabv3",
    "ResNet-101 + DeepLabv3",
}


def _parameters(folder: Path, profile: str = "paper", **changes) -> Parameters:
    chosen = PROFILES[profile]
    return replace(Parameters(chosen, None, folder, CPU, 1, chosen.seeds, False), **changes)


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """A folder with COCO's layout and names of parts."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    config = DataConfig(
        "shapescenes", None, "train2017", "val2017", train_images=6, eval_images=4, image_size=64
    )
    export_coco(config, folder)
    return folder


@pytest.mark.parametrize("table", TABLES)
def test_every_printed_row_can_be_trained(table):
    printed = set(paper_values(table)["row"])
    assert printed - UNTRAINED == {row.label for row in ITEMS[table].rows}


@pytest.mark.parametrize("table", TABLES)
def test_a_row_has_the_model_and_task_that_the_paper_prints(table):
    printed = paper_values(table).drop_duplicates("row").set_index("row")
    for row in ITEMS[table].rows:
        assert (row.model, row.task) == tuple(printed.loc[row.label, ["model", "task"]])
        assert row.task in model_entry(row.proxy_model).image_sizes


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("table", TABLES)
def test_every_recipe_and_option_exists(tmp_path, table, profile):
    if profile == "proxy" and table in ("table-04", "table-05"):
        pytest.skip("Tables 4 and 5 compare recipes; they have none in the proxy")
    for run in planned_runs(ITEMS[table], _parameters(tmp_path, profile)):
        assert run.config.options is not None
        assert run.config.recipe.name in {*run.row.recipes.values(), *run_recipes(profile)}


def run_recipes(profile: str) -> set[str]:
    return set(PROFILES[profile].recipes.values())


def test_rows_of_table_4_add_one_strategy_each(tmp_path):
    runs = planned_runs(ITEMS["table-04"], _parameters(tmp_path))
    settings = {
        run.row.label.removeprefix("Eff-SpineNet-D2 "): (
            run.config.options.get("squeeze_excitation", True),
            run.config.options.get("activation", "swish"),
            run.config.recipe.steps // 462,
            run.config.recipe.scale_jitter,
            run.config.options["stochastic_depth"],
        )
        for run in runs
        if run.config.model == "eff_spinenet_d2"
    }
    assert settings == {
        "baseline": (False, "relu", 72, (0.8, 1.2), 0.0),
        "+SE": (True, "relu", 72, (0.8, 1.2), 0.0),
        "+ms train": (True, "relu", 650, (0.1, 2.0), 0.0),
        "+Swish": (True, "swish", 650, (0.1, 2.0), 0.0),
        "+SD": (True, "swish", 650, (0.1, 2.0), 0.2),
    }


def test_the_same_run_stands_in_several_tables(tmp_path):
    keys = {
        table: {run.row.label: run.config.key for run in planned_runs(ITEMS[table], parameters)}
        for parameters in [_parameters(tmp_path)]
        for table in ("table-03", "table-04", "table-05")
    }
    d2 = keys["table-03"]["Eff-SpineNet-D2"]
    assert d2 == keys["table-04"]["Eff-SpineNet-D2 +SD"]
    assert d2 == keys["table-05"]["Eff-SpineNet-D2 650 epochs"]
    assert keys["table-03"]["ResNet-50-FPN"] == keys["table-04"]["ResNet-50-FPN +SD"]


def test_image_sizes_are_the_papers(tmp_path):
    sizes = {
        (table, run.config.model): run.config.image_size
        for table in ("table-06", "table-07", "table-10", "table-11")
        for run in planned_runs(ITEMS[table], _parameters(tmp_path))
    }
    assert sizes["table-06", "eff_spinenet_d1"] == 640
    assert sizes["table-07", "eff_spinenet_m0"] == 256
    assert sizes["table-10", "eff_spinenet_d1"] == 240
    assert sizes["table-11", "eff_spinenet_d2"] == 512


@pytest.mark.parametrize("name", ["Eff-SpineNet-D2", "eff-spinenet-d2", "eff_spinenet_d2"])
def test_a_row_is_found_by_label_or_model(name):
    assert find_row(ITEMS["table-03"], name).label == "Eff-SpineNet-D2"


def test_a_row_that_is_not_there_lists_the_near_ones():
    with pytest.raises(UnknownName, match="eff_spinenet_d2"):
        find_row(ITEMS["table-03"], "eff_spinenet_d3")
    with pytest.raises(UserError, match=r"5 rows of eff_spinenet_d2.*72 epochs"):
        find_row(ITEMS["table-05"], "eff_spinenet_d2")


def test_recipes_that_the_proxy_lacks_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no recipe in the profile proxy, only in paper and smoke"):
        planned_runs(ITEMS["table-05"], _parameters(tmp_path, "proxy"))


# --- data -----------------------------------------------------------------------------------


def _tables(folder: Path, lists: str, names: tuple[str, ...]) -> Path:
    for name in names:
        path = folder / lists.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return folder


@pytest.mark.parametrize("names", [("train2017", "val2017"), ("train", "val")])
def test_parts_of_a_coco_folder_are_found_by_name(tmp_path, names):
    folder = _tables(tmp_path / "own", "annotations/instances_{}.json", names)
    config = planned_runs(ITEMS["table-03"], _parameters(tmp_path, data_root=folder))[0].config
    assert (config.data.train_split, config.data.eval_split) == names
    assert config.data.root == str(folder)


def test_segmentation_takes_the_augmented_list_where_there_is_one(tmp_path):
    lists = "ImageSets/Segmentation/{}.txt"
    folder = _tables(tmp_path / "voc", lists, ("train", "val"))
    (tmp_path / "weights").write_bytes(b"")
    parameters = _parameters(tmp_path, data_root=folder, initial_weights=tmp_path / "weights")
    assert planned_runs(ITEMS["table-11"], parameters)[0].config.data.train_split == "train"
    _tables(folder, lists, ("train_aug",))
    data = planned_runs(ITEMS["table-11"], parameters)[0].config.data
    assert (data.format, data.train_split) == ("voc_segmentation", "train_aug")


def test_a_folder_without_the_parts_is_one_clear_line(tmp_path):
    folder = _tables(tmp_path / "own", "annotations/instances_{}.json", ("training",))
    with pytest.raises(DataError, match=r"no parts train2017/val2017 nor train/val"):
        planned_runs(ITEMS["table-03"], _parameters(tmp_path, data_root=folder))


# --- one row, trained -----------------------------------------------------------------------

# The paper's profile at a size that a test can train.
TINY = Profile("paper", {"detection": "paper_detection"}, (0,), 64, None)
ITEM = Item(
    "table-07", "Mobile-size detection", None, (Row("Eff-SpineNet-M0", "eff_spinenet_m0", ""),)
)


def _tiny(folder: Path, coco: Path, **changes) -> Parameters:
    return replace(Parameters(TINY, coco, folder, CPU, 1, (0,), False), **changes)


def test_a_row_of_a_few_steps_is_recorded_and_says_so(tmp_path, coco):
    parameters = _tiny(tmp_path, coco)
    result = train_row(ITEM, ITEM.rows[0], parameters, max_steps=2, progress=False)
    store = ResultsStore(tmp_path, "paper")
    frame = store.measurements("table-07")
    measured = frame[frame["source"] == "paper_scale"]
    assert set(measured["row"]) == {"Eff-SpineNet-M0"}
    assert set(measured["note"]) == {"2 of 38,438,400 steps, recipe scaled from batch 256 to 2"}
    assert set(measured["data"]) == {"coco (pictures), train2017/val2017, 64x64"}
    assert dict(zip(measured["metric"], measured["value"], strict=True)) == pytest.approx(
        result.metrics, nan_ok=True
    )
    assert set(frame[frame["source"] == "cost"]["metric"]) == {"multi_adds", "parameters"}
    record = store.run(result.key)
    assert (record["state"], int(record["steps"])) == ("partial", 2)
    assert not store.finished(result.key)

    more = train_row(ITEM, ITEM.rows[0], parameters, max_steps=3, progress=False)
    assert more.key == result.key
    notes = set(store.measurements("table-07").query("source != 'cost'")["note"])
    assert notes == {"3 of 38,438,400 steps, recipe scaled from batch 256 to 2"}


def test_a_batch_in_parts_is_not_scaled(tmp_path, coco):
    profile = replace(TINY, recipes={"detection": "smoke_detection"})
    parameters = _tiny(tmp_path, coco, profile=profile)
    result = train_row(ITEM, ITEM.rows[0], parameters, micro_batch=2, max_steps=1, progress=False)
    assert result.images == get_recipe("smoke_detection").batch_size == 4
    notes = set(ResultsStore(tmp_path, "paper").measurements("table-07")["note"].fillna(""))
    assert notes == {"", "1 of 12 steps"}


def test_a_few_steps_do_not_replace_what_a_longer_run_measured(tmp_path, coco):
    parameters = _tiny(tmp_path, coco)
    first = train_row(ITEM, ITEM.rows[0], parameters, max_steps=2, progress=False)
    store = ResultsStore(tmp_path, "paper")
    before = store.measurements("table-07")
    with pytest.raises(UserError, match=rf"run {first.key}, of 4 images.*another results folder"):
        train_row(ITEM, ITEM.rows[0], parameters, batch_size=3, max_steps=1, progress=False)
    assert store.measurements("table-07").equals(before)


def test_a_row_that_starts_from_another_says_which_weights_are_missing(tmp_path):
    run = planned_runs(ITEMS["table-11"], _parameters(tmp_path))[0]
    d0 = planned_runs(ITEMS["table-03"], _parameters(tmp_path))[0].config
    assert run.config.initial_weights is not None
    assert Path(run.config.initial_weights).parent.name == d0.key
    with pytest.raises(CheckpointError, match=rf"{d0.key}.*initial weights cannot be read"):
        _ = run.config.key


def test_a_row_is_killed_and_goes_on(tmp_path, coco):
    """By the command line, as a user does it; the run that was not killed has the same weights."""
    command = [
        *(sys.executable, "-m", "effspinenet_lib", "reproduce", "table-07"),
        *("--row", "eff_spinenet_m0", "--profile", "paper", "--data-root", str(coco)),
        *("--max-steps", "3", "--results-dir"),
    ]
    folder = tmp_path / "results"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, str(folder)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not list(folder.glob("paper_scale/runs/*/config.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(folder.glob("paper_scale/*.csv"))
    again = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "3 steps" in again.stdout
    (run,) = (folder / "paper_scale" / "runs").iterdir()
    result = read_result(run)
    assert result is not None
    assert result.steps == 3
    assert (folder / "paper_scale" / "table-07.csv").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["table-03", "--max-steps", "3"], "--max-steps needs --row"),
        (["table-03", "--row", "x", "--devices", "2"], "--devices has no meaning with --row"),
        (["table-03", "table-05", "--row", "x"], "--row takes one item, 2 were given"),
        (["table-01", "--row", "x"], "table-01 trains nothing"),
        (["table-07", "--row", "x"], "unknown row"),
        (["table-03", "--row", "x", "--profile", "paper"], "set data_root to its folder"),
    ],
)
def test_options_that_do_not_fit_together_are_one_line(options, message):
    from typer.testing import CliRunner

    from effspinenet_lib.cli import app

    result = CliRunner().invoke(app, ["reproduce", *options])
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
